"""Mixtures of experts: transformers' fused module as the reference for ours, its own checkpoints for names on disk."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import TINY_MIXTURES, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_cptquant import CPTQuantConfig, measure_sensitivity
from hf_cptquant.calibration import facts_of, load_calibration
from hf_cptquant.errors import CheckpointError, ModelError
from hf_cptquant.experts import LinearExperts, fused_experts, linear_experts
from hf_cptquant.folder_evaluation import evaluate_folder, uniform_control
from hf_cptquant.model_view import units, view_model
from hf_cptquant.modules import QuantLinear, packed_modules
from hf_cptquant.pipeline import prepare, quantize_model
from hf_cptquant.plan import BitPlan
from hf_cptquant.quantize import apply_plan
from hf_cptquant.sensitivity.cmpq import sample_outputs, units_by_tokens


def mixture(kind: str, **changes) -> transformers.PreTrainedModel:
    """With transformers' eager experts, which add in our order. Rows that belong to no expert are zero."""
    model = tiny_model(kind, **changes)
    model.set_experts_implementation("eager")
    if kind == "longcat-flash":
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj.data[len(layer.mlp.experts.down_proj) :] = 0
    return model


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def settings(tokens: torch.Tensor, **changes) -> CPTQuantConfig:
    common = {"dataset": tokens, "sequence_length": 32, "group_size": 32, "target_bits": 6.0, "quality": "fast"}
    return CPTQuantConfig(**{**common, **changes})


def experts_only(model: transformers.PreTrainedModel) -> BitPlan:
    """The plan with 4 bits for experts, and 16 for everything else."""
    plan = view_model(model).plan("group")
    of_experts = set(fused_experts(model))
    return plan.with_bits({m.unit: 4 if m.unit in of_experts else 16 for m in plan.modules}, 32)


@pytest.mark.parametrize("kind", TINY_MIXTURES)
def test_linear_layers_compute_what_fused_experts_do_and_leave_no_trace(kind, tokens):
    model = mixture(kind)
    expected, view = logits(model, tokens), view_model(model)
    parameters, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    with linear_experts(model):
        assert any(isinstance(module, LinearExperts) for module in model.modules())
        torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)
        assert view_model(model) == view  # the fused form is seen as what it becomes
    torch.testing.assert_close(logits(model, tokens), expected, rtol=0, atol=0)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", TINY_MIXTURES)
def test_quantized_saved_and_reloaded(kind, tokens, tmp_path):
    mixture(kind).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings(tokens))
    apart = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LinearExperts))
    experts = [module for name, module in packed_modules(model).items() if name.startswith(apart)]
    assert apart
    assert len(experts) == sum(
        len(model.get_submodule(name[:-1])) * len(model.get_submodule(f"{name}0")) for name in apart
    )
    assert all(type(module) is QuantLinear for module in experts)
    assert not any({"gate", "router"} & set(name.split(".")) for name in packed_modules(model))
    expected = logits(model, tokens)

    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(again, tokens), expected)
    again.save_pretrained(tmp_path / "once more")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "once more"), tokens), expected)

    dense = again.dequantize()
    dense.set_experts_implementation("eager")
    assert not any(isinstance(module, LinearExperts) for module in dense.modules())
    torch.testing.assert_close(logits(dense, tokens), expected, rtol=1e-5, atol=1e-5)
    dense.save_pretrained(tmp_path / "dense again")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense again", experts_implementation="eager")
    assert torch.equal(logits(plain, tokens), logits(dense, tokens))


@pytest.mark.parametrize("kind", ["mixtral", "qwen2-moe", "nemotron-h"])
def test_names_on_disk_are_those_of_the_original_checkpoint(kind, tokens, tmp_path):
    model = mixture(kind)
    model.save_pretrained(tmp_path / "dense")
    config = settings(tokens, target_bits=None, bits_override={"*": 4})
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config).save_pretrained(
        tmp_path / "quantized"
    )

    def names(folder: str) -> set[str]:
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as tensors:
            return {name.replace("weight_packed", "weight") for name in tensors.keys()}  # noqa: SIM118, no dict

    extra = {name for name in names("quantized") if name.endswith(("weight_scale", "weight_shape"))}
    assert names("quantized") - extra == names("dense")


