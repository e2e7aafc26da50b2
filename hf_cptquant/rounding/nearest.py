"""Rounding to nearest (equation 1 of arXiv 2412.03599): the grid spans each group's minimum and maximum."""

from __future__ import annotations

from torch import Tensor

from ..grid import QuantizedWeight, fit_grid, quantize
from ..plan import LayerScheme


def round_nearest(weight: Tensor, scheme: LayerScheme) -> QuantizedWeight:
    """Round a weight `[out_features, in_features]` to the nearest integers of its grid."""
    return quantize(weight, *fit_grid(weight, scheme), scheme)
