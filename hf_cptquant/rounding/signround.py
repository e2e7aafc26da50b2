"""Rounding tuned by signed gradients, block by block (SignRound, arXiv 2309.05516), from where GPTQ ends.

A weight W goes to s·clamp(round(W/s + V)): the offset V ∈ [−½, ½] of each weight decides whether it is rounded up or
down, and the range of each group is shrunk by a factor, which trades the largest weights for finer steps. Both are
tuned so that the block, called with what the rounded blocks before it give, gives what the original block gave in the
original model. Rounding counts as the identity in the backward pass. Steps have one size, for which the sign of the
gradient is enough; it falls linearly to 0.

W are not the weights themselves but what GPTQ makes of them (`gptq.compensated`), with its ranges, so that tuning
begins with what GPTQ gives: signs of gradients move all weights alike and hardly find errors that cancel, which GPTQ
solves for, but know the whole block, where GPTQ knows one layer.

Errors count by how much the loss minds them (`curvature.py`), and relative to the size of the output for their token:
the first token of a text, on which attention rests, is a hundred times as large as the others in the middle of
SmolLM2, and would otherwise decide alone.

The iterate with the least loss is kept. As calls differ in how hard they are, a loss counts relative to that of
rounding to nearest on the same call, and the first, the best and the last iterate are in the end compared with rounding
to nearest on all calls: the result is never worse on the calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..grid import QuantizedWeight, dequantize, extremes, grid_between, integer_range
from ..modules import matrix_of, weight_of
from ..plan import LayerScheme
from ..sensitivity.compensation import input_products
from ..sensitivity.prefix import Call
from . import gptq
from .clipping import FACTORS, best_factors, narrowed_grid
from .nearest import round_nearest

LEAST_SIZE = 1e-6  # of an output, as a share of their mean square, that errors count relative to
LEAST_RANGE = min(FACTORS)  # of a group, that it may be shrunk to
TRAVEL = 0.125  # sum of all steps; more would lose what GPTQ has solved for


class TunableGrid(nn.Module):
    """A weight on its grid, as a function of what is tuned.

    Args:
        matrix: `[out_features, in_features]`.
        scheme: a packed scheme.
        dtype: of the scales, and of the weight when it is dequantized; by default the matrix's.
        factors: to begin with, of the ranges' ends, `[out_features, groups]`; by default 1.
        aims: what is rounded, in the shape of the matrix; by default the matrix itself.

    Attributes:
        offset: V, float32 `[out_features, groups, group size]`.
        shrinkage: factors of the ranges' ends, float32 `[out_features, groups, 2]`; symmetric grids have one end.
    """

    def __init__(
        self,
        matrix: Tensor,
        scheme: LayerScheme,
        dtype: torch.dtype | None = None,
        factors: Tensor | None = None,
        aims: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._matrix, self._scheme, self._dtype = matrix, scheme, dtype or matrix.dtype
        self._low, self._high = extremes(matrix, scheme)
        self._grouped = (matrix if aims is None else aims).float().reshape(*self._low.shape, -1)
        self.offset = nn.Parameter(torch.zeros_like(self._grouped))
        ends = (torch.ones_like(self._low) if factors is None else factors).unsqueeze(-1)
        self.shrinkage = nn.Parameter(ends.repeat(1, 1, 1 if scheme.symmetric else 2))

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        low, high = self._low * self.shrinkage[..., 0], self._high * self.shrinkage[..., -1]
        return grid_between(low, high, self._scheme, self._dtype)

    def forward(self) -> Tensor:
        """The weight as it will be dequantized, `[out_features, in_features]` in the matrix's dtype."""
        scale, zero_point = self._grid()
        weight = _Rounded.apply(self._grouped, self.offset, scale.float().unsqueeze(-1), zero_point, self._scheme.bits)
        return weight.view_as(self._matrix).to(self._dtype).to(self._matrix.dtype)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The integers."""
        scale, zero_point = self._grid()
        wide = scale.float().unsqueeze(-1)
        integers, _ = _rounded(self._grouped, self.offset, wide, zero_point, self._scheme.bits)
        return QuantizedWeight(integers.to(torch.int8).view_as(self._matrix), scale, zero_point, self._scheme)


def _rounded(
    grouped: Tensor, offset: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """Integers (as float32), and whether each is within the grid's range before it is clamped."""
    free = torch.addcdiv(offset, grouped, scale).round_()
    if zero_point is not None:
        free += zero_point.unsqueeze(-1)
    integers = free.clamp(*integer_range(bits))
    return integers, integers == free


class _Rounded(torch.autograd.Function):
    """(clamp(round(w/s + V) + z) − z)·s, with the gradient of the identity for the rounding.

    A function of its own, because it runs at every step for every weight, and autograd would go over them three times
    as often: ∂ŵ/∂V = s within the range and 0 outside, ∂ŵ/∂s = q − z − (w/s within the range, 0 outside).
    """

    @staticmethod
    def forward(
        ctx: Any, grouped: Tensor, offset: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
    ) -> Tensor:
        steps, inside = _rounded(grouped, offset, scale, zero_point, bits)
        if zero_point is not None:
            steps -= zero_point.unsqueeze(-1)
        ctx.save_for_backward(grouped, scale, steps, inside)
        return steps * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        grouped, scale, steps, inside = ctx.saved_tensors
        of_scale = (gradient * steps).sum(-1, keepdim=True)
        of_offset = (gradient * scale).mul_(inside)
        of_scale -= (of_offset * grouped).sum(-1, keepdim=True) / scale.square()
        return None, of_offset, of_scale, None, None


