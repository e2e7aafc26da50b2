"""Budgets: what they mean in bytes, what is infeasible, overrides, and the cost of equations 4 and 5."""

import itertools

import pytest
import torch
from conftest import tiny_model

from hf_cptquant.allocation import allocate
from hf_cptquant.errors import CPTQuantError
from hf_cptquant.model_view import view_model
from hf_cptquant.recipe import Recipe
from hf_cptquant.table import SensitivityTable

BITS = (3, 4, 8, 16)


@pytest.fixture(scope="module")
def plan():
    return view_model(tiny_model("llama").to(torch.bfloat16)).plan("block")


def recipe_for(**settings) -> Recipe:
    return Recipe(**{"allocation": "integer", "bits": BITS, "group_size": 32, **settings})


def table_for(plan, costs=None, raw=None, errors=None) -> SensitivityTable:
    raw = raw or dict.fromkeys((module.unit for module in plan.modules), 1.0)
    return SensitivityTable("tdmpq", "loss", 2.0, raw, plan, {}, "", costs or {}, errors=errors or {}, group_size=32)


def bits_of(plan) -> dict[str, int]:
    """Unit → bits."""
    return {module.unit: module.scheme.bits for module in plan.modules}


COSTS = {
    "model.layers.0": {3: 4.0, 4: 1.0, 8: 0.01},
    "model.layers.1": {3: 0.4, 4: 0.1, 8: 0.001},
    "model.layers.2": {3: 0.04, 4: -0.01, 8: 0.0},
}


def all_plans(plan, widths=BITS):
    units = list(COSTS)
    for bits in itertools.product(widths, repeat=3):
        chosen = dict(zip(units, bits, strict=True))
        cost = sum(COSTS[unit].get(width, 0.0) for unit, width in chosen.items())
        yield cost, plan.with_bits(chosen, 32), chosen


@pytest.mark.parametrize("target", [3.6, 4.5, 6.0, 9.5])
def test_target_bits_counts_scales_and_is_the_best_plan(plan, target):
    bits = bits_of(allocate(table_for(plan, COSTS), recipe_for(target_bits=target)))
    assert plan.with_bits(bits, 32).bits_per_weight <= target
    best = min(cost for cost, decided, _ in all_plans(plan) if decided.bits_per_weight <= target)
    assert sum(COSTS[unit].get(width, 0.0) for unit, width in bits.items()) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("widths", [(4, 8, 16), (3, 4), (8, 16), (5,)])
def test_without_a_budget_there_is_a_quarter_of_a_bit_above_the_smallest_plan(widths):
    plan = view_model(tiny_model("llama")).plan("module")
    units = [module.unit for module in plan.modules]
    errors = {unit: {width: 4.0**-width for width in range(2, 9)} for unit in units}
    default, smallest = recipe_for(bits=widths), plan.with_bits(dict.fromkeys(units, min(widths)), 32)
    decided = allocate(table_for(plan, errors=errors), default)
    spelt_out = recipe_for(bits=widths, target_bits=smallest.bits_per_weight + 0.25)
    assert decided == allocate(table_for(plan, errors=errors), spelt_out)
    assert smallest.bits_per_weight <= decided.bits_per_weight <= smallest.bits_per_weight + 0.25


def test_target_size_and_compression_are_of_the_whole_checkpoint(plan):
    for cost, decided, chosen in sorted(all_plans(plan), key=lambda found: found[0])[::9]:
        for settings in (
            {"target_size": decided.nbytes},
            {"target_compression": decided.compression_ratio * (1 - 1e-12)},
        ):
            bits = bits_of(allocate(table_for(plan, COSTS), recipe_for(**settings)))
            assert plan.with_bits(bits, 32).nbytes <= decided.nbytes
            found = sum(COSTS[unit].get(width, 0.0) for unit, width in bits.items())
            assert found <= cost + 1e-12, chosen


@pytest.mark.parametrize("limit", [-0.01, 0.0, 0.05, 1.0, 9.0])
def test_max_loss_increase_gives_the_smallest_plan(plan, limit):
    recipe = recipe_for(method="tdmpq", estimator="taylor", max_loss_increase=max(limit, 0.0))
    bits = bits_of(allocate(table_for(plan, COSTS), recipe))
    smallest = min(decided.nbytes for cost, decided, _ in all_plans(plan) if cost <= max(limit, 0.0))
    assert plan.with_bits(bits, 32).nbytes == smallest


