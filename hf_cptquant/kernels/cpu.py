"""torch's own CPU weight-only kernels for decoding in bfloat16.

`_weight_int4pack_mm_for_cpu` and `_weight_int8pack_mm` read 4 or 8 bits per weight instead of 16 and so beat a
dense matmul when few rows are multiplied; with many rows the arithmetic dominates and the dense matmul wins. Their int4
weights lie in blocks whose shape depends on the instruction set, so the block is found by packing a
known matrix and looking, and the kernel is not offered where no known block explains what is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from ..arithmetic import working_dtype
from ..grid import dequantize
from ..packing import pack, packed_length, spread, unpack
from . import reference

INT4_GROUP_SIZES = (32, 64, 128, 256)
INT4_BLOCKS = (64, 32)  # rows per block: AVX-512, AVX2 and the scalar fallback
INT8_WIDTH = 16  # the int8 kernel reads whole vectors, beyond the row where the width is not a multiple
CHUNK = 2**16  # weights that are converted at a time, so that nothing large is left to fragment the heap
INNER_K_TILES = 1  # an argument that the CPU op takes for symmetry with CUDA and ignores


@lru_cache
def int4_block() -> int | None:
    """Rows per block of the int4 layout on this machine, or None if the layout is not one that is known here."""
    probe = torch.randint(0, 16, (128, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe, INNER_K_TILES)
    matches = [block for block in INT4_BLOCKS if torch.equal(_from_blocks(packed, 64, block), probe.to(torch.uint8))]
    return matches[0] if matches else None


def _from_blocks(packed: Tensor, in_features: int, block: int) -> Tensor:
    """Undo `_convert_weight_to_int4pack_for_cpu`: uint8 `[out, in / 2]` → uint8 values `[out, in]`.

    Within a block, each input feature has `block / 2` bytes: the low nibbles are the first half of the rows.
    """
    octets = packed.view(-1, in_features, block // 2)
    return torch.cat((octets & 0xF, octets >> 4), -1).transpose(1, 2).contiguous().view(-1, in_features)


def int4_to_kernel(words: Tensor, in_features: int) -> Tensor:
    """Wire words → uint8 `[out, in / 2]` in blocks."""
    packed = words.new_empty(len(words), in_features // 2, dtype=torch.uint8)
    for part, part_words in _parts(packed, words, in_features, _known_block()):
        unsigned = unpack(part_words, 4, in_features).to(torch.int32) + 8
        part.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, INNER_K_TILES))
    return packed


def int4_to_wire(packed: Tensor, in_features: int) -> Tensor:
    """Exact reverse of `int4_to_kernel`."""
    words = packed.new_empty(len(packed), packed_length(in_features, 4), dtype=torch.int32)
    for part, part_packed in _parts(words, packed, in_features, _known_block()):
        part.copy_(pack(_int4_integers(part_packed, in_features), 4))
    return words


@torch.library.custom_op("hf_cptquant::int4_rows", mutates_args=())
def int4_rows(packed: Tensor, rows: Tensor, in_features: int) -> Tensor:
    """The integers of some rows of the int4 layout. An op, since the compiler cannot look for the block.

    Args:
        packed: uint8 `[out, in / 2]` in blocks.
        rows: int64 `[n]`.

    Returns:
        int8 `[n, in]`.
    """
    block = _known_block()
    place, octets = rows % block, packed.view(-1, in_features, block // 2)
    in_upper_half = (place >= block // 2).to(torch.uint8)
    found = octets[rows // block, :, place % (block // 2)] >> 4 * in_upper_half.unsqueeze(1)
    return (found & 0xF).to(torch.int8) - 8


@int4_rows.register_fake
def _(packed: Tensor, rows: Tensor, in_features: int) -> Tensor:
    return packed.new_empty(len(rows), in_features, dtype=torch.int8)


def _parts(first: Tensor, second: Tensor, in_features: int, block: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Corresponding rows of two forms of one weight, whole blocks of rows and about `CHUNK` weights at a time."""
    rows = max(1, CHUNK // (in_features * block)) * block
    return zip(first.split(rows), second.split(rows), strict=True)


def _known_block() -> int:
    block = int4_block()
    assert block is not None, "the layout is only entered where it is known"
    return block


def _int4_integers(packed: Tensor, in_features: int) -> Tensor:
    return _from_blocks(packed, in_features, _known_block()).to(torch.int8) - 8


def scale_and_shift(scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """The int4 kernel's table, bfloat16 `[groups, out, 2]`.

    The kernel computes (q − 8)·scale + shift, hence shift = (8 − z)·scale where z is counted from 0. To make the table
    at each call would slow decoding by a tenth (4096 × 4096) to a half (576 × 576), so it is held: as much memory again
    as the scales take.

    Args:
        scale: `[out, groups]`.
        zero_point: packed, or None.
    """
    shift = torch.zeros_like(scale) if zero_point is None else -unpack(zero_point, 4, len(scale), dim=0) * scale
    return torch.stack((scale.t(), shift.t()), -1)


def scale_of(table: Tensor) -> Tensor:
    """The scales `[out, groups]` in the int4 kernel's table, as a view."""
    return table[..., 0].t()


def int4_dense(packed: Tensor, table: Tensor, zero_point: Tensor | None, in_features: int) -> Tensor:
    """Dense weight `[out, in]` from the int4 layout; exact, since the integer zero point is used."""
    scale = scale_of(table)
    unpacked_zero = None if zero_point is None else unpack(zero_point, 4, len(scale), dim=0)
    return dequantize(_int4_integers(packed, in_features), scale, unpacked_zero)


def int4_linear(x: Tensor, packed: Tensor, table: Tensor, group_size: int) -> Tensor:
    """`x` bfloat16 `[rows, in]` times an int4 weight → `[rows, out]`."""
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, table)


def int4_dense_linear(
    x: Tensor, packed: Tensor, table: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`x [rows, in]` times an int4 weight for many rows → `[rows, out]` in the dtype of `x`.

    Blocks are dequantized as they lie, input features first, a few at a time. The two integers of a byte become
    neighbours, so output features are in the order 0, 32, 1, 33, … within a block of 64, and are brought back in the
    product. The weights are those of `int4_dense`, bit for bit.
    """
    (rows, in_features), out_features, block = x.shape, len(packed), _known_block()
    dtype = working_dtype(x.dtype, x.device)
    inputs = x.to(dtype)
    octets = packed.view(-1, in_features, block // 2)
    scales = _in_order_of_bytes(table[..., 0], block)
    unpacked_zero = (
        torch.zeros_like(table[..., 0]) if zero_point is None else unpack(zero_point, 4, out_features, 0).t()
    )
    zeros = _in_order_of_bytes(unpacked_zero, block) + 8  # integers are held from 0
    product = x.new_empty(rows, out_features)
    of_blocks = product.view(rows, len(octets), 2, block // 2).transpose(2, 3)
    step = (reference.rows_of_tile(in_features, x.device, block) or out_features) // block
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(octets), step):
            part = slice(start, start + step)
            integers = spread(octets[part].to(torch.int16), 4).view(-1, len(table), in_features // len(table), block)
            steps = integers.float()
            steps -= zeros[part]
            steps *= scales[part]
            dense = table.new_empty(*steps.shape[1:3], len(steps), block).copy_(steps.permute(1, 2, 0, 3))
            of_part = of_blocks[:, part]
            of_part.copy_((inputs @ dense.view(in_features, -1).to(dtype)).view(of_part.shape))
    return product if bias is None else product.add_(bias)


def _in_order_of_bytes(values: Tensor, block: int) -> Tensor:
    """Values by group and output feature, `[groups, out]` → float32 `[blocks, groups, 1, block]` in the order in which
    bytes hold a block's integers."""
    halves = values.float().view(len(values), -1, 2, block // 2)
    return halves.permute(1, 0, 3, 2).reshape(-1, len(values), 1, block)


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


def int8_dense_linear(x: Tensor, integers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same for many rows. In bfloat16 the integers themselves are multiplied, which are exact in it, and the
    product is scaled; wider inputs would tell that from the product with the dequantized weight, which is rounded."""
    rows = reference.rows_of_tile(integers.shape[1], x.device) or len(integers)
    if x.dtype != torch.bfloat16:
        parts = zip(integers.split(rows), scale.split(rows), strict=True)
        tiles = (dequantize(part, of_part, None) for part, of_part in parts)
        return reference.linear_of_tiles(x, tiles, bias, len(integers))
    product = reference.linear_of_tiles(x, (part.to(x.dtype) for part in integers.split(rows)), None, len(integers))
    product *= scale.flatten()
    return product if bias is None else product.add_(bias)


def int8_dense(integers: Tensor, scale: Tensor) -> Tensor:
    """Dense weight `[out, in]` from the int8 layout."""
    return dequantize(integers, scale, None)