@pytest.mark.parametrize("kind", ["llama4", "longcat-flash", "jetmoe"])
@pytest.mark.parametrize("rounding", ["nearest", "gptq", "signround"])
def test_packed_they_compute_what_fused_ones_with_rounded_weights_do(kind, rounding, tokens, tmp_path):
    """The independent reference is transformers' module with the dequantized weights put in by hand."""
    model, reference = mixture(kind), mixture(kind)
    plan = experts_only(model)
    recipe = CPTQuantConfig(plan=plan, dataset=tokens, sequence_length=32, rounding=rounding, iters=2).recipe()
    quantize_model(model, recipe, prepare(model, recipe))
    assert {module.name for module in plan.packed} == packed_modules(model).keys()
    for name, fused in fused_experts(reference).items():
        for expert, layers in enumerate(model.get_submodule(name)):
            weights = {leaf: layer.weight for leaf, layer in layers.items()}
            if kind == "jetmoe":
                fused.weight.data[expert] = weights["linear"]
                continue
            gate_up, down = torch.cat((weights["gate_proj"], weights["up_proj"])), weights["down_proj"]
            fused.gate_up_proj.data[expert] = gate_up.t() if kind == "llama4" else gate_up
            fused.down_proj.data[expert] = down.t() if kind == "llama4" else down
    expected = logits(reference, tokens)
    torch.testing.assert_close(logits(model, tokens), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(mixture(kind), tokens), atol=0.1)
    held = sum(tensor.nbytes for tensor in model.state_dict().values()) - 16 * len(plan.packed)
    tied = model.lm_head.weight.nbytes if model.config.tie_word_embeddings else 0
    assert held - tied == plan.nbytes  # and no dense copy beside it


def test_llama_4_is_written_by_the_names_that_engines_read(tokens, tmp_path):
    mixture("llama4").save_pretrained(tmp_path / "dense")
    config = settings(tokens, target_bits=None, bits_override={"*": 4})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "quantized")
    found = {name for name in load_file(tmp_path / "quantized" / "model.safetensors") if ".experts." in name}
    leaves, tensors = ("gate_proj", "up_proj", "down_proj"), ("weight_packed", "weight_scale", "weight_shape")
    assert found == {
        f"model.layers.{layer}.feed_forward.experts.{expert}.{leaf}.{tensor}"
        for layer in range(2) for expert in range(4) for leaf in leaves for tensor in tensors
    }  # fmt: skip


def test_an_expert_of_llama_4_runs_on_its_own_tokens_alone(tokens):
    model = mixture("llama4")
    seen: dict[int, int] = {}
    with linear_experts(model):
        experts = model.model.layers[0].feed_forward.experts
        for index, expert in enumerate(experts):
            count = lambda _module, inputs, index=index: seen.update({index: len(inputs[0])})  # noqa: E731
            expert["gate_proj"].register_forward_pre_hook(count)
        logits(model, tokens)
    assert sum(seen.values()) == 2 * tokens.numel()  # two of four for each


def test_some_initialize_the_parameters_of_experts_by_name():
    """As transformers' class of Qwen3-Omni does while packed ones are loaded."""
    model = mixture("mixtral")
    with linear_experts(model):
        experts = model.model.layers[0].mlp.experts
        assert experts.gate_up_proj.numel() == experts.down_proj.numel() == 0
        with pytest.raises(AttributeError, match="other"):
            _ = experts.other
        model.initialize_weights()


def test_the_weights_of_fused_experts_are_rounded_as_linear_layers_are(tokens):
    model = mixture("mixtral")
    fused = model.model.layers[1].mlp.experts
    alone = nn.Module()
    alone.layer = nn.Linear(64, 128, bias=False)
    alone.layer.weight.data = fused.gate_up_proj.detach()[2, 128:].clone()
    plan = experts_only(model)
    (module,) = [module for module in plan.modules if module.name == "model.layers.1.mlp.experts.2.w3"]
    apply_plan(alone, BitPlan((replace(module, name="layer"),)))
    recipe = CPTQuantConfig(plan=plan, quality="fast").recipe()
    quantize_model(model, recipe, prepare(model, recipe))
    assert torch.equal(model.get_submodule(module.name).weight, alone.layer.weight)


