"""What compensation leaves of rounding errors: the decomposition against least squares, and real GPTQ."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import TINY_CONFIGS, tiny_model
from transformers.pytorch_utils import Conv1D

from hf_cptquant.model_view import find_blocks, view_model
from hf_cptquant.plan import LayerScheme
from hf_cptquant.rounding import gptq, round_nearest
from hf_cptquant.sensitivity import compensation
from hf_cptquant.sensitivity.compensation import input_products, share_left, shares_left


def correlated(features: int, tokens: int, directions: int) -> torch.Tensor:
    """Inputs `[tokens, features]` that mostly lie in few directions, in float64."""
    draw = torch.Generator().manual_seed(directions)
    strong = torch.randn(tokens, directions, generator=draw, dtype=torch.float64)
    mixing = torch.randn(directions, features, generator=draw, dtype=torch.float64)
    return strong @ mixing + 0.1 * torch.randn(tokens, features, generator=draw, dtype=torch.float64)


def test_share_is_what_the_smaller_inputs_cannot_express(monkeypatch):
    """Each input, but for its projection on all smaller ones, by least squares."""
    monkeypatch.setattr(compensation, "DAMPING", 0.0)
    inputs = correlated(24, 400, 6)
    by_size = inputs[:, inputs.square().sum(0).argsort()]
    left = 0.0
    for column in range(24):
        others, target = by_size[:, :column], by_size[:, column]
        if column:
            target = target - others @ torch.linalg.lstsq(others, target.unsqueeze(1)).solution.squeeze(1)
        left += float(target.square().sum())
    product = (inputs.t() @ inputs).float()
    assert share_left(product) == pytest.approx(left / float(inputs.square().sum()), rel=1e-3)


@pytest.mark.parametrize("directions", [2, 8, 32, 64])
def test_gptq_leaves_about_that_share(directions):
    inputs = correlated(64, 1000, directions).float()
    product = inputs.t() @ inputs
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    scheme = LayerScheme(4, -1)
    (compensated,) = gptq.round_together([weight], [scheme], product)
    errors = []
    for found in (compensated, round_nearest(weight, scheme)):
        change = (found.integers.float() * found.scale) - weight
        errors.append(float(((change @ product) * change).sum()))
    assert share_left(product) == pytest.approx(errors[0] / errors[1], rel=0.25, abs=0.02)  # the damping is a hundredth


def test_inputs_of_few_directions_are_decomposed_in_float64(monkeypatch):
    """Whole numbers, so that XXᵀ is exact; of rank 3, so that float32 comes to negative pivots."""
    monkeypatch.setattr(compensation, "DAMPING", 1e-7)
    inputs = torch.randint(-8, 9, (3, 64), generator=torch.Generator().manual_seed(0)).float()
    product = inputs.t() @ inputs
    order = product.diagonal().argsort(stable=True)
    damped = product[order][:, order] + 1e-7 * product.diagonal().mean() * torch.eye(64)
    assert int(torch.linalg.cholesky_ex(damped)[1]) > 0
    pivots = np.diag(np.linalg.cholesky(damped.double().numpy())) ** 2
    assert share_left(product) == pytest.approx(pivots.sum() / float(damped.diagonal().sum()), rel=1e-5)


def test_independent_inputs_leave_everything():
    assert share_left(torch.diag(torch.rand(16) + 1)) == pytest.approx(1)
    assert share_left(torch.zeros(16, 16)) == 1.0


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_every_module_of_a_model_has_a_share(kind, tokens):
    model = tiny_model(kind)
    plan = view_model(model).plan("module")
    batch = {"input_ids": tokens, **({"labels": tokens} if kind == "t5" else {})}
    inputs: dict[str, torch.Tensor] = {}

    def keep(name, _layer, args):
        inputs.setdefault(name, args[0].double())

    for module in plan.modules:
        model.get_submodule(module.name).register_forward_pre_hook(partial(keep, module.name))
    with torch.no_grad():
        model(**batch)
    found = shares_left(
        model,
        plan,
        [{name: part[:4] for name, part in batch.items()}, {name: part[4:] for name, part in batch.items()}],
    )
    assert found.keys() == {module.name for module in plan.modules}
    for name, share in found.items():
        rows = inputs[name].flatten(0, -2)
        assert share == pytest.approx(share_left(rows.t() @ rows), rel=1e-2)
        assert 0 < share < 1


@pytest.mark.parametrize("kind", TINY_CONFIGS)
@torch.no_grad()
def test_products_are_those_of_the_inputs(kind):
    model = tiny_model(kind).double()
    blocks = [model.get_submodule(find_blocks(model)[0])]
    layers = {
        name: module for name, module in blocks[0].named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))
    }
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
        for name, layer in layers.items()
    ]
    calls = []
    hook = blocks[0].register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    for start in (1, 40):
        ids = torch.arange(start, start + 20).view(2, 10)
        model(input_ids=ids, **({"labels": ids} if kind == "t5" else {}))
    for handle in (*hooks, hook):
        handle.remove()
    found = input_products(layers, [partial(blocks[0], *args, **kwargs) for args, kwargs in calls])
    assert sorted(name for names, _ in found for name in names) == sorted(layers)
    for names, product in found:
        for name in names:
            rows = torch.cat([inputs.flatten(0, -2) for inputs in seen[name]])
            assert torch.allclose(product.double(), rows.t() @ rows, rtol=1e-4, atol=1e-4)
    assert max(len(names) for names, _ in found) == (1 if kind == "gpt2" else 3)  # q, k and v
