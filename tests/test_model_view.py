"""Blocks, quantizable modules, groups and reasons on every supported architecture."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import SMALL_SETTINGS, TINY_CONFIGS, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.falcon.modeling_falcon import FalconLinear

from hf_cptquant import CPTQuantConfig
from hf_cptquant.arithmetic import SAME_AS_LINEAR
from hf_cptquant.errors import ModelError
from hf_cptquant.model_view import ModelView, QuantizableModule, find_blocks, task_of, units, view_model

EXPECTED = {  # blocks, quantizable modules per block (first), units per block (first), task
    "llama": (3, 7, ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"], "causal-lm"),
    "opt": (3, 6, ["self_attn.qkv_proj", "self_attn.out_proj", "fc1", "fc2"], "causal-lm"),
    "gpt2": (3, 4, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], "causal-lm"),
    "t5": (4, 5, ["layer.0.SelfAttention.qkv", "layer.0.SelfAttention.o", "layer.1.DenseReluDense.wi"], "seq2seq-lm"),
    "bert-mlm": (3, 6, ["attention.self.qkv", "attention.output.dense", "intermediate.dense", "output.dense"],
                 "masked-lm"),
    "bert-classifier": (3, 6, ["attention.self.qkv", "attention.output.dense", "intermediate.dense", "output.dense"],
                        "sequence-classification"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_structure(kind):
    model = tiny_model(kind)
    view = view_model(model)
    blocks, modules, groups, task = EXPECTED[kind]
    assert len(view.blocks) == blocks
    first = view.blocks[0]
    assert len([module for module in view.modules if module.block == first]) == modules
    assert [name for name in units(view, "group") if name.startswith(first + ".")] == [
        f"{first}.{group}" for group in groups
    ]
    assert set(units(view, "block")) == set(view.blocks)
    assert len(units(view, "module")) == len(view.modules)
    assert task_of(model) == task


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_shapes_are_maps_from_inputs_to_outputs(kind):
    model = tiny_model(kind)
    for module in view_model(model).modules:
        x = torch.zeros(1, module.in_features)
        assert model.get_submodule(module.name)(x).shape == (1, module.out_features)


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_bytes_and_view_are_the_same_on_the_meta_device(kind, tmp_path):
    model = tiny_model(kind)
    view = view_model(model)
    with torch.device("meta"):
        assert view_model(type(model)(model.config)) == view
    model.save_pretrained(tmp_path)
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    quantizable = sum(module.out_features * module.in_features * module.element_size for module in view.modules)
    assert view.other_bytes + quantizable == (tmp_path / "model.safetensors").stat().st_size - header


def test_every_matrix_is_either_quantizable_or_left_with_a_reason():
    for kind in TINY_CONFIGS:
        model = tiny_model(kind)
        view = view_model(model)
        matrices = {
            name for name, module in model.named_modules() if any(p.dim() > 1 for p in module.parameters(recurse=False))
        }
        assert {module.name for module in view.modules} | {module.name for module in view.left} == matrices
        assert all(module.reason for module in view.left)


def test_reasons():
    reasons = {module.name: module.reason for module in view_model(tiny_model("t5")).left}
    assert reasons["lm_head"] == "shares its weight with another module"
    assert reasons["encoder.block.0.layer.1.DenseReluDense.wo"] == "kept in float32 by the model"
    assert reasons["decoder.block.0.layer.0.SelfAttention.relative_attention_bias"] == "Embedding is not supported"
    llama = view_model(tiny_model("llama"), modules_to_not_convert=["down_proj", "model.layers.1"])
    left = {module.name for module in llama.left if module.reason == "named in modules_to_not_convert"}
    assert {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj"} <= left
    assert {module.block for module in llama.modules} == {"model.layers.0", "model.layers.2"}
    assert not any(module.name.endswith("down_proj") for module in llama.modules)


def test_mostly_unsupported_blocks_are_refused_unless_allowed():
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.has_post_expert_norm = True  # as transformers marks those of Muse Spark
    with pytest.raises(ModelError, match=r"\d\d% .* e.g. model.layers.0.mlp.experts: .*allow_skipped=True"):
        view_model(model)
    view = view_model(model, allow_skipped=True)
    assert not any(".experts." in module.name for module in view.modules)


# Of the classes that transformers makes from `nn.Linear` those that compute something else (routers, heads, a
# block-diagonal product), and one of a model (ESMFold) that has no task here.
OTHER_LINEARS = {
    "DeepseekV4GroupedLinear", "DoryLMHead", "EsmFoldLinear", "IdeficsDecoupledLinear", "Llama4Router",
    "PhimoeTopKRouter",
}  # fmt: skip


def test_classes_made_from_linear_are_known():
    """Of a new one somebody has to look whether it computes the same."""
    models = Path(transformers.__file__).parent / "models"
    classes = re.compile(r"^class (\w+)\((?:torch\.)?nn\.Linear\)", re.MULTILINE)
    sources = (path.read_text(encoding="utf-8") for path in models.glob("*/modeling_*.py"))
    found = {name for source in sources for name in classes.findall(source)}
    assert SAME_AS_LINEAR <= found <= SAME_AS_LINEAR | OTHER_LINEARS


@pytest.mark.parametrize("rounding", ["nearest", "gptq", "signround"])
@torch.no_grad()
def test_a_class_that_computes_the_same_is_packed_as_linear_and_comes_back(rounding, tokens, tmp_path, monkeypatch):
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
    config = transformers.FalconConfig(**shape, bias=True, parallel_attn=False, eos_token_id=0, bos_token_id=0)
    monkeypatch.setitem(TINY_CONFIGS, "falcon", ("FalconForCausalLM", "FalconConfig", config.to_diff_dict()))
    original = tiny_model("falcon")
    x, layer = torch.randn(5, 64), original.transformer.h[0].mlp.dense_h_to_4h
    assert type(layer) is FalconLinear
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    original.save_pretrained(tmp_path / "dense")
    settings = {**SMALL_SETTINGS, "dataset": tokens, "bits": (4, 8), "rounding": rounding, "iters": 2, "quality": None}
    quantized = CPTQuantConfig(**{name: value for name, value in settings.items() if value is not None})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=quantized)
    names = {name for name, module in original.named_modules() if type(module) is FalconLinear}
    plan = model.hf_quantizer.record.plan
    assert {module.name for module in plan.packed} == names
    assert {module.kind for module in plan.modules} == {"Linear"}
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    assert torch.equal(again(tokens).logits, expected)
    dense = again.dequantize()
    assert {name for name, module in dense.named_modules() if type(module) is FalconLinear} == names
    torch.testing.assert_close(dense(tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_layers_with_few_inputs_are_left_alone():
    class Block(transformers.modeling_layers.GradientCheckpointingLayer):
        def __init__(self):
            super().__init__()
            self.position, self.narrow, self.wide = nn.Linear(2, 64), nn.Linear(16, 64), nn.Linear(64, 64)

    model = tiny_model("llama")
    model.model.layers = nn.ModuleList([Block()])
    view = view_model(model)
    assert [module.name for module in view.modules] == ["model.layers.0.narrow", "model.layers.0.wide"]
    reasons = {module.name: module.reason for module in view.left}
    assert reasons["model.layers.0.position"] == "fewer than 16 inputs, too few for a scale"


def test_nothing_to_quantize():
    with pytest.raises(ModelError, match="nothing to quantize"):
        view_model(tiny_model("llama"), modules_to_not_convert=["model.layers"])


def test_blocks_without_marked_layers_are_the_longest_uniform_list():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(2, 2), nn.ReLU(), nn.ReLU(), nn.ReLU()])
            self.stages = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(3)])
            self.short = nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])

    assert find_blocks(Plain()) == ("stages.0", "stages.1", "stages.2")
    stages = nn.ModuleList([Plain(), Plain()])  # the second list of the class is as much a part of the network
    assert find_blocks(stages) == tuple(f"{stage}.stages.{index}" for stage in (0, 1) for index in range(3))
    assert find_blocks(nn.Linear(2, 2)) == ()


def test_experts_of_a_block_share_a_unit():
    leaves = ("gate_proj", "up_proj", "down_proj")
    names = [
        f"m.layers.{block}.mlp.experts.{expert}.{leaf}" for block in (0, 1) for expert in (0, 1, 10) for leaf in leaves
    ]
    names += [f"m.layers.0.mlp.shared_expert.{leaf}" for leaf in leaves]
    modules = tuple(QuantizableModule(name, ".".join(name.split(".")[:3]), 8, 64, 2) for name in names)
    found = units(ModelView(("m.layers.0", "m.layers.1"), modules, (), 0), "group")
    assert {unit: len(members) for unit, members in found.items()} == {
        "m.layers.0.mlp.experts": 9,
        "m.layers.1.mlp.experts": 9,
        "m.layers.0.mlp.shared_expert.gate_up_proj": 2,
        "m.layers.0.mlp.shared_expert.down_proj": 1,
    }
