"""Where to end the range of a group: the largest weights are cut off for finer steps of all the others.

A range from the minimum to the maximum (equation 1 of arXiv 2412.03599) cuts nothing off. What a narrower one is worth
depends on the inputs. An output is off by Σ(ŵ_i − w_i)·x_i, and if inputs are taken for independent, the square of
that is Σ E[x_i²]·(ŵ_i − w_i)² on average. The factor with the least of it is searched for each group; llama.cpp
(importance matrices) and SignRoundV2 (arXiv 2512.04746) begin alike. With equal weights for all inputs the search would
do harm: large weights often meet inputs that matter.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..grid import QuantizedWeight, dequantize, extremes, grid_between, quantize
from ..modules import matrix_of, set_dequantized
from ..plan import LayerScheme
from ..sensitivity.compensation import Inputs, input_products, inputs_in, sharing
from ..sensitivity.prefix import Call
from .curvature import curvatures_of_layers
from .nearest import warn_of_unreached

# Weights that share their inputs, their schemes, the products XXᵀ of these inputs, the dtype of scales, and, if they
# are known, how the inputs have drifted from the original model's (`InputDrifts`) and how much the loss minds errors
# in the outputs of each weight (`curvatures_of_layers`) → the integers.
Together = Callable[
    [Sequence[Tensor], Sequence[LayerScheme], Tensor, torch.dtype | None, Tensor | None, Sequence[Tensor | None]],
    list[QuantizedWeight],
]

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


def clipped_grid(
    weight: Tensor, scheme: LayerScheme, importance: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of the best ranges, as `fit_grid` gives those of whole ones; arguments as of
    `best_factors`."""
    factors = best_factors(weight, scheme, importance, dtype)
    low, high = extremes(weight, scheme)
    return grid_between(low * factors, high * factors, scheme, dtype or weight.dtype)


def round_together(
    matrices: Sequence[Tensor],
    schemes: Sequence[LayerScheme],
    product: Tensor,
    dtype: torch.dtype | None = None,
    _drift: Tensor | None = None,
    _curvatures: Sequence[Tensor | None] = (),
) -> list[QuantizedWeight]:
    """Round weights `[out_features, in_features]` to nearest on their narrowed ranges."""
    importance = product.diagonal()
    return [
        quantize(matrix, *clipped_grid(matrix, scheme, importance, dtype), scheme)
        for matrix, scheme in zip(matrices, schemes, strict=True)
    ]


@torch.no_grad()
def round_by_inputs(
    together: Together,
    block: nn.Module,
    schemes: Mapping[str, LayerScheme],
    calls: Sequence[Call],
    dtype: torch.dtype | None = None,
    originals: Sequence[Call] = (),
    gradients: Sequence[Tensor] = (),
) -> dict[str, QuantizedWeight]:
    """Round the layers of a block, each by its own inputs, behind the rounded layers before it.

    Args:
        together: how to round layers that share their inputs.
        block: dense; its weights become what they are rounded to.
        schemes: name of a layer within the block → its packed scheme.
        calls: arguments of the block.
        dtype: of the scales; by default the block's.
        originals: the same calls in the original model, if the drift of the inputs is to count.
        gradients: of the loss by the outputs of the first of these, if it is to count what the loss minds.

    Returns:
        Layer → its integers. A layer that no call reaches is rounded to nearest, which is logged.

    Raises:
        ModelError: an input holds NaN or infinity.
    """
    layers = {name: block.get_submodule(name) for name in schemes}
    passes = [partial(block, *args, **kwargs) for args, kwargs in calls]
    original = copy.deepcopy(block) if originals else block
    wanted = [partial(original, *args, **kwargs) for args, kwargs in originals]
    curvatures = curvatures_of_layers(original, layers, originals, gradients)
    rounded: dict[str, QuantizedWeight] = {}
    for stage in stages(layers, passes[0]):
        drifts = InputDrifts({name: original.get_submodule(name) for name in stage}, wanted)
        found = input_products({name: layers[name] for name in stage}, passes, drifts.add if wanted else None)
        for names, product in found:
            matrices = [matrix_of(type(layers[name]), layers[name].weight.detach()).contiguous() for name in names]
            own = [schemes[name] for name in names]
            minded = [curvatures.get(name) for name in names]
            integers = together(matrices, own, product, dtype, drifts.sums.get(names[0]), minded)
            for name, each in zip(names, integers, strict=True):
                rounded[name] = each
                set_dequantized(layers[name], each)
            if not bool(product.any()):
                warn_of_unreached(names)
    return {name: rounded[name] for name in schemes}


def stages(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[list[str]]:
    """The layers of a block in the order in which they are called: those that share their inputs at a time, and so the
    experts, whose names differ by a number in the middle. Those that this call does not reach come last."""
    of_kind: dict[str, list[str]] = {}
    reached = sharing(inputs_in(layers, run))
    for names in reached:
        of_kind.setdefault(re.sub(r"\d+\.", "", names[0]), []).extend(names)
    rest = [name for name in layers if not any(name in names for names in reached)]
    return [stage for stage in (*of_kind.values(), rest) if stage]


class InputDrifts:
    """(X − X̂)X̂ᵀ of the inputs X̂ of layers, where the original model gives them X; gathered call by call.

    Experts, to which other tokens may come than in the original model, are left out: their inputs are lists of tokens,
    without the dimension of the batch.

    Args:
        layers: of the original block, by name.
        originals: run it with what the original model calls it with.

    Attributes:
        sums: float32 `[in_features, in_features]` by the first name of those that share their inputs.
    """

    def __init__(self, layers: Mapping[str, nn.Module], originals: Sequence[Callable[[], Any]]) -> None:
        self._layers, self._originals = layers, originals
        self.sums: dict[str, Tensor] = {}

    def add(self, number: int, found: Inputs) -> None:
        """Count one call, with the inputs that it gave behind rounded layers."""
        wanted = inputs_in(self._layers, self._originals[number])
        for name, *_ in sharing(found):
            for inputs, aim in zip(found[name], wanted.get(name, ()), strict=False):
                if inputs.dim() > 2 and inputs.shape == aim.shape:
                    rows = inputs.flatten(0, -2).float()
                    product = (aim.flatten(0, -2).float() - rows).t() @ rows
                    self.sums[name] = self.sums[name].add_(product) if name in self.sums else product
