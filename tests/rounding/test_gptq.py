"""GPTQ against the textbook: optimal brain surgery in float64, column by column."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_cptquant.errors import ModelError
from hf_cptquant.grid import dequantize, integer_range, quantize
from hf_cptquant.plan import LayerScheme
from hf_cptquant.rounding import clipping, gptq, round_nearest
from hf_cptquant.sensitivity.compensation import inputs_in

SCHEMES = [LayerScheme(4, 16), LayerScheme(3, 32, False), LayerScheme(2, 16, False), LayerScheme(8), LayerScheme(5, 16)]


def drawn(out_features: int, in_features: int, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and inputs whose features are correlated and of different sizes."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=draw) / in_features**0.5 + torch.eye(in_features)
    sizes = torch.rand(in_features, generator=draw) * 3 + 0.1
    return (
        torch.randn(out_features, in_features, generator=draw),
        (torch.randn(tokens, in_features, generator=draw) @ mixing) * sizes,
    )


def dense(quantized) -> torch.Tensor:
    return dequantize(quantized.integers, quantized.scale, quantized.zero_point)


def textbook(weight, hessian, scheme, damping=gptq.DAMPING) -> tuple[np.ndarray, torch.Tensor]:
    """Round the column of largest diagonal, move the open columns along the inverse Hessian, eliminate; in float64. On
    grids whose ranges are narrowed by what the error of each column costs at its turn."""
    h = hessian.double().numpy()
    damped = h + damping * np.diag(h).mean() * np.eye(len(h))
    costs, inverse = torch.empty(len(h)), np.linalg.inv(damped)
    for column in np.argsort(-np.diag(h), kind="stable"):
        costs[column] = 1 / inverse[column, column]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    scales, zero_points = clipping.clipped_grid(weight, scheme, costs)
    scale = scales.double().repeat_interleave(weight.shape[1] // scales.shape[1], 1).numpy()
    zero = np.zeros_like(scale)
    if zero_points is not None:
        zero = zero_points.double().repeat_interleave(weight.shape[1] // scales.shape[1], 1).numpy()
    inverse = np.linalg.inv(damped)
    work, integers = weight.double().numpy().copy(), np.zeros(weight.shape, dtype=int)
    for column in np.argsort(-np.diag(h), kind="stable"):
        level = np.clip(np.round(work[:, column] / scale[:, column]) + zero[:, column], *integer_range(scheme.bits))
        integers[:, column] = level
        error = work[:, column] - (level - zero[:, column]) * scale[:, column]
        work -= np.outer(error / inverse[column, column], inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return integers, scales


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("columns", [16, 128])
def test_integers_are_those_of_the_textbook(scheme, columns, monkeypatch):
    monkeypatch.setattr(gptq, "COLUMNS", columns)
    weight, inputs = drawn(24, 64, 200)
    hessian = inputs.t() @ inputs
    (found,) = gptq.round_together([weight], [scheme], hessian)
    expected, scales = textbook(weight, hessian, scheme)
    rows = (found.integers.numpy() == expected).mean(1)
    nearest = round_nearest(weight, scheme)
    kept = (found.integers == nearest.integers).all(1) & (found.scale == nearest.scale).all(1)
    assert np.all((rows > 0.97) | kept.numpy())  # a tie may fall to the other side in float32
    assert np.mean(rows > 0.97) > 0.8
    assert torch.equal(found.scale, torch.where(kept.unsqueeze(1), nearest.scale, scales))
    if scheme.bits < 8:
        assert (found.integers != nearest.integers).any()


@given(st.integers(0, 10**6), st.sampled_from(SCHEMES), st.sampled_from([5, 40, 300]))
def test_no_row_is_worse_than_rounded_to_nearest(seed, scheme, tokens):
    weight, inputs = drawn(8, 32, tokens, seed)
    (found,) = gptq.round_together([weight], [scheme], inputs.t() @ inputs)
    ours, nearest = (
        ((weight - dense(rounded)).double() @ inputs.double().t()).square().sum(1)
        for rounded in (found, round_nearest(weight, scheme))
    )
    assert bool((ours <= nearest * (1 + 1e-4) + 1e-6).all())


def test_correlated_inputs_are_made_use_of():
    weight, inputs = drawn(64, 128, 1000)
    scheme = LayerScheme(3, 32)
    (found,) = gptq.round_together([weight], [scheme], inputs.t() @ inputs)
    both = found, round_nearest(weight, scheme)
    ours, nearest = (((weight - dense(rounded)) @ inputs.t()).square().sum().item() for rounded in both)
    assert ours < 0.7 * nearest


def test_layers_that_share_their_inputs_are_rounded_as_each_alone():
    first, inputs = drawn(8, 64, 300)
    second, _ = drawn(12, 64, 1, seed=1)
    schemes, hessian = [LayerScheme(4, 16), LayerScheme(8)], inputs.t() @ inputs
    together = gptq.round_together([first, second], schemes, hessian)
    for weight, scheme, found in zip((first, second), schemes, together, strict=True):
        (alone,) = gptq.round_together([weight], [scheme], hessian)
        assert torch.equal(found.integers, alone.integers)
        assert torch.equal(found.scale, alone.scale)


def test_dead_inputs_are_rounded_to_nearest():
    weight, inputs = drawn(8, 32, 100)
    inputs[:, ::3] = 0
    (found,) = gptq.round_together([weight], [LayerScheme(4, 16)], inputs.t() @ inputs)
    nearest = quantize(weight, found.scale, found.zero_point, found.scheme)
    assert torch.equal(found.integers[:, ::3], nearest.integers[:, ::3])


def test_a_layer_that_no_token_reaches_is_rounded_to_nearest():
    weight, _ = drawn(8, 32, 1)
    (found,) = gptq.round_together([weight], [LayerScheme(4, 16)], torch.zeros(32, 32))
    assert torch.equal(found.integers, round_nearest(weight, LayerScheme(4, 16)).integers)


def test_fewer_tokens_than_features_are_damped():
    weight, inputs = drawn(8, 64, 3)
    (found,) = gptq.round_together([weight], [LayerScheme(4, 16)], inputs.t() @ inputs)
    assert bool(torch.isfinite(dense(found)).all())


def test_damping_grows_until_the_decomposition_succeeds():
    indefinite = torch.eye(8) - 0.5  # a product of inputs is not, but its float32 may be
    factor = gptq.inverse_factor(indefinite)
    assert bool(torch.isfinite(factor).all())
    damped = torch.linalg.inv((factor.t() @ factor).double())
    change = damped - indefinite.double()
    assert torch.allclose(change, change[0, 0] * torch.eye(8, dtype=torch.float64), atol=1e-4)
    assert change[0, 0] > 0


def test_float64_is_tried_before_more_damping(monkeypatch):
    exact = torch.linalg.cholesky_ex

    def failing(matrix, **options):
        factor, failed = exact(matrix, **options)
        return factor, torch.ones_like(failed) if matrix.dtype == torch.float32 else failed

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    _, inputs = drawn(1, 8, 50)
    hessian = inputs.t() @ inputs
    factor = gptq.inverse_factor(hessian)
    damped = hessian + gptq.DAMPING * hessian.diagonal().mean() * torch.eye(8)
    assert factor.dtype == torch.float32
    assert torch.allclose(factor.t() @ factor, torch.linalg.inv(damped), rtol=1e-4, atol=1e-7)


def drifted(tokens: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, the original model's inputs, and those behind rounded blocks."""
    weight, wanted = drawn(24, 32, tokens)
    return weight, wanted, wanted + 0.3 * drawn(1, 32, tokens, seed=1)[1]


