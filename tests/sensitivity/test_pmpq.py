"""PMPQ against the literal Algorithm 2, and its quantile against torch's."""

import pytest
import torch
from conftest import TINY_CONFIGS, tiny_model

from hf_cptquant.model_view import view_model
from hf_cptquant.sensitivity import METHODS
from hf_cptquant.sensitivity.pmpq import magnitude_quantile, pruned
from sensitivity.test_tdmpq import calibration_for, recipe_for

LEVELS = (0.25, 0.6)


@torch.no_grad()
def literal_scores(model, plan, batches, levels) -> dict[str, float]:
    """Algorithm 2 as written: clone the model, mask one unit by `torch.quantile`, evaluate, for every level."""

    def mean_loss(candidate) -> float:
        labelled = [b if "labels" in b else {**b, "labels": predictions[i]} for i, b in enumerate(batches)]
        total = sum(candidate(**b).loss.double().item() * len(next(iter(b.values()))) for b in labelled)
        return total / sum(len(next(iter(b.values()))) for b in batches)

    predictions = [None if "labels" in batch else model(**batch).logits.argmax(-1) for batch in batches]
    base = mean_loss(model)
    scores = {}
    for unit in dict.fromkeys(module.unit for module in plan.modules):
        weights = [model.get_submodule(module.name).weight for module in plan.modules if module.unit == unit]
        originals = [weight.clone() for weight in weights]
        flattened = torch.cat([weight.abs().flatten() for weight in weights])
        rises = []
        for level in levels:
            threshold = torch.quantile(flattened, level)
            for weight in weights:
                weight.mul_((weight.abs() > threshold).float())
            rises.append(mean_loss(model) - base)
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
        scores[unit] = sum(rises) / len(rises)
    return scores


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_scores_equal_the_literal_algorithm(kind, tokens, minilm):
    model = tiny_model(kind)
    recipe = recipe_for(kind, tokens, method="pmpq", sparsity_levels=LEVELS)
    plan = view_model(model).plan("group")
    calibration = calibration_for(model, recipe, minilm)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = METHODS["pmpq"](model, plan, calibration, recipe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected = literal_scores(model, plan, calibration.batches, LEVELS)
    assert max(map(abs, expected.values())) > 1e-3  # pruning matters, so the comparison means something
    assert table.raw == pytest.approx(expected, abs=1e-6)
    assert table.method == "pmpq"


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mask_is_that_of_torch_quantile(share, dtype):
    weights = [torch.randn(37, 11).to(dtype), torch.randn(53).to(dtype)]
    flattened = torch.cat([weight.abs().flatten() for weight in weights])
    expected = flattened.double() > torch.quantile(flattened.double(), share)
    assert torch.equal(flattened > magnitude_quantile(weights, share), expected)


def test_more_weights_than_older_versions_of_torch_quantile_take():
    weight = torch.arange(2**24 + 3, dtype=torch.float32)
    assert magnitude_quantile([weight], 0.5).item() == 2**23 + 1


def test_the_share_is_of_all_weights_of_the_unit_together():
    small, large = torch.nn.Linear(10, 10), torch.nn.Linear(10, 10)
    small.weight.data = torch.rand(10, 10) * 0.01 + 0.001
    large.weight.data = torch.rand(10, 10) + 1
    with pruned({"small": small, "large": large}, 0.5):
        assert small.weight.count_nonzero() == 0
        assert large.weight.count_nonzero() == 100
