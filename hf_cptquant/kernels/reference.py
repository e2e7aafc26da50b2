"""The kernel that every scheme, device and dtype has: unpack, dequantize, multiply.

It reads the wire format, so it is also what all other kernels are checked against. The dense weight lives
for the length of one call.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arithmetic import working_dtype
from ..grid import dequantize
from ..packing import unpack


def dense_weight(words: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, in_features: int) -> Tensor:
    """Wire tensors → weight `[out_features, in_features]` in the dtype of the scales.

    Args:
        words: int32 `[out_features, packed_length(in_features, bits)]`.
        scale: `[out_features, groups]`.
        zero_point: int32 `[packed_length(out_features, bits), groups]` or None.
    """
    unpacked_zero = None if zero_point is None else unpack(zero_point, bits, scale.shape[0], dim=0)
    return dequantize(unpack(words, bits, in_features), scale, unpacked_zero)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with a dequantized weight in the dtype of the input, under autocast too; computed in float32 where the
    processor only imitates that dtype."""
    dtype = working_dtype(x.dtype, x.device)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)