def test_experts_of_a_block_are_one_unit_or_each_projection_its_own(tokens):
    model = mixture("mixtral")
    grouped, alone = (units(view_model(model), granularity) for granularity in ("group", "module"))
    assert len(grouped["model.layers.0.mlp.experts"]) == 12
    assert "model.layers.0.mlp.experts.3.w2" in alone
    override = {"*.experts.0.*": 16, "*.experts.1.*": 4, "*.experts.[23].*": 4, "*.self_attn.*": 8}
    config = settings(tokens, target_bits=None, bits_override=override, granularity="module")
    recipe = config.recipe()
    record = quantize_model(model, recipe, prepare(model, recipe))
    bits = {module.name: module.scheme.bits for module in record.plan.modules}
    layer = model.get_submodule("model.layers.0.mlp.experts.0.w1")
    assert bits["model.layers.0.mlp.experts.0.w1"] == 16
    assert type(layer) is nn.Linear
    assert layer.weight.untyped_storage().nbytes() == layer.weight.nbytes  # it does not hold the packed ones' memory
    assert bits["model.layers.0.mlp.experts.1.w1"] == 4


def test_experts_stay_fused_where_a_plan_leaves_them(tokens, tmp_path):
    mixture("mixtral").save_pretrained(tmp_path / "dense")
    config = settings(tokens, target_bits=None, bits_override={"*.experts.*": 16, "*.self_attn.*": 4})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert len(fused_experts(model)) == 3
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(again, tokens), logits(model, tokens))


@pytest.mark.parametrize(
    "method",
    [
        {"estimator": "taylor", "granularity": "group"},
        {"estimator": "perturbation", "granularity": "module"},
        {"method": "pmpq", "granularity": "group"},
        {"method": "cmpq", "granularity": "group"},
    ],
)
def test_methods_score_experts_and_leave_the_model_as_it_is(method, tokens):
    model = mixture("qwen2-moe")
    values = copy.deepcopy(model.state_dict())
    table = measure_sensitivity(model, settings(tokens, target_bits=None, **method))
    experts = {"group": "model.layers.0.mlp.experts", "module": "model.layers.0.mlp.experts.3.up_proj"}
    assert experts[method["granularity"]] in table.scores
    assert all(torch.equal(values[name], tensor) for name, tensor in model.state_dict().items())


def test_correlations_of_single_projections_are_refused_with_the_way_out(tokens):
    with pytest.raises(
        ModelError, match=r"experts.0.gate_proj gives .* not one row for each token.*coarser granularity"
    ):
        measure_sensitivity(mixture("qwen2-moe"), settings(tokens, method="cmpq", granularity="module"))


@torch.no_grad()
def test_experts_correlate_by_what_they_give_together(tokens):
    model, plan = mixture("qwen2-moe"), view_model(mixture("qwen2-moe")).plan("group")
    with linear_experts(model):
        outputs: list[torch.Tensor] = []
        model.model.layers[0].mlp.experts.register_forward_hook(lambda *seen: outputs.append(seen[2]))
        recipe = settings(tokens, method="cmpq", cca_samples=64).recipe()
        units = units_by_tokens(model, plan, {"input_ids": tokens, "labels": tokens})["input_ids"]
        data = load_calibration(recipe, facts_of(model))
        outputs.clear()
        sample = sample_outputs(model, units, "input_ids", data, 64, 0)["model.layers.0.mlp.experts"]
    rows = torch.cat(outputs)
    assert sample.shape == (64, 64)
    assert all((rows == row).all(1).any() for row in sample)


def test_taylor_costs_do_not_depend_on_the_batch(tokens):
    model = mixture("mixtral")
    one, three = (measure_sensitivity(model, settings(tokens, batch_size=size)).costs for size in (1, 3))
    for unit, costs in one.items():
        assert three[unit] == pytest.approx(costs, rel=1e-4)


