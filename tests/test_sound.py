"""Speech models, on batches of features: Whisper, wav2vec2 with CTC, a classifier. Scores against autograd and literal
losses, packed front ends, saving and reloading, quantizing without data, and what is said of data that do not fit."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BatchFeature,
    HubertConfig,
    HubertForSequenceClassification,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_cptquant import CPTQuantConfig, evaluate_model, make_plan, measure_sensitivity
from hf_cptquant.calibration import facts_of, load_calibration
from hf_cptquant.errors import CalibrationError, EvaluationError, ModelError
from hf_cptquant.model_view import task_of, view_model
from hf_cptquant.modules import QuantConv1d, QuantLinear, packed_modules
from hf_cptquant.sensitivity.metrics import mean_loss
from hf_cptquant.sensitivity.taylor import gradient_of_drawn

SETTINGS = {"num_samples": 8, "batch_size": 3, "group_size": 32, "quality": "fast"}
WAVES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 12,
    "conv_dim": (32, 32, 32), "conv_stride": (5, 4, 2), "conv_kernel": (10, 5, 3), "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4, "feat_extract_norm": "layer", "classifier_proj_size": 32, "num_labels": 5,
}  # fmt: skip
WHISPER = {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "vocab_size": 100,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 16,
    "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
MODELS = {
    "speech-seq2seq": lambda: WhisperForConditionalGeneration(WhisperConfig(**WHISPER)),
    "ctc": lambda: Wav2Vec2ForCTC(Wav2Vec2Config(**WAVES)),
    "audio-classification": lambda: HubertForSequenceClassification(HubertConfig(**WAVES)),
}
FRONT_ENDS = {
    "speech-seq2seq": {"model.encoder.conv1": QuantConv1d, "model.encoder.conv2": QuantConv1d},
    "ctc": {"wav2vec2.feature_projection.projection": QuantLinear},
    "audio-classification": {"hubert.feature_projection.projection": QuantLinear},
}


def speech_model(task: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[task]()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def clips(task: str) -> list[dict[str, torch.Tensor]]:
    """Eight clips in batches of unequal sizes, with labels of unequal lengths."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for size, length in ((3, 6), (5, 4)):
        shape, name = ((16, 32), "input_features") if task == "speech-seq2seq" else ((800,), "input_values")
        batch = {name: torch.randn(size, *shape, generator=generator)}
        if task != "audio-classification":
            batch["labels"] = torch.randint(3, 12, (size, length), generator=generator)
            batch["labels"][0, 2:] = -100
        batches.append(batch)
    return batches


def config_for(task: str, **settings) -> CPTQuantConfig:
    return CPTQuantConfig(**{**SETTINGS, "dataset": clips(task), **settings})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {task: tmp_path_factory.mktemp("sound") / task for task in MODELS}
    for task, folder in found.items():
        speech_model(task).save_pretrained(folder)
    return found


