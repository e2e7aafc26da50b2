"""Rounding with compensation by second-order information (GPTQ, arXiv 2210.17323).

The error of a layer on its inputs X is ‖(W − Ŵ)X‖², with the Hessian H = XXᵀ. Columns are rounded one after the other,
those with the largest diagonal of H first, and what a column loses is made up for by those that are still open: with U
the upper Cholesky factor of H⁻¹, the error e = (w − ŵ)/U_ii moves the later columns by −e·U_i. Grids are fixed before
(the groups are those of the stored order), so the order costs nothing at run time. A hundred columns at a time are
finished before the rest of the matrix is touched, and layers that share their inputs are rounded as one tall matrix.
Ranges are narrowed by what they cost (`clipping.py`), where the error of a column counts by 1/U_ii², the part that the
later ones cannot make up for. The walk is greedy; a row that it leaves with a larger error than rounding to nearest on
the whole range would, is rounded to nearest.

Outputs make up for each other, too. If the loss minds an error Δ of the layer's outputs by Δᵀ C Δ (`curvature.py`), the
error of the layer is tr(C ΔW H ΔWᵀ) (YAQA, arXiv 2505.22988), and once some rows are rounded, what is best for all
others is W − C_oo⁻¹ C_or ΔW_r, whatever the inputs. So rows are rounded in sixteen parts, those with the largest
diagonal of C first, each by a walk over the columns, and the rows that are still open are moved. C is an average over
few tokens; twice its diagonal is added to it. (KL divergence of SmolLM2-135M at 4.5 bits: 0.0457 without, 0.0416 with.)

Behind rounded blocks the inputs are X̂ where the original model has X. What comes nearest to WX there is not W but
WXX̂ᵀ(X̂X̂ᵀ)⁻¹ = W + W(X − X̂)X̂ᵀ(X̂X̂ᵀ)⁻¹ (asymmetric calibration, GPTAQ, arXiv 2504.02692, which distributes the change
column by column). Weights are moved a quarter of the way there before they are rounded: on SmolLM2-135M in groups of 64
the KL divergence from the original falls from 0.096 to 0.084 nats at 4 bits and from 0.368 to 0.298 at 3 (WikiText-2),
the perplexity of reviews from 55.7 to 55.0 and from 90.2 to 82.0; the whole way ruins the model (1.34 and 2.99 nats).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ModelError
from ..grid import QuantizedWeight, dequantize, integer_range, quantize
from ..plan import LayerScheme
from ..sensitivity.compensation import DAMPING
from .clipping import clipped_grid
from .nearest import round_nearest

SHARE = 0.25  # of the way to what is best for the inputs that have drifted
PARTS = 16  # of the rows, which make up for each other
OWN = 2.0  # how much the diagonal of the outputs' curvature is raised by, as a share of it
COLUMNS = 128  # finished before the rest of the matrix is touched
MOST_DAMPING = 1e3  # ten times as much as at first after each failure


@dataclass(frozen=True)
class Walk:
    """Over the columns of weights that share their inputs.

    Attributes:
        order: of the columns, int64 `[in_features]`.
        factor: U of the columns in this order, float32 `[in_features, in_features]`.
    """

    order: Tensor
    factor: Tensor

    @staticmethod
    def by(hessian: Tensor) -> Walk:
        """Columns with the largest diagonal of H first."""
        order = hessian.diagonal().argsort(descending=True, stable=True)
        return Walk(order, inverse_factor(hessian[order][:, order]))


def round_together(
    matrices: Sequence[Tensor],
    schemes: Sequence[LayerScheme],
    hessian: Tensor,
    dtype: torch.dtype | None = None,
    drift: Tensor | None = None,
    curvatures: Sequence[Tensor | None] = (),
) -> list[QuantizedWeight]:
    """Round weights that share their inputs.

    Args:
        matrices: `[out_features, in_features]`, of one dtype.
        schemes: packed schemes of theirs.
        hessian: float32 `[in_features, in_features]`; where an input is always 0, its column is rounded to nearest.
        dtype: of the scales; by default the weights'.
        drift: (X − X̂)X̂ᵀ, as of `clipping.InputDrifts`, if it is to count.
        curvatures: C of each, float32 `[out_features, out_features]`, as of `curvature.curvatures_of_layers`, or None
            where it is not known.

    Returns:
        The integers.
    """
    dtype = dtype or matrices[0].dtype
    if drift is not None:
        matrices = against_drift(matrices, hessian, drift)
    walk = Walk.by(hessian)
    if all(curvature is None for curvature in curvatures):
        return _round_rows(matrices, schemes, hessian, walk, dtype)
    minded = [_raised(curvature, matrix) for curvature, matrix in zip(curvatures, matrices, strict=True)]
    across = [Walk.by(curvature) for curvature in minded]
    open_rows = [matrix.float()[rows.order] for matrix, rows in zip(matrices, across, strict=True)]
    rounded: list[list[QuantizedWeight]] = [[] for _ in matrices]
    count = min(PARTS, max(map(len, matrices)))
    for part in range(count):
        spans = [slice(len(m) * part // count, len(m) * (part + 1) // count) for m in matrices]
        chosen = [index for index, span in enumerate(spans) if span.start < span.stop]  # others have too few rows
        aims = [open_rows[index][spans[index]] for index in chosen]
        found = _round_rows(aims, [schemes[index] for index in chosen], hessian, walk, dtype)
        for index, aim, quantized in zip(chosen, aims, found, strict=True):
            rounded[index].append(quantized)
            span, factor = spans[index], across[index].factor
            moves = torch.linalg.solve_triangular(factor[span, span], factor[span, span.stop :], upper=True)
            open_rows[index][span.stop :] -= moves.t() @ (aim - _dense(quantized))
    whole = [_in_order(parts, rows.order.argsort()) for parts, rows in zip(rounded, across, strict=True)]
    return [_better(*each, hessian) for each in zip(matrices, whole, minded, strict=True)]


def _raised(curvature: Tensor | None, matrix: Tensor) -> Tensor:
    """C with its diagonal raised; of a layer of which it is not known, the rows are left to themselves."""
    if curvature is None:
        return torch.eye(len(matrix), device=matrix.device)
    return curvature + torch.diag(OWN * curvature.diagonal())


def _round_rows(
    matrices: Sequence[Tensor], schemes: Sequence[LayerScheme], hessian: Tensor, walk: Walk, dtype: torch.dtype
) -> list[QuantizedWeight]:
    """Rows by a walk over their columns, each row by itself."""
    costs = walk.factor.diagonal().pow(-2)[walk.order.argsort()]
    importance = torch.where(hessian.diagonal() == 0, 0, costs)
    grids = [clipped_grid(*each, importance, dtype) for each in zip(matrices, schemes, strict=True)]
    aims = _compensated(matrices, schemes, grids, walk)
    return [
        _better_rows(matrix, quantize(aim, *grid, scheme), hessian)
        for matrix, aim, grid, scheme in zip(matrices, aims, grids, schemes, strict=True)
    ]


def _in_order(parts: Sequence[QuantizedWeight], order: Tensor) -> QuantizedWeight:
    """All rows of a weight."""

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(tensors)[order]

    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    return QuantizedWeight(
        joined([part.integers for part in parts]),
        joined([part.scale for part in parts]),
        joined(zero_points) if zero_points else None,
        parts[0].scheme,
    )


def against_drift(matrices: Sequence[Tensor], hessian: Tensor, drift: Tensor) -> list[Tensor]:
    """W + ¼·W(X − X̂)X̂ᵀ(H + damping)⁻¹, float32; arguments as of `round_together`."""
    factor = inverse_factor(hessian)
    change = SHARE * (drift @ factor.t() @ factor)
    return [matrix.float() + matrix.float() @ change for matrix in matrices]


def _compensated(
    matrices: Sequence[Tensor],
    schemes: Sequence[LayerScheme],
    grids: Sequence[tuple[Tensor, Tensor | None]],
    walk: Walk,
) -> list[Tensor]:
    """The weights as the walk has moved them by the time that it rounds them: rounded to nearest, they are its result.

    Args:
        matrices, schemes: as of `round_together`.
        grids: scales and zero points.
        walk: over the columns.

    Returns:
        float32, in the shapes of the matrices.
    """
    order, factor = walk.order, walk.factor
    columns, pivots = len(order), factor.diagonal().tolist()

    def by_column(of_groups: Sequence[Tensor]) -> Tensor:
        return torch.cat([_spread(each, columns) for each in of_groups]).float().t()[order].contiguous()

    scales = by_column([scale for scale, _ in grids])
    zeros = by_column([torch.zeros_like(scale) if zero is None else zero for scale, zero in grids])
    rows = [len(matrix) for matrix in matrices]
    ends = torch.tensor([integer_range(scheme.bits) for scheme in schemes], dtype=torch.float32)
    low, high = ends.repeat_interleave(torch.tensor(rows), 0).t().to(factor.device)
    low, high = low - zeros, high - zeros
    work = torch.cat([matrix.float() for matrix in matrices]).t()[order].contiguous()
    for start in range(0, columns, COLUMNS):
        stop = min(start + COLUMNS, columns)
        errors = torch.empty(stop - start, work.shape[1], device=work.device)
        for column in range(start, stop):
            weight, scale = work[column], scales[column]
            level = (weight / scale).round_().clamp_(low[column], high[column])
            error = torch.addcmul(weight, level, scale, value=-1, out=errors[column - start]).div_(pivots[column])
            work[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
        work[stop:] -= factor[start:stop, stop:].t() @ errors
    return list(work[order.argsort()].t().split(rows))


def _better_rows(matrix: Tensor, rounded: QuantizedWeight, hessian: Tensor) -> QuantizedWeight:
    """Each row as it was rounded or, if that has the smaller error, to nearest on its whole range."""
    scheme = rounded.scheme
    nearest = round_nearest(matrix, scheme, rounded.scale.dtype)
    worse = (_errors(matrix, rounded, hessian) > _errors(matrix, nearest, hessian)).unsqueeze(1)
    zero_point = nearest.zero_point
    if zero_point is not None:
        zero_point = torch.where(worse, zero_point, rounded.zero_point)
    integers = torch.where(worse, nearest.integers, rounded.integers)
    return QuantizedWeight(integers, torch.where(worse, nearest.scale, rounded.scale), zero_point, scheme)


def _better(matrix: Tensor, rounded: QuantizedWeight, curvature: Tensor, hessian: Tensor) -> QuantizedWeight:
    """A weight as it was rounded or, if that has the smaller error tr(C ΔW H ΔWᵀ), to nearest on its whole range."""
    nearest = round_nearest(matrix, rounded.scheme, rounded.scale.dtype)

    def error(each: QuantizedWeight) -> float:
        change = _dense(each) - matrix.float()
        return float(((curvature @ change @ hessian) * change).sum())

    return min((rounded, nearest), key=error)


def _errors(matrix: Tensor, rounded: QuantizedWeight, hessian: Tensor) -> Tensor:
    """‖ΔW X‖² of every row."""
    change = _dense(rounded) - matrix.float()
    return ((change @ hessian) * change).sum(1)


def _dense(rounded: QuantizedWeight) -> Tensor:
    return dequantize(rounded.integers, rounded.scale, rounded.zero_point).float()


def inverse_factor(hessian: Tensor) -> Tensor:
    """U with UᵀU = (H + damping)⁻¹, upper triangular. Inputs that are always 0 count as independent of all others.

    Where float32 does not do, float64 may; the damping grows until the decomposition succeeds.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    damping = DAMPING
    while True:
        damped = hessian + torch.diag(torch.where(diagonal == 0, mean, 0.0) + damping * mean)
        factor = _factor_of_inverse(damped)
        if factor is None:
            factor = _factor_of_inverse(damped.to("cpu", torch.float64))
        if factor is not None:
            return factor.to(damped)
        if damping > MOST_DAMPING:
            raise ModelError("the inputs of a layer are so large that their products cannot be decomposed")
        damping *= 10


def _factor_of_inverse(matrix: Tensor) -> Tensor | None:
    """U with UᵀU = M⁻¹, or None where rounding errors make M look indefinite."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) else factor


def _spread(of_groups: Tensor, columns: int) -> Tensor:
    """`[out_features, groups]` → `[out_features, columns]`."""
    return of_groups.repeat_interleave(columns // of_groups.shape[1], 1)
