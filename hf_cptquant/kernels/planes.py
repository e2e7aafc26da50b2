"""Weights of 2 to 6 bits on torch's int4 kernel for CPUs, in no more memory than their bits take.

The kernel, `_weight_int4pack_mm_for_cpu`, reads 4 bits for each weight and so beats a dense product in bfloat16 when
few rows are multiplied. It multiplies with (n − 8)·scale + shift, n being the four bits. Integers of other widths are
held in planes, from whose bytes the kernel's bytes come by two or three operations on eight bytes at once, some output
features at a time, so that what the kernel reads is still in the cache:

- 2 bits: a byte holds two of the kernel's bytes, one of which is in place: n = 4c, c counted from 0.
- 3 bits: a byte holds one of the kernel's (n = 2c) and lends its two free bits to a fourth; three such bytes hold four.
- 5 and 6 bits: the upper four are the kernel's bytes as they are, and the lower one or two a plane that spreads to
  n = 8 + lower bits; the kernel is called with both, and the products are summed. Not with zero points: a shift that is
  rounded to bfloat16, as the kernel wants it, is too coarse for steps that fine.

The planes follow the kernel's own order: within a block of output features (64 with AVX-512, else 32), input features
first, and for each of them a byte for every two output features. The order depends on the instruction set, so it is
found by packing a known matrix and looking, and nothing of this is offered where no known order explains what is seen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..arithmetic import working_dtype
from ..grid import dequantize
from ..packing import pack, packed_length, unpack
from . import reference

GROUP_SIZES = (32, 64, 128, 256)
BLOCKS = (64, 32)  # output features of a block: AVX-512, AVX2 and the scalar fallback
CHUNK = 2**16  # weights that are converted at a time, so that nothing large is left to fragment the heap
INNER_K_TILES = 1  # an argument that the CPU op takes for symmetry with CUDA and ignores
LANE = 8  # bytes that are shifted and masked at once
QUARTERS = 4  # a block is spread in four parts, each of a quarter of the input features


@dataclass(frozen=True)
class Form:
    """How integers of some width are held: q = Σ factor · (n − 8), n being the kernel's four bits for a plane.

    Attributes:
        widths: bits of each plane, the upper ones first.
        factors: what the kernel's product with each plane counts; powers of two, so that scales are held as they are.
    """

    widths: tuple[int, ...]
    factors: tuple[float, ...]


FORMS = {
    2: Form((2,), (1 / 4,)),
    3: Form((3,), (1 / 2,)),
    4: Form((4,), (1,)),
    5: Form((4, 1), (2, 1)),
    6: Form((4, 2), (4, 1)),
}


def _bytes(*values: int) -> list[int]:
    """int64 lanes that hold one value in all of their bytes."""
    return [int.from_bytes(bytes([value] * LANE), sys.byteorder, signed=True) for value in values]


M01, M11, M33, M88, MCC, MEE = _bytes(0x01, 0x11, 0x33, 0x88, 0xCC, 0xEE)


@lru_cache
def _places(device: torch.device) -> Tensor:
    """By how many bits the four parts of a block are shifted in a plane of one bit."""
    return torch.arange(4, dtype=torch.int64, device=device).unsqueeze(1)


@lru_cache
def int4_block() -> int | None:
    """Output features of a block of the int4 kernel on this machine, or None if its order is not one that is known."""
    probe = torch.randint(0, 16, (128, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(probe, INNER_K_TILES)
    matches = [block for block in BLOCKS if torch.equal(_in_rows(packed, 64, block), probe.to(torch.uint8))]
    return matches[0] if matches else None


def known_block() -> int:
    """`int4_block`, where weights are in this layout already."""
    block = int4_block()
    assert block is not None, "the layout is only entered where it is known"
    return block


def _in_rows(octets: Tensor, in_features: int, block: int) -> Tensor:
    """Undo `_convert_weight_to_int4pack_for_cpu`: its bytes, of any shape → uint8 values `[out, in]`.

    Within a block, each input feature has `block / 2` bytes: the low nibbles are the first half of the rows.
    """
    octets = octets.view(torch.uint8).view(-1, in_features, block // 2)
    return torch.cat((octets & 0xF, octets >> 4), -1).transpose(1, 2).contiguous().view(-1, in_features)


def _from_rows(digits: Tensor, block: int) -> Tensor:
    """Reverse of `_in_rows`: uint8 values below 16, `[out, in]` → the kernel's bytes, `[blocks, in, block / 2]`.

    What `_convert_weight_to_int4pack_for_cpu` does, which takes ten times as long.
    """
    lower, upper = digits.view(-1, 2, block // 2, digits.shape[1]).unbind(1)
    octets = upper.bitwise_left_shift(4).bitwise_or_(lower)
    found = octets.new_empty(len(octets), octets.shape[2], octets.shape[1])
    for each, of_block in zip(found, octets, strict=True):  # one by one, since torch transposes matrices only fast
        each.copy_(of_block.t())
    return found


def to_kernel(words: Tensor, in_features: int) -> Tensor:
    """Wire words of 2 to 6 bits → planes, uint8 `[out, in · bits / 8]`; the bytes are not in the order of the rows."""
    bits, block = 32 * words.shape[1] // in_features, known_block()
    packed = words.new_empty(len(words), in_features * bits // 8, dtype=torch.uint8)
    planes = _planes(packed, bits, in_features)
    for part in _parts(len(words) // block, in_features * block):
        rows = slice(part.start * block, part.stop * block)
        unsigned = unpack(words[rows], bits, in_features).view(torch.uint8) + 2 ** (bits - 1)
        lower = bits
        for plane, width in zip(planes, FORMS[bits].widths, strict=True):
            lower -= width
            digits = (unsigned >> lower) & (2**width - 1)
            octets = _from_rows(digits, block)
            plane[part] = _join(octets.view(-1).view(torch.int64).view(len(plane[part]), QUARTERS, -1), width)
    return packed


def to_wire(packed: Tensor, in_features: int) -> Tensor:
    """Exact reverse of `to_kernel`."""
    bits, block = bits_of(packed, in_features), known_block()
    words = packed.new_empty(len(packed), packed_length(in_features, bits), dtype=torch.int32)
    planes = _planes(packed, bits, in_features)
    for part in _parts(len(packed) // block, in_features * block):
        rows = slice(part.start * block, part.stop * block)
        words[rows] = pack(_integers([plane[part] for plane in planes], bits, in_features), bits)
    return words


def bits_of(packed: Tensor, in_features: int) -> int:
    """Bits of the integers in planes."""
    return 8 * packed.shape[1] // in_features


def _parts(blocks: int, size: int) -> Iterator[slice]:
    """Blocks in parts of about `CHUNK` weights; `size` is that of a block."""
    step = max(1, CHUNK // size)
    return (slice(start, min(start + step, blocks)) for start in range(0, blocks, step))


def _planes(packed: Tensor, bits: int, in_features: int) -> list[Tensor]:
    """Views of the planes, int64 `[blocks, width, a quarter of a block's bytes by the kernel / 8]`."""
    quarter = known_block() * in_features // (2 * QUARTERS * LANE)
    lanes = packed.view(-1).view(torch.int64)
    widths = FORMS[bits].widths
    if len(widths) == 1:
        return [lanes.view(-1, widths[0], quarter)]
    parts = lanes.split([len(lanes) * width // bits for width in widths])
    return [part.view(-1, width, quarter) for part, width in zip(parts, widths, strict=True)]


def _join(octets: Tensor, width: int) -> Tensor:
    """The kernel's bytes, int64 `[blocks, 4, n]`, a digit in the lowest bits of each nibble → `[blocks, width, n]`."""
    if width == 4:
        return octets
    if width == 1:
        return (octets << _places(octets.device)).sum(1, keepdim=True)
    if width == 2:
        return octets[:, :2] | octets[:, 2:] << 2
    lent = [octets[:, 3:] >> place & M11 for place in (2, 1, 0)]
    return octets[:, :3] << 1 | torch.cat(lent, 1)


