"""Products with bit planes and with 8 bits, compiled by numba for the processor at hand, on torch's own threads.

torch's int4 kernel reads four bits for each weight, to which other widths are spread first; and to dequantize for many
rows takes several of torch's operations, each a pass over the weights. Here a byte of the planes becomes digits, and
these are multiplied and summed (`linear`) or scaled and stored (`dense_linear`) while they are in registers.

What a block of output features has for one input feature lies side by side (`planes.py`), so the inner loops go over
output features, and LLVM makes vectors of them. Planes hold a block in quarters of its input features, whose digits
share bytes, so four input features are read at once. Integers are written with their widths at every step: numba would
compute in 64 bits, and LLVM would find a fraction of the lanes.

The threads are those of torch's OpenMP library, which wait busily for a while after each of torch's operations: those
of a pool of numba's own would have to wait for them.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

from ..arithmetic import working_dtype
from . import reference
from .planes import FORMS, known_block

LEAST_BLOCKS = 4  # of a tile, or the dense product would be slow for its shape
SIGNATURE = types.void(types.CPointer(types.int64))
OF_BFLOAT16, OF_FLOAT16, OF_FLOAT32 = range(3)  # scales
FORMS_OF_SCALES = {torch.bfloat16: OF_BFLOAT16, torch.float16: OF_FLOAT16, torch.float32: OF_FLOAT32}
ENTRIES = (2, 2, 4)  # bytes, by these forms

_found = next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), None)
if _found is None:
    raise ImportError("torch's threads are not those of GNU's OpenMP library")
_library = ctypes.CDLL(str(_found))
_parallel = _library.GOMP_parallel  # function, its argument, threads, flags
_parallel.argtypes, _parallel.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None


def _symbol(name: str) -> Any:
    """A function of that library for compiled code, by its name: with an address code could not be kept on disk."""
    address = ctypes.cast(getattr(_library, name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(name, address)
    return types.ExternalFunction(name, types.int32())


_thread, _threads = _symbol("omp_get_thread_num"), _symbol("omp_get_num_threads")


def run_compiled(function: Any, *arguments: Tensor | int | None) -> None:
    """Call a compiled function on all of torch's threads. Of tensors it gets the addresses."""
    kept = [each.contiguous() if isinstance(each, Tensor) else each for each in arguments]  # while it runs
    numbers = [each.data_ptr() if isinstance(each, Tensor) else each or 0 for each in kept]
    held = (ctypes.c_int64 * len(numbers))(*numbers)
    _parallel(function.address, ctypes.addressof(held), torch.get_num_threads(), 0)


def _pointer_to(dtype: Any) -> Any:
    """A function for compiled code: address → pointer."""
    pointer = types.CPointer(dtype)

    @intrinsic
    def at(_typing: Any, _address: Any) -> Any:
        def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.int64), generate

    return at


_octets_at, integers_at = _pointer_to(types.uint8), _pointer_to(types.int8)
halves_at, _words_at, floats_at = _pointer_to(types.uint16), _pointer_to(types.uint32), _pointer_to(types.float32)


@njit(inline="always")
def thread_number():
    """Of this thread, from 0."""
    return types.int64(_thread())


@njit(inline="always")
def share_of_thread(count):
    """Which of so many pieces of work are this thread's: the first, and the one after the last."""
    return count * _thread() // _threads(), count * (_thread() + 1) // _threads()


@njit(inline="always", cache=True)  # fails at once where no compiled code can be kept
def widened(half):
    """The bits of a bfloat16 → its number."""
    return np.uint32(np.uint32(half) << np.uint32(16)).view(np.float32)


