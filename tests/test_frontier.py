"""The greedy walk against brute force and the integer program."""

import itertools
import math

import numpy as np
import pytest
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st

from hf_cptquant.allocation import frontier
from hf_cptquant.allocation.frontier import lower_hull, walk
from hf_cptquant.allocation.integer import Option, cheapest
from hf_cptquant.errors import PlanError
from hf_cptquant.model_view import view_model
from hf_cptquant.recipe import Recipe
from hf_cptquant.table import SensitivityTable

COSTS = st.floats(-1, 10, allow_nan=False).map(lambda cost: round(cost, 3))
UNITS = st.lists(st.lists(st.tuples(COSTS, st.integers(1, 12)), min_size=1, max_size=4), min_size=1, max_size=5)
EVERY = 2000  # so many sizes that every step of a walk is the nearest to one of them


def options_of(units) -> dict[str, list[Option]]:
    return {
        f"unit {index}": [Option(bits, cost, nbytes) for bits, (cost, nbytes) in enumerate(unit)]
        for index, unit in enumerate(units)
    }


def total(chosen) -> tuple[int, float]:
    return sum(option.nbytes for option in chosen), math.fsum(option.cost for option in chosen)


@given(UNITS)
def test_every_plan_of_the_walk_is_the_cheapest_of_its_size(units):
    options = options_of(units)
    every = [total(combination) for combination in itertools.product(*options.values())]
    found = [total(chosen.values()) for chosen in walk(options, EVERY)]
    for nbytes, cost in found:
        assert cost == pytest.approx(min(other for size, other in every if size <= nbytes), abs=1e-9)
    assert found[0][0] == min(size for size, _ in every)
    assert found[-1][1] == pytest.approx(min(cost for _, cost in every), abs=1e-9)
    assert all(a < b and c > d for (a, c), (b, d) in itertools.pairwise(found))


@given(UNITS)
def test_a_hull_holds_what_is_best_for_some_price(units):
    for options in options_of(units).values():
        hull = lower_hull(options)
        for price in (0.0, 1e-4, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 1e4):
            best = min(option.cost + price * option.nbytes for option in options)
            assert min(option.cost + price * option.nbytes for option in hull) == pytest.approx(best, abs=1e-9)
        slopes = [(b.cost - a.cost) / (b.nbytes - a.nbytes) for a, b in itertools.pairwise(hull)]
        assert slopes == sorted(slopes)


def test_a_few_plans_lie_at_equal_distances():
    draw = np.random.default_rng(0)
    options = options_of(
        [list(zip(4.0 ** -np.arange(4) * cost, (2, 3, 4, 8), strict=True)) for cost in draw.lognormal(size=200)]
    )
    sizes = [total(chosen.values())[0] for chosen in walk(options, 9)]
    assert sizes == pytest.approx(np.linspace(400, 1600, 9), abs=4)  # one step changes a size by at most 4
    for chosen in walk(options, 5):
        nbytes, cost = total(chosen.values())
        bits = cheapest(options, nbytes)
        assert cost == pytest.approx(math.fsum(options[unit][width].cost for unit, width in bits.items()), rel=1e-9)


@pytest.fixture(scope="module")
def table():
    plan = view_model(tiny_model("llama")).plan("group")
    units = list(dict.fromkeys(module.unit for module in plan.modules))
    raw = {unit: float(index) for index, unit in enumerate(units)}
    errors = {unit: {3: 0.03, 4: 0.01, 8: 1e-5} for unit in units}
    return SensitivityTable("pmpq", "loss", 1.0, raw, plan, {}, "", errors=errors, group_size=32)


def test_points_are_plans_with_their_costs(table):
    recipe = Recipe(bits=(3, 4, 8), group_size=32, bits_override=(("*.o_proj", 16),))
    points = frontier(table, recipe, 6)
    assert 2 < len(points) <= 6
    for point in points:
        bits = {module.unit: module.scheme.bits for module in point.plan.modules}
        costs = (table.raw[unit] * table.errors[unit].get(width, 0.0) for unit, width in bits.items())
        assert point.predicted == pytest.approx(math.fsum(costs))
        assert point.measured is None
        assert {width for unit, width in bits.items() if unit.endswith("o_proj")} == {16}
    assert {module.scheme.bits for module in points[0].plan.modules} == {3, 16}
    assert [point.plan.nbytes for point in points] == sorted(point.plan.nbytes for point in points)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"bits": (2, 4)},
            "the sensitivity table has no figures for 2 bits, only for 3, 4, 8; measure again with bits",
        ),
        ({"bits": (4, 8), "group_size": 64}, "table is for group_size=32 and symmetric=True, not for group_size=64"),
        ({"bits": (4, 8), "symmetric": False}, "and symmetric=True, not for group_size=32 and symmetric=False"),
    ],
)
def test_figures_that_a_table_does_not_have(table, settings, message):
    with pytest.raises(PlanError, match=message):
        frontier(table, Recipe(**{"group_size": 32, **settings}), 6)
