"""Rounding methods: a weight alone (`nearest`), or the layers of a block together, by name.

Those of a block are called with the block, the packed scheme of each of its layers (by name within the block), the
block's calls behind the rounded blocks before it, the outputs that the original block gave in the original model, and
the recipe; they give the integers of each layer.
"""

from __future__ import annotations

from collections.abc import Callable

from ..grid import QuantizedWeight
from . import gptq, signround
from .nearest import round_nearest

__all__ = ["BLOCK_ROUNDINGS", "round_nearest"]

BLOCK_ROUNDINGS: dict[str, Callable[..., dict[str, QuantizedWeight]]] = {
    "gptq": lambda block, schemes, calls, _targets, _recipe: gptq.round_block(block, schemes, calls),
    "signround": lambda block, schemes, calls, targets, recipe: signround.round_block(
        block, schemes, calls, targets, recipe.iters, recipe.seed
    ),
}
