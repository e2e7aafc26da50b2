"""One op, `hf_cptquant::linear`: a matrix product with a packed weight.

The op is defined once (schema, shape rule, gradient) and dispatches on the layout that the weight is in. A layout
is chosen for a module when it settles on a device (`choose_layout`), never per call, so that the weight is held once,
in the form its kernel reads; `to_layout` converts losslessly both ways. `"wire"` is the file format, which Triton's
kernel on CUDA reads, too, and the reference everywhere.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..grid import dequantize
from ..packing import pack, unpack, unpack_rows
from ..plan import PER_CHANNEL, LayerScheme
from . import cpu, planes, reference

WIRE, CPU_INT4, CPU_PLANES, CPU_INT8 = "wire", "cpu_int4", "cpu_planes", "cpu_int8"
NUMBA_PLANES, NUMBA_INT8 = "numba_planes", "numba_int8"  # what torch's kernels do not take

# Rows up to which torch's kernel beats "dequantize, then dense matmul" (2 cores with AVX-512 and AMX, 2048 × 2048:
# int4 5.8 ms against 9.6 ms at 64 rows, 11.0 against 10.9 at 128; int8 1.6 against 1.9 at 16 rows, 4.2 against 2.2 at
# 32). Planes are spread once for all rows, but 5 and 6 bits run the kernel twice: between the two, not measured apart.
MAX_ROWS = {CPU_INT4: 64, CPU_PLANES: 32, CPU_INT8: 16}
KERNELS = {
    CPU_INT4: "torch's int4 kernel",
    CPU_PLANES: "torch's int4 kernel on bit planes",
    CPU_INT8: "torch's int8 kernel",
}
BY_PLANES = {CPU_INT4, CPU_PLANES, NUMBA_PLANES}
BY_INT8 = {CPU_INT8, NUMBA_INT8}
BY_NUMBA = {NUMBA_PLANES, NUMBA_INT8}

# With numba its kernels take up to so many rows, and torch's the others up to so many; beyond, numba dequantizes planes
# (2 cores with AVX-512, 2048 × 2048, relative to bfloat16: 3 bits at 8 rows 1.15, dequantize 0.62, at 16 rows 0.6 and
# 0.71; torch's int4 at 16 rows 0.85 and 0.71, at 32 rows 0.67 and 0.72; int8 at 1 row 2.1 by numba and 1.0 by torch, at
# 2 rows 3.3 and 2.5, at 4 rows 1.4 and 2.0)
NUMBA_ROWS = {CPU_INT4: 0, CPU_PLANES: 12, CPU_INT8: 2, NUMBA_PLANES: 12, NUMBA_INT8: 16}
MAX_ROWS_WITH_NUMBA = {CPU_INT4: 24, CPU_INT8: 16}

# Dot products of bfloat16 beat all these, and the dense product, at any number of rows (128 rows, 2048 × 2048: 3 bits
# 1.26, 8 bits 1.1, dequantize 0.82; 4096 × 14336: 1.06, 1.1 and 0.77). Up to so many rows integers become bfloat16
# again for every few rows, and beyond once for all (2048 × 2048, 4 bits: at 12 rows 2.4 and 2.2, at 32 rows 1.6 and
# 1.7; 3 bits at 1 row 2.9 and 2.1, at 3 rows 2.3 and 3.0; 8 bits at 8 rows 2.2 and 1.8, at 12 rows 1.6 and 1.6);
# always where the pieces of groups that planes hold together are small, as in 576 inputs (3 bits at 1 row 1.2 and
# 1.6). Beside tile units (AMX), of which torch's dense product is made, not measured
ROWS_IN_PASSING = {2: 1, 3: 1, 4: 16, 5: 1, 6: 1, 8: 8}  # by bits
LEAST_PIECE = 64  # input features
ROWS_BESIDE_TILES = 64
LEAST_BY_DOT = 64  # inputs and outputs of weights of 8 bits
ROWS_IN_FLOAT32 = 8  # as in decoding; more are multiplied by dequantized weights, which rounds as a dense layer does
BY_NUMBA_IN = (torch.bfloat16, torch.float16, torch.float32)  # the others are sums of two or three of bfloat16
INPUTS = 32  # that numba's kernel of planes takes a multiple of
REFERENCE = "dequantize, dense product"
NUMBA, NUMBA_DENSE = "numba", "dequantize by numba, dense product"

# Beyond these rows arithmetic decides, and the dense product of the GPU's own library is taken: the number is that of
# vLLM for its Triton kernels of AWQ (`FP16_MATMUL_HEURISTIC_CONDITION`), not measured here
MAX_ROWS_TRITON = 256
TRITON, TRITON_DENSE = "Triton", "dequantize by Triton, dense product"
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_CAPABILITY = (8, 0)  # the oldest GPUs that Triton supports


@dataclass(frozen=True)
class PackedTensors:
    """The tensors of one packed weight in some layout.

    Attributes:
        weight: wire: int32 words `[out, packed_length(in, bits)]`; cpu_int4, cpu_planes, numba_planes: uint8
            `[out, in · bits / 8]`; cpu_int8, numba_int8: int8 `[out, in]`.
        scale: `[out, groups]`; cpu_int4, cpu_planes: what `planes.to_table` gives; numba_planes: `[groups, out]`.
        zero_point: int32 `[packed_length(out, bits), groups]`; numba_planes, numba_int8: int8 `[groups, out]`; or None.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None
    layout: str


