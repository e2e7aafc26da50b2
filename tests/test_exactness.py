"""Every scheme that can be, over shapes that hypothesis draws: products near float64, and layouts that lose nothing."""

import pytest
import torch
import torch.nn.functional as F
from conftest import LIBRARIES, kernels_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cptquant import kernels
from hf_cptquant.grid import QuantizedWeight, integer_range
from hf_cptquant.kernels import (
    CPU_INT4,
    CPU_INT8,
    CPU_PLANES,
    NUMBA_INT8,
    NUMBA_PLANES,
    WIRE,
    choose_layout,
    dense_weight,
    to_layout,
)
from hf_cptquant.modules import QuantConv1D, QuantLinear
from hf_cptquant.plan import PACKED_BITS, LayerScheme, scheme_for

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EXAMPLES = 150


@st.composite
def weights(draw) -> QuantizedWeight:
    """Random integers with scales and zero points, for kernels as often as for the reference; odd sizes, and widths
    that the group size does not divide, where a plan takes a smaller group or none."""
    bits, symmetric, dtype = draw(st.sampled_from(PACKED_BITS)), draw(st.booleans()), draw(st.sampled_from(DTYPES))
    group_size = draw(st.sampled_from((16, 32, 64, 128, 256, -1)))
    out_features, in_features = draw(st.integers(1, 130)), draw(st.integers(1, 300))
    if draw(st.booleans()):  # what the kernels take
        bits, dtype, group_size = draw(st.sampled_from((8, *PACKED_BITS))), torch.bfloat16, max(32, group_size)
        out_features, in_features = draw(st.sampled_from((64, 128, 192))), draw(st.sampled_from((64, 128, 192, 256)))
    scheme = scheme_for(bits, in_features, group_size, symmetric)
    low, high = integer_range(bits)
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    groups = scheme.groups(in_features)
    integers = torch.randint(low, high + 1, (out_features, in_features), dtype=torch.int8, generator=random)
    scale = 0.01 * torch.randn(out_features, groups, generator=random).sign() * (0.5 + torch.rand(1, generator=random))
    scale = (scale * (0.5 + torch.rand(out_features, groups, generator=random))).to(dtype)
    zero_point = torch.randint(low, high + 1, (out_features, groups), dtype=torch.int8, generator=random)
    return QuantizedWeight(integers, scale, None if symmetric else zero_point, scheme)


def exact_weight(weight: QuantizedWeight) -> torch.Tensor:
    """(q − z)·scale in float64, `[out, in]`."""
    rows, groups = weight.scale.shape
    steps = weight.integers.double().view(rows, groups, -1)
    if weight.zero_point is not None:
        steps = steps - weight.zero_point.double().unsqueeze(-1)
    return (steps * weight.scale.double().unsqueeze(-1)).view(rows, -1)


def norm_of_error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return (result.double() - exact).norm().item()


def product_of(
    weight, rows: int, bias: bool, seed: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, float]:
    """Inputs, bias, their product with a weight in float64, and how far from it one in their dtype may be: twice as far
    as torch's own."""
    dtype, (out_features, in_features) = weight.scale.dtype, weight.integers.shape
    random = torch.Generator().manual_seed(seed)
    offset = torch.randn(out_features, generator=random).to(dtype) if bias else None
    x = torch.randn(rows, in_features, generator=random).to(dtype)
    exact = x.double() @ exact_weight(weight).t() + (0 if offset is None else offset.double())
    of_torch = F.linear(x, exact_weight(weight).to(dtype), offset)
    # where a product of few terms happens to be exact in torch, one rounding of the result is allowed for
    return x, offset, exact, max(2 * norm_of_error(of_torch, exact), torch.finfo(dtype).eps * exact.norm().item())


@settings(max_examples=EXAMPLES)
@given(weight=weights(), rows=st.sampled_from((1, 2, 7, 16, 17, 64, 65)), bias=st.booleans(), seed=st.integers(0, 99))
@pytest.mark.parametrize("library", LIBRARIES)
def test_products_err_at_most_twice_as_much_as_torchs_own(library, weight, rows, bias, seed):
    x, offset, exact, allowed = product_of(weight, rows, bias, seed)
    for cls in (QuantLinear, QuantConv1D):
        with kernels_of(library):
            result = cls.from_quantized(weight, offset)(x)
        assert result.dtype == x.dtype
        assert norm_of_error(result, exact) <= allowed


@settings(max_examples=EXAMPLES)
@given(weight=weights())
def test_conversion_to_a_kernels_layout_and_back_loses_nothing(weight):
    module = QuantLinear.from_quantized(weight, None)
    found = module.quantized()
    assert torch.equal(found.integers, weight.integers)
    assert torch.equal(found.scale, weight.scale)
    assert (found.zero_point is None) == (weight.zero_point is None)
    assert weight.zero_point is None or torch.equal(found.zero_point, weight.zero_point)
    wire = to_layout(module.tensors, WIRE, module.in_features)
    again = to_layout(wire, module.layout, module.in_features)
    for before, after in zip(
        (module.weight_packed, module.weight_scale, module.weight_zero_point),
        (again.weight, again.scale, again.zero_point),
        strict=True,
    ):
        assert before is after is None or torch.equal(before, after)
    for tensors in (wire, module.tensors):  # the dense weight is the same from both
        dense = dense_weight(tensors, weight.scheme.bits, module.in_features)
        assert torch.equal(dense, exact_weight(weight).to(weight.scale.dtype))


OF_NUMBA = [] if kernels.without_numba() else [NUMBA_PLANES, NUMBA_INT8]


@pytest.mark.parametrize("layout", [CPU_INT4, CPU_PLANES, CPU_INT8, WIRE, *OF_NUMBA])
def test_the_sweep_meets_every_layout(layout):
    """So that the two sweeps are not about the reference alone."""
    found = 0

    @settings(max_examples=EXAMPLES, database=None)
    @given(weight=weights())
    def count(weight):
        nonlocal found
        shape = weight.integers.shape
        choice = choose_layout(weight.scheme, *shape, torch.device("cpu"), weight.scale.dtype)
        found += choice.layout == layout

    count()
    assert found >= 3


def test_scheme_of_the_sweep_can_be_per_channel_where_no_group_divides():
    assert scheme_for(4, 33, 64) == LayerScheme(4)
