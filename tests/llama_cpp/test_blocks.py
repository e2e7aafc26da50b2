"""Blocks hold our integers exactly, as the library `gguf` reads them."""

import gguf
import numpy as np
import pytest
import torch

from hf_cptquant.errors import ExportError
from hf_cptquant.grid import QuantizedWeight, fit_grid, integer_range, quantize
from hf_cptquant.llama_cpp.blocks import block_type, encode, largest_difference, shared_type
from hf_cptquant.plan import LayerScheme

HELD_AS = {
    (2, True): "Q4_0", (3, True): "Q4_0", (4, True): "Q4_0", (5, True): "Q5_0", (6, True): "Q8_0", (8, True): "Q8_0",
    (2, False): "Q4_0", (3, False): "Q4_0", (4, False): "Q4_1", (5, False): "Q8_0", (6, False): "Q8_0",
}  # fmt: skip


def read(weight: QuantizedWeight) -> torch.Tensor:
    """What another reader of the format makes of the blocks, in float32."""
    kind = block_type(weight)
    return torch.from_numpy(np.copy(gguf.dequantize(encode(weight, kind), gguf.GGMLQuantizationType[kind])))


def exact(weight: QuantizedWeight) -> torch.Tensor:
    """(q − z)·s without any rounding, which float64 has room for."""
    scale, steps = weight.scale.double(), weight.integers.double().view(*weight.scale.shape, -1)
    if weight.zero_point is not None:
        steps = steps - weight.zero_point.double().unsqueeze(-1)
    return (steps * scale.unsqueeze(-1)).view(weight.integers.shape)


def rounded(scheme: LayerScheme, dtype: torch.dtype) -> QuantizedWeight:
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(scheme.bits)) * 0.05
    weight[0, :32] = 0
    weight[1, 5] = 3.0
    weight[2] = weight[2].abs()
    weight = weight.to(dtype)
    return quantize(weight, *fit_grid(weight, scheme), scheme)


@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize(("bits", "symmetric"), HELD_AS)
def test_every_scheme_is_held_exactly(bits, symmetric, group_size):
    weight = rounded(LayerScheme(bits, group_size, symmetric), torch.bfloat16)
    assert weight.integers.min() == integer_range(bits)[0]
    assert block_type(weight) == HELD_AS[bits, symmetric]
    assert largest_difference(weight) == 0
    assert torch.equal(read(weight).double(), exact(weight))


def test_four_bits_with_zero_points_fit_whatever_bfloat16_scale_they_have():
    significands = torch.arange(128, 256).repeat_interleave(16)
    zero_point = torch.arange(-8, 8, dtype=torch.int8).repeat(128)
    integers = torch.arange(-8, 8, dtype=torch.int8).repeat(2).repeat(len(zero_point), 1)
    scale = (significands / 2.0**14).bfloat16()
    assert torch.equal(scale.double() * 2**14, significands.double())
    weight = QuantizedWeight(integers, scale[:, None], zero_point[:, None], LayerScheme(4, 32, False))
    assert block_type(weight) == "Q4_1"
    assert torch.equal(read(weight).double(), exact(weight))


def test_scales_with_more_bits_need_more_room_beside_zero_points():
    weight = rounded(LayerScheme(4, 32, False), torch.float16)
    assert block_type(weight) == "Q5_0"
    assert torch.equal(read(weight).double(), exact(weight))
    assert block_type(rounded(LayerScheme(4, 32, True), torch.float16)) == "Q4_0"


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 1e-6), (torch.float32, 1.0)])
def test_the_difference_is_told_where_scales_do_not_fit(dtype, factor, symmetric):
    weight = rounded(LayerScheme(4, 32, symmetric), dtype)
    scale = weight.scale * torch.where(torch.arange(8) == 3, factor, 1.0).to(dtype)
    weight = QuantizedWeight(weight.integers, scale, weight.zero_point, weight.scheme)
    difference = (read(weight).double() - exact(weight)).abs().max().item()
    assert 0 < difference == pytest.approx(largest_difference(weight), rel=1e-4)
    assert difference < 2**-17 if dtype == torch.bfloat16 else difference < 2**-11 * 3


@pytest.mark.parametrize(
    ("scheme", "in_features", "complaint"),
    [
        (LayerScheme(4, 16), 64, "groups of 16 do not fit .* group_size 32, 64 or 128"),
        (LayerScheme(8), 48, "48 input features do not fit .* modules_to_not_convert"),
        (LayerScheme(8, -1, False), 64, "zero points of 8 bits; quantize with symmetric=True"),
    ],
)
def test_what_has_no_block_is_refused(scheme, in_features, complaint):
    weight = torch.randn(4, in_features, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ExportError, match=complaint):
        block_type(quantize(weight, *fit_grid(weight, scheme), scheme))


def test_a_scale_that_float16_does_not_reach_is_refused():
    weight = rounded(LayerScheme(4, 32), torch.bfloat16)
    weight.scale[3, 1] = -7e4
    with pytest.raises(ExportError, match=r"the scale 7\S+ is too large for float16"):
        block_type(weight)


@pytest.mark.parametrize(
    ("schemes", "kind"),
    [
        ([(4, True), (3, True)], "Q4_0"),
        ([(4, True), (5, True)], "Q5_0"),
        ([(4, False), (4, True), (2, False)], "Q5_0"),
        ([(4, False), (8, True), (5, False)], "Q8_0"),
    ],
)
def test_a_type_in_common_holds_every_weight_exactly(schemes, kind):
    weights = [rounded(LayerScheme(bits, 32, symmetric), torch.bfloat16) for bits, symmetric in schemes]
    assert shared_type([block_type(weight) for weight in weights]) == kind
    for weight in weights:
        found = np.copy(gguf.dequantize(encode(weight, kind), gguf.GGMLQuantizationType[kind]))
        assert torch.equal(torch.from_numpy(found).double(), exact(weight))