def _spread(plane: Tensor, width: int, bits: int, scratch: Tensor) -> Tensor:
    """A plane → the kernel's bytes for it, int64 `[blocks, 4, n]`, in `scratch` unless they are the plane itself."""
    if width == 4:
        return plane
    if width == 1:
        torch.bitwise_right_shift(plane, _places(plane.device), out=scratch)
        return scratch.bitwise_and_(M11).bitwise_or_(M88)
    if width == 3:
        torch.bitwise_and(plane, MEE, out=scratch[:, :3])
        first, second, third = torch.bitwise_and(plane, M11).unbind(1)
        lent = torch.bitwise_left_shift(first, 1).bitwise_or_(second).bitwise_left_shift_(1).bitwise_or_(third)
        torch.bitwise_left_shift(lent, 1, out=scratch[:, 3])
        return scratch
    first, second = scratch[:, :2], scratch[:, 2:]
    if bits == 2:
        torch.bitwise_left_shift(plane, 2, out=first).bitwise_and_(MCC)
        torch.bitwise_and(plane, MCC, out=second)
        return scratch
    torch.bitwise_and(plane, M33, out=first)
    torch.bitwise_right_shift(plane, 2, out=second).bitwise_and_(M33)
    return scratch.bitwise_or_(M88)


def _scratch(plane: Tensor) -> Tensor:
    return plane.new_empty(len(plane), QUARTERS, plane.shape[2])