@intrinsic(prefer_literal=True)
def _number_at(_typing, form, address):
    """A number in the form that scales have, known when it is compiled, as float32."""
    form = form.literal_value

    def generate(_context: Any, build: Any, _signature: Any, arguments: Any) -> Any:
        kind = {OF_BFLOAT16: ir.IntType(16), OF_FLOAT16: ir.HalfType(), OF_FLOAT32: ir.FloatType()}[form]
        number = build.load(build.inttoptr(arguments[1], kind.as_pointer()), align=ENTRIES[form])
        if form == OF_BFLOAT16:
            word = build.zext(number, ir.IntType(32))
            return build.bitcast(build.shl(word, ir.IntType(32)(16)), ir.FloatType())
        return number if form == OF_FLOAT32 else build.fpext(number, ir.FloatType())

    return types.float32(types.literal(form), types.int64), generate


number_at: Any = _number_at  # which to type checkers has the arguments of its typing function


@njit(inline="always")
def narrowed(number):
    """A number → the bits of the nearest bfloat16, the even one of two."""
    bits = np.float32(number).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16(np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd) >> np.uint32(16))


@njit(cache=True, fastmath={"contract", "reassoc"})  # else a sum would be no vector
def sum_groups(x, count, group_size, sums):
    """Σ x of so many groups of bfloat16, which lie behind one another. By each thread for itself: that takes less time
    than to wait for the others."""
    for group in range(count):
        total = np.float32(0)
        for i in range(group * group_size, (group + 1) * group_size):
            total += widened(x[i])
        sums[group] = total


@njit(inline="always")
def _spread(width, plane, quarter, byte):
    """The bytes that a plane holds for one place in each of the quarters, a digit in each nibble."""
    first = plane[byte]
    if width == 1:
        mask = np.uint8(0x11)
        second, third = np.uint8(np.uint8(first >> np.uint8(1)) & mask), np.uint8(np.uint8(first >> np.uint8(2)) & mask)
        return np.uint8(first & mask), second, third, np.uint8(np.uint8(first >> np.uint8(3)) & mask)
    second = plane[quarter + byte]
    if width == 2:
        mask = np.uint8(0x33)
        third, fourth = (
            np.uint8(np.uint8(first >> np.uint8(2)) & mask),
            np.uint8(np.uint8(second >> np.uint8(2)) & mask),
        )
        return np.uint8(first & mask), np.uint8(second & mask), third, fourth
    third = plane[2 * quarter + byte]
    if width == 4:
        return first, second, third, plane[3 * quarter + byte]
    mask, lent = np.uint8(0x77), np.uint8(0x11)
    upper = np.uint8(np.uint8(np.uint8(first & lent) << np.uint8(2)) | np.uint8(np.uint8(second & lent) << np.uint8(1)))
    return (
        np.uint8(np.uint8(first >> np.uint8(1)) & mask),
        np.uint8(np.uint8(second >> np.uint8(1)) & mask),
        np.uint8(np.uint8(third >> np.uint8(1)) & mask),
        np.uint8(upper | np.uint8(third & lent)),
    )


@njit(inline="always")
def _joined(upper_width, lower_width, upper, lower, quarter, byte):
    """Integers counted from 0 of one place in each of the quarters: those of the lower, and of the upper nibbles."""
    a, b, c, d = _spread(upper_width, upper, quarter, byte)
    e = f = g = h = np.uint8(0)
    if lower_width:
        e, f, g, h = _spread(lower_width, lower, quarter, byte)
    return (
        _low(a, e, lower_width), _high(a, e, lower_width), _low(b, f, lower_width), _high(b, f, lower_width),
        _low(c, g, lower_width), _high(c, g, lower_width), _low(d, h, lower_width), _high(d, h, lower_width),
    )  # fmt: skip


@njit(inline="always")
def _low(upper, lower, width):
    return np.uint8(np.uint8(np.uint8(upper & np.uint8(15)) << np.uint8(width)) | np.uint8(lower & np.uint8(15)))


@njit(inline="always")
def _high(upper, lower, width):
    return np.uint8(np.uint8(np.uint8(upper >> np.uint8(4)) << np.uint8(width)) | np.uint8(lower >> np.uint8(4)))


@njit(inline="always")
def _signed(integer, lowest):
    return np.float32(np.int32(np.int32(integer) - np.int32(lowest)))


