"""The kernel that every scheme, device and dtype has: unpack, dequantize, multiply.

It reads the wire format, so it is also what all other kernels are checked against. On CPUs it works on some output
features at a time, few enough that their dequantized weights are multiplied while they are in the cache; the dense
weight is never in memory as a whole, and where bfloat16 `F.linear` waits for memory, the packed weight comes faster.

Without numba, weights per channel below 8 bits, those of 5, 6 and 8 bits with zero points, and all in float16 and
float32 take this way in decoding, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arithmetic import working_dtype
from ..grid import dequantize
from ..packing import unpack

TILE = 2**20  # weights that a thread dequantizes at a time: large enough that calls do not count, 4 MB in float32


def rows_of_tile(in_features: int, device: torch.device, multiple: int = 1) -> int | None:
    """Output features that are dequantized at a time, a multiple of some number; None for all."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return max(1, TILE * torch.get_num_threads() // (in_features * multiple)) * multiple


def dense_tiles(
    words: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, in_features: int
) -> Iterator[Tensor]:
    """Wire tensors → weights of consecutive output features `[some, in_features]` in the dtype of the scales.

    Args:
        words: int32 `[out_features, packed_length(in_features, bits)]`.
        scale: `[out_features, groups]`.
        zero_point: int32 `[packed_length(out_features, bits), groups]` or None.
    """
    out_features = len(scale)
    unpacked_zero = None if zero_point is None else unpack(zero_point, bits, out_features, dim=0)
    rows = rows_of_tile(in_features, words.device) or out_features
    for start in range(0, out_features, rows):
        part = slice(start, start + rows)
        integers = unpack(words[part], bits, in_features)
        yield dequantize(integers, scale[part], None if unpacked_zero is None else unpacked_zero[part])


def dense_weight(words: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, in_features: int) -> Tensor:
    """The weight `[out_features, in_features]` in the dtype of the scales; the arguments are those of `dense_tiles`."""
    return torch.cat(tuple(dense_tiles(words, scale, zero_point, bits, in_features)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` with a dequantized weight in the dtype of the input, under autocast too; computed in float32 where the
    processor only imitates that dtype."""
    dtype = working_dtype(x.dtype, x.device)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(x.dtype)


def linear_of_tiles(x: Tensor, tiles: Iterable[Tensor], bias: Tensor | None, out_features: int) -> Tensor:
    """`linear` of `x [rows, in]` with a weight that comes in parts, `[some outputs, in]` each."""
    product, start = x.new_empty(len(x), out_features), 0
    for tile in tiles:
        part = slice(start, start + len(tile))
        product[:, part] = linear(x, tile, None if bias is None else bias[part])
        start = part.stop
    return product