@pytest.mark.parametrize("rounding", ["gptq", "signround"])
def test_an_expert_without_tokens_is_rounded_to_nearest(rounding, tokens):
    model = mixture("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[3] = 0
        layer.mlp.gate.weight.data[:3] = layer.mlp.gate.weight.data[:1]  # equal, so that one of the first is as good
        layer.mlp.gate.weight.data[:3] *= 0
    plan = experts_only(model)
    used: set[int] = set()
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda _module, args: used.update(args[1].unique().tolist())
    )
    logits(model, tokens)
    handle.remove()
    (unused, *_) = {0, 1, 2, 3} - used
    nearest, tuned = copy.deepcopy(model), model
    for each, changes in ((nearest, {"quality": "fast"}), (tuned, {"rounding": rounding})):
        recipe = CPTQuantConfig(plan=plan, dataset=tokens, sequence_length=32, **changes).recipe()
        quantize_model(each, recipe, prepare(each, recipe))
    for leaf in ("w1", "w2", "w3"):
        name = f"model.layers.0.mlp.experts.{unused}.{leaf}"
        assert torch.equal(tuned.get_submodule(name).weight, nearest.get_submodule(name).weight)
    names = [f"model.layers.0.mlp.experts.{expert}.w1" for expert in used]
    assert any(not torch.equal(tuned.get_submodule(n).weight, nearest.get_submodule(n).weight) for n in names)


def test_what_is_named_is_left_alone():
    view = view_model(mixture("mixtral"), modules_to_not_convert=["model.layers.0.mlp.experts", "w2"])
    names = {module.name for module in view.modules if ".experts." in module.name}
    assert names == {
        f"model.layers.{i}.mlp.experts.{e}.{leaf}" for i in (1, 2) for e in range(4) for leaf in ("w1", "w3")
    }
    assert ("model.layers.0.mlp.gate", "routes tokens to experts") in {(left.name, left.reason) for left in view.left}


def test_experts_with_a_norm_behind_them_are_not_taken_apart(tokens):
    model = mixture("mixtral")
    model.model.layers[1].mlp.experts.has_post_expert_norm = True  # as transformers marks those of Muse Spark
    view = view_model(model)
    assert ("model.layers.1.mlp.experts", "MixtralExperts is not supported") in {(m.name, m.reason) for m in view.left}
    assert {module.block for module in view.modules if ".experts." in module.name} == {
        "model.layers.0",
        "model.layers.2",
    }


def test_the_control_of_a_uniform_plan_is_the_model_itself(tokens, tmp_path):
    mixture("mixtral").save_pretrained(tmp_path / "dense")
    config = settings(tokens, target_bits=None, bits_override={"*": 4})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    model.save_pretrained(tmp_path / "quantized")
    control = uniform_control(model.hf_quantizer.record)
    folders = str(tmp_path / "quantized"), CPTQuantConfig(dataset=tokens, sequence_length=32), str(tmp_path / "dense")
    for result in evaluate_folder(*folders, control=control):
        assert result.control == pytest.approx(result.value, rel=1e-4)
        assert result.metric != "perplexity" or result.base != pytest.approx(result.value, rel=1e-4)


def test_offloaded_experts_are_refused_and_nothing_is_changed(tokens, tmp_path):
    mixture("mixtral").save_pretrained(tmp_path / "dense")
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{index}": "disk" if index == 1 else "cpu" for index in range(3)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", device_map=device_map, offload_folder=tmp_path / "o"
    )
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.experts: the experts are offloaded.*device_map"):
        measure_sensitivity(model, settings(tokens))
    assert len(fused_experts(model)) == 3


def test_a_missing_expert_is_found_on_loading(tokens, tmp_path):
    mixture("mixtral").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings(tokens))
    model.save_pretrained(tmp_path / "quantized")
    path = tmp_path / "quantized" / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "experts.1.w3.weight_packed" in name)
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts.1.w3: weight_packed is missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
