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

Beside a block in bfloat16, 14 bytes are held for each of its weights: the offset, its gradient and the best offset in
float32, the rounded weight or its gradient in bfloat16. All else is made for some rows at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
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
IN_CACHE = 1 << 17  # weights that a processor has at hand while several operations go over them


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
        self._grouped = matrix.view(*self._low.shape, -1)
        self.offset = nn.Parameter(torch.zeros_like(self._grouped, dtype=torch.float32))
        self.shrinkage = nn.Parameter(torch.ones(*self._low.shape, 1 if scheme.symmetric else 2, device=matrix.device))

    def _grid(self) -> tuple[Tensor, Tensor | None]:
        low, high = self._low * self.shrinkage[..., 0], self._high * self.shrinkage[..., -1]
        return grid_between(low, high, self._scheme, self._dtype)

    def forward(self) -> Tensor:
        """The weight as it will be dequantized, `[out_features, in_features]` in the matrix's dtype."""
        scale, zero_point = self._grid()
        wide = scale.float().unsqueeze(-1)
        dtypes = (self._dtype, self._matrix.dtype)
        weight: Tensor = _Rounded.apply(self._grouped, self.offset, wide, zero_point, self._scheme.bits, dtypes)
        return weight.view_as(self._matrix)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The integers."""
        scale, zero_point = self._grid()
        integers = torch.empty_like(self._grouped, dtype=torch.int8)
        wide = scale.float().unsqueeze(-1)
        for rows in _parts(integers):
            steps, _ = _steps(rows, self._grouped, self.offset, wide, zero_point, self._scheme.bits)
            integers[rows] = steps if zero_point is None else steps + zero_point[rows].unsqueeze(-1)
        return QuantizedWeight(integers.view_as(self._matrix), scale, zero_point, self._scheme)


def _parts(weight: Tensor) -> Iterator[slice]:
    """Rows to do at a time: so many that what lies between their operations stays in a processor's cache."""
    rows = max(1, IN_CACHE // weight[0].numel()) if weight.device.type == "cpu" else len(weight)
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


def _steps(
    rows: slice, grouped: Tensor, offset: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """Some rows as whole numbers of steps away from 0, float32: within the range of the grid, and before clamping."""
    free = torch.addcdiv(offset[rows], grouped[rows].float(), scale[rows]).round_()
    low, high = integer_range(bits)
    if zero_point is None:
        return free.clamp(low, high), free
    shift = zero_point[rows].float().unsqueeze(-1)
    return free.clamp(low - shift, high - shift), free


class _Rounded(torch.autograd.Function):
    """(clamp(round(w/s + V) + z) − z)·s, with the gradient of the identity for the rounding.

    A function of its own, because it runs at every step for every weight, and autograd would go over them many times
    as often: ∂ŵ/∂V = s within the range and 0 outside, ∂ŵ/∂s = q − z − (w/s within the range, 0 outside). The integers
    are found again for the backward pass, in about the time that it takes to write and to read them, and in no memory.
    The product with the scale has the first of the two dtypes, and is given in the second.
    """

    @staticmethod
    def forward(
        ctx: Any,
        grouped: Tensor,
        offset: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bits: int,
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> Tensor:
        ctx.save_for_backward(grouped, offset, scale, zero_point)
        ctx.bits = bits
        weight = torch.empty_like(grouped, dtype=dtypes[1])
        for rows in _parts(grouped):
            steps, _ = _steps(rows, grouped, offset, scale, zero_point, bits)
            weight[rows] = steps.mul_(scale[rows]).to(dtypes[0])
        return weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, None, None, None]:
        grouped, offset, scale, zero_point = ctx.saved_tensors
        of_offset, of_scale = torch.empty_like(offset), torch.empty_like(scale)
        for rows in _parts(grouped):
            steps, free = _steps(rows, grouped, offset, scale, zero_point, ctx.bits)
            of_weight = gradient[rows].float()
            of_rounded = torch.mul(of_weight, scale[rows], out=of_offset[rows]).masked_fill_(steps != free, 0)
            of_steps = (of_weight * steps).sum(-1, keepdim=True)
            of_scale[rows] = of_steps - (of_rounded * grouped[rows]).sum(-1, keepdim=True) / scale[rows].square()
        return None, of_offset, of_scale, None, None, None


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

    def tune() -> set[str]:
        """Take the steps and leave the best iterate in `best`; gives the layers that a call reaches."""
        least = math.inf
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
                least = relative
                _copy(parameters, best)
            reached |= {name for name, found in zip(layers, gradients[::2], strict=True) if found is not None}
            _descend(grids, gradients, (1 - iteration / iterations) / iterations)
            del loss, gradients  # or they would lie beside those of the next step
        return reached

    parameters = list(grids.parameters())
    nearest = [parameter.detach().ravel()[0].clone().expand_as(parameter) for parameter in parameters]  # all 0, all 1
    of_nearest = losses()
    candidates: list[tuple[list[float], Sequence[Tensor]]] = [(of_nearest, nearest)]
    if iterations:
        best = [parameter.detach().clone() for parameter in parameters]
        reached = tune()
        if unreached := [name for name in layers if name not in reached]:
            warn_of_unreached(unreached)
        last = [parameter.detach().clone() for parameter in parameters]
        for values in (best, last):
            _copy(values, parameters)
            candidates.append((losses(), values))
    _copy(min(candidates, key=lambda candidate: sum(candidate[0]))[1], parameters)
    return {name: grids[name.replace(".", "/")].quantized() for name in layers}


@torch.no_grad()
def _descend(grids: nn.ModuleDict, gradients: Sequence[Tensor | None], step: float) -> None:
    for (name, parameter), gradient in zip(grids.named_parameters(), gradients, strict=True):
        if gradient is not None:
            limits = (-0.5, 0.5) if name.endswith("offset") else (LEAST_RANGE, 1.0)
            for rows in _parts(parameter):
                parameter[rows].sub_(gradient[rows].sign(), alpha=step).clamp_(*limits)


@torch.no_grad()
def _copy(values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    for target, value in zip(into, values, strict=True):
        target.copy_(value)