@dataclass(frozen=True)
class Choice:
    """Which layout a module gets, and why not each of the others."""

    layout: str
    reason: str


def choose_layout(
    scheme: LayerScheme, out_features: int, in_features: int, device: torch.device, dtype: torch.dtype
) -> Choice:
    """Pick the layout for a weight from where it lives and what it is multiplied in.

    Args:
        dtype: dtype of the scales, which is the model's.
    """
    if device.type != "cpu" or _interpreted():
        missing = without_triton(device, dtype)
        if missing is None:
            return Choice(WIRE, f"Triton's kernel up to {MAX_ROWS_TRITON} rows, dequantize beyond")
        return Choice(WIRE, f"no packed kernel for {missing}: the reference dequantizes at each call")
    if dtype not in BY_NUMBA_IN:
        return Choice(WIRE, f"kernels for CPUs take bfloat16, float16 and float32, the model is in {dtype}")
    missing, shape, half = without_numba(), (out_features, in_features), dtype == torch.bfloat16
    if not half and missing:
        return Choice(WIRE, f"torch's CPU kernels are fast in bfloat16 only, the model is in {dtype}; numba {missing}")
    by_numba = NUMBA_INT8 if scheme.bits == 8 else NUMBA_PLANES
    if not half and not scheme.symmetric and (lack := _without_dot(by_numba, shape)):
        return Choice(WIRE, f"numba's kernels take zero points in {dtype} by dot products of bfloat16 only, but {lack}")
    if scheme.bits == 8:
        if scheme.group_size != PER_CHANNEL:
            return Choice(WIRE, "kernels for CPUs take 8 bits per channel only")
        if half and scheme.symmetric and in_features % cpu.INT8_WIDTH == 0:
            return Choice(CPU_INT8, _reason(CPU_INT8, shape, dtype))
        if missing is None:
            return Choice(NUMBA_INT8, _reason(NUMBA_INT8, shape, dtype))
        width = f"multiples of {cpu.INT8_WIDTH} inputs"
        return Choice(WIRE, f"torch's int8 kernel takes {width} without zero points; numba's takes all, but {missing}")
    block = planes.int4_block()
    if block is None or out_features % block:
        return Choice(
            WIRE, f"torch's int4 kernel lays out blocks of {block or 'unknown'} rows; this weight has {out_features}"
        )
    if half and scheme.group_size in planes.GROUP_SIZES:
        if scheme.bits == 4 and (scheme.symmetric or without_dot()):
            return Choice(CPU_INT4, _reason(CPU_INT4, shape, dtype))
        if scheme.symmetric or (missing and scheme.bits < 4):
            return Choice(CPU_PLANES, _reason(CPU_PLANES, shape, dtype))
    if missing:
        return Choice(
            WIRE,
            f"torch's CPU kernels take groups of {planes.GROUP_SIZES}, and zero points with 2 to 4 bits only; numba's"
            f" would take all, but {missing}",
        )
    if in_features % INPUTS:
        return Choice(WIRE, f"numba's kernels read {INPUTS} inputs at a time; this weight has {in_features}")
    if in_features // scheme.groups(in_features) % 2:
        return Choice(WIRE, f"numba's kernels read two inputs of a group at a time, not groups of {scheme.group_size}")
    return Choice(NUMBA_PLANES, _reason(NUMBA_PLANES, shape, dtype))


