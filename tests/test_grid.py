"""Scales, zero points, quantize, dequantize: against equation 1 in float64, degenerate groups, compressed-tensors."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize as dequantize_of_compressed_tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cptquant import rounding
from hf_cptquant.errors import ModelError, PlanError
from hf_cptquant.grid import dequantize, fit_grid, integer_range, quantize
from hf_cptquant.plan import LayerScheme

BITS = (2, 3, 4, 5, 6, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COLUMNS = 128
QUOTIENT_ERROR = 1e-4  # of a step: weight / scale, up to 256, is computed in float32

all_bits = pytest.mark.parametrize("bits", BITS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_symmetries = pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])


def round_nearest(weight, scheme):
    return quantize(weight, *fit_grid(weight, scheme), scheme)


def dequantized(quantized):
    return dequantize(quantized.integers, quantized.scale, quantized.zero_point)


def varied_weight(dtype):
    """Rows that are mixed, positive, negative, with one outlier of either sign, constant, partly zero, small."""
    weight = torch.randn(8, COLUMNS, generator=torch.Generator().manual_seed(0))
    weight[1].abs_()
    weight[2].abs_().neg_()
    weight[3, 5], weight[4, 70] = 20, -20
    weight[5] = 0.3
    weight[6, 10:100] = 0
    weight[7] *= 0.05
    return weight.to(dtype)


def grouped(matrix, groups):
    return matrix.double().view(len(matrix), groups, -1)


def points(quantized):
    """(q − z)·scale without rounding: float64 `[out, groups, group size]`."""
    groups = quantized.scale.shape[1]
    zero_point = 0 if quantized.zero_point is None else quantized.zero_point.double().unsqueeze(-1)
    return (grouped(quantized.integers, groups) - zero_point) * quantized.scale.double().unsqueeze(-1)


def reference_grid(weight, scheme, groups):
    """Equation 1 in float64: unrounded signed scale, and the minimum of each group widened to contain 0."""
    values = grouped(weight, groups)
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    if not scheme.symmetric:
        scale = (high - low) / (2**scheme.bits - 1)
    else:  # the largest magnitude lies on −2^(bits−1)
        scale = torch.where(high > -low, high, low) / -(2 ** (scheme.bits - 1))
    return torch.where(scale == 0, 1.0, scale), low


@all_bits
@both_symmetries
@all_dtypes
@pytest.mark.parametrize("group_size", [16, 32, 128, -1])
def test_grid_and_integers_are_those_of_equation_1(bits, symmetric, dtype, group_size):
    scheme = LayerScheme(bits, group_size, symmetric)
    weight = varied_weight(dtype)
    before = weight.clone()
    quantized = round_nearest(weight, scheme)
    groups = 1 if group_size == -1 else COLUMNS // group_size

    scale, low = reference_grid(weight, scheme, groups)
    assert quantized.scale.dtype == dtype
    assert quantized.scale.shape == (len(weight), groups)
    torch.testing.assert_close(quantized.scale.double(), scale, rtol=torch.finfo(dtype).eps, atol=0)

    smallest, largest = integer_range(bits)
    levels = torch.arange(smallest, largest + 1).double()
    if symmetric:
        assert quantized.zero_point is None
        grid = levels * quantized.scale.double().unsqueeze(-1)
    else:
        zero_point = (smallest - torch.round(low / quantized.scale.double())).clamp(smallest, largest)
        assert quantized.zero_point.dtype == torch.int8
        assert torch.equal(quantized.zero_point.double(), zero_point)
        grid = (levels - zero_point.unsqueeze(-1)) * quantized.scale.double().unsqueeze(-1)

    values = grouped(weight, groups)
    least = torch.stack([(values - grid[..., level, None]).abs() for level in range(len(levels))]).amin(0)
    error = (values - points(quantized)).abs()
    assert ((error - least) / quantized.scale.double().abs().unsqueeze(-1)).max() <= QUOTIENT_ERROR

    assert quantized.integers.dtype == torch.int8
    assert quantized.integers.min() >= smallest
    assert quantized.integers.max() <= largest
    assert quantized.scheme == scheme
    assert torch.equal(weight, before)


@all_bits
@all_dtypes
def test_symmetric_grid_uses_its_extra_level(bits, dtype):
    quantized = round_nearest(varied_weight(dtype), LayerScheme(bits, -1))
    assert (quantized.integers == -(2 ** (bits - 1))).any(1).all()


@all_bits
def test_asymmetric_grid_uses_all_levels_of_a_one_sided_group(bits):
    weight = torch.linspace(0, 1, 1024).repeat(2, 1) * torch.tensor([[1.0], [-1.0]])
    quantized = round_nearest(weight, LayerScheme(bits, -1, symmetric=False))
    for row in quantized.integers:
        assert row.unique().tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


def test_by_hand():
    weight = torch.tensor([[-0.4, 0.8, 0.21, 0.0]])
    symmetric = round_nearest(weight, LayerScheme(3))
    assert symmetric.scale.item() == pytest.approx(-0.2)
    assert symmetric.integers.tolist() == [[2, -4, -1, 0]]
    asymmetric = round_nearest(weight, LayerScheme(2, symmetric=False))
    assert asymmetric.scale.item() == pytest.approx(0.4)
    assert asymmetric.zero_point.tolist() == [[-1]]
    assert asymmetric.integers.tolist() == [[-2, 1, 0, -1]]


@pytest.mark.parametrize(("bits", "limits"), [(2, (-2, 1)), (3, (-4, 3)), (4, (-8, 7)), (8, (-128, 127))])
def test_integer_range(bits, limits):
    assert integer_range(bits) == limits


@all_bits
@both_symmetries
@all_dtypes
def test_dequantize_is_exact_up_to_one_rounding(bits, symmetric, dtype):
    quantized = round_nearest(varied_weight(dtype), LayerScheme(bits, 32, symmetric))
    expected = points(quantized).flatten(1).to(dtype)
    assert torch.equal(dequantized(quantized), expected)


@all_bits
@both_symmetries
@all_dtypes
@pytest.mark.parametrize("group_size", [32, -1])
def test_dequantize_is_bit_for_bit_that_of_compressed_tensors(bits, symmetric, dtype, group_size):
    quantized = round_nearest(varied_weight(dtype), LayerScheme(bits, group_size, symmetric))
    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
    )
    theirs = dequantize_of_compressed_tensors(quantized.integers, quantized.scale, quantized.zero_point, args)
    assert theirs.dtype == dtype
    assert torch.equal(dequantized(quantized), theirs)


@all_bits
@both_symmetries
@all_dtypes
def test_zeros_stay_zeros(bits, symmetric, dtype):
    weight = torch.zeros(3, 64, dtype=dtype)
    weight[1, :32] = 1  # one group of row 1 is not zero
    quantized = round_nearest(weight, LayerScheme(bits, 32, symmetric))
    assert torch.isfinite(quantized.scale).all()
    assert (quantized.scale != 0).all()
    assert (dequantized(quantized)[weight == 0] == 0).all()


@all_bits
@both_symmetries
@all_dtypes
@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, -0.0173, 1000.0])
def test_constants_are_kept(bits, symmetric, dtype, value):
    weight = torch.full((2, 64), value, dtype=dtype)
    result = dequantized(round_nearest(weight, LayerScheme(bits, 32, symmetric)))
    # a symmetric scale is the constant divided by a power of two; an asymmetric one is rounded to the dtype
    torch.testing.assert_close(result, weight, rtol=0 if symmetric else torch.finfo(dtype).eps, atol=0)


@all_bits
@both_symmetries
@all_dtypes
def test_values_near_the_largest_of_the_dtype_stay_finite(bits, symmetric, dtype):
    largest = torch.finfo(dtype).max
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).clamp(-2, 2).to(dtype) * (largest / 2)
    weight[1:5] = torch.tensor([largest, -largest, largest / 2, -largest / 2], dtype=dtype).unsqueeze(1)
    weight[5, :32] = largest
    weight[5, 32:] = -largest
    for group_size in (32, -1):
        quantized = round_nearest(weight, LayerScheme(bits, group_size, symmetric))
        assert torch.isfinite(quantized.scale).all()
        assert torch.isfinite(dequantized(quantized)).all()


@all_bits
@both_symmetries
@all_dtypes
def test_one_sided_values_near_the_largest_of_the_dtype_are_kept(bits, symmetric, dtype):
    largest = torch.finfo(dtype).max
    weight = torch.tensor([[largest] * 32, [-largest] * 32], dtype=dtype)
    result = dequantized(round_nearest(weight, LayerScheme(bits, 32, symmetric)))
    # the scale gives way by two units in the last place so that no multiple of it overflows
    torch.testing.assert_close(result.double(), weight.double(), rtol=4 * torch.finfo(dtype).eps, atol=0)


@all_bits
@both_symmetries
@all_dtypes
def test_tiny_values_stay_finite_and_tiny(bits, symmetric, dtype):
    limits = torch.finfo(dtype)
    least = torch.nextafter(torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)).item()
    values = [least, -least, limits.tiny / 2, -limits.tiny / 2, limits.tiny, -limits.tiny, 3 * limits.tiny, 0]
    weight = torch.tensor([values * 4, [least] * 32], dtype=dtype)
    quantized = round_nearest(weight, LayerScheme(bits, 32, symmetric))
    assert torch.isfinite(quantized.scale).all()
    assert (quantized.scale != 0).all()
    error = (dequantized(quantized).double() - weight.double()).abs()
    assert torch.isfinite(error).all()
    assert (error <= weight.double().abs().amax(1, keepdim=True)).all()


@both_symmetries
@pytest.mark.parametrize(("bits", "amplitude"), [(4, 1e-2), (4, 1e-3), (4, 1e-4), (8, 1e-2), (8, 1e-3)])
@all_dtypes
def test_small_channels_are_as_accurate_as_large_ones(bits, symmetric, amplitude, dtype):
    """The relative error does not depend on the magnitude, down to values that the dtype itself resolves well."""
    unit = torch.rand(16, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def relative_error(weight):
        result = dequantized(round_nearest(weight, LayerScheme(bits, -1, symmetric)))
        return ((result.double() - weight.double()).norm() / weight.double().norm()).item()

    small, large = relative_error((unit * amplitude).to(dtype)), relative_error(unit.to(dtype))
    assert small <= 1.5 * large


@both_symmetries
@all_dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused(symmetric, dtype, value):
    weight = torch.randn(4, 64).to(dtype)
    weight[2, 40] = value
    with pytest.raises(ModelError, match=r"NaN or infinity.*modules_to_not_convert"):
        fit_grid(weight, LayerScheme(4, 32, symmetric))


@both_symmetries
def test_group_size_must_divide_the_input_features(symmetric):
    with pytest.raises(PlanError, match="group size 64 does not divide 100 input features"):
        fit_grid(torch.ones(4, 100), LayerScheme(4, 64, symmetric))


def test_nearest_is_the_rounding_of_that_name():
    weight, scheme = varied_weight(torch.bfloat16), LayerScheme(4, 32, symmetric=False)
    ours, expected = rounding.round_nearest(weight, scheme), round_nearest(weight, scheme)
    assert torch.equal(ours.integers, expected.integers)
    assert torch.equal(ours.scale, expected.scale)
    assert torch.equal(ours.zero_point, expected.zero_point)


def drawn_weight(data, dtype, largest):
    limit = torch.finfo(dtype).max * largest
    magnitudes = st.floats(-1, 1) | st.floats(-limit, limit) | st.sampled_from([0.0, limit, -limit, 1e-7, 1e-40])
    values = data.draw(st.lists(magnitudes, min_size=8, max_size=8))
    return torch.tensor([values], dtype=torch.float64).to(dtype)


@settings(deadline=None)
@given(st.data(), st.sampled_from(BITS), st.booleans(), st.sampled_from(DTYPES))
def test_every_dequantized_value_is_finite(data, bits, symmetric, dtype):
    result = dequantized(round_nearest(drawn_weight(data, dtype, 1.0), LayerScheme(bits, 4, symmetric)))
    assert torch.isfinite(result).all()


@settings(deadline=None)
@given(st.data(), st.sampled_from(BITS), st.booleans(), st.sampled_from(DTYPES))
def test_error_is_half_a_step_inside_the_grid_and_about_one_outside(data, bits, symmetric, dtype):
    # half of the largest value: the range of a group cannot overflow
    weight = drawn_weight(data, dtype, 0.5 * (1 - 4 * torch.finfo(dtype).eps))
    quantized = round_nearest(weight, LayerScheme(bits, 4, symmetric))
    step = quantized.scale.double().abs().unsqueeze(-1)
    values = grouped(weight, 2)
    error = (values - points(quantized)).abs() / step
    smallest, largest = integer_range(bits)
    zero_point = 0 if symmetric else quantized.zero_point.double().unsqueeze(-1)
    ends = torch.stack([(end - zero_point) * quantized.scale.double().unsqueeze(-1) for end in (smallest, largest)])
    inside = (values >= ends.amin(0)) & (values <= ends.amax(0))
    assert (error[inside] <= 0.5 + QUOTIENT_ERROR).all()
    # Outside: one step where the signed grid has a level less, half a step where the zero point is rounded. On top, the
    # range of 2^(bits−1) or 2^bits − 1 steps is short by the rounding of the scale, half a unit in the last place.
    shift, steps = (1.0, 2 ** (bits - 1)) if symmetric else (0.5, 2**bits - 1)
    bound = shift + steps * torch.finfo(dtype).eps / 2
    assert (error <= bound + QUOTIENT_ERROR).all()
