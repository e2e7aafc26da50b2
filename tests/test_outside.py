"""What lies outside the blocks and is packed where a setting asks for it: the head, and the embedding of tokens. (Where
they share a weight: `test_tied.py`.)"""

import copy
import dataclasses
import json
import math
import pickle

import pytest
import torch
from conftest import SMALL_SETTINGS, TINY_CONFIGS, run_command, tiny_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from hf_cptquant import BitPlan, CPTQuantConfig, SensitivityTable, make_plan, measure_sensitivity, solve
from hf_cptquant.doctor import diagnose
from hf_cptquant.errors import ConfigError, ModelError, PlanError
from hf_cptquant.kernels import REFERENCE
from hf_cptquant.modules import QuantEmbedding, QuantLinear
from hf_cptquant.pipeline import prepare
from hf_cptquant.plan import LayerScheme
from hf_cptquant.runtimes import RUNTIMES, problems

ROWS = 500  # not a multiple of what engines pad the vocabulary to
METHODS = {
    "pmpq": {"method": "pmpq"},
    "cmpq": {"method": "cmpq"},
    "perturbation": {"estimator": "perturbation"},
    "taylor": {"estimator": "taylor"},
    "taylor, tuned": {"estimator": "taylor", "quality": "balanced"},
}


@pytest.fixture
def settings(tokens):
    """Of a tiny Llama model of `ROWS` tokens."""
    return {**SMALL_SETTINGS, "dataset": tokens.clamp(max=ROWS - 1)}


def load(folder, **settings) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=CPTQuantConfig(**settings))


