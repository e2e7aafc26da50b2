"""The engine: finished blocks don't run again, stacking and smaller batches change nothing, weights come back."""

from contextlib import contextmanager

import pytest
import torch
from conftest import TINY_CONFIGS, tiny_model

from hf_cptquant.errors import CPTQuantError
from hf_cptquant.model_view import view_model
from hf_cptquant.sensitivity import METHODS, engine
from hf_cptquant.sensitivity.engine import SuffixRunner
from hf_cptquant.sensitivity.metrics import METRICS, mean_loss
from hf_cptquant.sensitivity.tdmpq import perturbed
from sensitivity.test_tdmpq import calibration_for, recipe_for

LAYERS = [f"model.layers.{index}" for index in range(3)]


def test_finished_blocks_do_not_run_again(tokens, minilm):
    model = tiny_model("llama")
    recipe = recipe_for("llama", tokens, sequence_length=32, batch_size=8)
    (batch,) = batches = calibration_for(model, recipe, minilm).batches
    assert batch["input_ids"].shape == (8, 32)
    expected = mean_loss(model, batches)
    runs = dict.fromkeys(range(3), 0)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    runner = SuffixRunner(model, batches, LAYERS, METRICS["loss"])
    assert [runner.measure(layer) for layer in LAYERS] == [[expected]] * 3
    # finding the order (1), measuring with the block and with those before it changed, advancing past it (1)
    assert runs == {0: 1 + 1 + 1, 1: 1 + 2 + 1, 2: 1 + 3}


def test_advancing_over_several_blocks_runs_each_once(tokens, minilm):
    model = tiny_model("llama")
    batches = calibration_for(model, recipe_for("llama", tokens, batch_size=8), minilm).batches
    runner = SuffixRunner(model, batches, LAYERS, METRICS["loss"])
    runs = dict.fromkeys(range(3), 0)
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    assert runner.measure(LAYERS[2]) == [mean_loss(model, batches)]
    assert runs == {0: 1 + 1, 1: 1 + 1, 2: 1 + 1}  # mean_loss once each; the runner once each


def test_blocks_may_be_asked_for_in_any_order(tokens, minilm):
    model = tiny_model("llama")
    batches = calibration_for(model, recipe_for("llama", tokens), minilm).batches
    module = model.model.layers[0].mlp.up_proj
    runner = SuffixRunner(model, batches, LAYERS, METRICS["loss"])
    in_order = [runner.measure(layer, [lambda: perturbed({"up": module}, 0.5, 0)]) for layer in LAYERS]
    runner = SuffixRunner(model, batches, LAYERS, METRICS["loss"])
    assert [runner.measure(layer, [lambda: perturbed({"up": module}, 0.5, 0)]) for layer in LAYERS[::-1]] == in_order[
        ::-1
    ]


@pytest.mark.parametrize("stacked", [1, 128])
def test_memory_for_fewer_tokens_than_are_stacked(stacked, tokens, minilm, monkeypatch):
    monkeypatch.setattr(engine, "STACKED_TOKENS", stacked)
    model = tiny_model("llama")
    batches = calibration_for(model, recipe_for("llama", tokens, batch_size=4), minilm).batches
    changes = [lambda s=s: perturbed({"up": model.model.layers[1].mlp.up_proj}, s, 0) for s in (0.1, 0.2, 0.3)]
    expected = SuffixRunner(model, batches, LAYERS, METRICS["loss"]).measure(LAYERS[1], changes)

    def little_memory(_module, args):
        if args[0].shape[:-1].numel() > 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")

    model.model.layers[2].mlp.register_forward_pre_hook(little_memory)
    found = SuffixRunner(model, batches, LAYERS, METRICS["loss"]).measure(LAYERS[1], changes)
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_stacked_variants_measure_as_much_as_single_ones(kind, tokens, minilm, monkeypatch):
    model = tiny_model(kind)
    recipe = recipe_for(kind, tokens, method="pmpq", batch_size=2)
    plan = view_model(model).plan("group")
    calibration = calibration_for(model, recipe, minilm)
    raw = {}
    for limit in (1, 10**6):
        monkeypatch.setattr(engine, "STACKED_TOKENS", limit)
        raw[limit] = METHODS["pmpq"](model, plan, calibration, recipe).raw
    assert max(map(abs, raw[1].values())) > 1e-3
    assert raw[10**6] == pytest.approx(raw[1], abs=1e-6)


