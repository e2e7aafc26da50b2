"""Tuned rounding: the grid's arithmetic, its gradients, what is kept, and that it helps."""

import itertools
import json

import pytest
import torch
from conftest import tiny_model
from torch import nn

from hf_cptquant.grid import dequantize, integer_range
from hf_cptquant.plan import LayerScheme
from hf_cptquant.rounding import round_nearest, signround
from hf_cptquant.rounding.signround import TunableGrid

SCHEMES = [
    LayerScheme(4, 16),
    LayerScheme(3, 32, False),
    LayerScheme(2, 16),
    LayerScheme(8),
    LayerScheme(6, 16, False),
    LayerScheme(8, symmetric=False),
]


def matrix(dtype=torch.bfloat16, seed=0) -> torch.Tensor:
    return torch.randn(24, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tuned(scheme, dtype=torch.bfloat16) -> TunableGrid:
    """A grid at some point on the way."""
    grid = TunableGrid(matrix(dtype), scheme)
    draw = torch.Generator().manual_seed(1)
    grid.offset.copy_(torch.randint(-signround.HALF, signround.HALF + 1, grid.offset.shape, generator=draw))
    with torch.no_grad():
        grid.shrinkage.copy_(0.5 + torch.rand(grid.shrinkage.shape, generator=draw) / 2)
    return grid


def weight_of(grid: TunableGrid, dtype: torch.dtype) -> torch.Tensor:
    """The weight that inputs are multiplied by: each input alone, and 1."""
    return grid.product(torch.eye(64, dtype=dtype), None).t()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_untouched_it_is_rounding_to_nearest(scheme, dtype):
    found, nearest = TunableGrid(matrix(dtype), scheme).quantized(), round_nearest(matrix(dtype), scheme)
    assert torch.equal(found.integers, nearest.integers)
    assert torch.equal(found.scale, nearest.scale)
    assert (found.zero_point is None) == (nearest.zero_point is None)
    if nearest.zero_point is not None:
        assert torch.equal(found.zero_point, nearest.zero_point)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_tuned_is_what_is_stored(scheme, dtype):
    grid = tuned(scheme, dtype)
    stored = grid.quantized()
    assert torch.equal(weight_of(grid, dtype), dequantize(stored.integers, stored.scale, stored.zero_point))
    smallest, largest = integer_range(scheme.bits)
    assert smallest <= int(stored.integers.min()) <= int(stored.integers.max()) <= largest


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gradients_are_those_of_the_grid_with_rounding_as_the_identity(scheme):
    """By hand: ∂ŵ/∂V = s inside the range and 0 outside; ∂ŵ/∂s = q − z − (w/s inside, 0 outside)."""
    grid = tuned(scheme, torch.float32)
    stored, before, grid.step = grid.quantized(), grid.offset.float(), 0.01
    upstream = torch.randn(24, 64, generator=torch.Generator().manual_seed(2))
    (weight_of(grid, torch.float32) * upstream).sum().backward()
    scale = stored.scale.unsqueeze(-1)
    zero = 0 if stored.zero_point is None else stored.zero_point.unsqueeze(-1)
    weight = matrix(torch.float32).view_as(grid.offset)
    free = torch.round(weight / scale + before / (2 * signround.HALF)) + zero
    smallest, largest = integer_range(scheme.bits)
    inside = (free >= smallest) & (free <= largest)
    of_values = upstream.view_as(grid.offset)
    expected = torch.where(inside, of_values * scale, 0.0)
    moved = before - round(0.01 * 2 * signround.HALF) * expected.sign()
    assert torch.equal(grid.offset.float(), moved.clamp(-signround.HALF, signround.HALF))
    steps = stored.integers.view_as(free).float() - zero  # up to 255, more than int8 holds
    by_scale = (of_values * (steps - torch.where(inside, weight / scale, 0.0))).sum(-1)
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    if scheme.symmetric:
        span = torch.where(high > -low, -high, -low) / -smallest
        expected = (by_scale * span).unsqueeze(-1)
    else:
        expected = torch.stack((-low, high), -1) / (largest - smallest) * by_scale.unsqueeze(-1)
    assert torch.allclose(grid.shrinkage.grad, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_weight_done_row_by_row_is_that_done_at_once(scheme, monkeypatch):
    draw = torch.Generator().manual_seed(2)
    inputs, upstream = torch.eye(64).bfloat16().requires_grad_(), torch.randn(64, 24, generator=draw).bfloat16()

    def found() -> list[torch.Tensor]:
        grid = tuned(scheme)
        grid.step = 0.1
        outputs = grid.product(inputs, None)
        gradients = torch.autograd.grad(outputs, [inputs, grid.shrinkage], upstream)
        return [outputs, *gradients, grid.offset, grid.quantized().integers]

    at_once = found()
    monkeypatch.setattr(signround, "IN_CACHE", 1)
    monkeypatch.setattr(signround, "LEAST_ROWS", 1)
    assert all(torch.equal(one, other) for one, other in zip(at_once, found(), strict=True))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_nothing_of_the_size_of_a_weight_is_kept_for_the_gradients(scheme):
    grid, kept = TunableGrid(matrix(), scheme), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        assert grid.product(torch.ones(1, 64).bfloat16(), None).requires_grad
    assert kept
    assert all(tensor.numel() < grid.offset.numel() / 4 for tensor in kept)


class Block(nn.Module):
    """Two layers and a residual, called with a tuple as transformers' blocks are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture
def problem():
    block = Block()
    draw = torch.Generator().manual_seed(3)
    calls = [((torch.randn(4, 8, 64, generator=draw),), {}) for _ in range(3)]
    with torch.no_grad():
        targets = [block(*args) for args, _ in calls]
    return block, {"up": LayerScheme(3, 32), "down": LayerScheme(4, 32, False)}, calls, targets


@torch.no_grad()
def error_of(block, rounded, calls, targets) -> float:
    """Squared error of the block with rounded weights."""
    weights = {f"{name}.weight": dequantize(q.integers, q.scale, q.zero_point) for name, q in rounded.items()}
    outputs = [torch.func.functional_call(block, weights, args) for args, _ in calls]
    return sum((output - target).square().mean().item() for output, target in zip(outputs, targets, strict=True))


def nearest_of(block, schemes):
    return {name: round_nearest(block.get_submodule(name).weight.detach(), scheme) for name, scheme in schemes.items()}


def test_tuning_lowers_the_error_of_the_block_and_more_steps_lower_it_further(problem):
    block, schemes, calls, targets = problem
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    errors = [error_of(block, nearest_of(block, schemes), calls, targets)]
    for iterations in (20, 200):
        rounded = signround.round_block(block, schemes, calls, targets, iterations, 0)
        assert {name: q.scheme for name, q in rounded.items()} == schemes
        errors.append(error_of(block, rounded, calls, targets))
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.8 * errors[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_it_is_never_worse_than_rounding_to_nearest(problem, iterations, monkeypatch):
    block, schemes, calls, targets = problem
    move, shrink = TunableGrid.move, TunableGrid.shrink
    monkeypatch.setattr(TunableGrid, "move", lambda grid, rows, gradient: move(grid, rows, -gradient))
    monkeypatch.setattr(TunableGrid, "shrink", lambda grid, gradient: shrink(grid, -gradient))
    rounded = signround.round_block(block, schemes, calls, targets, iterations, 0)
    nearest = nearest_of(block, schemes)
    assert all(torch.equal(rounded[name].integers, nearest[name].integers) for name in schemes)


def test_same_seed_same_integers(problem):
    block, schemes, calls, targets = problem
    first, again, other = (signround.round_block(block, schemes, calls, targets, 10, seed) for seed in (5, 5, 6))
    assert all(torch.equal(first[name].integers, again[name].integers) for name in schemes)
    assert any(not torch.equal(first[name].integers, other[name].integers) for name in schemes)


def test_a_layer_that_no_call_reaches_is_rounded_to_nearest(problem, logged):
    block, schemes, calls, targets = problem
    block.unused = nn.Linear(64, 32)
    rounded = signround.round_block(block, {**schemes, "unused": LayerScheme(4, 32)}, calls, targets, 5, 0)
    nearest = round_nearest(block.unused.weight.detach(), LayerScheme(4, 32))
    assert torch.equal(rounded["unused"].integers, nearest.integers)
    told = [record.getMessage() for record in logged.records]
    assert told == ["unused: no calibration token came there; rounded to nearest."]


def test_a_block_whose_outputs_do_not_depend_on_its_weights_is_rounded_to_nearest(logged):
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(64, 32)

        def forward(self, hidden):
            return 2 * hidden

    block, hidden = Idle().requires_grad_(False), torch.randn(2, 5, 64)
    rounded = signround.round_block(block, {"idle": LayerScheme(4, 32)}, [((hidden,), {})], [2 * hidden], 3, 0)
    assert torch.equal(rounded["idle"].integers, round_nearest(block.idle.weight, LayerScheme(4, 32)).integers)
    assert "idle: no calibration token came there" in logged.text


def test_tuning_holds_three_bytes_for_each_weight(monkeypatch, tmp_path):
    """The offset and the best integer, beside them for a moment the next one's or one layer's weight; and what groups
    need."""
    monkeypatch.setattr(signround, "IN_CACHE", 1 << 12)
    draw = torch.Generator().manual_seed(6)
    inputs = [torch.randn(1, 4, 1024, generator=draw).bfloat16() for _ in range(3)]
    block = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(4))).bfloat16().requires_grad_(False)
    schemes = {str(index): LayerScheme(4) for index in range(4)}
    calls, targets = [((each,), {}) for each in inputs], [block(each) for each in inputs]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        signround.round_block(block, schemes, calls, targets, 6, 0)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    memory = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    peak = max(itertools.accumulate(size for _, size in memory))
    weights = sum(layer.weight.numel() for layer in block)
    assert 3 <= peak / weights < 4.5


def test_conv1d_is_transposed():
    block = tiny_model("gpt2").transformer.h[0]
    hidden = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = block(hidden)
    target = output[0] if isinstance(output, tuple) else output
    schemes = {"mlp.c_fc": LayerScheme(3, 32), "attn.c_proj": LayerScheme(4, 32)}
    rounded = signround.round_block(block, schemes, [((hidden,), {})], [target], 10, 0)
    assert rounded["mlp.c_fc"].integers.shape == (256, 64)
    nearest = round_nearest(block.mlp.c_fc.weight.detach().t().contiguous(), schemes["mlp.c_fc"])
    assert (rounded["mlp.c_fc"].integers != nearest.integers).any()
    assert (rounded["mlp.c_fc"].integers - nearest.integers).abs().max() <= 2


def test_a_token_that_is_a_thousand_times_as_large_counts_no_more_than_the_others():
    layer, draw = nn.Linear(64, 32, bias=False), torch.Generator().manual_seed(4)
    rows = torch.randn(1, 8, 64, generator=draw)
    large = torch.cat((1024 * rows[:, :1], rows[:, 1:]), 1)
    block = nn.Sequential(layer).requires_grad_(False)
    found = [
        signround.round_block(block, {"0": LayerScheme(3, 32)}, [((x,), {})], [block(x)], 20, 0)["0"]
        for x in (rows, large)
    ]
    assert torch.equal(found[0].integers, found[1].integers)
    assert torch.equal(found[0].scale, found[1].scale)


def test_errors_count_by_the_curvature(problem):
    """Half of the outputs do not matter to the loss: the others come out better than without knowing that."""
    block, schemes, calls, targets = problem
    curvature = torch.diag((torch.arange(64) < 32).float())
    errors = []
    for known in (None, curvature):
        rounded = signround.round_block(block, schemes, calls, targets, 60, 0, known)
        weights = {f"{name}.weight": dequantize(q.integers, q.scale, q.zero_point) for name, q in rounded.items()}
        with torch.no_grad():
            off = [torch.func.functional_call(block, weights, a) - t for (a, _), t in zip(calls, targets, strict=True)]
        errors.append(sum(each[..., :32].square().sum().item() for each in off))
    assert errors[1] < 0.9 * errors[0]


def test_scales_have_the_dtype_that_is_asked_for(problem):
    block, schemes, calls, targets = problem
    narrow = signround.round_block(block.bfloat16().float(), schemes, calls, targets, 5, 0, None, torch.bfloat16)
    assert all(q.scale.dtype == torch.bfloat16 for q in narrow.values())
    layer = block.up.weight.detach().bfloat16()
    nearest = round_nearest(layer, schemes["up"])
    untouched = signround.round_block(block, schemes, calls, targets, 0, 0, None, torch.bfloat16)["up"]
    assert torch.equal(untouched.integers, nearest.integers)
    assert torch.equal(untouched.scale, nearest.scale)
