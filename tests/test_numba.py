"""Kernels that numba compiles: the bits of their weights, their threads, and what is told where they do not run."""

import importlib.util
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import LIBRARIES, kernels_of

from hf_cptquant import kernels
from hf_cptquant.grid import QuantizedWeight, integer_range
from hf_cptquant.kernels import (
    CPU_INT4,
    CPU_INT8,
    CPU_PLANES,
    NUMBA,
    NUMBA_DENSE,
    NUMBA_INT8,
    REFERENCE,
    ROWS_IN_FLOAT32,
    kernel_of,
    planes,
)
from hf_cptquant.modules import QuantLinear
from hf_cptquant.plan import PER_CHANNEL, LayerScheme

CPU = torch.device("cpu")
SCHEMES = [
    LayerScheme(bits, 64, symmetric)
    for bits, symmetric in ((2, True), (2, False), (3, True), (3, False), (4, True), (4, False), (5, True), (6, True))
]

pytestmark = [
    pytest.mark.skipif(planes.int4_block() is None, reason="the int4 layout of this machine is not known"),
    pytest.mark.skipif(kernels.without_numba() is not None, reason=f"numba {kernels.without_numba()}"),
]


def layer_of(scheme: LayerScheme, out_features: int = 192, in_features: int = 576) -> QuantLinear:
    """Random integers, all of them; groups straddle the quarters of 576 features."""
    random = torch.Generator().manual_seed(scheme.bits)
    low, high = integer_range(scheme.bits)
    groups = (out_features, scheme.groups(in_features))
    integers = torch.randint(low, high + 1, (out_features, in_features), dtype=torch.int8, generator=random)
    zero_point = torch.randint(low, high + 1, groups, dtype=torch.int8, generator=random)
    scale = (torch.randn(groups, generator=random) * 0.01).bfloat16()
    return QuantLinear.from_quantized(
        QuantizedWeight(integers, scale, None if scheme.symmetric else zero_point, scheme), None
    )


@pytest.mark.parametrize("library", LIBRARIES[:2])
@pytest.mark.parametrize("scheme", [*SCHEMES, LayerScheme(6, 64, False)], ids=str)
def test_weights_for_many_rows_are_the_dequantized_ones_bit_for_bit(scheme, library):
    """Rows of the identity pick them out."""
    with kernels_of(library):
        layer = layer_of(scheme)
        by_dot = kernels.without_dot() is None
        assert kernel_of(layer.layout, (192, 576), 576, torch.bfloat16, CPU) == (NUMBA if by_dot else NUMBA_DENSE)
        found = layer(torch.eye(576, dtype=torch.bfloat16)).t()
    with kernels_of("torch"):
        assert torch.equal(found, layer.weight)


@pytest.mark.parametrize("library", LIBRARIES[:2])
@pytest.mark.parametrize("scheme", [each for each in SCHEMES if each.bits != 4], ids=str)
def test_weights_for_few_rows_are_the_integers_times_the_scale(scheme, library):
    """Each alone; some rows together, and one."""
    with kernels_of(library):
        check_weights_for_few_rows(layer_of(scheme))


def check_weights_for_few_rows(layer):
    quantized = layer.quantized()
    steps = quantized.integers.view(192, -1, 64).double()
    if quantized.zero_point is not None:
        steps = steps - quantized.zero_point.double().unsqueeze(-1)
    exact = (steps * quantized.scale.double().unsqueeze(-1)).view(192, -1)
    identity = torch.eye(576, dtype=torch.bfloat16)
    for rows in (1, 2, 3, 4, 5):
        assert kernel_of(layer.layout, (192, 576), rows, torch.bfloat16, CPU) == NUMBA
        found = torch.cat([layer(part) for part in identity.split(rows)]).t()
        assert torch.equal(found, exact.bfloat16())


needs_dot = pytest.mark.skipif(kernels.without_dot() is not None, reason=str(kernels.without_dot()))


@needs_dot
def test_dot_products_take_all_rows_but_where_tile_units_would_be_faster(monkeypatch):
    def found():
        return [kernel_of(CPU_INT4, (192, 576), rows, torch.bfloat16, CPU) for rows in (0, 1, 64, 65, 10**6)]

    monkeypatch.setattr("hf_cptquant.kernels.numba_dot.HAS_TILES", False)
    assert found() == [REFERENCE, NUMBA, NUMBA, NUMBA, NUMBA]
    monkeypatch.setattr("hf_cptquant.kernels.numba_dot.HAS_TILES", True)
    assert found() == [REFERENCE, NUMBA, NUMBA, NUMBA_DENSE, NUMBA_DENSE]


