"""What `test_triton.py` runs with TRITON_INTERPRET=1, which must be set before triton is imported: the kernels for
CUDA, on the CPU. The sweep goes through the modules, as that of the CPU's kernels does."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exactness import norm_of_error, product_of, weights

from hf_cptquant import explain_choice
from hf_cptquant.grid import integer_range
from hf_cptquant.kernels import MAX_ROWS_TRITON, TRITON, TRITON_DENSE, WIRE, kernel_of, reference, triton_kernel
from hf_cptquant.modules import QuantConv1D, QuantLinear
from hf_cptquant.packing import pack
from hf_cptquant.plan import PER_CHANNEL, LayerScheme
from hf_cptquant.rounding import round_nearest

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OUT_FEATURES = 37  # no multiple of a tile, of a word or of a group
# Widths that end within a tile, within a group's tile, or with it
IN_FEATURES = {16: 80, 32: 96, 64: 192, 128: 256, PER_CHANNEL: 133}
SWEEP = [
    (bits, group_size, symmetric, dtype)
    for (bits, group_size, symmetric), dtype in zip(
        itertools.product(range(2, 9), IN_FEATURES, (True, False)), itertools.cycle(DTYPES), strict=False
    )
]


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "dtype"), SWEEP, ids=str)
def test_kernels_on_every_width_group_and_dtype(bits, group_size, symmetric, dtype):
    in_features = IN_FEATURES[group_size]
    groups = 1 if group_size == PER_CHANNEL else in_features // group_size
    random = torch.Generator().manual_seed(bits)
    low, high = integer_range(bits)
    integers = torch.randint(low, high + 1, (OUT_FEATURES, in_features), dtype=torch.int8, generator=random)
    zeros = torch.randint(low, high + 1, (OUT_FEATURES, groups), dtype=torch.int8, generator=random)
    scale = (0.01 * torch.randn(OUT_FEATURES, groups, generator=random)).to(dtype)
    steps = integers.double().view(OUT_FEATURES, groups, -1) - (0 if symmetric else zeros.double().unsqueeze(-1))
    exact = (steps * scale.double().unsqueeze(-1)).view(OUT_FEATURES, in_features)
    packed = (pack(integers, bits), scale, None if symmetric else pack(zeros, bits, dim=0))

    dense = triton_kernel.dense_weight(*packed, bits, in_features)
    assert dense.dtype == dtype
    assert torch.equal(dense, exact.to(dtype))
    for rows in (1, 5):
        x = torch.randn(rows, in_features, generator=random).to(dtype)
        bias = torch.randn(OUT_FEATURES, generator=random).to(dtype) if rows == 1 else None
        product = x.double() @ exact.t() + (0 if bias is None else bias.double())
        of_torch = F.linear(x, dense, bias)
        allowed = max(2 * norm_of_error(of_torch, product), torch.finfo(dtype).eps * product.norm().item())
        assert norm_of_error(triton_kernel.linear(x, *packed, bias, bits), product) <= allowed


@settings(max_examples=15)
@given(weight=weights(), rows=st.sampled_from((1, 2, 17, 65)), bias=st.booleans(), seed=st.integers(0, 99))
def test_products_of_modules_err_at_most_twice_as_much_as_torchs_own(weight, rows, bias, seed):
    x, offset, exact, allowed = product_of(weight, rows, bias, seed)
    module = (QuantLinear, QuantConv1D)[seed % 2].from_quantized(weight, offset)
    assert module.layout == WIRE
    assert kernel_of(module.layout, (module.out_features, module.in_features), rows, x.dtype, x.device) == TRITON
    assert norm_of_error(module(x), exact) <= allowed


def packed_module() -> QuantLinear:
    weight = 0.05 * torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    return QuantLinear.from_quantized(round_nearest(weight, LayerScheme(3, 32, False)), None)


def test_many_rows_take_the_dense_product():
    module, x = packed_module(), torch.randn(MAX_ROWS_TRITON + 1, 96)
    assert kernel_of(WIRE, (40, 96), len(x), x.dtype, x.device) == TRITON_DENSE
    assert torch.equal(module(x), F.linear(x, module.weight))
    assert explain_choice(module) == f"wire: Triton's kernel up to {MAX_ROWS_TRITON} rows, dequantize beyond"


def test_kernels_take_inputs_of_any_shape_stride_and_dtype():
    module = packed_module()
    for x in (torch.randn(96), torch.randn(2, 3, 96), torch.randn(96, 5).t(), torch.randn(0, 96)):
        assert torch.allclose(module(x), F.linear(x, module.weight), rtol=1e-5, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float64):
        x = torch.randn(3, 96, dtype=dtype)
        assert module(x).dtype == dtype
        assert torch.allclose(module(x), F.linear(x, module.weight.to(dtype)), rtol=1e-2, atol=1e-2)
    x = torch.randn(3, 96, requires_grad=True)
    module(x).sum().backward()
    assert torch.allclose(x.grad, module.weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


def test_dense_weight_of_a_module_is_that_of_the_reference():
    module = packed_module()
    expected = reference.dense_weight(
        module.weight_packed, module.weight_scale, module.weight_zero_point, module.scheme.bits, module.in_features
    )
    assert torch.equal(module.weight, expected)
