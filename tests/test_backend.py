"""`from_pretrained(quantization_config=...)` on real models and on tiny ones of every architecture."""

import copy
import json
import math
import warnings

import pytest
import torch
from conftest import AUTO_CLASSES, TINY_CONFIGS
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_cptquant import CPTQuantConfig, CPTQuantError
from hf_cptquant.evaluate import perplexity
from hf_cptquant.modules import QuantLinear, packed_modules
from hf_cptquant.pipeline import report
from hf_cptquant.plan import LayerScheme


def nearest_in_float64(weight: torch.Tensor, scheme: LayerScheme) -> torch.Tensor:
    """Symmetric rounding to nearest, written out: the extreme of each group (of two equal ones, the negative) lies on
    −2^(bits−1)."""
    groups = 1 if scheme.group_size == -1 else weight.shape[1] // scheme.group_size
    grouped = weight.double().view(len(weight), groups, -1)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    extreme = torch.where(high > -low, high, low)
    scale = (extreme / -(2 ** (scheme.bits - 1))).to(weight.dtype).double()
    scale[scale == 0] = 1
    steps = (grouped / scale).round().clamp(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1)
    return (steps * scale).to(weight.dtype).view_as(weight)


def test_real_model_is_packed_as_planned(quantized, smollm2):
    model, _ = quantized
    dense = AutoModelForCausalLM.from_pretrained(smollm2)
    plan = model.hf_quantizer.record.plan
    assert {module.scheme.bits for module in plan.modules} == {4, 8, 16}
    assert len(plan.modules) == 30 * 7
    for decision in plan.modules:
        now, before = model.get_submodule(decision.name), dense.get_submodule(decision.name)
        if decision.scheme.packed:
            assert type(now) is QuantLinear
            torch.testing.assert_close(now.weight, nearest_in_float64(before.weight, decision.scheme), rtol=0, atol=0)
        else:
            assert type(now) is nn.Linear
            assert torch.equal(now.weight, before.weight)
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_real_model_still_predicts(quantized, smollm2, texts):
    model, _ = quantized
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    windows = tokenizer("\n".join(texts[-3:]), return_tensors="pt", verbose=False)["input_ids"][0, : 4 * 128].view(
        4, 128
    )
    dense = AutoModelForCausalLM.from_pretrained(smollm2)
    before, after = (perplexity(candidate, windows, desc=None) for candidate in (dense, model))
    assert before < after < 1.5 * before
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0])


def test_groups_that_engines_fuse_share_a_scheme(quantized):
    modules = quantized[0].hf_quantizer.record.plan.modules
    schemes: dict[str, set] = {}
    for module in modules:
        schemes.setdefault(module.unit, set()).add(module.scheme)
    assert all(len(found) == 1 for found in schemes.values())
    assert {module.unit for module in modules if module.name.endswith(("q_proj", "k_proj", "v_proj"))} == {
        f"model.layers.{index}.self_attn.qkv_proj" for index in range(30)
    }


def test_memory_is_what_the_plan_says(quantized):
    model, _ = quantized
    plan = model.hf_quantizer.record.plan
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    x = torch.arange(200).view(1, -1)
    model(x)
    after = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    assert sum(after.values()) == sum(held.values())
    assert sum(held.values()) == pytest.approx(plan.nbytes, rel=0.02)
    assert plan.nbytes < 0.75 * plan.original_bytes


def test_bits_follow_the_scores(quantized):
    record = quantized[0].hf_quantizer.record
    bits = {module.unit: module.scheme.bits for module in record.plan.modules}
    ordered = [bits[unit] for unit in sorted(record.table.scores, key=record.table.scores.get)]
    assert ordered == sorted(ordered)


def test_config_of_the_model_is_what_stands_in_config_json(quantized):
    model, folder = quantized
    config = model.config.quantization_config
    assert isinstance(config, CPTQuantConfig)
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == json.loads(
        json.dumps(config.to_dict())
    )
    again = CPTQuantConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.recipe() == config.recipe()
    assert (again.granularity, again.group_size, again.num_samples) == ("group", 64, 2)


def test_report_says_what_was_quantized_and_what_was_left_and_why(quantized):
    plan = quantized[0].hf_quantizer.record.plan
    text = report(plan)
    total = 49152 * 576 + 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)  # tied embeddings once, blocks
    assert f"of {total:,} weights" in text
    assert "shares its weight with another module: 2 modules" in text
    assert "lm_head" in text