def _reason(layout: str, shape: tuple[int, int], dtype: torch.dtype) -> str:
    """What a layout is multiplied by on CPUs, as `kernel_of` decides."""
    missing = without_numba()
    if missing:
        rows = MAX_ROWS[layout]
        return f"{KERNELS[layout]} up to {rows} rows, dequantize beyond; numba would be faster, but {missing}"
    compiled = _numba_rows(layout, shape, dtype)
    if compiled == sys.maxsize:
        return "numba's kernel"
    kernels = [f"numba's kernel up to {compiled} rows"] if compiled else []
    if MAX_ROWS_WITH_NUMBA.get(layout, 0) > compiled:
        kernels.append(f"{KERNELS[layout]} up to {MAX_ROWS_WITH_NUMBA[layout]} rows")
    by_numba = "by numba " if layout in BY_PLANES and dtype == torch.bfloat16 else ""
    told = f"{', '.join(kernels)}, dequantize {by_numba}beyond"
    missing = _without_dot(layout, shape)
    return told if missing is None else f"{told}; dot products of bfloat16 would be faster, but {missing}"


def _interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, which is for testing and takes tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def without_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton's kernels do not run on a device for a dtype of inputs and scales, or None where they do."""
    if device.type == "meta":
        return "meta, where offloaded weights are"
    if dtype not in TRITON_DTYPES:
        return f"{dtype}, which Triton's does not take"
    if importlib.util.find_spec("triton") is None:
        return f"{device.type}, since triton is not installed (pip install triton)"
    if _interpreted():
        return None
    if device.type == "mps":
        return "mps, which Triton does not compile for"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{'ROCm' if device.type == 'cuda' else device.type}, on which Triton's was never tried"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        least, found = (".".join(map(str, each)) for each in (MIN_CAPABILITY, capability))
        return f"cuda with capability {found}, since Triton needs {least}"
    return None


@lru_cache
def without_numba() -> str | None:
    """Why no kernel is compiled by numba, or None where it is."""
    if importlib.util.find_spec("numba") is None:
        return "is not installed (pip install 'hf-cptquant[cpu]')"
    try:
        from . import numba_kernel  # noqa: F401
    except (ImportError, RuntimeError) as error:  # for these versions, these threads, or where it may not keep its code
        return f"does not run here: {error}"
    return None


@lru_cache
def without_dot() -> str | None:
    """Why products of few rows are not made of dot products of bfloat16, or None where they are."""
    if planes.int4_block() != 64:
        return f"torch's int4 kernel lays out blocks of {planes.int4_block()} rows, not of 64"
    if (missing := without_numba()) is not None:
        return missing
    try:
        from . import numba_dot  # noqa: F401
    except ImportError as error:  # for this processor, or this version
        return str(error)
    return None


def _without_dot(layout: str, shape: tuple[int, int]) -> str | None:
    """Why products with a weight `(outputs, inputs)` are not dot products of bfloat16, or None where they are."""
    if without_dot() is None and layout in BY_INT8 and (min(shape) < LEAST_BY_DOT or shape[1] % 2):
        return f"with 8 bits they take an even number of inputs, {LEAST_BY_DOT} or more, and as many outputs"
    return without_dot()