def file_bytes(folder) -> int:
    """Bytes of all tensors in a folder."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def nearest(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounded to nearest per row, without zero points, in float64: the largest weight of each row on −2^(bits−1)."""
    exact = weight.detach().double()
    largest = exact.gather(1, exact.abs().argmax(1, keepdim=True))
    scale = (-largest / 2 ** (bits - 1)).to(weight.dtype).double()
    return ((exact / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale).to(weight.dtype)


@pytest.mark.parametrize("granularity", ["block", "group", "module"])
def test_the_head_is_a_unit_of_its_own_with_the_bits_that_were_asked_for(granularity, settings):
    model = tiny_model("llama", vocab_size=ROWS)
    config = CPTQuantConfig(
        **{**settings, "granularity": granularity}, quantize_lm_head=8, bits_override={"*": 4}, target_bits=7
    )
    plan = make_plan(model, config).plan
    head = plan.modules[-1]
    assert (head.name, head.block, head.unit) == ("lm_head", "lm_head", "lm_head")
    assert head.scheme == LayerScheme(8)
    assert {module.scheme.bits for module in plan.modules[:-1]} == {4}
    assert plan.granularity == granularity
    assert "lm_head" not in {module.name for module in plan.left}
    inside = plan.weights - ROWS * 64
    assert plan.bits_per_weight == pytest.approx(((4 + 32 / 32) * inside + (8 + 32 / 64) * ROWS * 64) / plan.weights)


@pytest.mark.parametrize("method", METHODS)
def test_methods_measure_the_same_as_without_it(method, settings):
    settings = {**settings, **METHODS[method], "bits": (4, 8)}
    model = tiny_model("llama", vocab_size=ROWS)
    with_head = measure_sensitivity(model, CPTQuantConfig(**settings, quantize_lm_head=4))
    without = measure_sensitivity(model, CPTQuantConfig(**settings))
    assert with_head.plan.inside.modules == without.plan.modules
    assert dataclasses.replace(with_head, plan=without.plan) == without


@pytest.mark.parametrize("quality", ["fast", "balanced"])
@torch.no_grad()
def test_quantized_saved_and_reloaded(quality, settings, tmp_path):
    dense = tiny_model("llama", vocab_size=ROWS)
    dense.save_pretrained(tmp_path / "dense")
    given = {**settings, "quality": quality, "iters": 2, "bits": (4,)}
    model = load(tmp_path / "dense", **given, quantize_lm_head=8, target_size=file_bytes(tmp_path / "dense") // 2)
    assert type(model.lm_head) is QuantLinear
    assert torch.equal(model.lm_head.weight, nearest(dense.lm_head.weight, 8))
    plan = model.hf_quantizer.record.plan
    assert model.get_memory_footprint() == pytest.approx(plan.nbytes, rel=0.02)

    model.save_pretrained(tmp_path / "packed")
    marks = 16 * len(plan.packed)  # each has its shape beside it
    assert file_bytes(tmp_path / "packed") == plan.nbytes + marks
    assert "lm_head" not in model.config.quantization_config.to_dict()["ignore"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert again.hf_quantizer.record.plan == plan
    tokens = settings["dataset"]
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    hidden = model.model(tokens).last_hidden_state
    unpacked = again.dequantize()
    assert type(unpacked.lm_head) is torch.nn.Linear
    torch.testing.assert_close(unpacked(tokens).logits, hidden @ nearest(dense.lm_head.weight, 8).t())


def test_another_number_of_rows_is_refused_until_the_model_is_dense(settings, tmp_path):
    tiny_model("llama", vocab_size=ROWS).save_pretrained(tmp_path)
    model = load(tmp_path, **settings, quantize_lm_head=4)
    assert model.resize_token_embeddings(ROWS) is model.get_input_embeddings()
    for wanted in ({"new_num_tokens": 512}, {"pad_to_multiple_of": 64}):
        with pytest.raises(ModelError, match=r"lm_head is packed with 500 rows; resize .*dequantize\(\) first"):
            model.resize_token_embeddings(**wanted)
    model.dequantize().resize_token_embeddings(512, mean_resizing=False)
    assert model(settings["dataset"]).logits.shape[-1] == 512


def test_what_cannot_be_packed_is_said_before_any_work(settings, tmp_path, tiny_folder, texts):
    with pytest.raises(ConfigError, match=r"quantize_lm_head=7 is not one of None, 2, 3, 4, 5, 6, 8"):
        CPTQuantConfig(quantize_lm_head=7)
    with pytest.raises(ConfigError, match="with plan= every module is decided; leave out quantize_lm_head"):
        CPTQuantConfig(plan="plan.json", quantize_lm_head=8)
    tiny_model("llama", vocab_size=ROWS, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    with pytest.raises(ModelError, match=r"lm_head shares its weight with .* quantize_embeddings packs it for both"):
        load(tmp_path / "tied", **settings, quantize_lm_head=8)
    tiny_model("llama", vocab_size=ROWS).save_pretrained(tmp_path / "llama")
    with pytest.raises(ConfigError, match="lm_head, which a setting asks to quantize, cannot be: named in modules_to"):
        load(tmp_path / "llama", **settings, quantize_lm_head=8, modules_to_not_convert=["lm_head"])
    config = CPTQuantConfig(**{**settings, "dataset": texts}, quantize_lm_head=8)
    with pytest.raises(ModelError, match="BertForSequenceClassification has no linear layer that predicts tokens"):
        AutoModelForSequenceClassification.from_pretrained(tiny_folder("bert-classifier"), quantization_config=config)


@pytest.mark.parametrize("kind", [kind for kind in TINY_CONFIGS if kind not in ("llama", "bert-classifier")])
def test_tied_heads_of_other_models_are_named(kind, settings):
    name = {"bert-mlm": "cls.predictions.decoder"}.get(kind, "lm_head")
    with pytest.raises(ModelError, match=f"{name} shares its weight"):
        make_plan(tiny_model(kind), CPTQuantConfig(**settings, quantize_lm_head=8))


def test_it_counts_for_budgets(settings):
    model = tiny_model("llama", vocab_size=ROWS)
    least = BitPlan.from_dict(
        make_plan(model, CPTQuantConfig(**settings, bits=(4,), quantize_lm_head=8, target_bits=16)).plan.to_dict()
    )
    given = {**settings, "bits": (4, 8, 16), "quantize_lm_head": 8}
    assert make_plan(model, CPTQuantConfig(**given, target_size=least.nbytes)).plan.nbytes == least.nbytes
    with pytest.raises(PlanError, match=f"give {least.nbytes / 1e6:.3f} to .* MB"):
        make_plan(model, CPTQuantConfig(**given, target_size=least.nbytes - 1))
    with pytest.raises(PlanError, match=f"give {least.bits_per_weight:.4f} to .* bits per weight"):
        make_plan(model, CPTQuantConfig(**given, target_bits=math.floor(least.bits_per_weight)))


@pytest.mark.parametrize("allocation", ["integer", "kmeans"])
def test_plans_from_its_table_keep_its_bits(allocation, settings, tmp_path, capsys):
    given = {**settings, "bits": (4, 8), "quantize_lm_head": 3}
    tiny_model("llama", vocab_size=ROWS).save_pretrained(tmp_path / "model")
    record = make_plan(tiny_model("llama", vocab_size=ROWS), CPTQuantConfig(**given))
    record.save(tmp_path / "table.json")
    table = SensitivityTable.load(tmp_path / "table.json")
    assert table == record.table
    plan = solve(table, CPTQuantConfig(group_size=32, bits=(4, 8), allocation=allocation))
    assert [str(module.scheme) for module in plan.modules if module.outside] == ["3 sym g32"]
    chosen = ["--bits", "4,8", "--allocation", allocation]
    assert run_command("solve", tmp_path / "table.json", *chosen, "--output", tmp_path / "plan.json") == 0
    assert BitPlan.load(tmp_path / "plan.json") == plan
    shown = capsys.readouterr().out
    assert "outside the blocks" in shown
    assert run_command("inspect", tmp_path / "plan.json", "--units", "--plot", tmp_path / "plan.png") == 0
    assert "lm_head" in capsys.readouterr().out
    model = load(tmp_path / "model", plan=tmp_path / "plan.json", quality="fast")
    assert model.lm_head.scheme == LayerScheme(3, 32)
    assert model.hf_quantizer.record.plan == plan


def test_engines_pad_its_rows(settings):
    model = tiny_model("llama", vocab_size=ROWS, hidden_size=256)

    def found(runtime: str, tensor_parallel: int = 1, **given) -> list[str]:
        recipe = CPTQuantConfig(**{**settings, "group_size": 64, **given}).recipe()
        return [str(each) for each in problems(prepare(model, recipe).plan, RUNTIMES[runtime], tensor_parallel)]

    assert not found("sglang", quantize_lm_head=4)
    assert not found("vllm", 2, quantize_lm_head=4)
    assert found("vllm", quantize_lm_head=3) == [
        "lm_head: Marlin takes 4 and 8 bits (4 with zero points), not 3 sym g64; give 4 bits, group_size 64, symmetric"
    ]
    assert "its 512 output features cannot be split over 3 ranks" in found("vllm", 3, quantize_lm_head=4)[0]
    assert (
        "500 output features are no whole words of 8 zero points"
        in found("vllm", quantize_lm_head=4, symmetric=False)[0]
    )
    with pytest.raises(PlanError, match="loads lm_head with none of the bits 3"):
        found("vllm", quantize_lm_head=3, target_runtime="vllm")


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, False), (3, False)])
@torch.no_grad()
def test_an_embedding_is_packed_and_looks_up_the_same_rows(bits, symmetric, settings, tmp_path):
    tiny_model("llama", vocab_size=ROWS, pad_token_id=3).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", **settings, symmetric=symmetric, quantize_embeddings=bits, bits_override={"*": 16})
    tokens, embedding = settings["dataset"], model.get_input_embeddings()
    tokens[0, :3] = torch.tensor([0, ROWS - 1, 3])
    assert type(embedding) is QuantEmbedding
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (ROWS, 64, 3)
    dense = torch.nn.functional.embedding(tokens, embedding.weight)
    for same in (
        embedding,
        copy.deepcopy(embedding),
        pickle.loads(pickle.dumps(embedding)),
        torch.compile(embedding, fullgraph=True, backend="eager"),
        embedding.dense(),
    ):
        assert torch.equal(same(tokens), dense)
    assert embedding(tokens[:, :0]).shape == (*tokens[:, :0].shape, 64)
    plan = model.hf_quantizer.record.plan
    assert plan.packed == plan.modules[:1]
    assert model.get_memory_footprint() == pytest.approx(plan.nbytes, rel=0.02)

    model.save_pretrained(tmp_path / "packed")
    assert file_bytes(tmp_path / "packed") == plan.nbytes + 16
    section = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "cptquant"
    assert "model.embed_tokens" not in section["ignore"]
    assert "cannot load packed Embedding layers" in (tmp_path / "packed" / "README.md").read_text()
    (report,) = diagnose(tmp_path / "packed").kernels
    assert (report.example, report.decode, report.prefill) == ("model.embed_tokens", REFERENCE, REFERENCE)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert again.hf_quantizer.record.plan == plan
    logits = model(tokens).logits
    assert torch.equal(again(tokens).logits, logits)
    in_float32 = again.float().get_input_embeddings()(tokens)
    assert in_float32.dtype == torch.float32
    assert torch.equal(in_float32.to(torch.bfloat16), dense)  # the products are exact there, and rounded once here
    with pytest.raises(ModelError, match=r"model\.embed_tokens is packed with 500 rows"):
        model.resize_token_embeddings(512)
    unpacked = model.dequantize()
    assert type(unpacked.get_input_embeddings()) is torch.nn.Embedding
    assert unpacked.get_input_embeddings().padding_idx == 3
    assert torch.equal(unpacked(tokens).logits, logits)


@torch.no_grad()
def test_scales_of_embedding_and_head_are_recovered_with_the_others(settings, tmp_path):
    tiny_model("llama", vocab_size=ROWS).save_pretrained(tmp_path)
    given = {**settings, "bits": (3,), "quantize_lm_head": 3, "quantize_embeddings": 3}
    before, after = load(tmp_path, **given), load(tmp_path, **given, recover="scales")
    measured = after.hf_quantizer.record.measured
    assert measured["kl_after_recovery"] < measured["kl_before_recovery"]
    for name in ("lm_head", "model.embed_tokens"):
        packed, recovered = (model.get_submodule(name) for model in (before, after))
        assert torch.equal(packed.quantized().integers, recovered.quantized().integers)
        assert not torch.equal(packed.weight_scale, recovered.weight_scale)
    assert after.get_input_embeddings().num_embeddings == ROWS


def test_embeddings_that_cannot_be_packed(settings, tmp_path):
    model = tiny_model("llama", vocab_size=ROWS)
    plan = prepare(model, CPTQuantConfig(**settings, quantize_embeddings=4).recipe()).plan
    assert plan == BitPlan.from_dict(plan.to_dict())
    for name in RUNTIMES:
        (problem,) = problems(plan, RUNTIMES[name])
        assert "packed embeddings; leave quantize_embeddings out" in str(problem)
    model.set_input_embeddings(type("Scaled", (torch.nn.Embedding,), {})(ROWS, 64))
    with pytest.raises(ModelError, match=r"looks tokens up in model\.embed_tokens, a Scaled, not nn.Embedding"):
        make_plan(model, CPTQuantConfig(**settings, quantize_embeddings=8))
