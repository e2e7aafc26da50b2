"""The rounding errors that plans are priced by are those that quantizing really makes."""

import pytest
import torch
from conftest import TINY_CONFIGS, tiny_model
from transformers.pytorch_utils import Conv1D

from hf_cptquant.model_view import view_model
from hf_cptquant.quantize import apply_plan
from hf_cptquant.recipe import Recipe
from hf_cptquant.sensitivity.rounding_errors import relative_errors, rounding_errors


def matrix_of(module) -> torch.Tensor:
    return (module.weight.t() if isinstance(module, Conv1D) else module.weight).detach().double()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_relative_errors_are_those_of_the_quantized_model(kind, symmetric):
    recipe = Recipe(bits=(3, 8, 16), group_size=32, symmetric=symmetric, bits_override=(("*.q*", 5),))
    dense = tiny_model(kind)
    plan = view_model(dense).plan("group")
    found = relative_errors(dense, plan, recipe)
    for bits in (3, 5, 8):
        model = tiny_model(kind)
        decided = plan.with_bits(dict.fromkeys((module.unit for module in plan.modules), bits), 32, symmetric)
        apply_plan(model, decided)
        errors, sizes = dict.fromkeys(found, 0.0), dict.fromkeys(found, 0.0)
        for module in plan.modules:
            before = matrix_of(dense.get_submodule(module.name))
            after = matrix_of(model.get_submodule(module.name).dense())
            errors[module.unit] += float((after - before).square().sum())
            sizes[module.unit] += float(before.square().sum())
        for unit, error in errors.items():
            assert found[unit][bits] == pytest.approx(error / sizes[unit], rel=1e-5)
    assert all(list(errors) == [3, 5, 8] for errors in found.values())


def test_weights_of_zero_have_no_error():
    model = tiny_model("llama")
    for module in view_model(model).plan("block").modules:
        model.get_submodule(module.name).weight.data.zero_()
    found = relative_errors(model, view_model(model).plan("block"), Recipe(bits=(4,)))
    assert set(found) == {f"model.layers.{index}" for index in range(3)}
    assert all(errors == {4: 0.0} for errors in found.values())


def test_without_schemes_there_is_no_error():
    assert list(rounding_errors(torch.nn.Linear(8, 8), [])) == []