def _numba_rows(layout: str, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Up to how many rows of a dtype numba's kernels multiply with a weight `(outputs, inputs)`."""
    if _without_dot(layout, shape) is not None:
        rows = NUMBA_ROWS[layout]
    else:
        from . import numba_dot

        rows = ROWS_BESIDE_TILES if numba_dot.HAS_TILES and dtype == torch.bfloat16 else sys.maxsize
    return min(rows, ROWS_IN_FLOAT32) if dtype == torch.float32 else rows


def kernel_of(layout: str, shape: tuple[int, int], rows: int, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel that multiplies so many rows with a weight in a layout: `REFERENCE`, or one of torch, numba, Triton.

    Args:
        shape: outputs and inputs of the weight.
        dtype: of inputs and scales, or what they are promoted to.
    """
    if layout == WIRE and (device.type != "cpu" or _interpreted()) and without_triton(device, dtype) is None:
        return TRITON if 0 < rows <= MAX_ROWS_TRITON else TRITON_DENSE
    if layout == WIRE or device.type != "cpu" or dtype not in BY_NUMBA_IN or rows == 0:
        return REFERENCE
    if without_numba() is None and rows <= _numba_rows(layout, shape, dtype):
        return NUMBA
    if dtype != torch.bfloat16:
        return REFERENCE
    if layout in KERNELS and without_numba() is not None:
        return KERNELS[layout] if rows <= MAX_ROWS[layout] else REFERENCE
    if rows <= MAX_ROWS_WITH_NUMBA.get(layout, 0):
        return KERNELS[layout]
    return NUMBA_DENSE if layout in BY_PLANES else REFERENCE


def to_layout(tensors: PackedTensors, layout: str, in_features: int) -> PackedTensors:
    """Convert between layouts, bit for bit reversible. The input is not changed."""
    weight, scale, zero_point = tensors.weight, tensors.scale, tensors.zero_point
    if tensors.layout == layout:
        return tensors
    if tensors.layout in BY_PLANES:
        weight, scale = planes.to_wire(weight, in_features), planes.scale_of(scale)
    elif tensors.layout in BY_INT8:
        weight = cpu.int8_to_wire(weight)
    bits = 8 if BY_INT8 & {tensors.layout, layout} else 32 * weight.shape[1] // in_features
    if zero_point is not None and tensors.layout in BY_NUMBA:
        zero_point = pack(zero_point.t(), bits, dim=0)
    if layout in BY_PLANES:
        scale = planes.to_table(scale, None if layout in BY_NUMBA else zero_point, bits)
    if zero_point is not None and layout in BY_NUMBA:
        zero_point = unpack(zero_point, bits, len(weight), dim=0).t().contiguous()
    if layout in BY_PLANES:
        weight = planes.to_kernel(weight, in_features)
    elif layout in BY_INT8:
        weight = cpu.int8_to_kernel(weight, in_features)
    return PackedTensors(weight, scale, zero_point, layout)


def dense_weight(tensors: PackedTensors, bits: int, in_features: int) -> Tensor:
    """The dequantized weight `[out, in]` in the dtype of the scales: the same bits from every layout."""
    if tensors.layout in BY_PLANES:
        return planes.dense_weight(tensors.weight, tensors.scale, tensors.zero_point, in_features)
    if tensors.layout in BY_INT8:
        return cpu.int8_dense(tensors.weight, tensors.scale, tensors.zero_point)
    shape = (len(tensors.weight), in_features)
    if kernel_of(WIRE, shape, 0, tensors.scale.dtype, tensors.weight.device) == TRITON_DENSE:
        from . import triton_kernel

        return triton_kernel.dense_weight(tensors.weight, tensors.scale, tensors.zero_point, bits, in_features)
    return reference.dense_weight(tensors.weight, tensors.scale, tensors.zero_point, bits, in_features)


def dense_rows(tensors: PackedTensors, rows: Tensor, bits: int, in_features: int) -> Tensor:
    """Some rows of `dense_weight`, the same bits; the others are not dequantized.

    Args:
        rows: their numbers, int64 `[n]`, at least one.

    Returns:
        `[n, in_features]` in the dtype of the scales.
    """
    zero_point = tensors.zero_point
    if zero_point is not None:
        by_numba = tensors.layout in BY_NUMBA
        zero_point = zero_point[:, rows].t() if by_numba else unpack_rows(zero_point, bits, rows)
    if tensors.layout in BY_PLANES:
        integers, scale = planes.rows_of(tensors.weight, rows, in_features), planes.scale_of(tensors.scale[:, rows])
    elif tensors.layout in BY_INT8:
        integers, scale = tensors.weight[rows], tensors.scale[rows]
    else:
        integers, scale = unpack(tensors.weight[rows], bits, in_features), tensors.scale[rows]
    return dequantize(integers, scale, zero_point)


def multiply(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    """`x [..., in]` times a packed weight, plus bias → `[..., out]` in the dtype of `x`: what the op does, without it.

    `weight`, `scale` and `zero_point` are the tensors of a `PackedTensors` in `layout`.
    """
    in_features = x.shape[-1]
    rows = x.reshape(-1, in_features)
    shape = (len(weight), in_features)
    dtype = torch.promote_types(x.dtype, scale.dtype)
    kernel = kernel_of(layout, shape, len(rows), dtype, x.device)
    if kernel == NUMBA and dtype != scale.dtype:  # the dequantized weight is rounded, which wider inputs would tell
        kernel = REFERENCE
    if kernel == TRITON:
        from . import triton_kernel

        product = triton_kernel.linear(rows.contiguous(), weight, scale, zero_point, bias, bits)
    elif kernel == NUMBA_DENSE:
        from . import numba_kernel

        product = numba_kernel.dense_linear(rows, weight, scale, zero_point, bias, bits)
    elif kernel == NUMBA or kernel in KERNELS.values():
        rows = rows.contiguous()
        if kernel == NUMBA:
            product = _by_numba(rows, weight, scale, zero_point, bits, layout)
        elif layout in BY_PLANES:
            product = planes.linear(rows, weight, scale, group_size)
        else:
            product = cpu.int8_linear(rows, weight, scale)
        product = product if bias is None else (product + bias).to(x.dtype)
    elif layout in BY_PLANES:
        product = planes.dense_linear(rows, weight, scale, zero_point, bias)
    elif layout in BY_INT8:
        product = cpu.int8_dense_linear(rows, weight, scale, zero_point, bias)
    elif kernel == TRITON_DENSE:
        dense = dense_weight(PackedTensors(weight, scale, zero_point, layout), bits, in_features)
        product = reference.linear(rows, dense, bias)
    else:
        tiles = reference.dense_tiles(weight, scale, zero_point, bits, in_features)
        product = reference.linear_of_tiles(rows, tiles, bias, len(scale))
    return product.reshape(*x.shape[:-1], weight.shape[0])


def _by_numba(x: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, layout: str) -> Tensor:
    """The product by a kernel that numba compiles."""
    from . import numba_kernel

    if _without_dot(layout, (len(weight), x.shape[1])) is not None:
        if layout in BY_INT8:
            return numba_kernel.int8_linear(x, weight, scale, zero_point)
        return numba_kernel.linear(x, weight, scale, zero_point, bits)
    from . import numba_dot, numba_panels

    few = len(x) * numba_dot.TERMS[x.dtype] <= ROWS_IN_PASSING[bits]
    if bits == 8:
        if few:
            return numba_dot.int8_linear(x, weight, scale, zero_point)
        return numba_panels.linear(x, weight, scale.view(1, -1), zero_point, bits)
    group_size, in_bfloat16 = x.shape[1] // len(scale), x.dtype == scale.dtype == torch.bfloat16
    kept = zero_point is None or in_bfloat16  # else sums in float32 would lose what their difference shows
    if bits == 4 and few and kept and group_size % 4 == 0:
        return numba_dot.linear(x, weight, scale, zero_point)
    piece = math.gcd(x.shape[1] // planes.QUARTERS, group_size)
    if bits != 4 and few and in_bfloat16 and piece >= min(LEAST_PIECE, group_size):
        return numba_dot.planes_linear(x, weight, scale, zero_point, bits)
    return numba_panels.linear(x, weight, scale, zero_point, bits)


linear = torch.library.custom_op("hf_cptquant::linear", multiply, mutates_args=())


def needs_op(x: Tensor) -> bool:
    """Whether a product has to be one op: for a graph, a gradient, or inputs that are not plain. Elsewhere `multiply`
    may be called straight, which spares what takes as long as a small product itself."""
    return (
        type(x) is not Tensor
        or not x.is_cpu
        or torch.compiler.is_compiling()
        or (x.requires_grad and torch.is_grad_enabled())
    )


@linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    layout: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save_for_backward(ctx, inputs, output) -> None:
    x, weight, scale, zero_point, _, bits, _, layout = inputs
    ctx.save_for_backward(weight, scale, zero_point)
    ctx.bits, ctx.layout, ctx.in_features = bits, layout, x.shape[-1]


def _backward(ctx, gradient: Tensor):
    weight, scale, zero_point = ctx.saved_tensors
    tensors = PackedTensors(weight, scale, zero_point, ctx.layout)
    dense = dense_weight(tensors, ctx.bits, ctx.in_features)
    return reference.linear(gradient, dense.t(), None), None, None, None, None, None, None, None


linear.register_autograd(_backward, setup_context=_save_for_backward)
