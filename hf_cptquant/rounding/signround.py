"""Rounding tuned by signed gradients, block by block (SignRound, arXiv 2309.05516).

A weight W goes to s·clamp(round(W/s + V)): the offset V ∈ [−½, ½] of each weight decides whether it is rounded up or
down, and the range of each group is shrunk by a factor, which trades the largest weights for finer steps. Both are
tuned so that the block, called with what the rounded blocks before it give, gives what the original block gave in the
original model. Rounding counts as the identity in the backward pass. Steps have one size, for which the sign of the
gradient is enough; it falls linearly to 0 and allows an offset to cross its whole interval once.

Errors count by how much the loss minds them (`curvature.py`), and relative to the size of the output for their token:
the first token of a text, on which attention rests, is a hundred times as large as the others in the middle of
SmolLM2, and would otherwise decide alone. (The gradient of the loss is the same for small and for large tokens, that
one aside; but to let only such outliers count relatively was no better at 3.5 and at 4.5 bits.)

Beginning with what GPTQ gives lowers the loss further on the calibration data, and not on other text (SmolLM2-135M,
3 and 4 bits), so the beginning is rounding to nearest.

The iterate with the least loss is kept. As calls differ in how hard they are, a loss counts relative to that of
rounding to nearest on the same call, and the best and the last iterate are in the end compared with rounding to nearest
on all calls: the result is never worse on the calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..grid import QuantizedWeight, extremes, grid_between, integer_range
from ..plan import LayerScheme
from ..sensitivity.prefix import Call
from .nearest import warn_of_unreached

SMALLEST = torch.finfo(torch.float32).tiny
LEAST_RANGE = 0.5  # share of a group's range that it may be shrunk to


class TunableGrid(nn.Module):
    """A weight on its grid, as a function of what is tuned.

    Args:
        matrix: `[out_features, in_features]`.
        scheme: a packed scheme.
        dtype: of the scales, and of the weight when it is dequantized; by default the matrix's.

    Attributes:
        offset: V, float32 `[out_features, groups, group size]`.
        shrinkage: factors of the ranges' ends, float32 `[out_features, groups, 2]`; symmetric grids have one end.
    """

    def __init__(self, matrix: Tensor, scheme: LayerScheme, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._matrix, self._scheme, self._dtype = matrix, scheme, dtype or matrix.dtype
        self._low, self._high = extremes(matrix, scheme)
        self._grouped = matrix.float().view(*self._low.shape, -1)
        self.offset = nn.Parameter(torch.zeros_like(self._grouped))
        self.shrinkage = nn.Parameter(torch.ones(*self._low.shape, 1 if scheme.symmetric else 2, device=matrix.device))

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
        ctx.save_for_backward(grouped, scale, steps.bfloat16(), inside)  # exact: at most 8 bits and a sign
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
        Layer → its integers. A layer that no call reaches is rounded to nearest, which is logged.
    """
    layers = {name: block.get_submodule(name) for name in schemes}
    transposed = {name for name, layer in layers.items() if isinstance(layer, Conv1D)}
    grids = nn.ModuleDict()
    for name, layer in layers.items():
        weight = layer.weight.detach()
        matrix = (weight.t() if name in transposed else weight).contiguous()
        grids[name.replace(".", "/")] = TunableGrid(matrix, schemes[name], dtype)

    def rounded() -> dict[str, Tensor]:
        weights = {name: grids[name.replace(".", "/")]() for name in layers}
        return {f"{name}.weight": w.t() if name in transposed else w for name, w in weights.items()}

    def loss_of(index: int, weights: Mapping[str, Tensor]) -> Tensor:
        args, kwargs = calls[index]
        output = functional_call(block, weights, args, kwargs)
        first = output[0] if isinstance(output, tuple) else output
        target = targets[index].float()
        off = first.float() - target
        squares = (off if curvature is None else off @ curvature).mul(off).sum(-1)
        return (squares / target.square().mean(-1).clamp(min=SMALLEST)).mean()

    @torch.no_grad()
    def losses() -> list[float]:
        weights = rounded()
        return [loss_of(index, weights).item() for index in range(len(calls))]

    def state() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in grids.parameters()]

    parameters = list(grids.parameters())
    nearest = [parameter.detach().ravel()[0].clone().expand_as(parameter) for parameter in parameters]  # all 0, all 1
    of_nearest = losses()
    candidates = [(of_nearest, nearest)]
    least, best = math.inf, nearest
    reached: set[str] = set()
    generator = torch.Generator().manual_seed(seed)
    epochs = range(math.ceil(iterations / len(calls)))
    order = [index for _ in epochs for index in torch.randperm(len(calls), generator=generator).tolist()]
    for iteration, index in enumerate(order[:iterations]):
        with torch.enable_grad():
            loss = loss_of(index, rounded())
            gradients: Sequence[Tensor | None] = [None] * len(parameters)
            if loss.requires_grad:  # it may depend on none of the layers
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        relative = loss.item() / of_nearest[index] if of_nearest[index] else 1.0
        if relative < least:
            least, best = relative, state()
        reached |= {name for name, found in zip(layers, gradients[::2], strict=True) if found is not None}
        step = (1 - iteration / iterations) / iterations
        _descend(grids, gradients, step)
    if iterations and (unreached := [name for name in layers if name not in reached]):
        warn_of_unreached(unreached)
    for values in (best, state()) if iterations else ():
        _restore(parameters, values)
        candidates.append((losses(), values))
    _restore(parameters, min(candidates, key=lambda candidate: sum(candidate[0]))[1])
    return {name: grids[name.replace(".", "/")].quantized() for name in layers}


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
