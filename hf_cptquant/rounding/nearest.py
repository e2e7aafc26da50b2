"""Rounding to nearest (equation 1 of arXiv 2412.03599): the grid spans each group's minimum and maximum."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.utils import logging

from ..grid import QuantizedWeight, fit_grid, quantize
from ..plan import LayerScheme

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it


def round_nearest(weight: Tensor, scheme: LayerScheme, dtype: torch.dtype | None = None) -> QuantizedWeight:
    """Round a weight `[out_features, in_features]` to the nearest integers of its grid.

    Args:
        dtype: of the scales; by default the weight's.
    """
    return quantize(weight, *fit_grid(weight, scheme, dtype), scheme)


def warn_of_unreached(layers: Iterable[str]) -> None:
    """Say which layers of a block data cannot decide on, as no token comes there: experts, for example."""
    logger.warning(f"{', '.join(layers)}: no calibration token came there; rounded to nearest.")