@njit(inline="always")
def _zero_points_of_words(words, block, half, group, groups, zeros, start):
    """Of a block, counted from 0, out of words that hold four bits of each output feature (`packing.pack`)."""
    for k in range(half // 4):
        word = words[(block * (half // 4) + k) * groups + group]
        for n in range(8):
            zeros[start + 8 * k + n] = np.float32(np.uint32(np.uint32(word >> np.uint32(4 * n)) & np.uint32(15)))


@njit(inline="always")
def end_of_groups(start, quarter, group_size):
    """Up to where none of the four input features that are read together enters another group."""
    end = quarter
    for part in range(4):
        end = min(end, start + group_size - (start + part * quarter) % group_size)
    return end


@njit(inline="always")
def _sum_of_row(x, quarter, upper, lower, upper_width, lower_width, lowest, half, start, end, sums):
    """Σ x·q of one row over input features `start … end` of each quarter → `sums [4 quarters, block]`."""
    for j in range(8 * half):
        sums[j] = np.float32(0)
    for i in range(start, end):
        x0, x1, x2, x3 = x[i], x[quarter + i], x[2 * quarter + i], x[3 * quarter + i]
        for j in range(half):
            a, b, c, d, e, f, g, h = _joined(upper_width, lower_width, upper, lower, quarter * half, i * half + j)
            sums[j] += x0 * _signed(a, lowest)
            sums[half + j] += x0 * _signed(b, lowest)
            sums[2 * half + j] += x1 * _signed(c, lowest)
            sums[3 * half + j] += x1 * _signed(d, lowest)
            sums[4 * half + j] += x2 * _signed(e, lowest)
            sums[5 * half + j] += x2 * _signed(f, lowest)
            sums[6 * half + j] += x3 * _signed(g, lowest)
            sums[7 * half + j] += x3 * _signed(h, lowest)


@njit(inline="always")
def _sum_of_rows(x, quarter, upper, lower, upper_width, lower_width, lowest, half, start, end, scales, sums):
    """Σ x·q·s of four rows, added to `sums [4 rows, block]`; `scales [4 quarters, block]`."""
    second, third, fourth = 4 * quarter, 8 * quarter, 12 * quarter
    for i in range(start, end):
        for j in range(half):
            a, b, c, d, e, f, g, h = _joined(upper_width, lower_width, upper, lower, quarter * half, i * half + j)
            a0, b0 = _signed(a, lowest) * scales[j], _signed(b, lowest) * scales[half + j]
            a1, b1 = _signed(c, lowest) * scales[2 * half + j], _signed(d, lowest) * scales[3 * half + j]
            a2, b2 = _signed(e, lowest) * scales[4 * half + j], _signed(f, lowest) * scales[5 * half + j]
            a3, b3 = _signed(g, lowest) * scales[6 * half + j], _signed(h, lowest) * scales[7 * half + j]
            x0, x1, x2, x3 = x[i], x[quarter + i], x[2 * quarter + i], x[3 * quarter + i]
            sums[j] += x0 * a0 + x1 * a1 + x2 * a2 + x3 * a3
            sums[half + j] += x0 * b0 + x1 * b1 + x2 * b2 + x3 * b3
            x0, x1, x2, x3 = (
                x[second + i], x[second + quarter + i], x[second + 2 * quarter + i], x[second + 3 * quarter + i]
            )  # fmt: skip
            sums[2 * half + j] += x0 * a0 + x1 * a1 + x2 * a2 + x3 * a3
            sums[3 * half + j] += x0 * b0 + x1 * b1 + x2 * b2 + x3 * b3
            x0, x1, x2, x3 = (
                x[third + i], x[third + quarter + i], x[third + 2 * quarter + i], x[third + 3 * quarter + i]
            )  # fmt: skip
            sums[4 * half + j] += x0 * a0 + x1 * a1 + x2 * a2 + x3 * a3
            sums[5 * half + j] += x0 * b0 + x1 * b1 + x2 * b2 + x3 * b3
            x0, x1, x2, x3 = (
                x[fourth + i], x[fourth + quarter + i], x[fourth + 2 * quarter + i], x[fourth + 3 * quarter + i]
            )  # fmt: skip
            sums[6 * half + j] += x0 * a0 + x1 * a1 + x2 * a2 + x3 * a3
            sums[7 * half + j] += x0 * b0 + x1 * b1 + x2 * b2 + x3 * b3


@njit(inline="always")
def subtract_zeros(totals, block, scales, zeros, sums, groups, out_features):
    """From the products of a row with a block, Σ z·s·Σx by groups. Addresses of the block's scales and zero points in
    the first group, and of the sums of the row's inputs."""
    of_inputs = floats_at(sums)
    for group in range(groups):
        of_group = halves_at(scales + 2 * group * out_features)
        of_zeros = integers_at(zeros + group * out_features)
        for j in range(block):
            zero = np.float32(np.int32(of_zeros[j])) * of_inputs[group]
            totals[j] -= zero * widened(of_group[j])


@lru_cache
def _multiplier(bits: int, block: int, with_zeros: bool, form: int, wide: bool) -> Any:
    """The compiled function of `linear`, which writes float32 or bfloat16. Its argument: addresses of planes, scales,
    zero points, inputs (float32), their sums by groups (float32) and outputs; rows, input features, output features,
    group size."""
    half, lowest = block // 2, 2 ** (bits - 1)
    upper_width, lower_width = (*FORMS[bits].widths, 0)[:2]
    entry = ENTRIES[form]

    @cfunc(SIGNATURE, cache=True, fastmath={"contract"})
    def multiply(arguments):
        held = carray(arguments, 10)
        rows, in_features, out_features, group_size = held[6], held[7], held[8], held[9]
        quarter, groups, blocks = in_features // 4, in_features // group_size, out_features // block
        sums, totals = np.empty(4 * block, np.float32), np.empty(block, np.float32)
        scales = np.empty(4 * block, np.float32)
        for b in range(*share_of_thread(blocks)):
            upper = _octets_at(held[0] + b * quarter * half * upper_width)
            lower = _octets_at(held[0] + (blocks * upper_width + b * lower_width) * quarter * half)
            row = 0
            while row < rows:
                x = floats_at(held[3] + 4 * row * in_features)
                together = 4 if rows - row >= 4 else 1
                for j in range(block):
                    totals[j] = np.float32(0)
                if together == 4:
                    for j in range(4 * block):
                        sums[j] = np.float32(0)
                start = 0
                while start < quarter:
                    end = end_of_groups(start, quarter, group_size)
                    if together == 4:
                        for part in range(4):
                            group = (start + part * quarter) // group_size
                            of_group = held[1] + entry * (group * out_features + b * block)
                            for j in range(block):
                                scales[part * block + j] = number_at(form, of_group + entry * j)
                        _sum_of_rows(
                            x, quarter, upper, lower, upper_width, lower_width, lowest, half, start, end, scales, sums
                        )
                    else:
                        _sum_of_row(x, quarter, upper, lower, upper_width, lower_width, lowest, half, start, end, sums)
                        for part in range(4):
                            group = (start + part * quarter) // group_size
                            of_group = held[1] + entry * (group * out_features + b * block)
                            for j in range(block):
                                totals[j] += sums[part * block + j] * number_at(form, of_group + entry * j)
                    start = end
                for each in range(together):
                    if together == 4:
                        for j in range(block):
                            totals[j] = sums[each * block + j]
                    if with_zeros:
                        subtract_zeros(
                            totals, block, held[1] + 2 * block * b, held[2] + block * b,
                            held[4] + 4 * (row + each) * groups, groups, out_features,
                        )  # fmt: skip
                    first = (row + each) * out_features + b * block
                    for j in range(block):
                        if wide:
                            floats_at(held[5])[first + j] = totals[j]
                        else:
                            halves_at(held[5])[first + j] = narrowed(totals[j])
                row += together

    return multiply


@lru_cache
def _dequantizer(bits: int, block: int, shifted: bool, with_zeros: bool) -> Any:
    """The compiled function of `dense_linear`. Its argument: addresses of planes, table, zero points and result; the
    first block, how many, input features, output features, group size."""
    half, lowest = block // 2, 2 ** (bits - 1)
    upper_width, lower_width = (*FORMS[bits].widths, 0)[:2]
    every = 2 if shifted else 1  # number of a table is a scale

    @cfunc(SIGNATURE, cache=True)
    def dequantize(arguments):
        held = carray(arguments, 9)
        first, count, in_features, out_features, group_size = held[4], held[5], held[6], held[7], held[8]
        quarter, groups, blocks = in_features // 4, in_features // group_size, out_features // block
        words = _words_at(held[2])
        integers = np.empty(4 * block, np.uint8)
        scales, zeros = np.empty(4 * block, np.float32), np.empty(4 * block, np.float32)
        for each in range(*share_of_thread(count)):
            b = first + each
            upper = _octets_at(held[0] + b * quarter * half * upper_width)
            lower = _octets_at(held[0] + (blocks * upper_width + b * lower_width) * quarter * half)
            start = 0
            while start < quarter:
                end = end_of_groups(start, quarter, group_size)
                for part in range(4):
                    group = (start + part * quarter) // group_size
                    place, first_of_part = group * out_features + b * block, part * block
                    table, zero_points = halves_at(held[1] + 2 * every * place), integers_at(held[2] + place)
                    for j in range(block):
                        scales[first_of_part + j] = widened(table[every * j])
                        zeros[first_of_part + j] = np.float32(lowest)
                        if with_zeros and not shifted:
                            zeros[first_of_part + j] += np.float32(np.int32(zero_points[j]))
                    if shifted:
                        _zero_points_of_words(words, b, half, group, groups, zeros, first_of_part)
                for i in range(start, end):
                    for j in range(half):
                        found = _joined(upper_width, lower_width, upper, lower, quarter * half, i * half + j)
                        for place in range(8):
                            integers[place * half + j] = found[place]
                    for part in range(4):
                        output = halves_at(held[3] + 2 * ((part * quarter + i) * count + each) * block)
                        for j in range(block):
                            k = part * block + j
                            output[j] = narrowed((np.float32(integers[k]) - zeros[k]) * scales[k])
                start = end

    return dequantize


@lru_cache
def _int8_multiplier(with_zeros: bool, form: int, wide: bool) -> Any:
    """The compiled function of `int8_linear`, which writes float32 or bfloat16. Its argument: addresses of integers,
    scales, zero points, inputs (float32), their sums (float32) and outputs; rows, input features, output features."""

    entry = ENTRIES[form]

    @cfunc(SIGNATURE, cache=True, fastmath={"contract", "reassoc"})  # else a sum would be no vector
    def multiply(arguments):
        held = carray(arguments, 9)
        rows, in_features, out_features = held[6], held[7], held[8]
        zeros, sums = integers_at(held[2]), floats_at(held[4])
        start, stop = share_of_thread(out_features)
        half = (stop - start + 1) // 2  # of the outputs: two are read at a time, far from one another
        for j in range(start, start + half):
            other = min(j + half, stop - 1)
            first, second = integers_at(held[0] + j * in_features), integers_at(held[0] + other * in_features)
            for row in range(rows):
                x = floats_at(held[3] + 4 * row * in_features)
                of_first = of_second = np.float32(0)
                for i in range(in_features):
                    of_first += x[i] * np.float32(np.int32(first[i]))
                    of_second += x[i] * np.float32(np.int32(second[i]))
                if with_zeros:
                    of_first -= sums[row] * np.float32(np.int32(zeros[j]))
                    of_second -= sums[row] * np.float32(np.int32(zeros[other]))
                of_first *= number_at(form, held[1] + entry * j)
                of_second *= number_at(form, held[1] + entry * other)
                if wide:
                    output = floats_at(held[5] + 4 * row * out_features)
                    output[j], output[other] = of_first, of_second
                else:
                    rounded = halves_at(held[5] + 2 * row * out_features)
                    rounded[j], rounded[other] = narrowed(of_first), narrowed(of_second)

    return multiply


def dtype_of_outputs(dtype: torch.dtype) -> torch.dtype:
    """In which compiled code writes them, for inputs of a dtype: bfloat16 or float32."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def check_width(in_features: int, width: int) -> None:
    """Compiled code would read beyond the weight."""
    if in_features != width:
        raise ValueError(f"inputs have {in_features} features, and the weight {width}")


def linear(x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int) -> Tensor:
    """`x` `[rows, in]` in bfloat16, float16 or float32, contiguous, times planes → `[rows, out]`, for few rows; summed
    in float32.

    Args:
        packed: as `planes.linear` takes it.
        scales: of any of these dtypes, `[groups, out]`.
        zero_points: int8 `[groups, out]`, where inputs and scales are bfloat16; or None.

    Raises:
        ValueError: the inputs have another width than the weight.
    """
    rows, in_features = x.shape
    check_width(in_features, 8 * packed.shape[1] // bits)
    inputs, product = x.float(), x.new_empty(rows, len(packed), dtype=dtype_of_outputs(x.dtype))
    group_size = in_features // len(scales)
    sums = None if zero_points is None else inputs.view(rows, -1, group_size).sum(-1)
    wide, form = product.dtype == torch.float32, FORMS_OF_SCALES[scales.dtype]
    function = _multiplier(bits, known_block(), zero_points is not None, form, wide)
    run_compiled(
        function, packed, scales, zero_points, inputs, sums, product, rows, in_features, len(packed), group_size
    )
    return product.to(x.dtype)


def dense_linear(
    x: Tensor, packed: Tensor, table: Tensor, zero_points: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """`x [rows, in]` times planes, for many rows → `[rows, out]` in the dtype of `x`. The weights are those of
    `planes.dense_weight`, bit for bit.

    Args:
        packed, table: as `planes.dense_linear` takes them.
        zero_points: int8 `[groups, out]`; with shifts in the table the words of the wire format; or None.

    Raises:
        ValueError: the inputs have another width than the weight.
    """
    (rows, in_features), out_features, block = x.shape, len(packed), known_block()
    check_width(in_features, 8 * packed.shape[1] // bits)
    function = _dequantizer(bits, block, table.dim() == 3, zero_points is not None)
    group_size = in_features // len(table)
    dtype = working_dtype(x.dtype, x.device)
    inputs, product = x.to(dtype), x.new_empty(rows, out_features)
    step = max(reference.rows_of_tile(in_features, x.device, block) or out_features, LEAST_BLOCKS * block)
    tile = table.new_empty(in_features * min(step, out_features))
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, out_features, step):
            width = min(step, out_features - start)
            part = tile[: in_features * width].view(in_features, width)
            first, count = start // block, width // block
            run_compiled(
                function, packed, table, zero_points, part, first, count, in_features, out_features, group_size
            )
            product[:, start : start + width] = inputs @ part.to(dtype)
    return product if bias is None else product.add_(bias)


def int8_linear(x: Tensor, integers: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """`x` `[rows, in]` in bfloat16, float16 or float32, contiguous, times a per-channel int8 weight → `[rows, out]`,
    for few rows.

    Args:
        integers: int8 `[out, in]`.
        scale: of any of these dtypes, `[out, 1]`.
        zero_point: int8 `[1, out]`, where inputs and scales are bfloat16; or None.

    Raises:
        ValueError: the inputs have another width than the weight.
    """
    (rows, in_features), (out_features, width) = x.shape, integers.shape
    check_width(in_features, width)
    inputs, product = x.float(), x.new_empty(rows, out_features, dtype=dtype_of_outputs(x.dtype))
    sums, wide = None if zero_point is None else inputs.sum(-1), product.dtype == torch.float32
    function = _int8_multiplier(zero_point is not None, FORMS_OF_SCALES[scale.dtype], wide)
    run_compiled(function, integers, scale, zero_point, inputs, sums, product, rows, in_features, out_features)
    return product.to(x.dtype)
