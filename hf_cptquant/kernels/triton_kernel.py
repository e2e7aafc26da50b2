"""Products and dequantization on CUDA, by Triton, straight from the wire format.

The words of a weight lie on the GPU as they lie in the file. Every kernel reads, for each weight, the word or the two
words of the bit stream that its integer lies in (the same word is read for its neighbours, too, and comes from the
cache), so that one source serves 2 to 8 bits, any group size and zero points, and nothing is held twice. A weight is
(q − z)·scale, rounded once to the dtype of the scales, which is bit for bit the dequantized weight; products are summed
in float32.

torch's own int4 and int8 kernels for CUDA are not used: their layouts can be made on a GPU only, so that the way back
to the file format cannot be held by a test without one.

The kernels are tested in Triton's interpreter and compiled for GPUs, but the sizes of the tiles are usual ones, not
measured. This file imports triton and is therefore imported when the first weight is multiplied on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ONE_ROW_TILE = (16, 128)  # outputs × inputs
DENSE_TILE = (32, 128)
PRODUCT_TILE = (64, 64)
PRODUCT_ROWS = (16, 64)  # rows of a tile where they are few, and where they are many
# With three stages, the tiles of 3 bits in float32 take more shared memory than smaller GPUs have. Products may be
# fused with sums; a dequantized weight is one product.
OPTIONS = {"num_stages": 2, "enable_fp_fusion": True}
# Triton's interpreter cuts bfloat16 off instead of rounding, and multiplies matrices of its bits as whole numbers
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _rounded(values, dtype: tl.constexpr):
    """float32 in another dtype, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def _integers(stream, position, step, mask, BITS: tl.constexpr):  # noqa: N803 (constants are written so in Triton)
    """Signed integers at positions, in bits, of a stream whose words are `step` apart."""
    word, start = position // 32, position % 32
    value = tl.load(stream + word * step, mask=mask, other=0).to(tl.uint32, bitcast=True) >> start.to(tl.uint32)
    if 32 % BITS != 0:  # an integer may straddle two words
        straddling = mask & (start + BITS > 32)
        following = tl.load(stream + (word + 1) * step, mask=straddling, other=0).to(tl.uint32, bitcast=True)
        value = value | (following << ((32 - start) % 32).to(tl.uint32))
    return (value & ((1 << BITS) - 1)).to(tl.int32) - (1 << (BITS - 1))


