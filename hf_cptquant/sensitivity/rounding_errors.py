"""What rounding to nearest would do to the weights: ΔW of a layer, and its size relative to the weights of a unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import ranks
from ..grid import dequantize, fit_grid, quantize
from ..modules import matrix_of
from ..plan import BitPlan, LayerScheme, scheme_for
from ..recipe import Recipe


def rounding_errors(module: nn.Module, schemes: Sequence[LayerScheme]) -> Iterator[Tensor]:
    """ΔW of rounding to nearest under each scheme, float32 `[out_features, in_features]`, one at a time."""
    with align_module_device(module):
        weight = module.weight.detach()
    matrix = matrix_of(type(module), weight).contiguous()
    for scheme in schemes:
        rounded = quantize(matrix, *fit_grid(matrix, scheme), scheme)
        yield dequantize(rounded.integers, rounded.scale, rounded.zero_point).float() - matrix.float()


@torch.no_grad()
def relative_errors(model: PreTrainedModel, plan: BitPlan, recipe: Recipe) -> dict[str, dict[int, float]]:
    """Unit → bit width → ‖W − Q(W)‖² / ‖W‖² over all weights of the unit (R of equations 4 and 5).

    Args:
        model: dense.
        plan: the units; its bits are not read.
        recipe: `bits`, `bits_override`, `group_size`, `symmetric`.
    """
    widths = recipe.packed_bits
    squares: dict[str, list[float]] = {}
    for module in logging.tqdm(plan.modules, desc="Rounding errors", disable=ranks.rank() > 0):
        schemes = [scheme_for(bits, module.in_features, recipe.group_size, recipe.symmetric) for bits in widths]
        dense = model.get_submodule(module.name)
        with align_module_device(dense):
            size = float(dense.weight.float().square().sum())
        found = [size, *(float(change.square().sum()) for change in rounding_errors(dense, schemes))]
        known = squares.get(module.unit, [0.0] * len(found))
        squares[module.unit] = [a + b for a, b in zip(known, found, strict=True)]
    return {
        unit: {bits: error / size if size else 0.0 for bits, error in zip(widths, errors, strict=True)}
        for unit, (size, *errors) in squares.items()
    }