def test_max_loss_increase_that_nothing_meets(plan):
    costs = {unit: {3: 4.0, 4: 1.0} for unit in COSTS}
    recipe = recipe_for(bits=(3, 4), method="tdmpq", estimator="taylor", max_loss_increase=0.5)
    with pytest.raises(CPTQuantError, match=r"max_loss_increase=0.5 is less than the 3 nats"):
        allocate(table_for(plan, costs), recipe)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_bits": 3.0}, r"target_bits=3.0 cannot be met: .* give 3\.5000 to 16\.0000 bits per weight"),
        ({"target_size": 1000}, r"target_size=0.001 MB cannot be met: .* give 0\.\d{3} to 0\.\d{3} MB"),
        ({"target_compression": 40.0}, r"target_compression=40.0 cannot be met: .* give 1\.0000 to \d\.\d{4}"),
    ],
)
def test_an_infeasible_budget_names_the_feasible_range(plan, settings, message):
    with pytest.raises(CPTQuantError, match=message):
        allocate(table_for(plan, COSTS), recipe_for(**settings))


def test_a_single_score_costs_in_proportion_to_the_rounding_error(plan):
    raw = {"model.layers.0": 3.0, "model.layers.1": 2.0, "model.layers.2": -1.0}
    errors = {unit: {3: 0.04, 4: 0.01, 8: 0.0001} for unit in raw}
    for target in (3.6, 4.6, 6.0):
        bits = bits_of(allocate(table_for(plan, raw=raw, errors=errors), recipe_for(target_bits=target)))
        costs = {unit: {width: max(0.0, raw[unit]) * error for width, error in errors[unit].items()} for unit in raw}
        best = min(
            sum(costs[unit].get(width, 0.0) for unit, width in chosen.items())
            for _, decided, chosen in all_plans(plan)
            if decided.bits_per_weight <= target
        )
        assert sum(costs[unit].get(width, 0.0) for unit, width in bits.items()) == pytest.approx(best, abs=1e-12)


def test_regularization_weighs_the_rounding_error(plan):
    errors = {unit: dict.fromkeys((3, 4, 8), 0.0) for unit in COSTS}
    errors["model.layers.2"] = {3: 100.0, 4: 90.0, 8: 0.0}
    plain = bits_of(allocate(table_for(plan, COSTS, errors=errors), recipe_for(target_bits=6.0)))
    weighed = bits_of(allocate(table_for(plan, COSTS, errors=errors), recipe_for(target_bits=6.0, regularization=10.0)))
    assert plain["model.layers.2"] < 8 <= weighed["model.layers.2"]


@pytest.mark.parametrize("allocation", ["integer", "kmeans", "k-harmonic-means"])
def test_overrides_are_decided_beforehand(plan, allocation):
    budget = {"target_bits": 8.0} if allocation == "integer" else {}
    override = (("model.layers.2.*", 16), ("model.layers.0.self_attn.q_proj", 3))
    recipe = recipe_for(allocation=allocation, bits_override=override, **budget)
    bits = bits_of(allocate(table_for(plan, COSTS), recipe))
    assert (bits["model.layers.2"], bits["model.layers.0"]) == (16, 3)
    assert set(bits) == set(COSTS)
    if budget:  # the solver takes them into account
        assert plan.with_bits(bits, 32).bits_per_weight <= 8.0


def test_an_override_may_be_a_width_that_is_not_to_choose_from(plan):
    costs = {**COSTS, "model.layers.1": {6: 0.01}}
    bits = allocate(table_for(plan, costs), recipe_for(target_bits=9.0, bits_override=(("model.layers.1.*", 6),)))
    assert bits_of(bits)["model.layers.1"] == 6


def test_an_override_that_matches_nothing(plan):
    with pytest.raises(
        CPTQuantError, match=r"'\*.fc1' matches no quantizable module; they are named like 'model.layers.0"
    ):
        allocate(table_for(plan, COSTS), recipe_for(target_bits=8.0, bits_override=(("*.fc1", 8),)))


def test_overrides_that_contradict_each_other_within_a_unit(plan):
    recipe = recipe_for(target_bits=8.0, bits_override=(("*.q_proj", 8), ("*.k_proj", 4)))
    with pytest.raises(CPTQuantError, match=r"q_proj 8 bits and .*k_proj 4, which share the unit .*finer granularity"):
        allocate(table_for(plan, COSTS), recipe)