def test_weights_move_a_quarter_of_the_way_to_the_damped_solution_for_drifted_inputs():
    weight, wanted, inputs = drifted()
    hessian, drift = inputs.t() @ inputs, (wanted - inputs).t() @ inputs
    (found,) = gptq.against_drift([weight], hessian, drift)
    w, x, given = (tensor.double().numpy() for tensor in (weight, wanted, inputs))
    h = given.T @ given
    damped = h + gptq.DAMPING * np.diag(h).mean() * np.eye(len(h))
    change = np.linalg.solve(damped, given.T @ (x - given) @ w.T).T
    assert np.allclose(found.numpy(), w + change / 4, atol=1e-4)
    assert np.abs(change).max() > 0.1


def test_rounding_against_the_drift_comes_nearer_to_the_original_outputs():
    weight, wanted, inputs = drifted()
    hessian, scheme = inputs.t() @ inputs, LayerScheme(4, 16)
    (without,) = gptq.round_together([weight], [scheme], hessian)
    (found,) = gptq.round_together([weight], [scheme], hessian, drift=(wanted - inputs).t() @ inputs)
    off = [(wanted @ weight.t() - inputs @ dense(each).t()).square().sum() for each in (found, without)]
    assert off[0] < 0.95 * off[1]
    assert found.scale.dtype == weight.dtype


