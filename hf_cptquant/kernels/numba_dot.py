"""Products of few rows with packed weights, by the processor's own dot products of bfloat16 (AVX-512).

torch's int4 kernel takes twice as long as it takes to read the weights. Here 64 bytes, two input features of a block of
64 output features, become bfloat16 by looking their integers up (those of 2 to 6 bits are exact in it); then one
instruction multiplies 32 of them by inputs and sums in float32. Vectors are written out, since LLVM does not make them
of loops: there it finds a sum for each output feature, and would not keep all of these in registers.

The layout of 4 bits is that of torch's kernel, in which each input feature has bytes of its own, so some rows are
taken together; with other planes, whose bytes hold four input features, the sums of one fill the registers. Integers
of 8 bits, which lie row by row, are converted, and multiplied by as many inputs of one row; the lanes of a sum are
added in the end.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import intrinsic
from torch import Tensor

from .numba_kernel import (
    ENTRIES,
    FORMS_OF_SCALES,
    OF_FLOAT16,
    OF_FLOAT32,
    SIGNATURE,
    check_width,
    dtype_of_outputs,
    end_of_groups,
    floats_at,
    halves_at,
    narrowed,
    number_at,
    run_compiled,
    share_of_thread,
    subtract_zeros,
    sum_groups,
    thread_number,
    widened,
)
from .planes import FORMS, QUARTERS

TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # numbers of bfloat16 of which inputs are sums, exactly
BLOCK = 64  # output features, of which two lie in each byte
LANES = 16  # numbers of float32 in a vector
VECTORS = BLOCK // LANES
TOGETHER = 4  # rows, of which the sums fit into the registers
OUTPUTS = 4  # of 8 bits that are multiplied together
AHEAD = 8192  # bytes, of planes half of it: the processor itself looks no further than the end of a page of memory
DOT, FMA, PREFETCH = "llvm.x86.avx512bf16.dpbf16ps.512", "llvm.fma.v16f32", "llvm.prefetch.p0"
LARGEST_TABLE = 6  # bits of what is looked up
NARROW_TWO = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
LOOK_UP, LOOK_UP_IN_TWO = "llvm.x86.avx512.permvar.hi.512", "llvm.x86.avx512.vpermi2var.hi.512"

if not llvmlite.binding.get_host_cpu_features().get("avx512bf16", False):
    raise ImportError("the processor has none (AVX512_BF16)")
HAS_TILES = llvmlite.binding.get_host_cpu_features().get("amx-bf16", False)  # of which torch's dense products are made
if llvmlite.binding.llvm_version_info < (16, 0, 0):
    raise ImportError("numba's LLVM has none before version 16")


class _BFloat(ir.Type):
    """The type bfloat, which llvmlite does not have."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


INT8, INT16, INT32, INT64, FLOAT = (*map(ir.IntType, (8, 16, 32, 64)), ir.FloatType())
OCTETS, HALVES, WORDS, FLOATS = (ir.VectorType(*each) for each in ((INT8, 64), (INT16, 32), (INT32, 16), (FLOAT, 16)))
BFLOATS = ir.VectorType(_BFloat(), 32)


def _bits_of_bfloat16(number: int) -> int:
    """Of an integer that is exact in it."""
    return int(torch.tensor(number, dtype=torch.bfloat16).view(torch.uint16))


