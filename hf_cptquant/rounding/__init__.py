"""Rounding methods: a weight alone (`nearest`), or the layers of a block together, by name.

Those of a block are called with the block, the packed scheme of each of its layers (by name within the block), the
block's calls behind the rounded blocks before it, the outputs that the original block gave in the original model, and
a `Tuning`; they give the integers of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..grid import QuantizedWeight
from ..plan import LayerScheme
from ..sensitivity.prefix import Call
from . import clipping, gptq, signround
from .nearest import round_nearest

__all__ = ["BLOCK_ROUNDINGS", "Tuning", "round_nearest"]


@dataclass(frozen=True)
class Tuning:
    """What the rounding of one block is told beside its calls.

    Attributes:
        dtype: of the scales.
        iterations, seed: of tuning.
        curvature: of the loss by the block's outputs, float32 `[features, features]`, if it is known.
    """

    dtype: torch.dtype
    iterations: int
    seed: int
    curvature: Tensor | None = None


def _by_inputs(
    together: clipping.Together,
    block: nn.Module,
    schemes: Mapping[str, LayerScheme],
    calls: Sequence[Call],
    _targets: Sequence[Tensor],
    tuning: Tuning,
) -> dict[str, QuantizedWeight]:
    return clipping.round_by_inputs(together, block, schemes, calls, tuning.dtype)


BLOCK_ROUNDINGS: dict[str, Callable[..., dict[str, QuantizedWeight]]] = {
    "clipped": partial(_by_inputs, clipping.round_together),
    "gptq": partial(_by_inputs, gptq.round_together),
    "signround": lambda block, schemes, calls, targets, tuning: signround.round_block(
        block, schemes, calls, targets, tuning.iterations, tuning.seed, tuning.curvature, tuning.dtype
    ),
}
