"""Encoder–decoders from data to checkpoint: blocks of both stacks, by every method and rounding."""

import copy

import pytest
import torch
import transformers
from conftest import SMALL_SETTINGS, TINY_CONFIGS, tiny_model
from transformers import AutoModelForSeq2SeqLM

from hf_cptquant import CPTQuantConfig, evaluate_model
from hf_cptquant.errors import ModelError
from hf_cptquant.modules import packed_modules

BART = (
    "BartForConditionalGeneration",
    "BartConfig",
    {
        "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 512, "max_position_embeddings": 64,
        "decoder_start_token_id": 2, "forced_eos_token_id": None,
    },
)  # fmt: skip
STACK = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "max_position_embeddings": 64,
    "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
EYES = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
}  # fmt: skip
# Its encoder reads images, too; attention of the decoder is to itself and to the encoder at once.
T5GEMMA2 = (
    "T5Gemma2ForConditionalGeneration",
    "T5Gemma2Config",
    {
        "encoder": {"model_type": "t5gemma2_encoder", "text_config": {"model_type": "t5gemma2_text", **STACK},
                    "vision_config": EYES, "mm_tokens_per_image": 4, "boi_token_index": 509, "eoi_token_index": 510,
                    "image_token_index": 511},
        "decoder": {"model_type": "t5gemma2_decoder", **STACK}, "eoi_token_index": 510, "image_token_index": 511,
    },
)  # fmt: skip
WAYS = {
    "default": {"iters": 2, "quality": "balanced"},
    "gptq": {"rounding": "gptq"},
    "pmpq, accuracy": {"method": "pmpq", "metric": "accuracy"},
    "best of all": {"method": "auto"},
}


@pytest.fixture(scope="module", params=["t5", "bart", "t5gemma2"])
def folder(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY_CONFIGS, "bart", BART)
        patch.setitem(TINY_CONFIGS, "t5gemma2", T5GEMMA2)
        model = tiny_model(request.param)
    folder = tmp_path_factory.mktemp("encoder-decoder") / request.param
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_both_stacks_are_quantized_saved_and_reloaded(way, folder, tokens, tmp_path):
    config = CPTQuantConfig(**{**SMALL_SETTINGS, "dataset": tokens, "bits": (3, 4, 8), **WAYS[way]})
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved")
    packed = packed_modules(again)
    assert packed.keys() == packed_modules(model).keys()
    assert {"encoder", "decoder"} <= {part for name in packed for part in name.split(".")[:2]}
    decoder = [name for name in packed if "decoder" in name]
    of_encoder = ("EncDecAttention", "encoder_attn", "model.decoder.layers.0.self_attn")  # the last is T5Gemma 2's
    assert any(any(what in name for what in of_encoder) for name in decoder)
    assert not any("vision_tower" in name for name in packed)
    given = {"input_ids": tokens, "labels": tokens[:, :20].contiguous()}
    assert torch.equal(again(**given).logits, model(**given).logits)
    dense = copy.deepcopy(model).dequantize()
    torch.testing.assert_close(dense(**given).logits, model(**given).logits, atol=1e-3, rtol=1e-3)
    asked = {"input_ids": tokens, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**asked), again.generate(**asked))


def test_tuned_rounding_comes_nearer_to_the_original_than_rounding_to_nearest(folder, tokens):
    original = AutoModelForSeq2SeqLM.from_pretrained(folder)
    settings = {**SMALL_SETTINGS, "num_samples": 32, "dataset": tokens.repeat(4, 1), "bits": (3,), "target_bits": 4}
    found = {}
    for rounding in ("nearest", "gptq", "signround"):
        config = CPTQuantConfig(**settings, rounding=rounding, iters=20)
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, quantization_config=config)
        results = evaluate_model(model, CPTQuantConfig(dataset=tokens, sequence_length=16), against=original)
        found[rounding] = next(result.value for result in results if result.metric == "kl_divergence")
    assert found["gptq"] < found["nearest"]
    assert found["signround"] < found["nearest"]


def test_a_model_without_a_head_is_refused_before_any_work(tokens):
    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, vocab_size=100, num_mel_bins=8, pad_token_id=0, bos_token_id=0,
        eos_token_id=0, decoder_start_token_id=0, begin_suppress_tokens=None,
    )  # fmt: skip
    from hf_cptquant import measure_sensitivity

    with pytest.raises(ModelError, match="computes no loss that calibration could measure"):
        measure_sensitivity(transformers.WhisperModel(config), CPTQuantConfig(dataset=tokens))