@needs_dot
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_dot_products_of_wide_weights_and_any_number_of_rows(bits, symmetric, dtype):
    """Wide enough for several panels, of which the last is another; rows one by one, some together, and in several
    rounds. Near float64."""
    in_features = 4700 if bits == 8 else 9600
    scheme = LayerScheme(bits, PER_CHANNEL if bits == 8 else 64, symmetric)
    layer = layer_of(scheme, 130 if bits == 8 else 128, in_features).to(dtype)
    x = torch.randn(401, in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    quantized = layer.quantized()
    steps = quantized.integers.view(len(quantized.scale), quantized.scale.shape[1], -1).double()
    if not symmetric:
        steps = steps - quantized.zero_point.double().unsqueeze(-1)
    exact = x.double() @ (steps * quantized.scale.double().unsqueeze(-1)).flatten(1).t()
    allowed = 2 * (F.linear(x, layer.weight).double() - exact).norm(dim=1)
    for rows in (1, 2, 3, 7, 9, 17, 401):
        expected = REFERENCE if dtype == torch.float32 and rows > ROWS_IN_FLOAT32 else NUMBA
        assert kernel_of(layer.layout, (layer.out_features, in_features), rows, dtype, CPU) == expected
        found = layer(x[:rows])
        assert found.dtype == dtype
        assert ((found.double() - exact[:rows]).norm(dim=1) <= allowed[:rows]).all()


@pytest.mark.parametrize("library", LIBRARIES[:2])
@pytest.mark.parametrize("scheme", [LayerScheme(3, 64), LayerScheme(4, 64, False), LayerScheme(8)], ids=str)
def test_inputs_wider_than_the_scales_are_multiplied_by_the_dequantized_weight(scheme, library):
    """So that a model that is dequantized, as adapters want it to be merged, computes the same."""
    x = torch.randn(20, 576)
    with kernels_of(library):
        layer = layer_of(scheme)
        for rows in (1, 20):
            expected = F.linear(x[:rows], layer.weight.float())
            assert torch.allclose(layer(x[:rows]), expected, rtol=1e-5, atol=1e-4)


@needs_dot
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_inputs_of_bfloat16s_sum_up_to_what_they_are(dtype):
    from hf_cptquant.kernels.numba_dot import TERMS, terms_of

    def sums_of(x):
        terms = terms_of(x)
        assert terms.dtype == torch.bfloat16
        return terms.double().view(3, TERMS[dtype], 1000).sum(1)

    x = (torch.randn(3, 1000) * torch.tensor(2.0) ** torch.randint(-12, 12, (3, 1000))).to(dtype)
    x[0, :4] = torch.tensor([0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal])
    if dtype == torch.float16:
        x[0, 4] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert torch.equal(sums_of(x), x.double())
    x[1, :2] = torch.tensor([torch.inf, torch.nan])
    assert not sums_of(x)[1, :2].isfinite().any()


@needs_dot
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("bits", "group_size"), [(2, 256), (3, 128), (4, 64), (4, 128), (5, 64), (6, 64), (8, PER_CHANNEL)]
)
def test_zero_points_take_a_byte_and_no_more(bits, group_size, dtype):
    scheme = LayerScheme(bits, group_size, False)
    layer = layer_of(scheme, 192, 1024).to(dtype)
    held = sum(tensor.nbytes for tensor in (layer.weight_packed, layer.weight_scale, layer.weight_zero_point))
    assert held <= 1.02 * scheme.nbytes(192, 1024, dtype.itemsize)


@needs_dot
def test_inputs_that_are_not_finite_reach_their_own_rows_only():
    for scheme in (LayerScheme(3, 64), LayerScheme(8)):
        layer, x = layer_of(scheme), torch.randn(30, 576).bfloat16()
        expected = layer(x)
        x[7] = torch.inf
        found = layer(x)
        assert not found[7].isfinite().any()
        assert torch.equal(found[torch.arange(30) != 7], expected[torch.arange(30) != 7])


@needs_dot
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_dot_products_are_of_the_integers_times_the_scale(symmetric):
    """One row alone, and two to four together."""
    layer = layer_of(LayerScheme(4, 64, symmetric))
    quantized, identity = layer.quantized(), torch.eye(576, dtype=torch.bfloat16)
    zeros = 0 if symmetric else quantized.zero_point.double().unsqueeze(-1)
    scale = quantized.scale.double().unsqueeze(-1)
    exact = ((quantized.integers.view(192, -1, 64).double() - zeros) * scale).view(192, -1)
    for rows in (1, 2, 3, 4):
        found = torch.cat([layer(part) for part in identity.split(rows)]).t()
        assert torch.equal(found, exact.bfloat16())


