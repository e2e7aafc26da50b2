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

Beside a block, 3 bytes are held for each of its weights: the offset in 16 bits, and the integer of the best iterate.
A layer's rounded weight is there while the layer is called, and made again for its backward pass, which takes the step
of the offsets, too, so that their gradients never are there together. (A layer that is called twice takes two steps.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..forwards import computing
from ..grid import QuantizedWeight, dequantize, extremes, grid_between, integer_range
from ..modules import kind_of, matrix_of
from ..plan import LayerScheme
from ..sensitivity.prefix import Call
from .nearest import round_nearest, warn_of_unreached

SMALLEST = torch.finfo(torch.float32).tiny
LEAST_RANGE = 0.5  # share of a group's range that it may be shrunk to
HALF = 1 << 14  # an offset of ½, in the units in which offsets are held: a step past it fits into int16, too
IN_CACHE = 1 << 17  # weights that a processor has at hand while several operations go over them
LEAST_ROWS = 64  # of a weight that are done at a time, as their gradient is a product, too

Rounded = Mapping[str, QuantizedWeight]


class TunableGrid:
    """A weight on its grid, as a function of what is tuned.

    Args:
        matrix: `[out_features, in_features]`.
        scheme: a packed scheme.
        dtype: of the scales, and of the weight when it is dequantized; by default the matrix's.

    Attributes:
        offset: V in units of 2⁻¹⁵, int16 `[out_features, groups, group size]`.
        shrinkage: factors of the ranges' ends, float32 `[out_features, groups, 2]`; symmetric grids have one end.
        step: by how much a backward pass moves offsets against the sign of their gradients, and `shrink` the ranges.
    """

    def __init__(self, matrix: Tensor, scheme: LayerScheme, dtype: torch.dtype | None = None) -> None:
        self._scheme, self._dtype = scheme, dtype or matrix.dtype
        self._low, self._high = extremes(matrix, scheme)
        self._grouped = matrix.view(*self._low.shape, -1)
        self.offset = torch.zeros_like(self._grouped, dtype=torch.int16)
        ends = 1 if scheme.symmetric else 2
        self.shrinkage = torch.ones(*self._low.shape, ends, device=matrix.device, requires_grad=True)
        self.step = 0.0

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        low, high = self._low * self.shrinkage[..., 0], self._high * self.shrinkage[..., -1]
        return grid_between(low, high, self._scheme, self._dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x [..., in_features]` times the weight as it will be dequantized, plus bias → `[..., out_features]`."""
        scale, zero_point = self._grid()
        result: Tensor = _Product.apply(x, scale.float().unsqueeze(-1), zero_point, bias, self)
        return result

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The integers."""
        scale, zero_point = self._grid()
        integers = torch.empty_like(self._grouped, dtype=torch.int8)
        for rows in self.parts():
            steps = self.steps(rows, scale.float().unsqueeze(-1), zero_point)[0]
            integers[rows] = steps if zero_point is None else steps + zero_point[rows].unsqueeze(-1)
        return QuantizedWeight(integers.flatten(1), scale, zero_point, self._scheme)

    def parts(self) -> Iterator[slice]:
        """Rows to do at a time: so many that what lies between their operations stays in a processor's cache."""
        rows, on_cpu = self._grouped.shape[0], self._grouped.device.type == "cpu"
        at_once = max(LEAST_ROWS, IN_CACHE // self._grouped[0].numel()) if on_cpu else rows
        return (slice(start, start + at_once) for start in range(0, rows, at_once))

    def empty(self) -> Tensor:
        """A weight to fill, `[out_features, groups, group size]`."""
        return torch.empty_like(self._grouped)

    def steps(self, rows: slice, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Some rows as whole numbers of steps away from 0, float32: within the range of the grid, before clamping, and
        before the offset and rounding.

        Args:
            scale: float32 `[out_features, groups, 1]`.
            zero_point: int8 `[out_features, groups]` or None.
        """
        exact = self._grouped[rows].float() / scale[rows]
        free = exact.add(self.offset[rows], alpha=0.5 / HALF).round_()
        low, high = integer_range(self._scheme.bits)
        if zero_point is None:
            return free.clamp(low, high), free, exact
        shift = zero_point[rows].float().unsqueeze(-1)
        return free.clamp(low - shift, high - shift), free, exact

    def fill(self, weight: Tensor, rows: slice, steps: Tensor, scale: Tensor) -> None:
        """Some rows of the weight that is dequantized from whole numbers of steps."""
        weight[rows] = (steps * scale[rows]).to(self._dtype)

    def move(self, rows: slice, gradient: Tensor) -> None:
        """Take a step with the offsets of some rows, float32, against their gradient, which is overwritten."""
        moved = gradient.sign_().mul_(round(self.step * 2 * HALF)).to(torch.int16)
        self.offset[rows].sub_(moved).clamp_(-HALF, HALF)

    @torch.no_grad()
    def shrink(self, gradient: Tensor) -> None:
        """Take a step with the ranges."""
        self.shrinkage.sub_(gradient.sign(), alpha=self.step).clamp_(LEAST_RANGE, 1.0)


class _Product(torch.autograd.Function):
    """x·Ŵᵀ + b with ŵ = (clamp(round(w/s + V) + z) − z)·s, and the gradient of the identity for the rounding.

    ∂ŵ/∂V = s within the range and 0 outside; ∂ŵ/∂s = q − z − (w/s within the range, 0 outside). By V nothing is
    returned: some rows at a time, offsets are moved against it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, grid: TunableGrid
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid = grid
        weight = grid.empty()
        for rows in grid.parts():
            grid.fill(weight, rows, grid.steps(rows, scale, zero_point)[0], scale)
        return F.linear(x, weight.flatten(1), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        x, scale, zero_point = ctx.saved_tensors
        grid, weight, of_scale = ctx.grid, ctx.grid.empty(), torch.empty_like(scale)
        by_output, x = gradient.flatten(0, -2).t(), x.flatten(0, -2)
        for rows in grid.parts():
            steps, free, exact = grid.steps(rows, scale, zero_point)
            grid.fill(weight, rows, steps, scale)
            of_weight = (by_output[rows] @ x).float().view_as(steps)
            outside = steps != free
            of_scale[rows] = (steps - exact.masked_fill_(outside, 0)).mul_(of_weight).sum(-1, keepdim=True)
            grid.move(rows, of_weight.mul_(scale[rows]).masked_fill_(outside, 0))
        of_x = gradient @ weight.flatten(1) if ctx.needs_input_grad[0] else None
        return of_x, of_scale, None, None, None


@dataclass(frozen=True)
class _Objective:
    """How far a block's outputs are from what they should be, by the rounded weights of its layers.

    Attributes:
        block: dense.
        layers: name within the block → layer that is rounded.
        calls, targets, curvature: as `round_block` takes them.
    """

    block: nn.Module
    layers: Mapping[str, nn.Module]
    calls: Sequence[Call]
    targets: Sequence[Tensor]
    curvature: Tensor | None

    def loss(self, index: int) -> Tensor:
        """Of one call, with the layers as they are."""
        args, kwargs = self.calls[index]
        output = self.block(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        target = self.targets[index].float()
        off = first.float() - target
        squares = (off if self.curvature is None else off @ self.curvature).mul(off).sum(-1)
        return (squares / target.square().mean(-1).clamp(min=SMALLEST)).mean()

    @torch.no_grad()
    def losses(self, rounded: Rounded) -> list[float]:
        """Of all calls."""
        forwards = {layer: partial(_product, layer, rounded[name]) for name, layer in self.layers.items()}
        with computing(forwards):
            return [self.loss(index).item() for index in range(len(self.calls))]


def _product(layer: nn.Linear | Conv1D, weight: QuantizedWeight, x: Tensor) -> Tensor:
    """What the layer gives with a rounded weight, dequantized at each call: those of a block never are together."""
    matrix = dequantize(weight.integers, weight.scale, weight.zero_point)
    return F.linear(x, matrix.to(layer.weight.dtype), layer.bias)


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
    matrices = {name: matrix_of(kind_of(layer), layer.weight).detach().contiguous() for name, layer in layers.items()}

    def nearest() -> dict[str, QuantizedWeight]:
        return {name: round_nearest(matrix, schemes[name], dtype) for name, matrix in matrices.items()}

    def grids() -> dict[str, TunableGrid]:
        return {name: TunableGrid(matrix, schemes[name], dtype) for name, matrix in matrices.items()}

    if not iterations:
        return nearest()
    objective = _Objective(block, layers, calls, targets, curvature)
    of_nearest = objective.losses(nearest())
    least, found = sum(of_nearest), None
    for iterate in _tune(objective, grids(), of_nearest, iterations, seed):
        loss = sum(objective.losses(iterate))
        if loss < least:
            least, found = loss, iterate
    return found or nearest()


def _tune(
    objective: _Objective, grids: Mapping[str, TunableGrid], of_nearest: Sequence[float], iterations: int, seed: int
) -> tuple[dict[str, QuantizedWeight], dict[str, QuantizedWeight]]:
    """Take the steps; gives the best iterate and the last."""
    least, best = 1.0, {name: grid.quantized() for name, grid in grids.items()}
    reached: set[str] = set()
    generator = torch.Generator().manual_seed(seed)
    epochs = range(math.ceil(iterations / len(of_nearest)))
    order = [index for _ in epochs for index in torch.randperm(len(of_nearest), generator=generator).tolist()]
    ranges = [grid.shrinkage for grid in grids.values()]
    forwards = {layer: partial(grids[name].product, bias=layer.bias) for name, layer in objective.layers.items()}
    with computing(forwards):
        for iteration, index in enumerate(order[:iterations]):
            with torch.enable_grad():
                loss = objective.loss(index)
            relative = loss.item() / of_nearest[index] if of_nearest[index] else 1.0
            if relative < least:
                least, best = relative, {name: grid.quantized() for name, grid in grids.items()}
            if not loss.requires_grad:  # it depends on none of the layers
                continue
            for grid in grids.values():
                grid.step = (1 - iteration / iterations) / iterations
            gradients = torch.autograd.grad(loss, ranges, allow_unused=True)  # which moves the offsets
            for (name, grid), gradient in zip(grids.items(), gradients, strict=True):
                if gradient is not None:
                    grid.shrink(gradient)
                    reached.add(name)
    if unreached := [name for name in grids if name not in reached]:
        warn_of_unreached(unreached)
    return best, {name: grid.quantized() for name, grid in grids.items()}
