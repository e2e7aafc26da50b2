"""TDMPQ against the literal Algorithm 3, and the engine's promise that nothing is left changed."""

import math

import pytest
import torch
from conftest import TINY_CONFIGS, tiny_model

from hf_cptquant.calibration import CalibrationSet, ModelFacts, load_calibration
from hf_cptquant.errors import CPTQuantError
from hf_cptquant.model_view import task_of, view_model
from hf_cptquant.recipe import Recipe
from hf_cptquant.sensitivity import METHODS
from hf_cptquant.sensitivity.metrics import mean_loss
from hf_cptquant.sensitivity.tdmpq import perturbed


def calibration_for(model, recipe, minilm) -> CalibrationSet:
    facts = ModelFacts(task_of(model), model.config.vocab_size, 64, str(minilm))
    return load_calibration(recipe, facts)


def recipe_for(kind, tokens, **settings) -> Recipe:
    dataset = tuple(["a good film", "what a bad film", "tea or coffee"] * 40) if kind.startswith("bert") else tokens
    return Recipe(
        **{
            "estimator": "perturbation",
            "rounding": "nearest",
            "dataset": dataset,
            "sequence_length": 16,
            "batch_size": 3,
            "num_samples": 8,
            **settings,
        }
    )


@torch.no_grad()
def literal_scores(model, plan, batches, recipe) -> dict[str, float]:
    """Algorithm 3 as written: for every unit perturb, run the whole model on every batch, restore."""

    def total_variation() -> float:
        labelled = [b if "labels" in b else {**b, "labels": predictions[i]} for i, b in enumerate(batches)]
        return sum(model(**b).loss.double().item() * len(next(iter(b.values()))) for b in labelled)

    predictions = [None if "labels" in batch else model(**batch).logits.argmax(-1) for batch in batches]
    sequences = sum(len(next(iter(batch.values()))) for batch in batches)
    base = total_variation() / sequences
    scores = {}
    for unit in dict.fromkeys(module.unit for module in plan.modules):
        names = [module.name for module in plan.modules if module.unit == unit]
        with perturbed({name: model.get_submodule(name) for name in names}, recipe.perturbation_scale, recipe.seed):
            scores[unit] = total_variation() / sequences - base
    return scores


@pytest.mark.parametrize("kind", TINY_CONFIGS)
@pytest.mark.parametrize("granularity", ["block", "group"])
def test_scores_equal_the_literal_algorithm(kind, granularity, tokens, minilm):
    model = tiny_model(kind)
    recipe = recipe_for(kind, tokens, granularity=granularity)
    plan = view_model(model).plan(granularity)
    calibration = calibration_for(model, recipe, minilm)
    table = METHODS["tdmpq"](model, plan, calibration, recipe)
    expected = literal_scores(model, plan, calibration.batches, recipe)
    assert list(table.raw) == list(dict.fromkeys(module.unit for module in plan.modules))
    assert max(map(abs, expected.values())) > 1e-3  # the noise matters, so the comparison means something
    assert table.raw == pytest.approx(expected, abs=1e-6)
    assert max(map(abs, table.scores.values())) == 1.0


def test_first_disturbs_only_the_first_weight_of_a_unit(tokens, minilm):
    model = tiny_model("llama")
    plan = view_model(model).plan("block")
    table = {}
    for perturb in ("all", "first"):
        recipe = recipe_for("llama", tokens, perturb=perturb)
        table[perturb] = METHODS["tdmpq"](model, plan, calibration_for(model, recipe, minilm), recipe).raw
    first = {plan.modules[0].name: model.get_submodule(plan.modules[0].name)}
    batches = calibration_for(model, recipe, minilm).batches
    base = mean_loss(model, batches)
    with perturbed(first, recipe.perturbation_scale, recipe.seed):
        assert table["first"]["model.layers.0"] == pytest.approx(mean_loss(model, batches) - base, abs=1e-7)
    assert table["all"] != table["first"]


@pytest.mark.parametrize("kind", ["llama", "bert-mlm", "bert-classifier", "t5"])
def test_scores_do_not_depend_on_the_batch_size(kind, tokens, minilm):
    model = tiny_model(kind)
    plan = view_model(model).plan("block")
    raw = []
    for batch_size in (1, 3, 8):
        recipe = recipe_for(kind, tokens, batch_size=batch_size)
        raw.append(METHODS["tdmpq"](model, plan, calibration_for(model, recipe, minilm), recipe).raw)
    assert raw[0] == pytest.approx(raw[1], abs=1e-5)
    assert raw[0] == pytest.approx(raw[2], abs=1e-5)


def test_same_seed_same_table_other_seed_other_table(tokens, minilm):
    model = tiny_model("llama")
    plan = view_model(model).plan("block")
    tables = []
    for seed in (0, 0, 1):
        recipe = recipe_for("llama", tokens, seed=seed)
        tables.append(METHODS["tdmpq"](model, plan, calibration_for(model, recipe, minilm), recipe))
    assert tables[0] == tables[1]
    assert tables[0].raw != tables[2].raw
    assert tables[0].fingerprint != tables[2].fingerprint


def test_noise_is_normal_and_relative_to_the_weight():
    module = torch.nn.Linear(400, 300)
    original = module.weight.detach().clone()
    with perturbed({"layer": module}, 0.1, seed=3):
        noise = (module.weight.detach() - original) / (0.1 * original.square().mean().sqrt())
    assert noise.mean().item() == pytest.approx(0, abs=5 / math.sqrt(noise.numel()))
    assert noise.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * noise.numel()))
    assert (noise.abs() < 1.96).float().mean().item() == pytest.approx(0.95, abs=0.005)
    with perturbed({"other": module}, 0.1, seed=3):
        other = (module.weight.detach() - original) / (0.1 * original.square().mean().sqrt())
    assert torch.corrcoef(torch.stack((noise.flatten(), other.flatten())))[0, 1].abs() < 0.02


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_weights_and_forwards_are_restored_after_an_interruption(interruption, tokens, minilm):
    model = tiny_model("llama")
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    recipe = recipe_for("llama", tokens)
    calls = 0

    def interrupt(*_args):
        nonlocal calls
        calls += 1
        if calls == 8:
            raise interruption

    handle = model.model.layers[2].register_forward_hook(interrupt)
    plan = view_model(model).plan("block")
    with pytest.raises(interruption):
        METHODS["tdmpq"](model, plan, calibration_for(model, recipe, minilm), recipe)
    handle.remove()
    for name, tensor in model.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    assert not any("forward" in layer.__dict__ for layer in model.model.layers)


def test_blocks_that_run_twice_are_refused(tokens, minilm):
    model = tiny_model("llama")
    model.model.layers.append(model.model.layers[0])
    model.config.num_hidden_layers = 4
    recipe = recipe_for("llama", tokens)
    with pytest.raises(CPTQuantError, match=r"model.layers.0 runs 2 times"):
        METHODS["tdmpq"](model, view_model(model).plan("block"), calibration_for(model, recipe, minilm), recipe)