def losses_of_clips(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> list[tuple[float, int]]:
    """−log p of what is said in each clip, by the definition, and how many predictions it is the sum of."""
    found = []
    for index, labels in enumerate(batch["labels"]):
        wanted = labels[labels != -100]
        one = {name: tensor[index : index + 1] for name, tensor in batch.items()}
        logits = model(**one).logits[0].double()
        if isinstance(model, WhisperForConditionalGeneration):
            found.append((F.cross_entropy(logits[: len(wanted)], wanted, reduction="sum").item(), len(wanted)))
        else:
            lengths = torch.tensor([len(logits)]), torch.tensor([len(wanted)])
            given = logits.log_softmax(-1)[:, None], wanted[None], *lengths
            found.append((F.ctc_loss(*given, blank=0, reduction="sum").item(), 1))
    return found


@pytest.mark.parametrize("task", ["speech-seq2seq", "ctc"])
@torch.no_grad()
def test_the_loss_counts_every_label_once_whatever_the_batches(task):
    model = speech_model(task)
    assert task_of(model) == task
    losses = [found for batch in clips(task) for found in losses_of_clips(model, batch)]
    expected = math.fsum(loss for loss, _ in losses) / sum(count for _, count in losses)
    for size in (1, 3, 8):
        recipe = config_for(task, batch_size=size).recipe()
        calibration = load_calibration(recipe, facts_of(model))
        assert mean_loss(model, calibration.batches) == pytest.approx(expected, rel=1e-5)
        assert calibration.description["features"] == ([16, 32] if task == "speech-seq2seq" else [800])


@pytest.mark.parametrize("task", ["speech-seq2seq", "ctc"])
def test_scores_do_not_depend_on_the_batches(task):
    model = speech_model(task)
    tables = [measure_sensitivity(model, config_for(task, batch_size=size, bits=(3,))) for size in (1, 3)]
    assert tables[0].raw == pytest.approx(tables[1].raw, rel=1e-3, abs=1e-6)
    first = min(view_model(model).plan("group").modules, key=lambda module: module.name).unit
    assert tables[0].raw[first] != 0


def test_what_ctc_draws_has_the_probability_of_the_text():
    """Over many draws the mean gradient is 0, and its square the Fisher information of the texts of two frames."""
    model = speech_model("ctc")
    logits = torch.tensor([[[0.3, 1.0, -0.5], [0.2, -0.4, 0.6]]]).repeat(6000, 1, 1)
    uniform = torch.rand(6000, 40, generator=torch.Generator().manual_seed(0))
    found = 6000 * gradient_of_drawn(model, torch.zeros(6000, 1), logits, uniform).double()
    p = logits[0].double().requires_grad_()
    log_p = p.log_softmax(-1)
    texts: dict[tuple[int, ...], torch.Tensor] = {}
    for first in range(3):
        for second in range(3):
            spelled = [token for token in ([first] if first == second else [first, second]) if token]
            texts[tuple(spelled)] = texts.get(tuple(spelled), 0) + (log_p[0, first] + log_p[1, second]).exp()
    fisher = sum(
        text.detach() * torch.autograd.grad(text.log(), p, retain_graph=True)[0] ** 2 for text in texts.values()
    )
    torch.testing.assert_close(found.mean(0), torch.zeros(2, 3).double(), atol=0.03, rtol=0)
    torch.testing.assert_close((found**2).mean(0), fisher, atol=0.02, rtol=0.05)


WAYS = {
    "speech-seq2seq": {"quality": "balanced", "iters": 2},
    "ctc": {"quality": "balanced", "iters": 2, "recover": "scales"},
    "audio-classification": {"method": "pmpq"},
}


@pytest.mark.parametrize("task", MODELS)
@torch.no_grad()
def test_quantized_saved_and_reloaded(task, folders, tmp_path):
    original, (given, _) = speech_model(task), clips(task)
    config = config_for(task, **WAYS[task], quantize_front_end=8)
    model = type(original).from_pretrained(folders[task], quantization_config=config)
    packed = packed_modules(model)
    plan = model.hf_quantizer.record.plan
    assert {module.name for module in plan.modules if module.outside} == set(FRONT_ENDS[task])
    for name, packed_class in FRONT_ENDS[task].items():
        dense = original.get_submodule(name)
        assert type(packed[name]) is packed_class
        weight = dense.weight.flatten(1)
        integers = (127 * weight / weight.abs().amax(1, keepdim=True)).round()
        assert (packed[name].quantized().integers.int().abs() - integers.abs()).abs().max() <= 1  # of 128
        error = (packed[name].weight.flatten(1) - weight).abs().amax(1) / weight.abs().amax(1)
        assert error.max() < (0.1 if "recover" in WAYS[task] else 1.01 / 128)  # scales are trained, or one step at most
    assert any("conv_layers.1.conv" in name for name in packed) == (task != "speech-seq2seq")
    assert len(packed) > 12
    model.save_pretrained(tmp_path / "packed")
    again = type(original).from_pretrained(tmp_path / "packed")
    logits = model(**given).logits
    assert torch.equal(again(**given).logits, logits)
    assert again.hf_quantizer.record.plan == plan
    card = (tmp_path / "packed" / "README.md").read_text()
    tag = "audio-classification" if task == "audio-classification" else "automatic-speech-recognition"
    assert f"pipeline_tag: {tag}" in card
    assert f"on 8 clips of {'16 × 32' if task == 'speech-seq2seq' else 800} features" in card
    torch.testing.assert_close(again.dequantize()(**given).logits, logits, atol=1e-4, rtol=1e-4)
    if task == "speech-seq2seq":
        text = {"input_features": given["input_features"], "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(model.generate(**text), again.generate(**text))


@torch.no_grad()
def test_one_bit_width_needs_no_data(folders, tmp_path):
    config = CPTQuantConfig(bits=(4,), bits_override={"*.fc2": 8}, quality="fast", group_size=32, quantize_front_end=8)
    model = WhisperForConditionalGeneration.from_pretrained(folders["speech-seq2seq"], quantization_config=config)
    bits = {name: module.scheme.bits for name, module in packed_modules(model).items()}
    assert {bits[name] for name in bits if ".layers." in name and not name.endswith("fc2")} == {4}
    assert {bits[name] for name in bits if name.endswith("fc2") or "conv" in name} == {8}
    model.save_pretrained(tmp_path)
    (given, _) = clips("speech-seq2seq")
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again(**given).logits, model(**given).logits)
    with pytest.raises(CalibrationError, match="no calibration data: pass dataset=, batches of features"):
        measure_sensitivity(speech_model("speech-seq2seq"), config)


def test_outputs_of_convolutions_are_not_rows(folders):
    table = measure_sensitivity(speech_model("speech-seq2seq"), config_for("speech-seq2seq", method="cmpq"))
    assert all(0 <= score <= 1 for score in table.scores.values())
    with pytest.raises(ModelError, match=r"conv_layers\.1.* gives .* not one row for each token"):
        measure_sensitivity(speech_model("ctc"), config_for("ctc", method="cmpq"))


def bad_clips(task: str, **changes: torch.Tensor | None) -> list[dict[str, torch.Tensor]]:
    first, second = clips(task)
    return [{name: tensor for name, tensor in {**first, **changes}.items() if tensor is not None}, second]


BAD_DATA = {
    "nothing": ("ctc", {"dataset": None}, "no calibration data: pass dataset=, batches of features"),
    "own text": ("ctc", {"dataset": "self"}, "only causal language models write their own text.*batches of features"),
    "texts": ("ctc", {"dataset": ["a text"]}, r"the model hears, and dataset= \(list\) holds no features; pass"),
    "named": ("ctc", {"dataset": "wikitext2"}, r"the model hears, and dataset= \('wikitext2'\) holds no features"),
    "tokens": ("ctc", {"dataset": torch.ones(4, 8, dtype=torch.long)}, r"hold \['input_values'\], no features of so"),
    "no labels": ("ctc", {"dataset": torch.randn(4, 800)}, "hold no labels, which the loss .* add the token ids of"),
    "lengths": (
        "ctc", {"dataset": bad_clips("ctc", input_values=torch.randn(3, 700))},
        r"input_values has different sizes for a clip, \[\(700,\), \(800,\)\]; cut or pad all clips to one length",
    ),
    "rows": (
        "ctc", {"dataset": bad_clips("ctc", input_values=torch.randn(2, 800))},
        "hold 7 × input_values, 8 × labels; every field must have a row for each clip",
    ),
    "another field": (
        "ctc", {"dataset": [{**batch, "pitch": batch["labels"]} for batch in clips("ctc")]},
        "the model takes no pitch; it takes input_values, ",
    ),
    "not in all": ("ctc", {"dataset": bad_clips("ctc", labels=None)}, "not every batch holds all of input_values, la"),
    "accuracy": ("ctc", {"metric": "accuracy"}, "metric='accuracy' does not fit to CTC"),
    "classes": (
        "audio-classification",
        {"dataset": {"input_values": torch.randn(2, 800), "labels": torch.tensor([0, 5])}},
        "labels must be numbers of the model's 5 classes, one for each clip",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DATA)
def test_unusable_data(case):
    task, settings, message = BAD_DATA[case]
    with torch.device("meta"):
        model = MODELS[task]()
    with pytest.raises(CalibrationError, match=message):
        make_plan(model, config_for(task, **settings))


def test_a_single_batch_and_plain_features_will_do():
    with torch.device("meta"):
        whisper, hubert = MODELS["speech-seq2seq"](), MODELS["audio-classification"]()
    (batch, _) = clips("speech-seq2seq")
    recipe = config_for("speech-seq2seq", dataset=BatchFeature(batch)).recipe()
    assert load_calibration(recipe, facts_of(whisper)).description["sequences"] == 3
    features = torch.randn(4, 800)
    (found, *rest) = load_calibration(
        config_for("audio-classification", dataset=features).recipe(), facts_of(hubert)
    ).batches
    assert torch.equal(torch.cat([found["input_values"], *(batch["input_values"] for batch in rest)]), features)


def test_they_are_not_evaluated():
    with torch.device("meta"):
        model = MODELS["ctc"]()
    with pytest.raises(EvaluationError, match="Wav2Vec2ForCTC has none of the heads that are evaluated: causal-lm"):
        evaluate_model(model, config_for("ctc"))
