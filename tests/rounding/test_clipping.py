"""Narrowed ranges against a search by brute force in float64."""

import numpy as np
import pytest
import torch

from hf_cptquant.grid import integer_range
from hf_cptquant.plan import LayerScheme
from hf_cptquant.rounding.clipping import FACTORS, best_factors


def drawn(out_features=6, in_features=64) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with outliers, and the importance of its inputs."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=draw)
    weight[:, ::16] *= 4
    return weight, torch.rand(in_features, generator=draw) ** 4


def error_of(group: np.ndarray, importance: np.ndarray, factor: float, bits: int, symmetric: bool) -> float:
    """Σ importance·(ŵ − w)² of a group whose range is narrowed, by equation 1 and its form without a zero point."""
    smallest, largest = integer_range(bits)
    low, high = factor * min(group.min(), 0.0), factor * max(group.max(), 0.0)
    if symmetric:
        scale, zero = max(-low, high) / -smallest * (-1 if high > -low else 1), 0
    else:
        scale = (high - low) / (largest - smallest)
        zero = np.clip(smallest - np.round(low / scale), smallest, largest)
    levels = np.clip(np.round(group / scale) + zero, smallest, largest)
    return float((importance * ((levels - zero) * scale - group) ** 2).sum())


@pytest.mark.parametrize("scheme", [LayerScheme(4, 16), LayerScheme(2, 32, False), LayerScheme(3, -1)], ids=str)
def test_no_factor_would_be_better(scheme):
    weight, importance = drawn()
    found = best_factors(weight, scheme, importance)
    groups = scheme.groups(64)
    assert found.shape == (6, groups)
    weights = importance.double().view(groups, -1).numpy()
    for row, factors in zip(weight.double().view(6, groups, -1).numpy(), found.tolist(), strict=True):
        for group, of_group, factor in zip(row, weights, factors, strict=True):
            errors = [error_of(group, of_group, each, scheme.bits, scheme.symmetric) for each in FACTORS]
            assert error_of(group, of_group, factor, scheme.bits, scheme.symmetric) <= min(errors) * 1.001
    assert found.min() < 0.9 < found.max()


def test_the_inputs_decide():
    """The outlier is kept where its input is large, and cut off where it is small."""
    weight = torch.full((1, 16), 0.1) * torch.linspace(-1, 1, 16)
    weight[0, 3] = 1.0
    kept, cut = torch.ones(16), torch.ones(16)
    cut[3] = 0
    assert best_factors(weight, LayerScheme(4, 16), kept).item() > 0.9
    assert best_factors(weight, LayerScheme(4, 16), cut).item() == min(FACTORS)


@pytest.mark.parametrize("importance", [torch.zeros(64), torch.ones(64)])
def test_equal_errors_leave_the_range_whole(importance):
    weight = drawn()[0] if not importance.any() else torch.zeros(6, 64)
    assert torch.equal(best_factors(weight, LayerScheme(4, 16), importance), torch.ones(6, 4))
