"""Products of many rows with packed weights, by the processor's own dot products of bfloat16 (AVX-512).

`numba_dot` looks integers up again for every few rows. Here those of a block of 64 output features are looked up once
for all rows: they are written to a panel, which stays in the cache, in the order that the instruction takes them. Then
six rows at a time are multiplied with it, whose sums fill the registers. The integers are exact in bfloat16, scales
multiply the sums of each group, and zero points are taken off the integers; nothing is rounded but the sums.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import intrinsic
from torch import Tensor

from .numba_dot import (
    AHEAD,
    BFLOATS,
    BLOCK,
    FLOATS,
    FMA,
    INT8,
    INT64,
    LANES,
    OCTETS,
    TERMS,
    VECTORS,
    WORDS,
    Writer,
    terms_of,
)
from .numba_kernel import (
    ENTRIES,
    FORMS_OF_SCALES,
    SIGNATURE,
    check_width,
    dtype_of_outputs,
    end_of_groups,
    floats_at,
    halves_at,
    integers_at,
    narrowed,
    run_compiled,
    share_of_thread,
    thread_number,
)
from .planes import FORMS, QUARTERS

TOGETHER = 6  # terms of rows, of which the sums fit into the registers
TILES = 64  # of so many, that are multiplied with a panel before it is filled anew
OF_TOTALS = 4 * TILES * TOGETHER * BLOCK  # bytes
PANEL = 2048  # input features, which take a quarter of a megabyte
PAIR = 4 * BLOCK  # bytes of a panel for two input features
WIDTH = 64  # input features of 8 bits that are brought into the order of a panel together
AHEAD_OF_ROW = 256  # bytes


def parts_of(bits: int) -> int:
    """Of the input features that are read together: integers of 4 and 8 bits share bytes with no other quarter's."""
    return 1 if bits in (4, 8) else QUARTERS