@triton.jit
def _weights(
    words,
    scales,
    zero_points,
    outputs,
    inputs,
    out_features,
    in_features,
    GROUP: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
):
    """The dequantized weights of a tile, `[outputs, inputs]` in the dtype of the scales; 0 beyond the weight.

    `inputs` are `TILE` consecutive ones. Scales are read once for each output where the tile lies within one group.
    """
    groups = in_features // GROUP
    of_output = (outputs < out_features)[:, None]
    mask = of_output & (inputs < in_features)[None, :]
    row = outputs.to(tl.int64)[:, None]
    length = (in_features * BITS + 31) // 32
    steps = _integers(words + row * length, (inputs * BITS)[None, :], 1, mask, BITS)
    if GROUP % TILE == 0:
        group, of_group = (tl.min(inputs, 0) // GROUP + tl.arange(0, 1))[None, :], of_output
    else:
        group, of_group = (inputs // GROUP)[None, :], mask
    if zero_points is not None:
        steps -= _integers(zero_points + group, (outputs * BITS)[:, None], groups, of_group, BITS)
    scale = tl.load(scales + row * groups + group, mask=of_group, other=0)
    weights = _rounded(steps.to(tl.float32) * scale.to(tl.float32), scales.dtype.element_ty)
    return tl.where(mask, weights, 0)


@triton.jit
def one_row_kernel(
    x,
    words,
    scales,
    zero_points,
    bias,
    out,
    out_features,
    in_features,
    GROUP: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
    TILE_N: tl.constexpr,  # noqa: N803
    TILE_K: tl.constexpr,  # noqa: N803
):
    """`x [in]` times a weight: each program sums some outputs over all inputs."""
    outputs = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    sums = tl.zeros((TILE_N, TILE_K), tl.float32)
    for first in range(0, in_features, TILE_K):
        inputs = first + tl.arange(0, TILE_K)
        weights = _weights(words, scales, zero_points, outputs, inputs, out_features, in_features, GROUP, TILE_K, BITS)
        values = tl.load(x + inputs, mask=inputs < in_features, other=0)
        sums += _rounded(weights.to(tl.float32), values.dtype).to(tl.float32) * values.to(tl.float32)[None, :]
    product = tl.sum(sums, 1)
    of_output = outputs < out_features
    if bias is not None:
        product += tl.load(bias + outputs, mask=of_output, other=0).to(tl.float32)
    tl.store(out + outputs, _rounded(product, out.dtype.element_ty), mask=of_output)


@triton.jit
def product_kernel(
    x,
    words,
    scales,
    zero_points,
    bias,
    out,
    rows,
    out_features,
    in_features,
    GROUP: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
    TILE_M: tl.constexpr,  # noqa: N803
    TILE_N: tl.constexpr,  # noqa: N803
    TILE_K: tl.constexpr,  # noqa: N803
):
    """`x [rows, in]` times a weight: each program makes one tile of the product. Programs that follow one another take
    other rows and the same weights, which the cache then holds."""
    row = (tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)).to(tl.int64)
    outputs = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    of_row = (row < rows)[:, None]
    product = tl.zeros((TILE_M, TILE_N), tl.float32)
    for first in range(0, in_features, TILE_K):
        inputs = first + tl.arange(0, TILE_K)
        weights = _weights(words, scales, zero_points, outputs, inputs, out_features, in_features, GROUP, TILE_K, BITS)
        of_input = of_row & (inputs < in_features)[None, :]
        values = tl.load(x + row[:, None] * in_features + inputs[None, :], mask=of_input, other=0)
        weights = _rounded(weights.to(tl.float32), values.dtype).trans()
        if INTERPRETED:
            values, weights = values.to(tl.float32), weights.to(tl.float32)
        product = tl.dot(values, weights, product, input_precision="ieee")
    of_output = outputs < out_features
    if bias is not None:
        product += tl.load(bias + outputs, mask=of_output, other=0).to(tl.float32)[None, :]
    places = out + row[:, None] * out_features + outputs[None, :]
    tl.store(places, _rounded(product, out.dtype.element_ty), mask=of_row & of_output[None, :])


@triton.jit
def dense_kernel(
    words,
    scales,
    zero_points,
    out,
    out_features,
    in_features,
    GROUP: tl.constexpr,  # noqa: N803
    BITS: tl.constexpr,  # noqa: N803
    TILE_N: tl.constexpr,  # noqa: N803
    TILE_K: tl.constexpr,  # noqa: N803
):
    """The dequantized weight, a tile for each program."""
    outputs = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    inputs = tl.program_id(1) * TILE_K + tl.arange(0, TILE_K)
    weights = _weights(words, scales, zero_points, outputs, inputs, out_features, in_features, GROUP, TILE_K, BITS)
    places = out + outputs.to(tl.int64)[:, None] * in_features + inputs[None, :]
    tl.store(places, weights, mask=(outputs < out_features)[:, None] & (inputs < in_features)[None, :])


def linear(
    x: Tensor, words: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None, bits: int
) -> Tensor:
    """`x [rows, in]`, contiguous, times a packed weight in the wire format → `[rows, out]` in the dtype of `x`.

    Args:
        x: bfloat16, float16 or float32; at least one row.
        words: int32 `[out, packed_length(in, bits)]`.
        scale: `[out, groups]`, one of the same dtypes.
        zero_point: int32 `[packed_length(out, bits), groups]` or None.
        bias: `[out]` or None; added before the product is rounded to the dtype of `x`.
    """
    (rows, in_features), (out_features, groups) = x.shape, scale.shape
    out = x.new_empty(rows, out_features)
    weight = (words, scale, zero_point)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if rows == 1:
            tile_n, tile_k = ONE_ROW_TILE
            one_row_kernel[(triton.cdiv(out_features, tile_n),)](
                x, *weight, bias, out, out_features, in_features, in_features // groups, bits, tile_n, tile_k, **OPTIONS
            )
        else:
            few, many = PRODUCT_ROWS
            tile_m, (tile_n, tile_k) = few if rows <= few else many, PRODUCT_TILE
            product_kernel[(triton.cdiv(rows, tile_m), triton.cdiv(out_features, tile_n))](
                x,
                *weight,
                bias,
                out,
                rows,
                out_features,
                in_features,
                in_features // groups,
                bits,
                tile_m,
                tile_n,
                tile_k,
                **OPTIONS,
            )
    return out


def dense_weight(words: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, in_features: int) -> Tensor:
    """The dequantized weight `[out, in]` in the dtype of the scales; the arguments are those of `linear`."""
    out_features, groups = scale.shape
    out = scale.new_empty(out_features, in_features)
    tile_n, tile_k = DENSE_TILE
    with torch.cuda.device_of(words):
        dense_kernel[(triton.cdiv(out_features, tile_n), triton.cdiv(in_features, tile_k))](
            words,
            scale,
            zero_point,
            out,
            out_features,
            in_features,
            in_features // groups,
            bits,
            tile_n,
            tile_k,
            **OPTIONS,
        )
    return out