def test_inputs_that_have_not_drifted_change_nothing():
    weight, inputs = drawn(8, 32, 100)
    weight, hessian = weight.bfloat16(), inputs.t() @ inputs
    (without,) = gptq.round_together([weight], [LayerScheme(3, 16)], hessian)
    (found,) = gptq.round_together([weight], [LayerScheme(3, 16)], hessian, drift=torch.zeros_like(hessian))
    assert torch.equal(found.integers, without.integers)
    assert torch.equal(found.scale, without.scale)


def drifts_of(layer, passes, originals):
    drifts = clipping.InputDrifts({"x": layer}, originals)
    for number, run in enumerate(passes):
        drifts.add(number, inputs_in({"x": layer}, run))
    return drifts.sums


def test_drifts_are_sums_over_the_calls_and_lists_of_tokens_are_left_out():
    draw = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(6, 3)
    found, wanted = (list(torch.randn(2, 2, 5, 6, generator=draw)) for _ in range(2))
    passes, originals = ([partial(layer, inputs) for inputs in each] for each in (found, wanted))
    drift = drifts_of(layer, passes, originals)["x"]
    rows, aims = (torch.stack(each).flatten(0, 2).double() for each in (found, wanted))
    assert torch.allclose(drift.double(), (aims - rows).t() @ rows, atol=1e-5)
    tokens = [partial(layer, inputs.flatten(0, 1)) for inputs in found]
    assert drifts_of(layer, tokens, tokens) == {}


def test_layers_are_rounded_behind_the_rounded_layers_before_them():
    torch.manual_seed(0)
    block = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 8, bias=False))
    block.requires_grad_(False)
    weights = [layer.weight.clone() for layer in block]
    _, inputs = drawn(1, 16, 40)
    scheme, seen = LayerScheme(3, 16), []

    def spied(matrices, schemes, product, *rest):
        seen.append((product, rest[1]))
        return gptq.round_together(matrices, schemes, product, *rest)

    call = ((inputs[None],), {})
    found = clipping.round_by_inputs(spied, block, {"0": scheme, "1": scheme}, [call], originals=[call])
    (first,) = gptq.round_together(weights[:1], [scheme], inputs.t() @ inputs)
    assert torch.equal(found["0"].integers, first.integers)
    behind, wanted = (inputs @ weight.t() for weight in (dense(first), weights[0]))
    assert torch.allclose(seen[1][0], behind.t() @ behind, rtol=1e-3, atol=1e-2)
    assert torch.allclose(seen[1][1], (wanted - behind).t() @ behind, rtol=1e-3, atol=1e-2)
    assert all(torch.equal(layer.weight, dense(each)) for layer, each in zip(block, found.values(), strict=True))


def test_experts_are_one_stage():
    names = [f"experts.{expert}.{name}" for expert in range(3) for name in ("up", "down")]
    layers = {name: torch.nn.Linear(4, 4) for name in ("gate", *names)}

    def run():
        inputs = torch.ones(2, 4)
        layers["gate"](inputs)
        for expert in (0, 2):  # no token comes to the other
            layers[f"experts.{expert}.down"](layers[f"experts.{expert}.up"](inputs + expert))

    both = [[f"experts.{expert}.{name}" for expert in (0, 2)] for name in ("up", "down")]
    assert clipping.stages(layers, run) == [["gate"], *both, ["experts.1.up", "experts.1.down"]]


def test_inputs_that_are_not_finite_name_the_layer():
    block = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(ModelError, match="0: its inputs hold NaN or infinity"):
        clipping.round_by_inputs(
            gptq.round_together, block, {"0": LayerScheme(4, 4)}, [((torch.full((1, 2, 4), torch.nan),), {})]
        )


def minded(out_features: int) -> torch.Tensor:
    """A curvature of correlated outputs."""
    _, gradients = drawn(1, out_features, 4 * out_features, seed=2)
    return gradients.t() @ gradients