def test_same_seed_same_bytes(smollm2, small_config, tmp_path):
    files = []
    for run in ("a", "b"):
        model = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=small_config(), device_map="auto")
        model.save_pretrained(tmp_path / run)
        files.append((tmp_path / run / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_real_encoder_as_masked_lm_and_classifier(minilm, texts):
    for auto_class in (AutoModelForMaskedLM, AutoModelForSequenceClassification):
        torch.manual_seed(0)  # of the head, which the checkpoint does not have
        data = {"dataset": texts[:10], "num_samples": 4, "sequence_length": 64}  # not tuned to what a random head minds
        config = CPTQuantConfig(quality="fast", group_size=64, bits=(4, 8), allocation="kmeans", **data)
        model = auto_class.from_pretrained(minilm, quantization_config=config)
        assert len(packed_modules(model)) == 6 * 6
        assert model.config.quantization_config.to_dict()["cptquant"]["calibration"]["sequences"] == 4
        original = AutoModel.from_pretrained(minilm)
        inputs = AutoTokenizer.from_pretrained(minilm)(
            ["a sunny day", "the weather is nice"], return_tensors="pt", padding=True
        )
        with torch.no_grad():
            states = [base(**inputs).last_hidden_state.mean(1) for base in (original, model.base_model)]
        assert torch.cosine_similarity(*states, dim=1).min() > 0.97


@pytest.mark.parametrize("kind", TINY_CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_architecture(kind, dtype, tiny_folder, tokens, texts):
    folder = tiny_folder(kind, dtype)
    dataset = texts[:2] if kind.startswith("bert") else tokens
    config = CPTQuantConfig(dataset=dataset, sequence_length=32, num_samples=4, group_size=32, quality="fast")
    dense = AUTO_CLASSES[kind].from_pretrained(folder, dtype=dtype)
    model = AUTO_CLASSES[kind].from_pretrained(folder, dtype=dtype, quantization_config=config)
    plan = model.hf_quantizer.record.plan
    assert packed_modules(model).keys() == {module.name for module in plan.packed}
    for decision in plan.packed:
        before = dense.get_submodule(decision.name).weight
        before = before.t() if kind == "gpt2" else before
        now = packed_modules(model)[decision.name].weight
        now = now.t() if kind == "gpt2" else now
        torch.testing.assert_close(now, nearest_in_float64(before.contiguous(), decision.scheme), rtol=0, atol=0)
    inputs = {"input_ids": tokens[:2]} | ({"decoder_input_ids": tokens[:2]} if kind == "t5" else {})
    with torch.no_grad():
        packed_logits = model(**inputs).logits
        dequantized_logits = copy.deepcopy(model).dequantize()(**inputs).logits
    error = (packed_logits.double() - dequantized_logits.double()).norm() / dequantized_logits.double().norm()
    assert error < 20 * torch.finfo(dtype).eps


def test_dequantize_gives_a_plain_model(smollm2, small_config, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=small_config())
    weights = {name: module.weight for name, module in packed_modules(model).items()}
    plain = model.dequantize()
    assert not packed_modules(plain)
    assert not hasattr(plain.config, "quantization_config")
    for name, weight in weights.items():
        assert type(plain.get_submodule(name)) is nn.Linear
        assert torch.equal(plain.get_submodule(name).weight, weight)
    plain.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, reloaded.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_modules_to_not_convert(tiny_folder, tokens):
    config = CPTQuantConfig(dataset=tokens, sequence_length=32, group_size=32, modules_to_not_convert=["down_proj"])
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), quantization_config=config)
    assert packed_modules(model)
    assert not any(name.endswith("down_proj") for name in packed_modules(model))
    assert "named in modules_to_not_convert: 3 modules" in report(model.hf_quantizer.record.plan)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [((2, 3, 6), 16, True), ((5,), -1, True), ((4, 8), 32, False), ((3, 16), 64, False)],
)
def test_other_bits_and_schemes(bits, group_size, symmetric, tiny_folder, tokens):
    config = CPTQuantConfig(
        bits=bits, group_size=group_size, symmetric=symmetric, dataset=tokens, sequence_length=32, allocation="kmeans"
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), quantization_config=config)
    schemes = {module.scheme for module in model.hf_quantizer.record.plan.modules}
    assert {scheme.bits for scheme in schemes} == set(bits)
    assert all(scheme.symmetric is symmetric for scheme in schemes if scheme.packed)
    assert math.isfinite(perplexity(model, tokens, desc=None))