@needs_dot
def test_a_row_is_the_same_alone_and_among_others_but_for_rounding():
    layer, x = layer_of(LayerScheme(4, 64)), torch.randn(11, 576).bfloat16()
    together = layer(x)
    for row in range(11):
        alone = layer(x[row : row + 1])[0]
        assert torch.allclose(together[row].float(), alone.float(), rtol=2**-7, atol=2**-7 * float(alone.abs().max()))


@pytest.mark.parametrize("scheme", [LayerScheme(4, 64, False), LayerScheme(8)], ids=str)
def test_tensors_that_are_not_contiguous(scheme):
    """A state dict may hold views, which are taken as they are."""
    layer, x = layer_of(scheme), torch.randn(100, 576).bfloat16()
    expected = layer(x), layer(x[:1])
    views = {
        name: torch.stack((held, held), -1)[..., 0] if held.dim() == 2 else held
        for name, held in layer.state_dict().items()
    }
    assert not views["weight_scale"].is_contiguous()
    layer.load_state_dict(views, assign=True)
    assert all(map(torch.equal, (layer(x), layer(x[:1])), expected))


@pytest.mark.parametrize("scheme", [LayerScheme(3, 64), LayerScheme(4, 64), LayerScheme(8)], ids=str)
def test_threads_do_not_change_the_result(scheme):
    """More of them than there are blocks of outputs, too."""
    layer, x = layer_of(scheme), torch.randn(100, 576).bfloat16()
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found[threads] = [layer(x[:rows]) for rows in (1, 2, 6, 50)]
    finally:
        torch.set_num_threads(before)
    for threads in (2, 5):
        assert all(map(torch.equal, found[threads], found[1]))


def test_few_rows_are_those_of_the_layout():
    def found(layout, *rows, dtype=torch.bfloat16):
        return [kernel_of(layout, (192, 576), each, dtype, CPU) for each in rows]

    with kernels_of("numba without dot products"):
        assert found(CPU_PLANES, 0, 1, 12, 13) == [REFERENCE, NUMBA, NUMBA, NUMBA_DENSE]
        int4, int8 = found(CPU_INT4, 0, 1, 24, 25), found(CPU_INT8, 0, 1, 2, 3, 16, 17)
        assert int4 == [REFERENCE, "torch's int4 kernel", "torch's int4 kernel", NUMBA_DENSE]
        assert int8 == [REFERENCE, NUMBA, NUMBA, "torch's int8 kernel", "torch's int8 kernel", REFERENCE]
        assert found(CPU_PLANES, 1, 12, 13, dtype=torch.float16) == [NUMBA, NUMBA, REFERENCE]
        assert found(CPU_PLANES, 1, 8, 9, dtype=torch.float32) == [NUMBA, NUMBA, REFERENCE]
        assert found(NUMBA_INT8, 1, 8, 9, dtype=torch.float32) == [NUMBA, NUMBA, REFERENCE]
    assert found(CPU_PLANES, 1, dtype=torch.float64) == [REFERENCE]


def test_reason_names_the_way_out_where_numba_is_not_installed(monkeypatch):
    kernels.without_numba.cache_clear()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find(name))
    try:
        layer = layer_of(LayerScheme(3, 64))
        assert layer.choice.reason.endswith("but is not installed (pip install 'hf-cptquant[cpu]')")
        assert kernel_of(layer.layout, (192, 576), 1, torch.bfloat16, CPU) == "torch's int4 kernel on bit planes"
    finally:
        kernels.without_numba.cache_clear()


CHILD = """
import sys
import numba.core.caching as caching
if sys.argv[1] == "no folder":
    caching.CacheImpl._locator_classes = []
if sys.argv[1] == "no OpenMP":
    import pathlib
    pathlib.Path.glob = lambda self, pattern: iter(())
if sys.argv[1] == "no dot products":
    import llvmlite.binding
    llvmlite.binding.get_host_cpu_features = llvmlite.binding.targets.FeatureMap
import torch
from hf_cptquant.kernels import without_dot, without_numba
print(without_dot() if sys.argv[1] == "no dot products" else without_numba())
"""


@pytest.mark.parametrize(
    ("lack", "reason"),
    [
        ("no folder", "does not run here: cannot cache function 'widened': no locator available"),
        ("no OpenMP", "does not run here: torch's threads are not those of GNU's OpenMP library"),
        pytest.param("no dot products", "the processor has none (AVX512_BF16)", marks=needs_dot),
        ("nothing", "None"),
    ],
)
def test_reason_where_compiled_code_cannot_be_kept_or_threads_are_others(lack, reason):
    found = subprocess.run([sys.executable, "-c", CHILD, lack], capture_output=True, text=True, check=True).stdout
    assert found.startswith(reason)