def round_block(
    block: nn.Module,
    schemes: Mapping[str, LayerScheme],
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    iterations: int,
    seed: int,
    curvature: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, QuantizedWeight]:
    """Round the layers of a block together.

    Args:
        block: dense.
        schemes: name of a layer within the block → its packed scheme.
        calls: arguments of the block.
        targets: the output that each call should give.
        iterations: steps; 0 is rounding to nearest.
        seed: of the order of the calls.
        curvature: C, float32 `[features, features]` of the outputs: an output that is off by Δ counts Δᵀ C Δ; by
            default ‖Δ‖².
        dtype: of the scales; by default the block's.

    Returns:
        Layer → its integers.
    """
    layers = {name: block.get_submodule(name) for name in schemes}
    matrices = {name: matrix_of(type(layer), layer.weight.detach()).contiguous() for name, layer in layers.items()}
    nearest = {name: round_nearest(matrix, schemes[name], dtype) for name, matrix in matrices.items()}
    if not iterations:
        return nearest
    grids = _from_gptq(block, matrices, schemes, calls, targets, dtype)

    def as_parameters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            f"{name}.weight": weight_of(type(layers[name]), weight, layers[name].weight.shape)
            for name, weight in weights.items()
        }

    def rounded() -> dict[str, Tensor]:
        return as_parameters({name: grids[name.replace(".", "/")]() for name in layers})

    def loss_of(index: int, weights: Mapping[str, Tensor]) -> Tensor:
        args, kwargs = calls[index]
        output = functional_call(block, weights, args, kwargs)
        first = output[0] if isinstance(output, tuple) else output
        target = targets[index].float()
        off = first.float() - target
        squares = (off if curvature is None else off @ curvature).mul(off).sum(-1)
        return (squares * _token_weights(target)).mean()

    @torch.no_grad()
    def losses(weights: Mapping[str, Tensor]) -> list[float]:
        return [loss_of(index, weights).item() for index in range(len(calls))]

    def state() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in grids.parameters()]

    plain = {name: dequantize(q.integers, q.scale, q.zero_point).to(matrices[name]) for name, q in nearest.items()}
    of_nearest = losses(as_parameters(plain))
    least, best, first = math.inf, state(), state()
    generator = torch.Generator().manual_seed(seed)
    parameters = list(grids.parameters())
    epochs = range(math.ceil(iterations / len(calls)))
    order = [index for _ in epochs for index in torch.randperm(len(calls), generator=generator).tolist()]
    for iteration, index in enumerate(order[:iterations]):
        with torch.enable_grad():
            loss = loss_of(index, rounded())
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        relative = loss.item() / of_nearest[index] if of_nearest[index] else 1.0
        if relative < least:
            least, best = relative, state()
        step = 2 * TRAVEL * (1 - iteration / iterations) / iterations
        _descend(grids, gradients, step)
    candidates = []
    for values in (first, best, state()):
        _restore(parameters, values)
        candidates.append((sum(losses(rounded())), values))
    found, values = min(candidates, key=lambda candidate: candidate[0])
    if found > sum(of_nearest):
        return nearest
    _restore(parameters, values)
    return {name: grids[name.replace(".", "/")].quantized() for name in layers}


def _token_weights(target: Tensor) -> Tensor:
    """What an error in the output for each token counts, float32 `[…]`: relative to the size of that output."""
    size = target.float().square().mean(-1)
    least = LEAST_SIZE * size.mean()
    return 1 / size.clamp(min=least) if least > 0 else torch.ones_like(size)


def _from_gptq(
    block: nn.Module,
    matrices: Mapping[str, Tensor],
    schemes: Mapping[str, LayerScheme],
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    dtype: torch.dtype | None,
) -> nn.ModuleDict:
    """The grids with GPTQ's ranges, at its integers; for these, too, tokens count relative to their output."""
    grids = nn.ModuleDict()
    layers = {name: block.get_submodule(name) for name in schemes}
    passes = [partial(block, *args, **kwargs) for args, kwargs in calls]
    weights_of_tokens = [_token_weights(target).flatten() for target in targets]
    for names, product in input_products(layers, passes, weights_of_tokens):
        weights, packed = [matrices[name] for name in names], [schemes[name] for name in names]
        pairs = list(zip(weights, packed, strict=True))
        factors = [best_factors(*pair, product.diagonal(), dtype) for pair in pairs]
        ranges = [narrowed_grid(*pair, narrowed, dtype) for pair, narrowed in zip(pairs, factors, strict=True)]
        aims = gptq.compensated(weights, packed, ranges, product)
        for name, pair, narrowed, aim in zip(names, pairs, factors, aims, strict=True):
            grids[name.replace(".", "/")] = TunableGrid(*pair, dtype, narrowed, aim)
    return grids


@torch.no_grad()
def _descend(grids: nn.ModuleDict, gradients: Sequence[Tensor | None], step: float) -> None:
    for (name, parameter), gradient in zip(grids.named_parameters(), gradients, strict=True):
        if gradient is not None:
            limits = (-0.5, 0.5) if name.endswith("offset") else (LEAST_RANGE, 1.0)
            parameter.sub_(gradient.sign(), alpha=step).clamp_(*limits)


@torch.no_grad()
def _restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