def _integers(planes: list[Tensor], bits: int, in_features: int) -> Tensor:
    """Signed integers `[out, in]`, int8, of the blocks of some planes."""
    scratch, form = _scratch(planes[0]), FORMS[bits]
    total = torch.zeros((), dtype=torch.int8)
    for plane, width, factor in zip(planes, form.widths, form.factors, strict=True):
        values = _in_rows(_spread(plane, width, bits, scratch), in_features, known_block()).view(torch.int8) - 8
        total = total + (values * int(factor) if factor >= 1 else values >> (4 - width))
    return total


@torch.library.custom_op("hf_cptquant::rows_of_planes", mutates_args=())
def rows_of(packed: Tensor, rows: Tensor, in_features: int) -> Tensor:
    """The integers of some rows. An op, since the compiler cannot look for the block.

    Args:
        packed: planes.
        rows: int64 `[n]`.

    Returns:
        int8 `[n, in]`.
    """
    bits, block = bits_of(packed, in_features), known_block()
    place = rows % block
    if bits == 4:
        octets = packed.view(-1, in_features, block // 2)
        in_upper_half = (place >= block // 2).to(torch.uint8)
        found = octets[rows // block, :, place % (block // 2)] >> 4 * in_upper_half.unsqueeze(1)
        return (found & 0xF).to(torch.int8) - 8
    blocks, index = (rows // block).unique(return_inverse=True)
    integers = _integers([plane[blocks] for plane in _planes(packed, bits, in_features)], bits, in_features)
    return integers.view(len(blocks), block, in_features)[index, place]


@rows_of.register_fake
def _(packed: Tensor, rows: Tensor, in_features: int) -> Tensor:
    return packed.new_empty(len(rows), in_features, dtype=torch.int8)


def to_table(scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """Scales `[out, groups]` in the kernel's order: bfloat16 `[groups, out]`, or with zero points scales and shifts
    `[groups, out, 2]`, shift = −z·scale / factor.

    Without zero points the shifts are 0 and not held, but made at each call: held, they would take as much memory again
    as the scales do. To make those of zero points would take longer.
    """
    if zero_point is None:
        return scale.t().contiguous()
    counted = unpack(zero_point, bits, len(scale), dim=0) / FORMS[bits].factors[0]
    return torch.stack((scale.t(), (-counted * scale.float()).to(scale.dtype).t()), -1)


def zeros_of(zero_point: Tensor | None, bits: int, out_features: int) -> Tensor | None:
    """Zero points, int8 `[out, groups]`, out of the words of the wire format, or out of int8 `[groups, out]`."""
    if zero_point is None:
        return None
    if zero_point.dtype == torch.int8:
        return zero_point.t()
    return unpack(zero_point, bits, out_features, dim=0)


def scale_of(table: Tensor) -> Tensor:
    """The scales `[out, groups]` in a table, of all output features or of some."""
    return _scales(table).t().contiguous()


def _scales(table: Tensor) -> Tensor:
    return table if table.dim() == 2 else table[..., 0]


def _pairs(table: Tensor) -> Tensor:
    """A table, of all output features or of some, as the kernel reads it: scale and shift, `[groups, out, 2]`.

    Without shifts: the bits of a scale, as an integer that is widened to 32 bits, lie in memory before 16 zeros.
    """
    if table.dim() == 3:
        return table.contiguous()
    wide = table.view(torch.uint16).to(torch.int32, memory_format=torch.contiguous_format)
    return wide.view(torch.bfloat16).view(*table.shape, 2)


def linear(x: Tensor, packed: Tensor, table: Tensor, group_size: int) -> Tensor:
    """`x` bfloat16 `[rows, in]`, contiguous, times planes → `[rows, out]`, for few rows."""
    kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
    (rows, in_features), bits = x.shape, bits_of(packed, x.shape[1])
    if bits == 4:
        return kernel(x, packed, group_size, _pairs(table))
    out_features, block, form = len(packed), known_block(), FORMS[bits]
    planes = _planes(packed, bits, in_features)
    step = (reference.rows_of_tile(in_features, x.device, block) or out_features) // block
    product = x.new_empty(rows, out_features)
    scratch = _scratch(planes[0][:step])
    for start in range(0, out_features // block, step):
        part = slice(start, start + step)
        outputs = slice(start * block, (start + step) * block)
        of_part = product[:, outputs]
        pairs, found = _pairs(table[:, outputs]), []
        for plane, width in zip(planes, form.widths, strict=True):
            octets = _spread(plane[part], width, bits, scratch[: of_part.shape[1] // block])
            found.append(kernel(x, octets.view(torch.uint8).view(-1, in_features // 2), group_size, pairs))
        if len(found) == 1:
            torch.mul(found[0], form.factors[0], out=of_part)
        else:
            torch.add(found[1], found[0], alpha=form.factors[0], out=of_part)
    return product


def _dense_tiles(
    packed: Tensor, table: Tensor, zero_point: Tensor | None, in_features: int
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks, and their dequantized weights in two halves, the first and the second half of the output features of each
    block: `[2, in, blocks · block / 2]` in the dtype of the scales.

    All that takes long works on contiguous rows of output features, whose scales and zero points lie beside one
    another, too. (q − z)·scale is rounded once.
    """
    bits, block = bits_of(packed, in_features), known_block()
    form, planes, (out_features, groups) = FORMS[bits], _planes(packed, bits, in_features), (len(packed), len(table))
    lowest, scales = 2 ** (bits - 1), _in_halves(_scales(table), block)
    unpacked_zero = zeros_of(zero_point, bits, out_features)
    zeros = None if unpacked_zero is None else _in_halves(unpacked_zero.t() + lowest, block)
    step = (reference.rows_of_tile(in_features, packed.device, block) or out_features) // block
    for start in range(0, out_features // block, step):
        part = slice(start, start + step)
        digits = [
            _digits(
                _spread(plane[part], width, bits, _scratch(plane[part])),
                in_features,
                width,
                4 - width if bits < 4 else 0,
            )
            for plane, width in zip(planes, form.widths, strict=True)
        ]
        lanes = digits[0] if len(digits) == 1 else digits[0].bitwise_left_shift_(form.widths[1]).bitwise_or_(digits[1])
        steps = lanes.view(torch.int8).view(2, groups, in_features // groups, -1)
        steps -= lowest if zeros is None else zeros[:, :, part].reshape(2, groups, 1, -1)
        dense = steps.to(table.dtype)
        dense *= scales[:, :, part].reshape(2, groups, 1, -1)
        yield part, dense.view(2, in_features, -1)


def _in_halves(values: Tensor, block: int) -> Tensor:
    """Values `[groups, out]` → `[2, groups, blocks, block / 2]`, a view."""
    return values.unflatten(1, (-1, 2, block // 2)).permute(2, 0, 1, 3)


def _digits(octets: Tensor, in_features: int, width: int, place: int) -> Tensor:
    """The kernel's bytes for a plane → its digits, which begin at a place of each nibble, counted from 0, one in each
    byte: int64 lanes `[2, in, n]`."""
    lanes = octets.view(len(octets), in_features, -1).transpose(0, 1).reshape(in_features, -1)
    found = lanes.new_empty(2, *lanes.shape)
    torch.bitwise_right_shift(lanes, place, out=found[0])
    torch.bitwise_right_shift(lanes, place + 4, out=found[1])
    return found.bitwise_and_(M01 * (2**width - 1))


def dense_linear(x: Tensor, packed: Tensor, table: Tensor, zero_point: Tensor | None, bias: Tensor | None) -> Tensor:
    """`x [rows, in]` times planes, for many rows → `[rows, out]` in the dtype of `x`. The weights are those of
    `dense_weight`, bit for bit."""
    (rows, in_features), block = x.shape, known_block()
    dtype = working_dtype(x.dtype, x.device)
    inputs, product = x.to(dtype), x.new_empty(rows, len(packed))
    of_blocks = product.view(rows, len(packed) // block, 2, block // 2)
    with torch.autocast(x.device.type, enabled=False):
        for part, dense in _dense_tiles(packed, table, zero_point, in_features):
            for half in (0, 1):
                of_part = of_blocks[:, part, half]
                of_part.copy_((inputs @ dense[half].to(dtype)).view(of_part.shape))
    return product if bias is None else product.add_(bias)


def dense_weight(packed: Tensor, table: Tensor, zero_point: Tensor | None, in_features: int) -> Tensor:
    """The dequantized weight `[out, in]` in the dtype of the scales; exact, since integer zero points are used."""
    bits, scale = bits_of(packed, in_features), scale_of(table)
    integers = _integers(_planes(packed, bits, in_features), bits, in_features)
    return dequantize(integers, scale, zeros_of(zero_point, bits, len(scale)))
