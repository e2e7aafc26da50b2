"""Executing a plan: all or nothing, and errors that name the module."""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_model

from hf_cptquant.errors import CPTQuantError, ModelError, PlanError
from hf_cptquant.model_view import view_model
from hf_cptquant.modules import packed_modules
from hf_cptquant.quantize import apply_plan, dequantize_model


def plan_for(model, bits=4):
    plan = view_model(model).plan("block")
    return plan.with_bits({module.unit: bits for module in plan.modules}, group_size=32)


def test_dense_weights_are_gone_and_come_back():
    model = tiny_model("gpt2")
    classes = {name: type(module) for name, module in model.named_modules()}
    apply_plan(model, plan_for(model))
    assert len(packed_modules(model)) == 12
    assert not any(parameter.dim() > 1 for parameter in model.transformer.h.parameters())
    dequantize_model(model)
    assert {name: type(module) for name, module in model.named_modules()} == classes


def test_non_finite_weights_name_the_module():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("inf")
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.down_proj: .*NaN or infinity.*modules_to_not_convert"):
        apply_plan(model, plan_for(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "model.layers.9.mlp.up_proj"}, r"model.layers.9.mlp.up_proj: .* no such module"),
        ({"name": "model.norm"}, r"model.norm: .* has a LlamaRMSNorm there"),
        ({"out_features": 3}, r"down_proj: the plan has shape \(3, 128\), the model \(64, 128\)"),
    ],
)
def test_a_plan_for_another_model_changes_nothing(change, message):
    model = tiny_model("llama")
    plan = plan_for(model)
    last = replace(plan.modules[-1], **change)
    with pytest.raises(PlanError, match=message):
        apply_plan(model, replace(plan, modules=(*plan.modules[:-1], last)))
    assert not packed_modules(model)


def test_weights_that_were_never_loaded_are_an_error():
    with torch.device("meta"):
        model = tiny_model("llama")
    with pytest.raises(CPTQuantError, match=r"layers.0.self_attn.q_proj: the weight was never loaded"):
        apply_plan(model, plan_for(model))
