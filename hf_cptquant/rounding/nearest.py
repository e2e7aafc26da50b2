"""Rounding to nearest (equation 1 of arXiv 2412.03599): the grid spans each group's minimum and maximum."""

from __future__ import annotations

import torch
from torch import Tensor

from ..grid import QuantizedWeight, fit_grid, quantize
from ..plan import LayerScheme


def round_nearest(weight: Tensor, scheme: LayerScheme, dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Round a weight `[out_features, in_features]` to the nearest integers of its grid.

    Args:
        dtype: of the scales; by default the weight's.
    """
    return quantize(weight, *fit_grid(weight, scheme, dtype), scheme)