def test_a_model_that_is_quantized_already_is_refused(quantized, small_config):
    with pytest.raises(ValueError, match="CPTQuantConfig"):
        AutoModelForCausalLM.from_pretrained(quantized[1], quantization_config=small_config())


def test_a_model_without_a_loss_is_refused(minilm, small_config):
    with pytest.raises(CPTQuantError, match=r"BertModel computes no loss .*AutoModelForMaskedLM"):
        AutoModel.from_pretrained(minilm, quantization_config=small_config())


def test_bad_data_is_found_before_the_weights_are_loaded(tiny_folder, small_config):
    folder = tiny_folder("llama")
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(CPTQuantError, match="no tokenizer at"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=small_config())


def test_the_model_moves_copies_and_changes_dtype(quantized):
    model, _ = quantized
    x = torch.arange(6).view(1, -1)
    with torch.no_grad():
        expected = model(x).logits
        assert torch.equal(copy.deepcopy(model)(x).logits, expected)
        exact = copy.deepcopy(model).to(torch.float64)
        assert {module.layout for module in packed_modules(exact).values()} == {"wire"}
        reference = exact(x).logits
        assert torch.equal(exact.dequantize()(x).logits, reference)
        wide = copy.deepcopy(model).to(torch.float32)
        error = (wide(x).logits - reference).abs().max()
        assert error <= 2 * (wide.dequantize()(x).logits - reference).abs().max()


def test_gradients_reach_the_inputs_of_packed_layers(quantized):
    model, _ = quantized
    embeddings = model.get_input_embeddings()(torch.arange(8).view(1, -1)).detach().requires_grad_()
    model(inputs_embeds=embeddings, labels=torch.arange(8).view(1, -1)).loss.backward()
    assert bool(torch.isfinite(embeddings.grad).all())
    assert embeddings.grad.abs().max() > 0
    model.zero_grad()


def test_no_warnings_from_us(tiny_folder, tokens):
    config = CPTQuantConfig(dataset=tokens, sequence_length=32, group_size=32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), quantization_config=config)
    assert not [warning for warning in caught if "hf_cptquant" in warning.filename]


def test_a_config_object_can_be_used_again(tiny_folder, tokens):
    config = CPTQuantConfig(dataset=tokens, sequence_length=32, group_size=32)
    folder = tiny_folder("llama")
    models = [AutoModelForCausalLM.from_pretrained(folder, quantization_config=config) for _ in range(2)]
    assert models[0].hf_quantizer.record.plan == models[1].hf_quantizer.record.plan
    assert type(config) is CPTQuantConfig


@pytest.mark.parametrize("method", ["cmpq", "pmpq", "tdmpq"])
def test_a_budget_is_met_and_survives_reloading(method, tiny_folder, tokens, tmp_path):
    folder = tiny_folder("llama", torch.bfloat16)
    data = {"dataset": tokens, "sequence_length": 32, "num_samples": 4, "group_size": 32}
    override = {"*.layers.1.mlp.down_proj": 8}
    config = CPTQuantConfig(method=method, bits=(3, 4, 8, 16), target_bits=5.0, bits_override=override, **data)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    record = model.hf_quantizer.record
    assert 4.5 < record.plan.bits_per_weight <= 5.0
    bits = {module.name: module.scheme.bits for module in record.plan.modules}
    assert bits["model.layers.1.mlp.down_proj"] == 8
    assert len(set(bits.values())) > 1
    if method == "tdmpq":  # whose costs are nats
        units = {module.unit: module.scheme.bits for module in record.plan.modules}
        predicted = sum(record.table.costs[unit].get(width, 0.0) for unit, width in units.items())
        assert record.measured["predicted_loss_increase"] == pytest.approx(predicted)
    model.save_pretrained(tmp_path / "saved")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert reloaded.hf_quantizer.record.plan == record.plan
    assert reloaded.hf_quantizer.record.table == record.table  # costs and correlations too, from the plan file
    assert torch.equal(reloaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_bits": 3.0}, "target_bits=3.0 cannot be met"),
        ({"target_size": "1KB"}, "target_size=0.001 MB cannot be met"),
        ({"bits_override": {"*.fc1": 8}}, "matches no quantizable module"),
    ],
)
def test_what_cannot_be_planned_is_told_before_the_weights_are_loaded(settings, message, tiny_folder, tokens):
    folder = tiny_folder("llama")
    (folder / "model.safetensors").write_bytes(b"no weights")
    config = CPTQuantConfig(dataset=tokens, sequence_length=32, num_samples=4, group_size=32, **settings)
    with pytest.raises(CPTQuantError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