def test_stacking_runs_the_blocks_behind_only_once(tokens, minilm):
    model = tiny_model("llama")
    batches = calibration_for(model, recipe_for("llama", tokens, batch_size=8), minilm).batches
    runner = SuffixRunner(model, batches, LAYERS, METRICS["loss"])
    rows = {index: [] for index in range(3)}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *seen, index=index: rows[index].append(len(seen[2])))
    up = model.model.layers[1].mlp.up_proj
    runner.measure(LAYERS[1], [lambda scale=scale: perturbed({"up": up}, scale, 0) for scale in (0.1, 0.2, 0.3)])
    assert rows == {0: [8], 1: [8, 8, 8], 2: [24]}


def test_running_out_of_memory_halves_the_batches_and_changes_nothing(tokens, minilm, monkeypatch, logged):
    monkeypatch.setattr(engine, "STACKED_TOKENS", 1)
    model = tiny_model("llama")
    plan = view_model(model).plan("block")
    recipe = recipe_for("llama", tokens, method="pmpq", batch_size=8)
    expected = METHODS["pmpq"](model, plan, calibration_for(model, recipe, minilm), recipe)
    sizes = []

    def little_memory(_module, args):
        if len(args[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")
        sizes.append(len(args[0]))

    model.model.layers[2].mlp.register_forward_pre_hook(little_memory)
    table = METHODS["pmpq"](model, plan, calibration_for(model, recipe, minilm), recipe)
    assert table.raw == pytest.approx(expected.raw, abs=1e-6)
    assert table.fingerprint == expected.fingerprint
    assert max(sizes) == 2
    assert "Out of memory with 8 sequences at a time; going on with 4, on the same data." in logged.text


def test_memory_that_does_not_suffice_for_one_sequence_is_an_error(tokens, minilm):
    model = tiny_model("llama")
    plan = view_model(model).plan("block")
    recipe = recipe_for("llama", tokens)

    def no_memory(_module, args):
        if args[0].shape[1] > 15:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much")

    batches = calibration_for(model, recipe, minilm)
    model.lm_head.register_forward_pre_hook(no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        METHODS["pmpq"](model, plan, batches, recipe)


def test_other_errors_are_not_taken_for_lack_of_memory(tokens, minilm):
    model = tiny_model("llama")
    runner = SuffixRunner(
        model, calibration_for(model, recipe_for("llama", tokens), minilm).batches, LAYERS, METRICS["loss"]
    )

    @contextmanager
    def broken():
        raise RuntimeError("shapes do not match")
        yield

    with pytest.raises(RuntimeError, match="shapes"):
        runner.measure(LAYERS[0], [broken])


def test_weights_are_back_before_a_result_is_handed_out(tokens, minilm):
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    original = weight.detach().clone()
    batches = calibration_for(model, recipe_for("llama", tokens), minilm).batches
    runner = SuffixRunner(model, batches, LAYERS, METRICS["loss"])
    (changed,) = runner.measure(LAYERS[0], [lambda: perturbed({"up": model.model.layers[0].mlp.up_proj}, 0.5, 0)])
    assert changed != mean_loss(model, batches)
    assert torch.equal(weight, original)


def test_a_weight_that_is_not_finite_is_named(tokens, minilm):
    model = tiny_model("llama")
    model.lm_head.weight.data[3, 5] = float("nan")
    recipe = recipe_for("llama", tokens)
    with pytest.raises(CPTQuantError, match=r"unchanged model gives a loss of nan.*lm_head.weight holds NaN"):
        METHODS["tdmpq"](model, view_model(model).plan("block"), calibration_for(model, recipe, minilm), recipe)


def test_the_first_module_with_an_activation_that_is_not_finite_is_named(tokens, minilm):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *seen: seen[2] / 0)
    recipe = recipe_for("llama", tokens)
    with pytest.raises(CPTQuantError, match=r"output of model\.layers\.1\.mlp\.down_proj is the first that holds NaN"):
        METHODS["tdmpq"](model, view_model(model).plan("block"), calibration_for(model, recipe, minilm), recipe)
