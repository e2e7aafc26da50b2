"""Where to end the range of a group: the largest weights are given up for finer steps of all the others.

A range from the minimum to the maximum (equation 1 of arXiv 2412.03599) cuts nothing off. What a narrower one is worth
depends on the inputs. An output is off by Σ(ŵ_i − w_i)·x_i, and if inputs are taken for independent, the square of
that is Σ E[x_i²]·(ŵ_i − w_i)² on average. The factor with the least of it is searched for each group; llama.cpp
(importance matrices) and SignRoundV2 (arXiv 2512.04746) begin alike. With equal weights for all inputs the search would
do harm: large weights often meet inputs that matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..grid import dequantize, extremes, grid_between, quantize
from ..plan import LayerScheme

FACTORS = tuple(1 - step / 40 for step in range(21))  # from the whole range down to half of it


@torch.no_grad()
def best_factors(weight: Tensor, scheme: LayerScheme, importance: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """How far to narrow the range of each group.

    Args:
        weight: `[out_features, in_features]`.
        scheme: a packed scheme.
        importance: float32 `[in_features]`, the mean square of each input, or anything in proportion to it.
        dtype: of the scales; by default the weight's.

    Returns:
        float32 `[out_features, groups]`, one of `FACTORS` for each group, the largest of equal ones.

    Raises:
        ModelError, PlanError: as `fit_grid`.
    """
    low, high = extremes(weight, scheme)
    least = torch.full_like(low, torch.inf)
    best = torch.ones_like(low)
    for factor in FACTORS:
        scale, zero_point = grid_between(low * factor, high * factor, scheme, dtype or weight.dtype)
        rounded = quantize(weight, scale, zero_point, scheme)
        change = dequantize(rounded.integers, scale, zero_point).float().sub_(weight)
        error = change.square_().mul_(importance).view(*low.shape, -1).sum(-1)
        best.masked_fill_(error < least, factor)
        least = torch.minimum(least, error)
    return best