@intrinsic(prefer_literal=True)
def _fill_from_planes(_typing, bits, shifted, upper, lower, zeros, length, start, end, part_of_panel, panel):
    """Write input features start … end of each part of a block of planes into a panel.

    Its arguments: bits, and whether there are zero points, known when it is compiled; addresses of the block's planes,
    and of bytes to be added, `[parts, 2 nibbles, 64]`, what each output feature has twice; how many input features a
    part has; start, and end; how many a panel has of each part; address in the panel of what start is.
    """
    kinds = signature(types.void, bits, shifted, *[types.int64] * 8)
    bits, shifted = bits.literal_value, shifted.literal_value
    widths, parts = FORMS[bits].widths, parts_of(bits)

    def generate(context: Any, build: Any, _signature: Any, arguments: Any) -> Any:
        *planes, zeros, length, start, end, part_of_panel, panel = arguments[2:]
        write, bytes_of_part = Writer(build), build.mul(length, INT64(BLOCK // 2))
        with cgutils.for_range_slice(build, start, end, INT64(2)) as (feature, _):
            digits = []
            for plane, width in zip(planes, widths, strict=False):
                first = write.at(plane, write.times(feature, BLOCK // 2))
                pieces = range(width * parts // QUARTERS)
                starts = [write.at(first, write.times(bytes_of_part, piece)) for piece in pieces]
                digits.append(write.spread(width, [write.load_octets(each, AHEAD // 2) for each in starts]))
            for part in range(parts):
                number = build.sub(write.at(write.times(part_of_panel, part), feature), start)
                first = write.at(panel, write.times(number, PAIR // 2))
                for place in (0, 1):
                    integers = write.integers([each[part] for each in digits], widths, 4 * place)
                    lowest = 2 ** (bits - 1)
                    if shifted:
                        of_this = write.load(write.at(zeros, BLOCK * (2 * part + place)), OCTETS)
                        integers, lowest = build.add(integers, of_this), 2**bits - 1
                    for vector, steps in enumerate(write.steps(integers, bits + shifted, lowest), start=2 * place):
                        write.store(steps, write.at(first, 4 * LANES * vector))
        return context.get_dummy_value()

    return kinds, generate


@intrinsic(prefer_literal=True)
def _fill_from_int8(_typing, shifted, integers, zeros, in_features, panel):
    """Write `WIDTH` input features of 16 output features of int8 `[out, in]` into a panel.

    Its arguments: whether there are zero points, known when it is compiled; addresses of the first integer, and of zero
    points, int8 `[out]`; how many input features there are; address in the panel of the first.
    """
    kinds = signature(types.void, shifted, *[types.int64] * 4)
    shifted = shifted.literal_value

    def generate(context: Any, build: Any, _signature: Any, arguments: Any) -> Any:
        integers, zeros, in_features, panel = arguments[1:]
        write, bits = Writer(build), lambda count: ir.Constant(WORDS, [count] * LANES)
        starts = [write.at(integers, write.times(in_features, row)) for row in range(LANES)]
        rows = [build.bitcast(write.load_octets(start, write.times(in_features, LANES)), WORDS) for start in starts]
        of_outputs = build.sext(write.load(zeros, ir.VectorType(INT8, LANES)), WORDS) if shifted else None
        for number, four in enumerate(write.transposed(rows)):
            found = []  # the bits of these input features in float32, of which the upper half is all that there is
            for place in range(4):
                steps = build.ashr(build.shl(four, bits(24 - 8 * place)), bits(24))
                steps = build.sub(steps, of_outputs) if shifted else steps
                found.append(build.bitcast(build.sitofp(steps, FLOATS), WORDS))
            for pair in (0, 1):
                first, second = found[2 * pair : 2 * pair + 2]
                both = build.or_(build.lshr(first, bits(16)), build.and_(second, bits(0xFFFF0000)))
                write.store(both, write.at(panel, PAIR * (2 * number + pair)))
        return context.get_dummy_value()

    return kinds, generate


@intrinsic(prefer_literal=True)
def _panel_product(_typing, rows, panel, scales, x, in_features, totals, groups, group_size):
    """Add the product of some rows with a panel to their totals.

    Its arguments: rows, known when it is compiled; addresses of the panel; of its scales, float32 `[groups, block]`; of
    the inputs, and how many a row has; of the totals, float32 `[rows, block]`; groups of the panel, and their size.
    """
    kinds = signature(types.void, rows, *[types.int64] * 7)
    rows = rows.literal_value

    def generate(context: Any, build: Any, _signature: Any, arguments: Any) -> Any:
        panel, scales, x, in_features, totals, groups, group_size = arguments[1:]
        write, vectors = Writer(build), [(row, vector) for row in range(rows) for vector in range(VECTORS)]
        found, of_group = write.sums(rows, VECTORS), write.sums(rows, VECTORS)
        places = {(row, vector): write.at(totals, 4 * (BLOCK * row + LANES * vector)) for row, vector in vectors}
        for row, vector in vectors:
            build.store(write.load(places[row, vector], FLOATS), found[row][vector])
        with cgutils.for_range(build, groups) as of_groups:
            group = of_groups.index
            write.clear(of_group)
            start = write.times(group, group_size)
            with cgutils.for_range_slice(build, start, write.at(start, group_size), INT64(2)) as (feature, _):
                pair = write.at(panel, write.times(feature, PAIR // 2))
                steps = [write.load(write.at(pair, 4 * LANES * vector), BFLOATS) for vector in range(VECTORS)]
                for row in range(rows):
                    of_row = write.at(feature, write.times(in_features, row))
                    write.add_products(of_group[row], steps, x, of_row)
            of_this = write.at(scales, write.times(group, 4 * BLOCK))
            scale = [write.load(write.at(of_this, 4 * LANES * vector), FLOATS) for vector in range(VECTORS)]
            for row, vector in vectors:
                total, sums = found[row][vector], build.load(of_group[row][vector])
                build.store(write.call(FMA, FLOATS, sums, scale[vector], build.load(total)), total)
        for row, vector in vectors:
            write.store(build.load(found[row][vector]), places[row, vector])
        return context.get_dummy_value()

    return kinds, generate


@intrinsic(prefer_literal=True)
def _widen_scales(_typing, form, scales, widened):
    """Write the scales of a block in one group as float32. Their form, known when it is compiled; addresses of both."""
    kinds = signature(types.void, form, types.int64, types.int64)
    form = form.literal_value

    def generate(context: Any, build: Any, _signature: Any, arguments: Any) -> Any:
        _, scales, widened = arguments
        write = Writer(build)
        for first in range(0, BLOCK, LANES):
            found = write.scales(write.at(scales, ENTRIES[form] * first), form)
            write.store(found, write.at(widened, 4 * first))
        return context.get_dummy_value()

    return kinds, generate


fill_from_planes: Any = _fill_from_planes  # which to type checkers have the arguments of their typing functions
fill_from_int8: Any = _fill_from_int8
panel_product: Any = _panel_product
widen_scales: Any = _widen_scales


@njit(inline="always")
def _zeros_to_add(zeros, most, added, start):
    """What is to be added to integers that are counted from 0 up to `most`, for their zero points; so that they stay
    above 0 and are `most` above what they stand for."""
    for half in range(2):
        to = start + half * BLOCK
        for j in range(BLOCK // 2):
            value = np.uint8(np.uint8(most // 2) - np.uint8(zeros[half * (BLOCK // 2) + j]))
            added[to + j] = added[to + j + BLOCK // 2] = value


@njit(inline="always")
def _fill_with_int8(shifted, integers, zeros, in_features, start, end, panel):
    """Write input features start … end of a block into a panel. Addresses of its first output feature, and the zero
    point of that."""
    for j in range(0, BLOCK, LANES):
        for each in range(start, end, WIDTH):
            place = min(each, end - WIDTH)  # the last ones may begin among those before
            to = panel + 2 * BLOCK * (place - start) + 4 * j
            fill_from_int8(shifted, integers + j * in_features + place, zeros + j, in_features, to)


@njit(inline="always")
def _fill_with_planes(
    bits, shifted, parts, upper, lower, zeros, added, length, group_size, out_features, start, end, panel
):
    """Write input features start … end of each part of a block into a panel. Addresses of the block's planes, and of
    its zero points in the first group."""
    place = start
    while place < end:
        until = end
        if shifted:
            until = min(end, end_of_groups(place, length, group_size))
            for part in range(parts):
                group = (part * length + place) // group_size
                of_group = integers_at(zeros + group * out_features)
                _zeros_to_add(of_group, (1 << bits) - 1, added, 2 * BLOCK * part)
        to = panel + 2 * BLOCK * (place - start)
        fill_from_planes(bits, shifted, upper, lower, added.ctypes.data, length, place, until, end - start, to)
        place = until


@njit(inline="always")
def _multiply_tiles(
    terms, panel, scales, x, rows, first_tile, end_tile, tiles, in_features, totals, groups, group_size
):
    """Add the products of some of the tiles of rows (terms of a row are together) with a panel to their totals."""
    first_row = rows * first_tile // tiles
    for tile in range(first_tile, end_tile):
        row = rows * tile // tiles
        together = terms * (rows * (tile + 1) // tiles - row)
        inputs, to = x + 2 * terms * row * in_features, totals + 4 * BLOCK * terms * (row - first_row)
        if together == 6:
            panel_product(6, panel, scales, inputs, in_features, to, groups, group_size)
        elif together == 5:
            panel_product(5, panel, scales, inputs, in_features, to, groups, group_size)
        elif together == 4:
            panel_product(4, panel, scales, inputs, in_features, to, groups, group_size)
        elif together == 3:
            panel_product(3, panel, scales, inputs, in_features, to, groups, group_size)
        elif together == 2:
            panel_product(2, panel, scales, inputs, in_features, to, groups, group_size)
        else:
            panel_product(1, panel, scales, inputs, in_features, to, groups, group_size)


@lru_cache
def _multiplier(bits: int, form: int, shifted: int, terms: int) -> Any:
    """The compiled function of `linear`, by bits, the form of scales, whether there are zero points, and the terms of
    inputs. Its argument: addresses of integers, scales, zero points, terms, outputs, and of each thread's totals, panel
    and its scales; rows, input features, output features, group size; input features that a panel takes of each
    part, and its bytes."""
    upper_width, lower_width = (8, 0) if bits == 8 else (*FORMS[bits].widths, 0)[:2]
    all_parts, of_tile, entry = parts_of(bits), TOGETHER // terms, ENTRIES[form]

    @cfunc(SIGNATURE, cache=True)
    def multiply(arguments):
        held = carray(arguments, 14)
        rows, in_features, out_features, group_size, step = held[8], held[9], held[10], held[11], held[12]
        blocks, tiles = (out_features + BLOCK - 1) // BLOCK, (rows + of_tile - 1) // of_tile
        length, all_groups, thread = in_features // all_parts, in_features // group_size, thread_number()
        parts = 1 if step == length else all_parts  # of a panel, one behind the other
        totals, panel = held[5] + thread * OF_TOTALS, held[6] + thread * held[13]
        scales = held[7] + 4 * thread * BLOCK * all_groups
        sums = floats_at(totals)
        added = np.empty(2 * all_parts * BLOCK, np.uint8)
        done, last = share_of_thread(blocks * tiles)
        while done < last:
            b, first_tile = done // tiles, done % tiles
            end_tile = min(tiles, first_tile + min(TILES, last - done))
            done += end_tile - first_tile
            first_row, end_row = rows * first_tile // tiles, rows * end_tile // tiles
            first = min(b * BLOCK, out_features - BLOCK)  # the last block may begin within the one before
            for j in range((end_row - first_row) * terms * BLOCK):
                sums[j] = np.float32(0)
            start = 0
            while start < length:
                end = start + step if length - start - step >= WIDTH else length
                if bits == 8:
                    integers = held[0] + first * in_features
                    _fill_with_int8(shifted, integers, held[2] + first, in_features, start, end, panel)
                else:
                    of_block = in_features * BLOCK // 8  # bytes for each bit
                    upper, lower = held[0] + b * of_block * upper_width, blocks * upper_width + b * lower_width
                    _fill_with_planes(
                        bits, shifted, all_parts, upper, held[0] + lower * of_block, held[2] + first, added, length,
                        group_size, out_features, start, end, panel,
                    )  # fmt: skip
                for part in range(parts):
                    feature, count = part * length + start, (end - start) * (all_parts // parts)
                    group, groups, size = feature // group_size, max(1, count // group_size), min(count, group_size)
                    for each in range(groups):
                        place = (group + each) * out_features + first
                        widen_scales(form, held[1] + entry * place, scales + 4 * BLOCK * each)
                    columns, x = panel + 2 * BLOCK * part * (end - start), held[3] + 2 * feature
                    _multiply_tiles(
                        terms, columns, scales, x, rows, first_tile, end_tile, tiles, in_features, totals, groups, size
                    )
                start = end
            for row in range(first_row, end_row):
                place, start = row * out_features + first, (row - first_row) * terms * BLOCK
                narrow, wide = halves_at(held[4]), floats_at(held[4])
                for j in range(BLOCK):
                    if terms == 1:
                        narrow[place + j] = narrowed(sums[start + j])
                    elif terms == 2:
                        wide[place + j] = sums[start + j] + sums[start + BLOCK + j]
                    else:
                        small = sums[start + BLOCK + j] + sums[start + 2 * BLOCK + j]
                        wide[place + j] = sums[start + j] + small

    return multiply


def linear(x: Tensor, integers: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int) -> Tensor:
    """`x` `[rows, in]` in bfloat16, float16 or float32, contiguous, times a packed weight → `[rows, out]`; summed in
    float32.

    Args:
        integers: planes as `planes.linear` takes them; or those of 8 bits, int8 `[out, in]`, at least 64 × 64 and with
            an even number of inputs.
        scales: of any of these dtypes, `[groups, out]`.
        zero_points: int8 `[groups, out]`, or None.

    Raises:
        ValueError: the inputs have another width than the weight.
    """
    rows, in_features = x.shape
    check_width(in_features, 8 * integers.shape[1] // bits)
    (groups, out_features), threads = scales.shape, torch.get_num_threads()
    terms, shifted = TERMS[x.dtype], int(zero_points is not None)
    group_size, parts = in_features // groups, parts_of(bits)
    length, unit = in_features // parts, WIDTH if bits == 8 else group_size
    most = PANEL if bits < 8 or terms == 1 else WIDTH  # sums of many numbers would round too often
    step = min(length, most // parts // unit * unit)
    if not step or (bits < 8 and length % group_size):  # a panel has whole groups
        step = length
    product = x.new_empty(rows, out_features, dtype=dtype_of_outputs(x.dtype))
    of_panel = 2 * BLOCK * parts * (step + WIDTH)  # the last panel takes what is too little for one more, too
    totals, panels = (x.new_empty(threads * count, dtype=torch.uint8) for count in (OF_TOTALS, of_panel))
    widened = x.new_empty(threads, groups, BLOCK, dtype=torch.float32)
    function = _multiplier(bits, FORMS_OF_SCALES[scales.dtype], shifted, terms)
    numbers = (rows, in_features, out_features, group_size, step, of_panel)
    run_compiled(function, integers, scales, zero_points, terms_of(x), product, totals, panels, widened, *numbers)
    return product if terms == 1 else product.to(x.dtype)