def error_of(found, weight, hessian, curvature) -> float:
    """tr(C ΔW H ΔWᵀ) in float64."""
    change = (dense(found) - weight).double()
    return float(torch.trace(curvature.double() @ change @ hessian.double() @ change.t()))


def raised(curvature):
    return curvature + 2 * torch.diag(curvature.diagonal())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_that_make_up_for_each_other_are_those_of_the_textbook(scheme, monkeypatch):
    """Optimal brain surgery on the Kronecker product of both curvatures in float64, weight by weight."""
    monkeypatch.setattr(gptq, "PARTS", 12)  # a row in each
    monkeypatch.setattr(gptq, "_better_rows", lambda matrix, rounded, hessian: rounded)
    weight, inputs = drawn(12, 32, 100)
    hessian, curvature = inputs.t() @ inputs, minded(12)
    (found,) = gptq.round_together([weight], [scheme], hessian, curvatures=[curvature])
    spread = 32 // found.scale.shape[1]
    scale = found.scale.double().repeat_interleave(spread, 1).flatten().numpy()
    zero = np.zeros_like(scale)
    if found.zero_point is not None:
        zero = found.zero_point.double().repeat_interleave(spread, 1).flatten().numpy()
    h, c = hessian.double().numpy(), raised(curvature).double().numpy()
    h, c = (each + gptq.DAMPING * np.diag(each).mean() * np.eye(len(each)) for each in (h, c))
    inverse = np.linalg.inv(np.kron(c, h))
    work, expected = weight.double().flatten().numpy(), np.zeros(weight.numel(), dtype=int)
    for row in np.argsort(-np.diag(c), kind="stable"):
        for column in np.argsort(-np.diag(h), kind="stable"):
            at = row * 32 + column
            expected[at] = np.clip(np.round(work[at] / scale[at]) + zero[at], *integer_range(scheme.bits))
            error = work[at] - (expected[at] - zero[at]) * scale[at]
            work = work - error / inverse[at, at] * inverse[at]
            inverse = inverse - np.outer(inverse[:, at], inverse[at]) / inverse[at, at]
    assert np.mean(found.integers.flatten().numpy() == expected) > 0.99  # a tie may fall to the other side in float32


@given(st.integers(0, 10**6), st.sampled_from(SCHEMES), st.sampled_from([5, 40, 300]))
def test_no_layer_is_worse_than_rounded_to_nearest_for_what_the_loss_minds(seed, scheme, tokens):
    weight, inputs = drawn(24, 32, tokens, seed)
    hessian, curvature = inputs.t() @ inputs, minded(24)
    (found,) = gptq.round_together([weight], [scheme], hessian, curvatures=[curvature])
    nearest = round_nearest(weight, scheme)
    ours, theirs = (error_of(each, weight, hessian, raised(curvature)) for each in (found, nearest))
    assert ours <= theirs * (1 + 1e-4)


def test_correlated_outputs_are_made_use_of():
    weight, inputs = drawn(64, 64, 1000)
    hessian, curvature, scheme = inputs.t() @ inputs, torch.ones(64, 64) + 0.1 * torch.eye(64), LayerScheme(3, 32)
    (alone,) = gptq.round_together([weight], [scheme], hessian)
    (found,) = gptq.round_together([weight], [scheme], hessian, curvatures=[curvature])
    ours, theirs = (error_of(each, weight, hessian, raised(curvature)) for each in (found, alone))
    assert ours < 0.9 * theirs


@pytest.mark.parametrize("rows", [1, 8])
def test_layers_of_different_sizes_are_rounded_as_each_alone_by_their_curvatures(rows):
    first, inputs = drawn(rows, 64, 300)
    second, _ = drawn(40, 64, 1, seed=1)
    schemes, hessian = [LayerScheme(4, 16), LayerScheme(8)], inputs.t() @ inputs
    together = gptq.round_together([first, second], schemes, hessian, curvatures=[minded(rows), minded(40)])
    for weight, scheme, size, found in zip((first, second), schemes, (rows, 40), together, strict=True):
        (alone,) = gptq.round_together([weight], [scheme], hessian, curvatures=[minded(size)])
        assert torch.equal(found.integers, alone.integers)
    together = gptq.round_together([first, second], schemes, hessian, curvatures=[minded(rows), None])
    (alone,) = gptq.round_together([second], schemes[1:], hessian)
    assert torch.equal(together[1].integers, alone.integers)
