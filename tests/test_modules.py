"""QuantLinear and QuantConv1D: products against float64, layouts, and all that a module in a model must survive."""

import copy
import io
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from conftest import LIBRARIES, WIDTHS_OF_THEIRS, kernels_of
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_cptquant import explain_choice, kernels
from hf_cptquant.kernels import planes, reference
from hf_cptquant.modules import QuantConv1D, QuantLinear, packed_modules
from hf_cptquant.plan import LayerScheme
from hf_cptquant.rounding import round_nearest

BITS = (2, 3, 4, 5, 6, 8)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INT4, PLANES, INT8, WIRE = "cpu_int4", "cpu_planes", "cpu_int8", "wire"
NUMBA_PLANES, NUMBA_INT8 = "numba_planes", "numba_int8"

needs_int4 = pytest.mark.skipif(planes.int4_block() is None, reason="the int4 layout of this machine is not known")
with_and_without_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def by_numba(scheme, shape, layout, name, dtype=torch.bfloat16):
    """A parameter for a scheme that has a layout only where numba is."""
    layout = WIRE if kernels.without_numba() else layout
    return pytest.param(scheme, shape, dtype, layout, marks=needs_int4, id=f"{name}-by-numba-{str(dtype)[6:]}")


# One module for each layout on the CPU: scheme, [out, in], dtype, layout.
SETTLED = pytest.mark.parametrize(
    ("scheme", "shape", "dtype", "layout"),
    [
        pytest.param(LayerScheme(4, 32), (64, 96), torch.bfloat16, INT4, marks=needs_int4, id="int4-sym"),
        pytest.param(
            LayerScheme(4, 64, False),
            (128, 128),
            torch.bfloat16,
            INT4 if kernels.without_dot() else NUMBA_PLANES,
            marks=needs_int4,
            id="int4-asym",
        ),
        pytest.param(LayerScheme(2, 64), (64, 128), torch.bfloat16, PLANES, marks=needs_int4, id="planes-2-sym"),
        pytest.param(LayerScheme(5, 32), (64, 96), torch.bfloat16, PLANES, marks=needs_int4, id="planes-5-sym"),
        pytest.param(LayerScheme(6, 32), (128, 96), torch.bfloat16, PLANES, marks=needs_int4, id="planes-6-sym"),
        pytest.param(LayerScheme(8), (40, 96), torch.bfloat16, INT8, id="int8"),
        pytest.param(
            LayerScheme(3, 32, False),
            (128, 96),
            torch.bfloat16,
            PLANES if kernels.without_numba() else NUMBA_PLANES,
            marks=needs_int4,
            id="planes-3-asym",
        ),
        by_numba(LayerScheme(6, 16, False), (64, 96), NUMBA_PLANES, "6-asym"),
        by_numba(LayerScheme(4), (64, 96), NUMBA_PLANES, "4-channel"),
        by_numba(LayerScheme(8, -1, False), (40, 96), NUMBA_INT8, "8-asym"),
        pytest.param(LayerScheme(8, 32), (40, 96), torch.bfloat16, WIRE, id="wire-8-groups"),
        pytest.param(LayerScheme(3, 32, False), (40, 96), torch.float32, WIRE, id="wire-3-asym"),
        pytest.param(LayerScheme(4, 32), (40, 96), torch.float16, WIRE, id="wire-4-sym"),
        by_numba(LayerScheme(4, 32), (64, 96), NUMBA_PLANES, "4-sym", torch.float16),
        by_numba(LayerScheme(5, 32), (64, 96), NUMBA_PLANES, "5-sym", torch.float32),
        by_numba(LayerScheme(8), (40, 96), NUMBA_INT8, "8-sym", torch.float32),
    ],
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The matrices are small, and waiting for a second thread on a busy machine takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def quantized_weight(scheme, shape, dtype, seed=0):
    return round_nearest(random(*shape, dtype=dtype, seed=seed) * 0.05, scheme)


def packed_module(scheme, shape, dtype, bias=True, cls=QuantLinear, seed=0):
    values = random(shape[0], dtype=dtype, seed=seed + 1) if bias else None
    return cls.from_quantized(quantized_weight(scheme, shape, dtype, seed), values)


def exact_weight(quantized):
    """(q − z)·scale in float64, `[out, in]`."""
    rows, groups = quantized.scale.shape
    steps = quantized.integers.double().view(rows, groups, -1)
    if quantized.zero_point is not None:
        steps = steps - quantized.zero_point.double().unsqueeze(-1)
    return (steps * quantized.scale.double().unsqueeze(-1)).view(rows, -1)


def exact_product(x, weight, bias):
    return x.double() @ weight.t() + (0 if bias is None else bias.double())


def relative_error(result, exact):
    return ((result.double() - exact).norm() / exact.norm()).item()


def tolerance(dtype, terms):
    """Each weight and each sum is rounded to the dtype by half an eps at most; sums of so many terms are in float32."""
    return torch.finfo(dtype).eps + terms**0.5 * torch.finfo(torch.float32).eps


@with_and_without_bias
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("cls", [QuantLinear, QuantConv1D])
def test_product_is_that_of_the_integers(cls, bits, symmetric, dtype, bias):
    for group_size in (32, -1):
        scheme, shape = LayerScheme(bits, group_size, symmetric), (40, 96)
        module = packed_module(scheme, shape, dtype, bias, cls)
        weight = exact_weight(quantized_weight(scheme, shape, dtype))
        for rows in (1, 3, 100):
            x = random(rows, 96, dtype=dtype, seed=2)
            result = module(x)
            assert result.dtype == dtype
            assert relative_error(result, exact_product(x, weight, module.bias)) <= tolerance(dtype, 96)


@SETTLED
def test_inputs_of_any_shape(scheme, shape, dtype, layout):
    module = packed_module(scheme, shape, dtype)
    assert module.layout == layout
    for leading in ((), (1,), (5,), (2, 3), (2, 1, 3), (1, 1, 1, 2)):
        x = random(*leading, shape[1], dtype=dtype, seed=2)
        result = module(x)
        assert result.shape == (*leading, shape[0])
        rows = module(x.reshape(-1, shape[1]))
        assert torch.equal(result.reshape(-1, shape[0]), rows)


@SETTLED
def test_non_contiguous_inputs(scheme, shape, dtype, layout):
    module = packed_module(scheme, shape, dtype)
    in_features = shape[1]
    transposed = random(in_features, 5, dtype=dtype).t()
    strided = random(5, 2 * in_features, dtype=dtype)[:, ::2]
    swapped = random(3, 2, in_features, dtype=dtype).transpose(0, 1)
    expanded = random(1, in_features, dtype=dtype).expand(4, in_features)
    for x in (transposed, strided, swapped, expanded):
        assert not x.is_contiguous()
        result = module(x)
        assert result.is_contiguous()
        assert torch.equal(result, module(x.contiguous()))


@SETTLED
def test_empty_batch(scheme, shape, dtype, layout):
    module = packed_module(scheme, shape, dtype)
    for leading in ((0,), (2, 0), (0, 3)):
        result = module(torch.empty(*leading, shape[1], dtype=dtype))
        assert result.shape == (*leading, shape[0])
        assert result.dtype == dtype


@SETTLED
def test_input_is_not_changed(scheme, shape, dtype, layout):
    module, x = packed_module(scheme, shape, dtype), random(3, shape[1], dtype=dtype)
    before = x.clone()
    module(x)
    assert torch.equal(x, before)


@SETTLED
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_result_has_the_dtype_of_the_input(scheme, shape, dtype, layout, other):
    module = packed_module(scheme, shape, dtype)
    weight = exact_weight(quantized_weight(scheme, shape, dtype))
    x = random(3, shape[1], dtype=other, seed=2)
    result = module(x)
    assert result.dtype == other
    rounding = tolerance(max(dtype, other, key=lambda each: torch.finfo(each).eps), shape[1])
    assert relative_error(result, exact_product(x, weight, module.bias)) <= rounding


@pytest.mark.parametrize(
    ("scheme", "shape", "width", "dtype"),
    [
        (LayerScheme(4), (40, 33), 34, torch.float32),
        (LayerScheme(3), (40, 33), 40, torch.float32),
        (LayerScheme(8), (40, 63), 64, torch.float32),
        (LayerScheme(4, 32), (40, 96), 95, torch.float32),
        (LayerScheme(8), (40, 96), 95, torch.bfloat16),
        (LayerScheme(4, 32), (64, 96), 64, torch.bfloat16),
        (LayerScheme(2, 32), (64, 96), 64, torch.bfloat16),
        (LayerScheme(3, 32), (64, 96), 192, torch.bfloat16),
    ],
    ids=str,
)
def test_input_of_wrong_width_is_refused(scheme, shape, width, dtype, library):
    module = packed_module(scheme, shape, dtype)
    for rows in (2, 100):
        with pytest.raises((RuntimeError, ValueError)):
            module(random(rows, width, dtype=dtype))


@needs_int4
@pytest.mark.parametrize("offset", [0, 1], ids=["centred", "positive"])
@with_and_without_bias
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
def test_int4_layout_is_taken_and_accurate(group_size, symmetric, bias, offset, library):
    scheme, rows = LayerScheme(4, group_size, symmetric), (1, 2, 3, 7, 24, 25, 64, 65, 100)
    layout = INT4 if symmetric or kernels.without_dot() else NUMBA_PLANES
    check_fast_layout(scheme, (192, 512), layout, bias, offset, rows)


@needs_int4
@pytest.mark.parametrize("offset", [0, 1], ids=["centred", "positive"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize(("bits", "symmetric"), [(2, True), (2, False), (3, True), (3, False), (5, True), (6, True)])
def test_planes_are_taken_and_accurate(bits, group_size, symmetric, offset, library):
    scheme = LayerScheme(bits, group_size, symmetric)
    layout = NUMBA_PLANES if library != "torch" and not symmetric else PLANES
    check_fast_layout(scheme, (192, 512), layout, bits == 3, offset, rows=(1, 3, 12, 13, 32, 33, 100))


@needs_int4
@pytest.mark.parametrize("offset", [0, 1], ids=["centred", "positive"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize(
    ("bits", "group_size"), [(5, 64), (6, 128), *((bits, size) for bits in BITS for size in (-1, 16, 6))]
)
@pytest.mark.parametrize("library", LIBRARIES[:2])
def test_numba_takes_what_torch_does_not(bits, group_size, symmetric, offset, library):
    """Zero points with many bits; groups of other sizes."""
    if bits == 8 and (symmetric or group_size > 0):
        pytest.skip("8 bits are per channel, and torch takes them without zero points")
    with kernels_of(library):
        layout = {8: NUMBA_INT8}.get(bits, PLANES if symmetric and group_size > 16 else NUMBA_PLANES)
        scheme = LayerScheme(bits, group_size, symmetric)
        check_fast_layout(scheme, (192, 384), layout, bits == 3, offset, rows=(1, 3, 8, 9, 12, 13, 100))


@needs_int4
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_tiles_make_the_product_of_the_whole(bits, symmetric, library, monkeypatch):
    """Three blocks of outputs, one or two at a time."""
    module = packed_module(LayerScheme(bits, 32, symmetric), (192, 64), torch.bfloat16)
    few, many = random(3, 64, dtype=torch.bfloat16), random(100, 64, dtype=torch.bfloat16)
    whole, dense = (module(few), module(many)), module.weight
    if library != "torch":
        monkeypatch.setattr("hf_cptquant.kernels.numba_kernel.LEAST_BLOCKS", 1)
    for blocks in (1, 2):
        monkeypatch.setattr(reference, "TILE", blocks * planes.int4_block() * 64)
        assert torch.equal(module(few), whole[0])
        assert relative_error(module(many), whole[1].double()) <= torch.finfo(torch.bfloat16).eps
        assert torch.equal(module.weight, dense)


@pytest.mark.parametrize("offset", [0, 1], ids=["centred", "positive"])
@with_and_without_bias
@pytest.mark.parametrize("shape", [(64, 512), (40, 576), (77, 48)], ids=str)
def test_int8_layout_is_taken_and_accurate(shape, bias, offset, library):
    check_fast_layout(LayerScheme(8), shape, INT8, bias, offset, rows=(1, 2, 3, 16, 17, 100))


def check_fast_layout(scheme, shape, layout, bias, offset, rows):
    """At most twice the error of torch's own product with the dequantized weight, for few and for many rows."""
    module = packed_module(scheme, shape, torch.bfloat16, bias)
    assert module.layout == layout
    weight = exact_weight(quantized_weight(scheme, shape, torch.bfloat16))
    for count in rows:
        x = (random(count, shape[1], seed=2) + offset).bfloat16()
        exact = exact_product(x, weight, module.bias)
        of_torch = F.linear(x, weight.bfloat16(), module.bias)
        assert relative_error(module(x), exact) <= 2 * relative_error(of_torch, exact)


@pytest.mark.parametrize("in_features", [1, 8, 24, 33, 100])
def test_torchs_int8_kernel_is_not_taken_for_widths_that_it_reads_beyond(in_features, library):
    """It reads rows in pieces of 16 and, where they do not fit, memory that is not the weight's."""
    module = packed_module(LayerScheme(8), (40, in_features), torch.bfloat16)
    assert module.layout == (NUMBA_INT8 if library != "torch" else WIRE)  # or the product may end the process
    weight = exact_weight(quantized_weight(LayerScheme(8), (40, in_features), torch.bfloat16))
    for rows in (1, 3, 20):
        x = random(rows, in_features, dtype=torch.bfloat16, seed=2)
        error = relative_error(module(x), exact_product(x, weight, module.bias))
        assert error <= tolerance(torch.bfloat16, in_features)


@pytest.mark.parametrize("shape", [(1, 16), (3, 16), (5, 80)], ids=str)
def test_int8_kernel_takes_small_weights(shape, library):
    module = packed_module(LayerScheme(8), shape, torch.bfloat16)
    assert module.layout == INT8
    weight = exact_weight(quantized_weight(LayerScheme(8), shape, torch.bfloat16))
    for rows in (1, 2, 13, 16):
        x = random(rows, shape[1], dtype=torch.bfloat16, seed=2)
        error = relative_error(module(x), exact_product(x, weight, module.bias))
        assert error <= tolerance(torch.bfloat16, shape[1])


@pytest.mark.parametrize(
    ("scheme", "shape", "dtype", "reason"),
    [
        (LayerScheme(8, 32), (64, 64), torch.bfloat16, r"8 bits per channel only"),
        (LayerScheme(4, 32), (40, 64), torch.bfloat16, r"blocks of .* rows; this weight has 40"),
        (LayerScheme(6, 32), (40, 64), torch.bfloat16, r"blocks of .* rows; this weight has 40"),
    ],
    ids=str,
)
def test_wire_layout_says_why_no_kernel_is_taken(scheme, shape, dtype, reason):
    module = packed_module(scheme, shape, dtype)
    assert module.layout == WIRE
    assert re.search(f"^wire: .*{reason}", explain_choice(module))


def test_wire_layout_is_that_of_dtypes_without_a_kernel():
    module = packed_module(LayerScheme(4, 32), (64, 64), torch.float32).double()
    assert module.layout == WIRE
    assert explain_choice(module).endswith("bfloat16, float16 and float32, the model is in torch.float64")


@needs_int4
@pytest.mark.parametrize(
    "scheme", [LayerScheme(3), LayerScheme(4, 16), LayerScheme(5, 32, False), LayerScheme(8, -1, False)], ids=str
)
def test_wire_layout_says_that_numba_would_take_the_weight(scheme):
    with kernels_of("torch"):
        module = packed_module(scheme, (64, 64), torch.bfloat16)
        assert module.layout == WIRE
        assert re.search("numba's (would take|takes) all, but is left out here$", explain_choice(module))
        module = packed_module(scheme, (64, 64), torch.float16)
        assert module.layout == WIRE
        assert explain_choice(module).endswith("bfloat16 only, the model is in torch.float16; numba is left out here")


@needs_int4
@pytest.mark.parametrize("scheme", [LayerScheme(3, 32, False), LayerScheme(8, -1, False)], ids=str)
def test_wire_layout_says_that_dot_products_would_take_zero_points(scheme):
    with kernels_of("numba without dot products"):
        module = packed_module(scheme, (64, 64), torch.float32)
        assert module.layout == WIRE
        reason = "take zero points in torch.float32 by dot products of bfloat16 only, but is left out here"
        assert explain_choice(module).endswith(reason)


@needs_int4
@pytest.mark.parametrize(
    ("scheme", "in_features", "reason"),
    [
        (LayerScheme(4), 40, "32 inputs at a time; this weight has 40"),
        (LayerScheme(4, 3), 96, "two inputs of a group at a time, not groups of 3"),
    ],
    ids=str,
)
def test_wire_layout_says_that_numba_reads_some_inputs_at_a_time(scheme, in_features, reason):
    with kernels_of("numba"):
        module = packed_module(scheme, (64, in_features), torch.bfloat16)
        assert explain_choice(module) == f"wire: numba's kernels read {reason}"


@needs_int4
def test_fast_layouts_say_which_kernel_and_up_to_how_many_rows(library):
    int4 = packed_module(LayerScheme(4, 32), (64, 64), torch.bfloat16)
    int8 = packed_module(LayerScheme(8), (64, 64), torch.bfloat16)
    of_planes = packed_module(LayerScheme(3, 32), (64, 64), torch.bfloat16)
    if library != "torch":
        narrow = packed_module(LayerScheme(8), (32, 64), torch.bfloat16)
        of_narrow = "numba's kernel up to 2 rows, torch's int8 kernel up to 16 rows, dequantize beyond"
        if (missing := kernels.without_dot()) is None:
            for module in (int4, int8, of_planes):
                assert explain_choice(module) == f"{module.layout}: numba's kernel"
            missing = "with 8 bits they take an even number of inputs, 64 or more, and as many outputs"
        else:
            why = f"dequantize by numba beyond; dot products of bfloat16 would be faster, but {missing}"
            assert explain_choice(int4) == f"cpu_int4: torch's int4 kernel up to 24 rows, {why}"
            assert explain_choice(of_planes) == f"cpu_planes: numba's kernel up to 12 rows, {why}"
        why = f"dot products of bfloat16 would be faster, but {missing}"
        assert explain_choice(narrow) == f"cpu_int8: {of_narrow}; {why}"
    else:
        why = "dequantize beyond; numba would be faster, but is left out here"
        assert explain_choice(int4) == f"cpu_int4: torch's int4 kernel up to 64 rows, {why}"
        assert explain_choice(of_planes) == f"cpu_planes: torch's int4 kernel on bit planes up to 32 rows, {why}"
        assert explain_choice(int8) == f"cpu_int8: torch's int8 kernel up to 16 rows, {why}"


def test_choice_names_a_device_without_a_kernel():
    module = QuantLinear(64, 64, LayerScheme(4, 32), dtype=torch.bfloat16, device="meta")
    assert "no packed kernel for meta" in explain_choice(module)


@with_and_without_bias
@SETTLED
def test_state_dict_is_the_wire_format_in_every_layout(scheme, shape, dtype, layout, bias):
    if scheme.bits not in WIDTHS_OF_THEIRS:
        pytest.skip("compressed-tensors before 0.18 packs these bits otherwise")
    module, quantized = packed_module(scheme, shape, dtype, bias), quantized_weight(scheme, shape, dtype)
    assert module.layout == layout
    state = module.state_dict()
    expected = {
        "weight_packed": pack_to_int32(quantized.integers, scheme.bits),
        "weight_scale": quantized.scale,
        "weight_shape": torch.tensor(shape),
    }
    if not scheme.symmetric:
        expected["weight_zero_point"] = pack_to_int32(quantized.zero_point, scheme.bits, packed_dim=0)
    if bias:
        expected["bias"] = random(shape[0], dtype=dtype, seed=1)
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)


@SETTLED
def test_stored_bytes_are_those_that_the_plan_counts(scheme, shape, dtype, layout):
    state = packed_module(scheme, shape, dtype, bias=False).state_dict()
    del state["weight_shape"]
    assert sum(tensor.nbytes for tensor in state.values()) == scheme.nbytes(*shape, dtype.itemsize)


@SETTLED
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_load_state_dict_into_an_empty_module(scheme, shape, dtype, layout, assign):
    module = packed_module(scheme, shape, dtype)
    loaded = QuantLinear(shape[1], shape[0], scheme, dtype=dtype)
    loaded.load_state_dict(module.state_dict(), assign=assign)
    assert loaded.layout == layout
    check_same(loaded, module)


@SETTLED
def test_load_state_dict_into_a_module_in_use(scheme, shape, dtype, layout):
    first, second = packed_module(scheme, shape, dtype), packed_module(scheme, shape, dtype, seed=7)
    first.load_state_dict(second.state_dict())
    assert first.layout == layout
    check_same(first, second)


@pytest.mark.parametrize("out_features", [1, 4, 8])
@pytest.mark.parametrize("bits", BITS)
def test_load_state_dict_of_few_output_features(bits, out_features):
    """Their zero points of a group fill less than or exactly one word."""
    module = packed_module(LayerScheme(bits, 32, False), (out_features, 96), torch.float32)
    loaded = QuantLinear(96, out_features, module.scheme, dtype=torch.float32)
    loaded.load_state_dict(module.state_dict())
    check_same(loaded, module)


def test_load_state_dict_refuses_other_shapes():
    module = packed_module(LayerScheme(4, 32), (64, 96), torch.bfloat16)
    other = packed_module(LayerScheme(4, 32), (64, 64), torch.bfloat16)
    expected = module(random(2, 96, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="size mismatch for weight_packed"):
        module.load_state_dict({**module.state_dict(), "weight_packed": other.state_dict()["weight_packed"]})
    assert torch.equal(module(random(2, 96, dtype=torch.bfloat16)), expected)


def check_same(module, expected):
    """Same state in the wire format and same product, for few and for many rows."""
    state, expected_state = module.state_dict(), expected.state_dict()
    assert state.keys() == expected_state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected_state.items())
    for rows in (2, 100):
        x = random(rows, expected.in_features, dtype=expected.weight_scale.dtype, seed=3)
        assert torch.equal(module(x), expected(x))


@SETTLED
def test_deepcopy_shares_nothing(scheme, shape, dtype, layout):
    module = packed_module(scheme, shape, dtype)
    copied = copy.deepcopy(module)
    assert copied.layout == layout
    check_same(copied, module)
    for buffer in copied.buffers():
        buffer.zero_()
    check_same(module, packed_module(scheme, shape, dtype))


@SETTLED
def test_pickle(scheme, shape, dtype, layout):
    module = packed_module(scheme, shape, dtype)
    restored = pickle.loads(pickle.dumps(module))
    assert restored.layout == layout
    check_same(restored, module)


@SETTLED
def test_torch_load_on_another_device_settles_there(scheme, shape, dtype, layout):
    file = io.BytesIO()
    torch.save(packed_module(scheme, shape, dtype), file)
    file.seek(0)
    loaded = torch.load(file, map_location="meta", weights_only=False)
    assert loaded.layout == loaded.choice.layout


@SETTLED
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_another_dtype_and_back_loses_nothing(scheme, shape, dtype, layout, other):
    module, x = packed_module(scheme, shape, dtype), random(3, shape[1], dtype=dtype, seed=2)
    integers, expected = module.state_dict()["weight_packed"], module(x)
    module.to(other)
    assert module.layout == module.choice.layout
    assert module.weight.dtype == module.bias.dtype == other
    assert torch.equal(module.state_dict()["weight_packed"], integers)
    exact = exact_product(x.to(other), exact_weight(quantized_weight(scheme, shape, dtype)), random(shape[0], seed=1))
    coarsest = max(torch.finfo(dtype).eps, torch.finfo(other).eps)  # of the scales
    assert relative_error(module(x.to(other)), exact) <= 2 * coarsest
    module.to(dtype)
    assert module.layout == layout
    assert torch.equal(module.state_dict()["weight_packed"], integers)
    if torch.finfo(other).eps <= torch.finfo(dtype).eps:  # the scales and the bias survive too
        assert torch.equal(module(x), expected)


@SETTLED
def test_gradient_of_the_input_is_that_of_the_dense_weight(scheme, shape, dtype, layout):
    module = packed_module(scheme, shape, dtype)
    assert module.layout == layout
    weight = exact_weight(quantized_weight(scheme, shape, dtype))
    for leading in ((3,), (2, 50), (2, 1, 2)):
        x = random(*leading, shape[1], dtype=dtype, seed=2).requires_grad_()
        gradient = random(*leading, shape[0], dtype=dtype, seed=3)
        module(x).backward(gradient)
        assert x.grad.dtype == dtype
        assert relative_error(x.grad, gradient.double() @ weight) <= tolerance(dtype, shape[0])


@pytest.mark.parametrize("cls", [QuantLinear, QuantConv1D])
def test_gradient_in_float64(cls):
    module = packed_module(LayerScheme(4, 32, False), (5, 64), torch.float32, cls=cls).double()
    x = random(2, 3, 64, dtype=torch.float64, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(module, x)


@SETTLED
def test_op_keeps_what_it_registers(scheme, shape, dtype, layout):
    module = packed_module(scheme, shape, dtype)
    arguments = (
        random(2, 3, shape[1], dtype=dtype).requires_grad_(),
        *(module.weight_packed, module.weight_scale, module.weight_zero_point, module.bias),
        *(scheme.bits, scheme.group_size, layout),
    )
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_cptquant.linear.default, arguments, test_utils=tests)


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        pytest.param(LayerScheme(4, 32), torch.bfloat16, marks=needs_int4, id="int4"),
        pytest.param(LayerScheme(3, 32, False), torch.bfloat16, marks=needs_int4, id="planes"),
        pytest.param(LayerScheme(3, 32, False), torch.float32, id="wire"),
    ],
)
def test_compile_without_graph_breaks(scheme, dtype):
    torch._dynamo.reset()
    module = packed_module(scheme, (64, 96), dtype)
    compiled = torch.compile(module, fullgraph=True)
    for leading in ((2, 3), (100,)):
        x = random(*leading, 96, dtype=dtype)
        assert torch.equal(compiled(x), module(x))


def test_compiled_and_eager_agree_on_the_dtype_under_autocast():
    torch._dynamo.reset()
    module, x = packed_module(LayerScheme(4, 32), (64, 96), torch.float32), random(2, 96)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(x).dtype == module(x).dtype


@SETTLED
@pytest.mark.parametrize("cls", [QuantLinear, QuantConv1D])
def test_weight_is_the_dequantized_weight(scheme, shape, dtype, layout, cls):
    module = packed_module(scheme, shape, dtype, cls=cls)
    expected = exact_weight(quantized_weight(scheme, shape, dtype)).to(dtype)
    expected = expected.t() if cls is QuantConv1D else expected
    assert module.weight.dtype == dtype
    assert torch.equal(module.weight, expected)
    assert module.weight.is_contiguous()
    file = io.BytesIO()
    torch.save(module.weight, file)
    file.seek(0)
    for copied in (torch.load(file), copy.deepcopy(module.weight)):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, expected)


@SETTLED
def test_weights_are_held_packed_and_not_as_parameters(scheme, shape, dtype, layout):
    module = packed_module(scheme, shape, dtype, bias=False)
    module(random(100, shape[1], dtype=dtype))
    module(random(1, shape[1], dtype=dtype))
    assert list(module.parameters()) == []
    held = sum(buffer.nbytes for buffer in module.buffers())
    shifted = layout in (INT4, PLANES) and not scheme.symmetric
    groups = shape[0] * scheme.groups(shape[1])
    more = groups * dtype.itemsize if shifted else 0  # a shift beside each scale
    if layout in (NUMBA_PLANES, NUMBA_INT8) and not scheme.symmetric:  # a byte for each zero point
        more = groups - module.state_dict()["weight_zero_point"].nbytes
    assert held == scheme.nbytes(*shape, dtype.itemsize) + more + module.weight_shape.nbytes


@with_and_without_bias
@SETTLED
def test_dense_linear_is_equivalent(scheme, shape, dtype, layout, bias):
    module = packed_module(scheme, shape, dtype, bias)
    check_dense(module, nn.Linear, exact_weight(quantized_weight(scheme, shape, dtype)), dtype)
    assert (module.dense().in_features, module.dense().out_features) == (shape[1], shape[0])


@SETTLED
def test_dense_conv1d_is_equivalent(scheme, shape, dtype, layout):
    module = packed_module(scheme, shape, dtype, cls=QuantConv1D)
    check_dense(module, Conv1D, exact_weight(quantized_weight(scheme, shape, dtype)), dtype)
    assert (module.nf, module.dense().nf) == (shape[0], shape[0])


def check_dense(module, cls, exact, dtype):
    dense = module.dense()
    assert type(dense) is cls
    assert torch.equal(dense.weight, module.weight)
    assert (dense.bias is None) == (module.bias is None)
    assert all(parameter.device.type == "cpu" for parameter in dense.parameters())
    x = random(2, 3, module.in_features, dtype=dtype, seed=2)
    product = exact_product(x, exact, module.bias)
    assert relative_error(dense(x), product) <= tolerance(dtype, module.in_features)
    assert relative_error(module(x), product) <= tolerance(dtype, module.in_features)


def test_packed_modules_are_found_by_name():
    model = nn.Sequential(nn.Linear(4, 4), packed_module(LayerScheme(4, 32), (64, 96), torch.float32))
    model.append(nn.ModuleList([packed_module(LayerScheme(4, 32), (64, 96), torch.float32, cls=QuantConv1D)]))
    assert packed_modules(model) == {"1": model[1], "2.0": model[2][0]}


def test_repr_names_shape_and_scheme():
    module = packed_module(LayerScheme(3, 32, False), (40, 96), torch.float32, bias=False)
    assert repr(module) == "QuantLinear(96, 40, bias=False, 3 asym g32, layout=wire)"
