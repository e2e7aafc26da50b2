"""Language models that read images, too: the language part is quantized on text alone, the rest is left as it is."""

import copy

import pytest
import torch
import transformers
from conftest import SMALL_SETTINGS
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from transformers.utils.quantization_config import CompressedTensorsConfig

from hf_cptquant import CPTQuantConfig, evaluate_model, make_plan, measure_sensitivity
from hf_cptquant.errors import ModelError, PlanError
from hf_cptquant.model_view import head_of, task_of, view_model
from hf_cptquant.modules import packed_modules

IMAGE_TOKEN = 500
PATCHES = 16  # of an image, without the class token
SETTINGS = {**SMALL_SETTINGS, "sequence_length": 16}


def tiny_llava() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**shape, image_size=32, patch_size=8, projection_dim=64)
    text = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=512, max_position_embeddings=64)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, image_seq_length=PATCHES,
        vision_feature_layer=-1, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image-text") / "llava"
    tiny_llava().save_pretrained(folder)
    return folder


@pytest.fixture
def text() -> torch.Tensor:
    return torch.randint(1, IMAGE_TOKEN, (8, 32), generator=torch.Generator().manual_seed(1))


def with_image(text: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every row of a text behind an image."""
    image = torch.full((len(text), PATCHES), IMAGE_TOKEN)
    pixels = torch.rand(len(text), 3, 32, 32, generator=torch.Generator().manual_seed(2))
    return {"input_ids": torch.cat((image, text[:, :8]), 1), "pixel_values": pixels}


def quantized(folder, **settings):
    config = CPTQuantConfig(**{**SETTINGS, **settings})
    return AutoModelForImageTextToText.from_pretrained(folder, quantization_config=config)


def test_the_language_part_is_quantized_and_the_rest_left_with_a_reason():
    model = tiny_llava()
    view = view_model(model)
    assert (task_of(model), head_of(model)) == ("causal-lm", "image-text-to-text")
    assert view.blocks == ("model.language_model.layers.0", "model.language_model.layers.1")
    assert len(view.modules) == 14
    reasons = {module.name: module.reason for module in view.left}
    assert "reads images" in reasons["model.vision_tower.encoder.layers.1.mlp.fc2"]
    assert reasons["model.multi_modal_projector.linear_1"] == "outside the blocks"
    with torch.device("meta"):
        assert view_model(type(model)(model.config)) == view


@pytest.mark.parametrize(
    "settings", [{"iters": 2, "quality": "balanced"}, {"method": "cmpq"}, {"rounding": "gptq"}, {}]
)
@torch.no_grad()
def test_it_computes_what_the_dense_model_does_with_and_without_images(settings, folder, text, tmp_path):
    model = quantized(folder, dataset=text, **settings)
    assert set(packed_modules(model)) <= {module.name for module in view_model(tiny_llava()).modules}
    assert packed_modules(model)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    dense = copy.deepcopy(model).dequantize()
    inputs = {"text": {"input_ids": text}, "image": with_image(text)}
    for name, given in inputs.items():
        logits = model(**given).logits
        assert torch.equal(again(**given).logits, logits), name
        torch.testing.assert_close(logits, dense(**given).logits, atol=1e-4, rtol=1e-4)
        tokens = {**given, "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(**tokens), dense.generate(**tokens)), name
    original = tiny_llava()
    for name, tensor in original.model.vision_tower.state_dict().items():
        assert torch.equal(again.model.vision_tower.state_dict()[name], tensor)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "AutoModelForImageTextToText.from_pretrained" in card


@torch.no_grad()
def test_it_loads_without_this_backend(folder, text, tmp_path, monkeypatch):
    model = quantized(folder, dataset=text)
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", CompressedTensorsConfig)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    given = with_image(text)
    logits = plain(**given).logits  # decompresses
    dense = copy.deepcopy(model).dequantize()
    for name, weight in dense.state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight), name
    torch.testing.assert_close(logits, dense(**given).logits)


def test_scores_are_those_of_the_language_model_alone(text):
    """With text there is nothing but a Llama."""
    whole = tiny_llava()
    alone = transformers.LlamaForCausalLM(whole.config.text_config).eval()
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    for method in ("tdmpq", "pmpq", "cmpq"):
        config = CPTQuantConfig(**SETTINGS, method=method, dataset=text)
        scores, expected = (measure_sensitivity(model, config).raw for model in (whole, alone))
        found = {name.replace("model.language_model.", "model."): score for name, score in scores.items()}
        assert found == pytest.approx(expected, abs=1e-6), method


def test_it_writes_its_own_text_and_is_evaluated_as_a_language_model(folder, text):
    model = quantized(folder)
    assert model.hf_quantizer.record.calibration["source"] == "text written by the model itself"
    results = evaluate_model(model, CPTQuantConfig(dataset=text, sequence_length=32), against=tiny_llava())
    assert [result.metric for result in results] == ["perplexity", "loss_increase", "kl_divergence", "top1_agreement"]


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_the_vision_tower_is_packed_if_it_is_asked_for(bits, folder, text, tmp_path, monkeypatch):
    settings = {"dataset": text, "rounding": "gptq", "bits_override": {"*.0.*": 16, "*.1.*": 4}}
    model = quantized(folder, **settings, quantize_vision_tower=bits)
    tower = {name for name in packed_modules(model) if "vision_tower" in name}
    assert len(tower) == 2 * 6  # q, k, v, output, fc1, fc2; neither the patches' convolution nor the projector
    original = tiny_llava()
    for name in tower:
        packed, weight = model.get_submodule(name), original.get_submodule(name).weight
        assert packed.quantized().scheme.bits == bits
        scale = packed.quantized().scale
        scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
        nearest = (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        torch.testing.assert_close(packed.weight, nearest * scale, msg=name)
    language = {name: module for name, module in packed_modules(model).items() if name not in tower}
    alone = packed_modules(quantized(folder, **settings))
    assert language.keys() == alone.keys()
    for name, module in language.items():
        assert torch.equal(module.weight, alone[name].weight), name

    model.save_pretrained(tmp_path / "saved")
    given = with_image(text)
    logits = model(**given).logits
    assert torch.equal(AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")(**given).logits, logits)
    replanned = quantized(folder, plan=tmp_path / "saved", dataset=text, rounding="gptq")
    assert torch.equal(replanned(**given).logits, logits)
    dense = copy.deepcopy(model).dequantize()
    torch.testing.assert_close(logits, dense(**given).logits, atol=1e-4, rtol=1e-4)
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "compressed-tensors", CompressedTensorsConfig)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    plain(**given)  # decompresses
    for name, weight in dense.state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight), name
    model.resize_token_embeddings(520)
    assert model(**given).logits.shape[-1] == 520


def test_the_vision_tower_counts_for_the_budget_and_is_shown(text):
    model = tiny_llava()
    config = CPTQuantConfig(**SETTINGS, dataset=text, bits=(3, 4, 8), quantize_vision_tower=8, target_bits=7)
    plan = make_plan(model, config).plan
    inside = plan.inside
    assert plan.bits_per_weight <= 7 < plan.bits_per_weight + 0.5
    assert inside.bits_per_weight < plan.bits_per_weight
    assert {module.scheme.bits for module in plan.modules if module.outside} == {8}
    drawn = {shown.stack: shown for shown in plan.maps()}
    assert len(drawn["outside the blocks"].rows) == 6
    assert set(drawn["outside the blocks"].cells.values()) == {(8,)}


def test_a_model_without_a_vision_tower_has_none_to_quantize(text):
    model = transformers.LlamaForCausalLM(tiny_llava().config.text_config)
    with pytest.raises(ModelError, match=r"no blocks .* read images; leave quantize_vision_tower out"):
        measure_sensitivity(model, CPTQuantConfig(**SETTINGS, dataset=text, quantize_vision_tower=8))


def tiny_mllama() -> transformers.PreTrainedModel:
    """Its tower has layers that transformers does not mark, in two lists; one block of text reads what it gives."""
    torch.manual_seed(0)
    text = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 128, "cross_attention_layers": [1], "pad_token_id": 0,
            "max_position_embeddings": 64}  # fmt: skip
    vision = {"hidden_size": 32, "attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_global_layers": 1, "image_size": 16, "patch_size": 8, "max_num_tiles": 1,
              "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0],
              "vision_output_dim": 64}  # fmt: skip
    model = transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(vision_config=vision, text_config=text)
    )
    for name, parameter in model.named_parameters():
        if (parameter.dim() > 1 and "embed" not in name) or "gate" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@torch.no_grad()
def test_blocks_of_text_that_only_run_with_images_belong_to_them(text, tmp_path):
    model = tiny_mllama()
    view = view_model(model)
    assert view.blocks == ("model.language_model.layers.0", "model.language_model.layers.2")
    reasons = {module.name: module.reason for module in view.left}
    towers = ("model.vision_model.transformer.layers.1", "model.vision_model.global_transformer.layers.0")
    for name in ("model.language_model.layers.1.cross_attn.q_proj", *(f"{tower}.mlp.fc1" for tower in towers)):
        assert "reads images" in reasons[name]
    model.save_pretrained(tmp_path / "dense")
    settings = {"dataset": text, "quality": "balanced", "iters": 2, "quantize_vision_tower": 8}
    model = quantized(tmp_path / "dense", **settings)
    packed = packed_modules(model)
    assert all(model.get_submodule(name).scheme.bits == 8 for name in packed if not name.startswith(view.blocks))
    assert {tower for tower in towers for name in packed if name.startswith(tower)} == set(towers)
    assert "model.language_model.layers.1.cross_attn.q_proj" in packed
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    dense = copy.deepcopy(model).dequantize()
    rows = text[:2, :8]
    image = {
        "pixel_values": torch.rand(2, 1, 1, 3, 16, 16), "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(2, 8, 1, 1, dtype=torch.long),
    }  # fmt: skip
    for given in ({}, image):
        logits = model(input_ids=rows, **given).logits
        assert torch.equal(again(input_ids=rows, **given).logits, logits)
        torch.testing.assert_close(dense(input_ids=rows, **given).logits, logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(model(input_ids=rows).logits, logits, atol=1e-2)


def test_decoders_that_only_answer_to_an_image_are_refused():
    config = transformers.Pix2StructConfig(
        text_config={"vocab_size": 100, "hidden_size": 32, "num_layers": 1, "d_ff": 32, "d_kv": 8, "num_heads": 4},
        vision_config={"hidden_size": 32, "num_hidden_layers": 1, "d_ff": 32, "d_kv": 8, "num_attention_heads": 4},
    )
    model = transformers.Pix2StructForConditionalGeneration(config)
    assert task_of(model) is None
    with pytest.raises(ModelError, match="cannot be run on text alone"):
        measure_sensitivity(model, CPTQuantConfig(dataset=torch.ones(2, 8, dtype=torch.long)))


def test_vllm_is_not_promised(folder, text):
    with pytest.raises(PlanError, match="vLLM"):
        quantized(folder, dataset=text, target_runtime="vllm")
