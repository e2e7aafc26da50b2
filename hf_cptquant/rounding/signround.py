"""Rounding tuned by signed gradients, block by block (SignRound, arXiv 2309.05516).

A weight W goes to s·clamp(round(W/s + V)): the offset V ∈ [−½, ½] of each weight decides whether it is rounded up or
down, and the range of each group is shrunk by a factor, which trades the largest weights for finer steps. Both are
tuned so that the block, called with what the rounded blocks before it give, gives what the original block gave in the
original model. Rounding counts as the identity in the backward pass. Steps have one size, for which the sign of the
gradient is enough; it falls linearly to 0 and allows an offset to cross its whole interval once.

The iterate with the least loss is kept. As calls differ in how hard they are, a loss counts relative to that of
rounding to nearest on the same call, and the best and the last iterate are in the end compared with rounding to nearest
on all calls: the result is never worse on the calibration data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..grid import QuantizedWeight, extremes, grid_between, integer_range
from ..plan import LayerScheme
from ..sensitivity.prefix import Call

LEAST_RANGE = 0.5  # share of a group's range that it may be shrunk to


class TunableGrid(nn.Module):
    """A weight on its grid, as a function of what is tuned.

    Attributes:
        offset: V, float32 `[out_features, groups, group size]`.
        shrinkage: factors of the ranges' ends, float32 `[out_features, groups, 2]`; symmetric grids have one end.
    """

    def __init__(self, matrix: Tensor, scheme: LayerScheme) -> None:
        super().__init__()
        self._matrix, self._scheme = matrix, scheme
        self._low, self._high = extremes(matrix, scheme)
        grouped = matrix.float().view(*self._low.shape, -1)
        self.offset = nn.Parameter(torch.zeros_like(grouped))
        self.shrinkage = nn.Parameter(torch.ones(*self._low.shape, 1 if scheme.symmetric else 2, device=matrix.device))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Integers (as float32, with gradients), scale, zero point."""
        low, high = self._low * self.shrinkage[..., 0], self._high * self.shrinkage[..., -1]
        scale, zero_point = grid_between(low, high, self._scheme, self._matrix.dtype)
        exact = self._matrix.float().view_as(self.offset) / scale.float().unsqueeze(-1) + self.offset
        integers = exact.detach().round() + (exact - exact.detach())  # whole numbers, with the gradient of the identity
        if zero_point is not None:
            integers = integers + zero_point.unsqueeze(-1)
        clamped = integers.detach().clamp(*integer_range(self._scheme.bits))
        # by hand, because torch.clamp has no gradient at its very limits, where many weights lie
        return torch.where(integers == clamped, integers, clamped), scale, zero_point

    def forward(self) -> Tensor:
        """The weight as it will be dequantized, `[out_features, in_features]` in the model's dtype."""
        integers, scale, zero_point = self._parts()
        steps = integers if zero_point is None else integers - zero_point.unsqueeze(-1)
        return (steps * scale.float().unsqueeze(-1)).view_as(self._matrix).to(self._matrix.dtype)

    @torch.no_grad()
    def quantized(self) -> QuantizedWeight:
        """The integers."""
        integers, scale, zero_point = self._parts()
        return QuantizedWeight(integers.to(torch.int8).view_as(self._matrix), scale, zero_point, self._scheme)


def round_block(
    block: nn.Module,
    schemes: Mapping[str, LayerScheme],
    calls: Sequence[Call],
    targets: Sequence[Tensor],
    iterations: int,
    seed: int,
) -> dict[str, QuantizedWeight]:
    """Round the layers of a block together.

    Args:
        block: dense.
        schemes: name of a layer within the block → its packed scheme.
        calls: arguments of the block.
        targets: the output that each call should give.
        iterations: steps; 0 is rounding to nearest.
        seed: of the order of the calls.

    Returns:
        Layer → its integers.
    """
    layers = {name: block.get_submodule(name) for name in schemes}
    transposed = {name for name, layer in layers.items() if isinstance(layer, Conv1D)}
    grids = nn.ModuleDict()
    for name, layer in layers.items():
        weight = layer.weight.detach()
        matrix = (weight.t() if name in transposed else weight).contiguous()
        grids[name.replace(".", "/")] = TunableGrid(matrix, schemes[name])

    def loss_of(index: int) -> Tensor:
        weights = {name: grids[name.replace(".", "/")]() for name in layers}
        overridden = {f"{name}.weight": w.t() if name in transposed else w for name, w in weights.items()}
        args, kwargs = calls[index]
        output = functional_call(block, overridden, args, kwargs)
        first = output[0] if isinstance(output, tuple) else output
        return F.mse_loss(first.float(), targets[index].float())

    @torch.no_grad()
    def losses() -> list[float]:
        return [loss_of(index).item() for index in range(len(calls))]

    def state() -> list[Tensor]:
        return [parameter.detach().clone() for parameter in grids.parameters()]

    candidates = [(losses(), state())]
    of_nearest = candidates[0][0]
    least, best = math.inf, candidates[0][1]
    generator = torch.Generator().manual_seed(seed)
    parameters = list(grids.parameters())
    for iteration in range(iterations):
        index = int(torch.randint(len(calls), (), generator=generator))
        with torch.enable_grad():
            loss = loss_of(index)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        relative = loss.item() / of_nearest[index] if of_nearest[index] else 1.0
        if relative < least:
            least, best = relative, state()
        step = (1 - iteration / iterations) / iterations
        _descend(grids, gradients, step)
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
