"""Refinement: which swaps are tried against brute force, and what a user gets of them against plain KL divergences."""

import copy
import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL_SETTINGS, tiny_model
from hypothesis import assume, given
from hypothesis import strategies as st

from hf_cptquant import CPTQuantConfig, make_plan, refinement
from hf_cptquant.allocation import Swap, largest_bytes, next_swap, options
from hf_cptquant.allocation.integer import Option
from hf_cptquant.errors import ConfigError
from hf_cptquant.evaluate import rounded_as
from hf_cptquant.grid import dequantize
from hf_cptquant.model_view import view_model
from hf_cptquant.pipeline import decide, measure_record, prepare
from hf_cptquant.quantize import apply_plan
from hf_cptquant.refinement import refine
from hf_cptquant.rounding import round_nearest

SETTINGS = {**SMALL_SETTINGS, "sequence_length": 32, "bits": (2, 4, 8), "target_bits": 4.5}
UNITS = st.lists(
    st.lists(st.tuples(st.integers(-5, 20).map(float), st.integers(0, 12)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


def possible(choices, bits, largest):
    """Every swap that a plan allows → its predicted cost, by brute force."""
    now = {unit: options[bits[unit]] for unit, options in choices.items()}
    size = sum(option.nbytes for option in now.values())
    found = {}
    for less, more in itertools.permutations(choices, 2):
        for first, second in itertools.product(choices[less], choices[more]):
            changes = first.nbytes - now[less].nbytes, second.nbytes - now[more].nbytes
            if changes[0] < 0 < changes[1] and size + sum(changes) <= largest:
                cost = first.cost - now[less].cost + second.cost - now[more].cost
                found[Swap((less, first.bits), (more, second.bits))] = cost
    return found


@given(UNITS, st.integers(0, 6), st.data())
def test_swaps_come_in_the_order_of_failures_and_predicted_costs(units, spare, data):
    choices = {
        f"unit {index}": [Option(bits, cost, nbytes) for bits, (cost, nbytes) in enumerate(unit)]
        for index, unit in enumerate(units)
    }
    bits = {unit: data.draw(st.integers(0, len(of_unit) - 1)) for unit, of_unit in choices.items()}
    largest = sum(of_unit[bits[unit]].nbytes for unit, of_unit in choices.items()) + spare
    left = possible(choices, bits, largest)
    assume(left)
    rejected: list[Swap] = []
    while (swap := next_swap(choices, bits, largest, rejected)) is not None:
        failures = Counter(move for other in rejected for move in (other.fewer, other.more))
        ranks = {other: (failures[other.fewer] + failures[other.more], cost) for other, cost in left.items()}
        assert ranks[swap] == min(ranks.values())
        del left[swap]
        rejected.append(swap)
    assert not left


@pytest.fixture
def tokens():
    return torch.randint(0, 100, (8, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model():
    return tiny_model("llama", vocab_size=100)  # so few classes that all are remembered


@torch.no_grad()
def kl_of(plan, model, tokens):
    """Mean KL divergence of a model rounded to nearest by a plan."""
    packed = copy.deepcopy(model)
    apply_plan(packed, plan)
    p, q = (each(tokens).logits.double().log_softmax(-1) for each in (model, packed))
    return F.kl_div(q, p, log_target=True, reduction="sum").item() / tokens.numel()


def size(plan):
    return sum(module.nbytes for module in plan.modules)


@pytest.mark.parametrize("budget", ["target_bits", "max_loss_increase"])
def test_swaps_that_help_are_kept_within_the_budget(budget, model, tokens):
    config = CPTQuantConfig(**SETTINGS, dataset=tokens, refine=12)
    record = measure_record(model, config)
    wrong = {  # what matters most is predicted to matter least
        unit: {bits: 4.0**-bits / max(of_unit.values()) for bits in of_unit}
        for unit, of_unit in record.table.costs.items()
    }
    table = replace(record.table, costs=wrong)
    if budget == "max_loss_increase":
        limit = sum(of_unit[4] for of_unit in wrong.values())
        config = CPTQuantConfig(**{**SETTINGS, "target_bits": None}, max_loss_increase=limit, dataset=tokens, refine=12)
    recipe = config.recipe()
    plan = decide(replace(record, table=table), recipe).plan
    refined, measured = refine(model, plan, table, prepare(model, recipe).data, recipe)
    assert measured["kl_before_refinement"] == pytest.approx(kl_of(plan, model, tokens), rel=1e-3)
    assert measured["kl_after_refinement"] == pytest.approx(kl_of(refined, model, tokens), rel=1e-3)
    assert measured["kl_after_refinement"] < measured["kl_before_refinement"]
    if budget == "max_loss_increase":
        assert size(refined) <= size(plan)
    else:
        assert refined.bits_per_weight <= 4.5
    fresh = tiny_model("llama", vocab_size=100)
    assert all(torch.equal(weight, fresh.state_dict()[name]) for name, weight in model.state_dict().items())


def test_a_swap_that_does_not_help_is_not_kept(model, tokens):
    config = CPTQuantConfig(**SETTINGS, dataset=tokens, refine=1)
    plan = make_plan(model, CPTQuantConfig(**SETTINGS, dataset=tokens)).plan
    record, recipe = make_plan(model, config), config.recipe()
    bits = {module.unit: module.scheme.bits for module in plan.modules}
    swap = next_swap(options(record.table, recipe), bits, largest_bytes(plan, recipe), ())
    tried = plan.with_bits(swap.applied_to(bits), recipe.group_size, recipe.symmetric)
    assert tried != plan
    assert record.plan == min((plan, tried), key=lambda each: kl_of(each, model, tokens))


def test_an_error_is_left_by_its_share(model):
    undecided = view_model(model).plan("module")
    plan = undecided.with_bits({module.unit: 3 for module in undecided.modules}, 32)
    names = [module.name for module in plan.packed]
    before = {name: model.get_submodule(name).weight.clone() for name in names}
    with rounded_as(model, plan, {names[0]: 0.25, names[1]: 1.0}):
        for name, share in zip(names[:3], (0.25, 1.0, 1.0), strict=True):
            quantized = round_nearest(before[name], plan.modules[names.index(name)].scheme)
            error = dequantize(quantized.integers, quantized.scale, None) - before[name]
            expected = before[name] + math.sqrt(share) * error
            torch.testing.assert_close(model.get_submodule(name).weight.detach(), expected)
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in before.items())


def test_a_killed_refinement_goes_on_where_it_was(model, tokens, tmp_path, monkeypatch):
    config = CPTQuantConfig(**SETTINGS, rounding="gptq", dataset=tokens, refine=4, work_dir=tmp_path)
    whole = make_plan(model, config)
    again = make_plan(model, config)
    assert (again.plan, again.measured) == (whole.plan, whole.measured)
    results = tmp_path / "refinement" / "results-0.jsonl"
    lines = results.read_text().splitlines()
    assert len([line for line in lines if line]) == 5
    results.write_text("\n".join(lines[:4]))
    measured = []
    inner = refinement._divergence
    monkeypatch.setattr(refinement, "_divergence", lambda *given: measured.append(1) or inner(*given))
    resumed = make_plan(model, config)
    assert (resumed.plan, resumed.measured) == (whole.plan, whole.measured)
    assert len(measured) == 5 - len([line for line in lines[:4] if line])


def test_another_plan_of_the_same_scores_forgets_the_divergences(model, tokens):
    config = CPTQuantConfig(**SETTINGS, dataset=tokens, refine=2)
    record = make_plan(model, config)
    assert {"kl_before_refinement", "kl_after_refinement"} <= record.measured.keys()
    assert record.settings["refine"] == 2
    solved = decide(record, CPTQuantConfig(**SETTINGS).recipe())
    assert solved.measured.keys() == {"predicted_loss_increase"}
    assert solved.settings["refine"] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refine": -1}, "refine=-1 must be a whole number of at least 0"),
        ({"refine": 2, "allocation": "kmeans"}, "refine=2 is for allocation='integer'"),
        ({"refine": 2, "plan": "plan.json"}, "leave out refine"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        CPTQuantConfig(**settings)
