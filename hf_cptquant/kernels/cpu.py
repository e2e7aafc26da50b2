"""torch's own CPU weight-only kernel for 8 bits, for decoding in bfloat16.

`_weight_int8pack_mm` reads 8 bits per weight instead of 16 and so beats a dense matmul when few rows are multiplied;
with many rows the arithmetic dominates and the dense matmul wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat

import torch
from torch import Tensor

from ..grid import dequantize
from ..packing import pack, packed_length, unpack
from . import reference

INT8_WIDTH = 16  # the int8 kernel reads whole vectors, beyond the row where the width is not a multiple
CHUNK = 2**16  # weights that are converted at a time, so that nothing large is left to fragment the heap
MULTIPLE = 64  # outputs of a tile: a dense product of other widths takes half as long again


def _parts(first: Tensor, second: Tensor, in_features: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Corresponding rows of two forms of one weight, about `CHUNK` weights at a time."""
    rows = max(1, CHUNK // in_features)
    return zip(first.split(rows), second.split(rows), strict=True)


def int8_to_kernel(words: Tensor, in_features: int) -> Tensor:
    """Wire words → int8 `[out, in]`."""
    integers = words.new_empty(len(words), in_features, dtype=torch.int8)
    for part, part_words in _parts(integers, words, in_features):
        part.copy_(unpack(part_words, 8, in_features))
    return integers


def int8_to_wire(integers: Tensor) -> Tensor:
    """int8 `[out, in]` → wire words."""
    in_features = integers.shape[1]
    words = integers.new_empty(len(integers), packed_length(in_features, 8), dtype=torch.int32)
    for part, part_integers in _parts(words, integers, in_features):
        part.copy_(pack(part_integers, 8))
    return words


def int8_linear(x: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    """`x` `[rows, in]` times a symmetric per-channel int8 weight `[out, in]`, scale `[out, 1]` → `[rows, out]`."""
    return torch.ops.aten._weight_int8pack_mm(x, integers, scale.flatten())


def int8_dense_linear(
    x: Tensor, integers: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """The same for many rows, and with zero points int8 `[1, out]`. In bfloat16 the integers themselves are multiplied,
    which less their zero points are exact in it, too, and the product is scaled; wider inputs would tell that from the
    product with the dequantized weight, which is rounded."""
    rows = reference.rows_of_tile(integers.shape[1], x.device, MULTIPLE) or len(integers)
    zeros = repeat(None) if zero_point is None else zero_point.t().split(rows)
    parts = zip(integers.split(rows), scale.split(rows), zeros, strict=False)  # zeros may have no end
    if x.dtype != torch.bfloat16:
        return reference.linear_of_tiles(x, (dequantize(*each) for each in parts), bias, len(integers))
    steps = (q.to(x.dtype) if z is None else (q.to(torch.int16) - z).to(x.dtype) for q, _, z in parts)
    product = reference.linear_of_tiles(x, steps, None, len(integers))
    product *= scale.flatten()
    return product if bias is None else product.add_(bias)


def int8_dense(integers: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """Dense weight `[out, in]` from the int8 layout."""
    return dequantize(integers, scale, None if zero_point is None else zero_point.t())