class Writer:
    """Instructions that several places need."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def at(self, address: Any, *terms: Any) -> Any:
        for term in terms:
            address = self.builder.add(address, term if isinstance(term, ir.Value) else INT64(term))
        return address

    def times(self, value: Any, factor: Any) -> Any:
        return self.builder.mul(value, factor if isinstance(factor, ir.Value) else INT64(factor))

    def load(self, address: Any, kind: Any) -> Any:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=1)

    def load_octets(self, address: Any, ahead: Any) -> Any:
        """64 bytes, and those so many bytes ahead are asked for."""
        later = self.builder.inttoptr(self.at(address, ahead), INT8.as_pointer())
        self.call(PREFETCH, ir.VoidType(), later, INT32(0), INT32(3), INT32(1))  # to read; keep it near; data
        return self.load(address, OCTETS)

    def store(self, value: Any, address: Any) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=1)

    def splat(self, value: Any, kind: Any) -> Any:
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, INT32(0))
        return self.builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(INT32, kind.count), None))

    def sums(self, rows: int, vectors: int) -> list[list[Any]]:
        """Places for vectors of sums, which LLVM keeps in registers."""
        return [[cgutils.alloca_once(self.builder, FLOATS) for _ in range(vectors)] for _ in range(rows)]

    def clear(self, sums: list[list[Any]]) -> None:
        for place in (each for of_row in sums for each in of_row):
            self.builder.store(ir.Constant(FLOATS, [0.0] * LANES), place)

    def add_products(self, sums: list[Any], steps: list[Any], x: Any, feature: Any) -> None:
        """To a row's sums, one for each vector of steps, the products with inputs `feature` and `feature + 1`."""
        pair = self.splat(self.load(self.at(x, self.times(feature, 2)), INT32), WORDS)
        inputs = self.builder.bitcast(pair, BFLOATS)
        for place, of_place in zip(sums, steps, strict=True):
            self.builder.store(self.call(DOT, FLOATS, self.builder.load(place), of_place, inputs), place)

    def shifted_right(self, octets: Any, places: int, mask: int) -> Any:
        moved = self.builder.lshr(octets, ir.Constant(OCTETS, [places] * 64)) if places else octets
        return self.builder.and_(moved, ir.Constant(OCTETS, [mask] * 64))

    def shifted_left(self, octets: Any, places: int) -> Any:
        return self.builder.shl(octets, ir.Constant(OCTETS, [places] * 64)) if places else octets

    def steps(self, digits: Any, bits: int, lowest: int) -> list[Any]:
        """Integers below 2^bits in bytes, 32 of one input feature and 32 of the next → how far they are above the
        lowest, pairs in bfloat16 for 16 output features each, in two vectors."""
        build, found = self.builder, []
        order = [each for lane in range(2 * LANES) for each in (lane, 32 + lane)]
        if bits > LARGEST_TABLE:
            pairs = build.shuffle_vector(digits, digits, ir.Constant(ir.VectorType(INT32, 64), order))
            return self.bfloats(build.sub(pairs, ir.Constant(OCTETS, [lowest] * 64)))
        entries = [_bits_of_bfloat16(index - lowest) for index in range(2**bits)]
        tables = [ir.Constant(HALVES, (entries * 32)[start : start + 32]) for start in range(0, max(32, 2**bits), 32)]
        for start in (0, 32):
            of_lanes = ir.Constant(ir.VectorType(INT32, 32), order[start : start + 32])
            wide = build.zext(build.shuffle_vector(digits, digits, of_lanes), HALVES)
            halves = (
                self.call(LOOK_UP, HALVES, tables[0], wide)
                if len(tables) == 1
                else self.call(LOOK_UP_IN_TWO, HALVES, tables[0], wide, tables[1])
            )
            found.append(build.bitcast(halves, BFLOATS))
        return found

    def spread(self, width: int, pieces: list[Any]) -> list[Any]:
        """What a plane holds for one place in each of the quarters, a digit in each nibble (`numba_kernel._spread`)."""
        right, left, build = self.shifted_right, self.shifted_left, self.builder
        if width == 1:
            return [right(pieces[0], place, 0x11) for place in range(4)]
        if width == 2:
            return [right(pieces[place % 2], place // 2 * 2, 0x33) for place in range(4)]
        if width == 4:
            return pieces
        lent = [left(right(piece, 0, 0x11), place) for piece, place in zip(pieces, (2, 1, 0), strict=True)]
        return [*(right(piece, 1, 0x77) for piece in pieces), build.or_(build.or_(lent[0], lent[1]), lent[2])]

    def integers(self, digits: list[Any], widths: tuple[int, ...], place: int) -> Any:
        """What the digits of all planes are, upper ones first, that begin at a place of each nibble."""
        found = self.shifted_right(digits[0], place, 15)
        for octets, width in zip(digits[1:], widths[1:], strict=True):
            found = self.builder.or_(self.shifted_left(found, width), self.shifted_right(octets, place, 15))
        return found

    def transposed(self, rows: list[Any]) -> list[Any]:
        """16 vectors of 16 words → theirs in the first, second, … lane."""
        mask = [[half * LANES // 2 + lane // 2 + lane % 2 * LANES for lane in range(LANES)] for half in (0, 1)]
        orders = [ir.Constant(ir.VectorType(INT32, LANES), each) for each in mask]
        for _ in range(LANES.bit_length() - 1):
            pairs = zip(rows[: LANES // 2], rows[LANES // 2 :], strict=True)
            rows = [self.builder.shuffle_vector(*pair, order) for pair in pairs for order in orders]
        return rows

    def narrowed(self, numbers: Any) -> Any:
        """16 numbers of float32 → the nearest in bfloat16."""
        return self.builder.fptrunc(numbers, ir.VectorType(_BFloat(), LANES))

    def bfloats(self, octets: Any, zero: Any = None) -> list[Any]:
        """64 integers in bytes, less a zero point in words → two vectors in bfloat16, which is exact."""
        build, found = self.builder, []
        for first in range(0, 64, 2 * LANES):
            floats = []
            for start in (first, first + LANES):
                order = ir.Constant(ir.VectorType(INT32, LANES), list(range(start, start + LANES)))
                words = build.sext(build.shuffle_vector(octets, octets, order), WORDS)
                floats.append(build.sitofp(words if zero is None else build.sub(words, zero), FLOATS))
            found.append(self.call(NARROW_TWO, BFLOATS, floats[1], floats[0]))
        return found

    def sum_of_lanes(self, numbers: Any) -> Any:
        count = LANES
        while count > 1:
            count //= 2
            orders = (
                ir.Constant(ir.VectorType(INT32, count), list(range(start, start + count))) for start in (0, count)
            )
            numbers = self.builder.fadd(*(self.builder.shuffle_vector(numbers, numbers, order) for order in orders))
        return self.builder.extract_element(numbers, INT32(0))

    def scales(self, place: Any, form: int) -> Any:
        """Of 16 output features, float32."""
        build = self.builder
        if form == OF_FLOAT32:
            return self.load(place, FLOATS)
        if form == OF_FLOAT16:
            return build.fpext(self.load(place, ir.VectorType(ir.HalfType(), LANES)), FLOATS)
        halves = build.zext(self.load(place, ir.VectorType(INT16, LANES)), WORDS)
        return build.bitcast(build.shl(halves, ir.Constant(WORDS, [16] * LANES)), FLOATS)

    def shift(self, zeros: Any, scale: Any) -> Any:
        """What a sum of inputs counts for 16 output features, from the address of their zero points, int8."""
        wide = self.builder.sext(self.load(zeros, ir.VectorType(INT8, LANES)), WORDS)
        return self.builder.fneg(self.builder.fmul(self.builder.sitofp(wide, FLOATS), scale))


@njit(inline="always")
def _upper_half(number):
    return np.uint16(np.float32(number).view(np.uint32) >> np.uint32(16))


@njit(inline="always")
def _rest(number):
    """What the upper half leaves; of what is not finite, nothing."""
    left = np.float32(number - widened(_upper_half(number)))
    return left if left == left else np.float32(0)


@lru_cache
def _splitter(form: int, terms: int) -> Any:
    """The compiled function of `terms_of`. Its argument: addresses of inputs and terms; rows, inputs in each."""
    entry = ENTRIES[form]

    @cfunc(SIGNATURE, cache=True)
    def split(arguments):
        held = carray(arguments, 4)
        rows, in_features, found = held[2], held[3], halves_at(held[1])
        for row in range(*share_of_thread(rows)):
            start = row * terms * in_features
            for i in range(in_features):
                number = number_at(form, held[0] + entry * (row * in_features + i))
                second = _rest(number)
                found[start + i] = _upper_half(number)
                found[start + in_features + i] = _upper_half(second)
                if terms == 3:
                    found[start + 2 * in_features + i] = _upper_half(_rest(second))

    return split


def terms_of(x: Tensor) -> Tensor:
    """Inputs `[rows, in]` as sums of terms in bfloat16 → `[rows · terms, in]`, those of a row behind one another; or as
    they are, which are bfloat16 already.

    Each has the next eight bits of a number, so nothing is lost. They are rows to the kernels: in a sum of its own each
    is rounded by its own size, where a common sum would be rounded as often as there are terms.
    """
    terms = TERMS[x.dtype]
    if terms == 1:
        return x
    found = x.new_empty(len(x) * terms, x.shape[1], dtype=torch.bfloat16)
    run_compiled(_splitter(FORMS_OF_SCALES[x.dtype], terms), x, found, *x.shape)
    return found


def sums_of_terms(products: Tensor, dtype: torch.dtype) -> Tensor:
    """Products of the terms of inputs, float32 `[rows · terms, out]` → of the inputs, `[rows, out]` in their dtype; or
    as they are, which are bfloat16 already."""
    terms = TERMS[dtype]
    return products if terms == 1 else products.view(-1, terms, products.shape[1]).sum(1).to(dtype)


@intrinsic(prefer_literal=True)
def _block_product(
    _typing, rows, form, shifted, wide, octets, scales, zeros, x, sums, output, in_features, out_features, group_size
):
    """The product of some rows with a block.

    Its arguments: rows, the form of scales, whether there are zero points, and whether outputs are float32 or bfloat16,
    known when it is compiled; addresses of the block's octets, of its scales and zero points in the first group, of the
    inputs, of their sums by groups, and of the outputs; input features, output features, group size.
    """
    kinds = signature(types.void, rows, form, shifted, wide, *[types.int64] * 9)
    rows, form, shifted, wide = (each.literal_value for each in (rows, form, shifted, wide))
    chains = 2 if rows == 1 else 1  # sums of a row that do not wait for each other

    def generate(context: Any, build: Any, _signature: Any, arguments: Any) -> Any:
        octets, scales, zeros, x, sums, output, in_features, out_features, group_size = arguments[4:]
        write, groups = Writer(build), build.sdiv(in_features, group_size)
        totals, of_group = write.sums(rows, VECTORS), write.sums(rows * chains, VECTORS)
        write.clear(totals)
        with cgutils.for_range(build, groups) as of_groups:
            group = of_groups.index
            write.clear(of_group)
            with cgutils.for_range_slice(build, INT64(0), group_size, INT64(2 * chains)) as (place, _):
                feature = write.at(write.times(group, group_size), place)
                for chain in range(chains):
                    nibbles = write.load_octets(write.at(octets, write.times(feature, BLOCK // 2)), AHEAD)
                    digits = (write.shifted_right(nibbles, place, 15) for place in (0, 4))
                    steps = [vector for of_place in digits for vector in write.steps(of_place, 4, 8)]
                    for row in range(rows):
                        of_row = write.at(feature, write.times(in_features, row))
                        write.add_products(of_group[row * chains + chain], steps, x, of_row)
                    feature = write.at(feature, 2)
            for vector in range(VECTORS):
                place = write.at(write.times(group, out_features), LANES * vector)
                scale = write.scales(write.at(scales, write.times(place, ENTRIES[form])), form)
                shift = write.shift(write.at(zeros, place), scale) if shifted else None
                for row in range(rows):
                    found, *others = (build.load(of_group[row * chains + chain][vector]) for chain in range(chains))
                    for other in others:
                        found = build.fadd(found, other)
                    now = write.call(FMA, FLOATS, found, scale, build.load(totals[row][vector]))
                    if shifted:
                        of_inputs = write.at(sums, write.times(write.at(write.times(groups, row), group), 4))
                        now = write.call(FMA, FLOATS, write.splat(write.load(of_inputs, FLOAT), FLOATS), shift, now)
                    build.store(now, totals[row][vector])
        for row in range(rows):
            for vector in range(VECTORS):
                number = write.at(write.times(out_features, row), LANES * vector)
                total = build.load(totals[row][vector])
                place = write.at(output, write.times(number, 4 if wide else 2))
                write.store(total if wide else write.narrowed(total), place)
        return context.get_dummy_value()

    return kinds, generate


block_product: Any = _block_product  # which to type checkers has the arguments of its typing function


@lru_cache
def _multiplier(form: int, shifted: int, wide: int) -> Any:
    """The compiled function of `linear`, by the form of scales, whether there are zero points, and whether outputs are
    float32. Its argument: addresses of octets, scales, zero points, inputs, their sums by groups (float32, for each
    thread) and outputs; rows, input features, output features, group size."""
    entry, of_output = ENTRIES[form], 4 if wide else 2

    @cfunc(SIGNATURE, cache=True)
    def multiply(arguments):
        held = carray(arguments, 10)
        rows, in_features, out_features, group_size = held[6], held[7], held[8], held[9]
        blocks, groups = out_features // BLOCK, in_features // group_size
        of_groups = held[4] + 4 * thread_number() * rows * groups
        if shifted:
            sum_groups(halves_at(held[3]), rows * groups, group_size, floats_at(of_groups))
        for b in range(*share_of_thread(blocks)):
            octets = held[0] + b * in_features * (BLOCK // 2)
            scales, zeros = held[1] + entry * BLOCK * b, held[2] + BLOCK * b
            for row in range(0, rows, TOGETHER):
                x, sums = held[3] + 2 * row * in_features, of_groups + 4 * row * groups
                y = held[5] + of_output * (row * out_features + BLOCK * b)
                if rows - row == 1:
                    block_product(
                        1, form, shifted, wide, octets, scales, zeros, x, sums, y, in_features,
                        out_features, group_size,
                    )  # fmt: skip
                elif rows - row == 2:
                    block_product(
                        2, form, shifted, wide, octets, scales, zeros, x, sums, y, in_features,
                        out_features, group_size,
                    )  # fmt: skip
                elif rows - row == 3:
                    block_product(
                        3, form, shifted, wide, octets, scales, zeros, x, sums, y, in_features,
                        out_features, group_size,
                    )  # fmt: skip
                else:
                    block_product(
                        TOGETHER, form, shifted, wide, octets, scales, zeros, x, sums, y, in_features,
                        out_features, group_size,
                    )  # fmt: skip

    return multiply


@intrinsic(prefer_literal=True)
def _planes_product(_typing, bits, upper, lower, quarter, x, start, end, sums):
    """Σ x·q of a row with a block of planes, over input features start … end of each quarter.

    Its arguments: bits, known when it is compiled; addresses of the block's planes, how many input features a quarter
    has; address of the inputs; start, and end; address of the sums, float32 `[4 quarters, block]`, which are written
    over.
    """
    kinds = signature(types.void, bits, *[types.int64] * 7)
    bits = bits.literal_value
    widths = FORMS[bits].widths

    def generate(context: Any, build: Any, _signature: Any, arguments: Any) -> Any:
        *planes, quarter, x, start, end, sums = arguments[1:]
        write, bytes_of_quarter = Writer(build), build.mul(quarter, INT64(BLOCK // 2))
        found = write.sums(QUARTERS, VECTORS)
        write.clear(found)
        with cgutils.for_range_slice(build, start, end, INT64(2)) as (feature, _):
            digits = []
            for plane, width in zip(planes, widths, strict=False):
                first = write.at(plane, write.times(feature, BLOCK // 2))
                starts = [write.at(first, write.times(bytes_of_quarter, piece)) for piece in range(width)]
                digits.append(write.spread(width, [write.load_octets(each, AHEAD // 2) for each in starts]))
            for part in range(QUARTERS):
                integers = (write.integers([each[part] for each in digits], widths, place) for place in (0, 4))
                steps = [vector for each in integers for vector in write.steps(each, bits, 2 ** (bits - 1))]
                write.add_products(found[part], steps, x, write.at(write.times(quarter, part), feature))
        for number, place in enumerate(each for of_quarter in found for each in of_quarter):
            write.store(build.load(place), write.at(sums, 4 * LANES * number))
        return context.get_dummy_value()

    return kinds, generate


planes_product: Any = _planes_product


@lru_cache
def _planes_multiplier(bits: int, with_zeros: bool) -> Any:
    """The compiled function of `planes_linear`. Its argument: addresses of planes, scales, zero points, inputs, their
    sums by groups (float32) and outputs; rows, input features, output features, group size."""
    upper_width, lower_width = (*FORMS[bits].widths, 0)[:2]

    @cfunc(SIGNATURE, cache=True, fastmath={"contract"})
    def multiply(arguments):
        held = carray(arguments, 10)
        rows, in_features, out_features, group_size = held[6], held[7], held[8], held[9]
        quarter, groups, blocks = in_features // QUARTERS, in_features // group_size, out_features // BLOCK
        sums, totals = np.empty(QUARTERS * BLOCK, np.float32), np.empty(BLOCK, np.float32)
        found, bytes_of_plane = sums.ctypes.data, quarter * (BLOCK // 2)
        for b in range(*share_of_thread(blocks)):
            upper = held[0] + b * bytes_of_plane * upper_width
            lower = held[0] + (blocks * upper_width + b * lower_width) * bytes_of_plane
            for row in range(rows):
                for j in range(BLOCK):
                    totals[j] = np.float32(0)
                start = 0
                while start < quarter:
                    end = end_of_groups(start, quarter, group_size)
                    x = held[3] + 2 * row * in_features
                    planes_product(bits, upper, lower, quarter, x, start, end, found)
                    for part in range(QUARTERS):
                        group = (start + part * quarter) // group_size
                        of_group = halves_at(held[1] + 2 * (group * out_features + b * BLOCK))
                        for j in range(BLOCK):
                            totals[j] += sums[part * BLOCK + j] * widened(of_group[j])
                    start = end
                if with_zeros:
                    subtract_zeros(
                        totals, BLOCK, held[1] + 2 * BLOCK * b, held[2] + BLOCK * b, held[4] + 4 * row * groups,
                        groups, out_features,
                    )  # fmt: skip
                output = halves_at(held[5] + 2 * (row * out_features + b * BLOCK))
                for j in range(BLOCK):
                    output[j] = narrowed(totals[j])

    return multiply


@intrinsic(prefer_literal=True)
def _int8_product(_typing, rows, shifted, integers, zeros, x, in_features, sums):
    """Σ x·(q − z) of some rows with `OUTPUTS` output features of 8 bits.

    Its arguments: rows, and whether there are zero points, known when it is compiled; addresses of the integers,
    `[outputs, in]`, of the zero points, int8 `[outputs]`, and of the inputs; input features, 64 at least; address of
    the sums, float32 `[outputs, rows]`, which are written over.
    """
    kinds = signature(types.void, rows, shifted, *[types.int64] * 5)
    rows, shifted = rows.literal_value, shifted.literal_value

    def generate(context: Any, build: Any, _signature: Any, arguments: Any) -> Any:
        integers, zeros, x, in_features, sums = arguments[2:]
        write, of_outputs = Writer(build), [None] * OUTPUTS
        if shifted:
            of_outputs = [
                write.splat(build.sext(write.load(write.at(zeros, output), INT8), INT32), WORDS)
                for output in range(OUTPUTS)
            ]
        found = write.sums(OUTPUTS, rows)
        write.clear(found)

        def add(feature: Any, keep: Any) -> None:
            for output, of_output in enumerate(found):
                start = write.at(integers, write.times(in_features, output), feature)
                octets = write.load_octets(start, write.times(in_features, OUTPUTS))  # and those of the next outputs
                halves = keep(write.bfloats(octets, of_outputs[output]))
                for row, place in enumerate(of_output):
                    of_row = write.at(x, write.times(write.at(write.times(in_features, row), feature), 2))
                    for half, steps in enumerate(halves):
                        inputs = write.load(write.at(of_row, 64 * half), BFLOATS)
                        build.store(write.call(DOT, FLOATS, build.load(place), steps, inputs), place)

        rest = build.and_(in_features, INT64(63))
        with cgutils.for_range_slice(build, INT64(0), build.sub(in_features, rest), INT64(64)) as (feature, _):
            add(feature, lambda halves: halves)
        with build.if_then(build.icmp_signed("!=", rest, INT64(0))):  # the last 64, of which the first are taken

            def rest_of(halves: list[Any]) -> list[Any]:
                taken = write.splat(build.trunc(build.sub(INT64(64), rest), INT16), HALVES)
                found = []
                for first, half in zip((0, 32), halves, strict=True):
                    numbers = ir.Constant(HALVES, list(range(first, first + 32)))
                    new = build.icmp_unsigned(">=", numbers, taken)
                    kept = build.select(new, build.bitcast(half, HALVES), ir.Constant(HALVES, [0] * 32))
                    found.append(build.bitcast(kept, BFLOATS))
                return found

            add(build.sub(in_features, INT64(64)), rest_of)
        for number, place in enumerate(each for of_output in found for each in of_output):
            write.store(write.sum_of_lanes(build.load(place)), write.at(sums, 4 * number))
        return context.get_dummy_value()

    return kinds, generate


int8_product: Any = _int8_product


@lru_cache
def _int8_multiplier(form: int, shifted: int, wide: int) -> Any:
    """The compiled function of `int8_linear`, by the form of scales, whether there are zero points, and whether outputs
    are float32. Its argument: addresses of integers, scales, zero points, inputs and outputs; rows, input features,
    output features."""
    entry = ENTRIES[form]

    @cfunc(SIGNATURE, cache=True)
    def multiply(arguments):
        held = carray(arguments, 8)
        rows, in_features, out_features = held[5], held[6], held[7]
        floats, halves = floats_at(held[4]), halves_at(held[4])
        sums = np.empty(OUTPUTS * TOGETHER, np.float32)
        found = sums.ctypes.data
        for part in range(*share_of_thread((out_features + OUTPUTS - 1) // OUTPUTS)):
            first = min(part * OUTPUTS, out_features - OUTPUTS)  # the last ones may begin among those before
            integers, zeros = held[0] + first * in_features, held[2] + first
            for row in range(0, rows, TOGETHER):
                together, x = min(TOGETHER, rows - row), held[3] + 2 * row * in_features
                if together == 1:
                    int8_product(1, shifted, integers, zeros, x, in_features, found)
                elif together == 2:
                    int8_product(2, shifted, integers, zeros, x, in_features, found)
                elif together == 3:
                    int8_product(3, shifted, integers, zeros, x, in_features, found)
                else:
                    int8_product(TOGETHER, shifted, integers, zeros, x, in_features, found)
                for j in range(OUTPUTS):
                    scale = number_at(form, held[1] + entry * (first + j))
                    for each in range(together):
                        total, place = sums[j * together + each] * scale, (row + each) * out_features + first + j
                        if wide:
                            floats[place] = total
                        else:
                            halves[place] = narrowed(total)

    return multiply


def int8_linear(x: Tensor, integers: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """`x` `[rows, in]` in bfloat16, float16 or float32 times a per-channel int8 weight → `[rows, out]`, for few rows.

    Args:
        integers: int8 `[out, in]`, at least 64 × 64.
        scale: `[out, 1]`, of any of these dtypes, too.
        zero_point: int8 `[1, out]`, or None.

    Raises:
        ValueError: the inputs have another width than the weight.
    """
    inputs, (out_features, width) = terms_of(x), integers.shape
    rows, in_features = inputs.shape
    check_width(in_features, width)
    product = x.new_empty(rows, out_features, dtype=dtype_of_outputs(x.dtype))
    wide = int(product.dtype == torch.float32)
    function = _int8_multiplier(FORMS_OF_SCALES[scale.dtype], int(zero_point is not None), wide)
    run_compiled(function, integers, scale, zero_point, inputs, product, rows, in_features, out_features)
    return sums_of_terms(product, x.dtype)


def planes_linear(x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int) -> Tensor:
    """As `numba_kernel.linear`, with the same arguments, result and error."""
    rows, in_features = x.shape
    check_width(in_features, 8 * packed.shape[1] // bits)
    product, group_size = x.new_empty(rows, len(packed)), in_features // len(scales)
    sums = None if zero_points is None else x.float().view(rows, -1, group_size).sum(-1)
    function = _planes_multiplier(bits, zero_points is not None)
    numbers = (rows, in_features, len(packed), group_size)
    run_compiled(function, packed, scales, zero_points, x, sums, product, *numbers)
    return product


def linear(x: Tensor, packed: Tensor, scales: Tensor, zero_points: Tensor | None) -> Tensor:
    """`x` `[rows, in]` in bfloat16, float16 or float32, contiguous, times a weight in the layout of torch's int4 kernel
    → `[rows, out]`.

    Args:
        packed: uint8 `[out, in / 2]`.
        scales: of any of these dtypes, `[groups, out]`.
        zero_points: int8 `[groups, out]`, where inputs are bfloat16; or None.

    Raises:
        ValueError: the inputs have another width than the weight.
    """
    inputs, (groups, out_features), shifted = terms_of(x), scales.shape, int(zero_points is not None)
    rows, in_features = inputs.shape
    check_width(in_features, 2 * packed.shape[1])
    product = x.new_empty(rows, out_features, dtype=dtype_of_outputs(x.dtype))
    sums = x.new_empty(torch.get_num_threads(), rows, groups, dtype=torch.float32) if shifted else None
    function = _multiplier(FORMS_OF_SCALES[scales.dtype], shifted, int(product.dtype == torch.float32))
    numbers = (rows, in_features, out_features, in_features // groups)
    run_compiled(function, packed, scales, zero_points, inputs, sums, product, *numbers)
    return sums_of_terms(product, x.dtype)
