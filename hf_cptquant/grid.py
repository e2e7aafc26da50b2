"""The integer grid: scales, zero points, quantize, dequantize.

Equation 1 of the paper, Q(x) = round((x − min)/scale) + q_min, with the minimum expressed as an integer zero point so
that it packs into as many bits as a weight does: x̂ = (q − z)·scale, z = q_min − round(min/scale). For that every range
is widened to contain 0. Without a zero point, x̂ = q·scale, the scale is signed: the weight of largest magnitude lies
on q_min = −2^(bits−1) whatever its sign, so that no level is wasted on the side that has one more. Scales are rounded
to the model's dtype *first*, and the integers are chosen against the rounded scales, so what is stored is what was
optimized. Dequantization multiplies an exactly represented small integer by a scale: one rounding, and bit for bit what
compressed-tensors computes. It goes by way of float32, which holds the product of both exactly, and which CPUs convert
integers to faster than to the dtype of the scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ModelError
from .plan import LayerScheme


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as integers.

    Attributes:
        integers: int8 `[out_features, in_features]`, signed, in [−2^(bits−1), 2^(bits−1) − 1].
        scale: `[out_features, groups]` in the model's dtype, finite and not 0; negative where the scheme is symmetric
            and the weight of largest magnitude is positive.
        zero_point: int8 `[out_features, groups]` in the same range, or None if the scheme is symmetric.
        scheme: bits, group size, symmetry.
    """

    integers: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: LayerScheme


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed integer of a bit width."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def fit_grid(weight: Tensor, scheme: LayerScheme, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points from the minimum and maximum of each group.

    Args:
        weight: `[out_features, in_features]`, any float dtype.
        scheme: a packed scheme.
        dtype: of the scales; by default the weight's.

    Returns:
        As `grid_between`.

    Raises:
        ModelError: the weight holds NaN or infinity.
        PlanError: the group size does not divide `in_features`.
    """
    return grid_between(*extremes(weight, scheme), scheme, dtype or weight.dtype)


def extremes(weight: Tensor, scheme: LayerScheme) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each group, float32 `[out_features, groups]`, at most and at least 0.

    Raises:
        ModelError, PlanError: as `fit_grid`.
    """
    out_features, in_features = weight.shape
    grouped = weight.float().view(out_features, scheme.groups(in_features), -1)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if not bool(torch.isfinite(low + high).all()):
        raise ModelError("the weight holds NaN or infinity; repair or exclude it (modules_to_not_convert)")
    return low, high


def grid_between(low: Tensor, high: Tensor, scheme: LayerScheme, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of grids that span given ranges. The scales have gradients by the ranges.

    Args:
        low, high: float32 `[out_features, groups]`, at most and at least 0.
        scheme: a packed scheme.
        dtype: of the scales.

    Returns:
        scale `[out_features, groups]` and zero point (int8, same shape; None if symmetric). A range of zeros
        has scale 1, so that nothing divides by zero; a scale that would underflow or overflow the dtype
        is the nearest that does not.
    """
    smallest, largest = integer_range(scheme.bits)
    steps = -smallest if scheme.symmetric else largest - smallest
    span = torch.maximum(-low, high) if scheme.symmetric else high - low
    limits = torch.finfo(dtype)
    ceiling = limits.max / steps * (1 - 2 * limits.eps)  # keeps steps · scale finite after rounding to the dtype
    # float16 needs its subnormals; they are evenly spaced, and rounding up keeps the extremes of a group on the grid
    spacing = max(limits.tiny * limits.eps, torch.finfo(torch.float32).tiny)
    exact = (span / steps).clamp(spacing, ceiling)
    exact = torch.where(exact < limits.tiny, torch.ceil(exact / spacing) * spacing, exact)
    magnitude = torch.where(span == 0, 1.0, exact)
    if scheme.symmetric:
        return torch.where(high > -low, -magnitude, magnitude).to(dtype), None
    scale = magnitude.to(dtype)
    zero_point = (smallest - torch.round(low.detach() / scale.detach().float())).clamp(smallest, largest)
    return scale, zero_point.to(torch.int8)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: LayerScheme) -> QuantizedWeight:
    """Round a weight `[out_features, in_features]` to the nearest point of a grid (equation 1)."""
    out_features, groups = scale.shape
    steps = (weight.float().view(out_features, groups, -1) / scale.float().unsqueeze(-1)).round_()
    if zero_point is not None:
        steps += zero_point.unsqueeze(-1)
    integers = steps.clamp_(*integer_range(scheme.bits)).to(torch.int8)
    return QuantizedWeight(integers.view_as(weight), scale, zero_point, scheme)


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """(q − z)·scale as `[out_features, in_features]` in the dtype of the scales.

    Args:
        integers: int8 `[out_features, in_features]`.
        scale: `[out_features, groups]`.
        zero_point: int8 `[out_features, groups]` or None.
    """
    wide = torch.promote_types(scale.dtype, torch.float32)
    steps = integers.to(wide).view(*scale.shape, -1)
    if zero_point is not None:
        steps -= zero_point.to(wide).unsqueeze(-1)
    steps *= scale.to(wide).unsqueeze(-1)
    return steps.view(len(scale), -1).to(scale.dtype)
