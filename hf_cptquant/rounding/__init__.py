"""Rounding methods: a weight alone (`nearest`), or the layers of a block together, by name.

Those of a block are called with the block, the packed scheme of each of its layers (by name within the block), the
block's calls behind the rounded blocks before it, the outputs that the original block gave in the original model, and
a `Tuning`; they give the integers of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..grid import QuantizedWeight
from ..sensitivity.prefix import Call
from . import clipping, gptq, signround
from .curvature import curvature_of, with_plain_squares
from .nearest import round_nearest

__all__ = ["BLOCK_ROUNDINGS", "Tuning", "round_nearest"]


@dataclass(frozen=True)
class Tuning:
    """What the rounding of one block is told beside its calls.

    Attributes:
        dtype: of the scales.
        iterations, seed: of tuning.
        originals: the block's calls in the original model, if they are known.
        gradients: of the loss by the block's outputs in the first of these, if they are known.
    """

    dtype: torch.dtype
    iterations: int
    seed: int
    originals: Sequence[Call] = ()
    gradients: Sequence[Tensor] = ()

    @property
    def curvature(self) -> Tensor | None:
        """Of the loss by the block's outputs, float32 `[features, features]`, if it is known."""
        return with_plain_squares(curvature_of(self.gradients)) if self.gradients else None


BLOCK_ROUNDINGS: dict[str, Callable[..., dict[str, QuantizedWeight]]] = {
    "clipped": lambda block, schemes, calls, _targets, tuning: clipping.round_by_inputs(
        clipping.round_together, block, schemes, calls, tuning.dtype
    ),
    "gptq": lambda block, schemes, calls, _targets, tuning: clipping.round_by_inputs(
        gptq.round_together, block, schemes, calls, tuning.dtype, tuning.originals, tuning.gradients
    ),
    "signround": lambda block, schemes, calls, targets, tuning: signround.round_block(
        block, schemes, calls, targets, tuning.iterations, tuning.seed, tuning.curvature, tuning.dtype
    ),
}
