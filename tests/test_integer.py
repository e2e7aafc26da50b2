"""The integer program against brute force, its bounds, and its size."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_cptquant.allocation.integer import Option, cheapest, smallest, solve

COSTS = st.one_of(st.integers(-5, 20).map(float), st.floats(-1, 10, allow_nan=False).map(lambda x: round(x, 3)))
UNITS = st.lists(st.lists(st.tuples(COSTS, st.integers(0, 12)), min_size=1, max_size=4), min_size=1, max_size=5)


def options_of(units) -> dict[str, list[Option]]:
    return {
        f"unit {index}": [Option(bits, cost, nbytes) for bits, (cost, nbytes) in enumerate(unit)]
        for index, unit in enumerate(units)
    }


def choices_of(options):
    """Every choice: (total cost, total bytes)."""
    for combination in itertools.product(*options.values()):
        yield sum(option.cost for option in combination), sum(option.nbytes for option in combination)


def totals(options, bits) -> tuple[float, int]:
    taken = [option for unit, given in options.items() for option in given if option.bits == bits[unit]]
    assert len(taken) == len(options)
    return sum(option.cost for option in taken), sum(option.nbytes for option in taken)


@given(UNITS, st.integers(0, 50))
def test_cheapest_equals_brute_force(units, budget):
    options = options_of(units)
    feasible = [cost for cost, nbytes in choices_of(options) if nbytes <= budget]
    bits = cheapest(options, budget)
    if not feasible:
        assert bits is None
        return
    cost, nbytes = totals(options, bits)
    assert nbytes <= budget
    assert cost == pytest.approx(min(feasible), rel=1e-9, abs=1e-9)


@given(UNITS, st.floats(-5, 40, allow_nan=False))
def test_smallest_equals_brute_force(units, limit):
    options = options_of(units)
    feasible = [nbytes for cost, nbytes in choices_of(options) if cost <= limit - 1e-7]
    if not feasible:
        return
    cost, nbytes = totals(options, smallest(options, limit))
    assert cost <= limit + 1e-7
    assert nbytes <= min(feasible)


def test_smallest_without_a_choice_within_the_limit():
    assert smallest(options_of([[(1.0, 5), (2.0, 3)]]), 0.5) is None


@pytest.mark.parametrize("seed", range(4))
def test_a_larger_budget_never_costs_more(seed):
    random = np.random.default_rng(seed)
    units = [list(zip(np.sort(random.exponential(size=5))[::-1], (2, 3, 4, 8, 16), strict=True)) for _ in range(60)]
    scaled = [
        [(cost, int(nbytes * size)) for cost, nbytes in unit]
        for unit, size in zip(units, random.integers(1, 9, 60), strict=True)
    ]
    options = options_of(scaled)
    least = sum(min(option.nbytes for option in unit) for unit in options.values())
    most = sum(max(option.nbytes for option in unit) for unit in options.values())
    costs = [totals(options, cheapest(options, budget))[0] for budget in np.linspace(least, most, 40).astype(int)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(costs))
    assert costs[0] > costs[-1]


def test_ties_are_broken_in_the_same_way_each_time():
    options = options_of([[(1.0, 1), (0.0, 2)]] * 9)
    assert len({tuple(cheapest(options, 13).items()) for _ in range(5)}) == 1


def test_equal_costs_take_the_fewest_bytes():
    assert cheapest(options_of([[(1.0, 9), (1.0, 3), (2.0, 1)]]), 100) == {"unit 0": 1}


def test_many_units_meet_the_bound_of_the_relaxed_problem():
    """10,000 units × 5 widths; the Lagrangian bound is computed here on its own."""
    random = np.random.default_rng(0)
    widths = np.array([2, 3, 4, 8, 16])
    weights = random.integers(1, 64, 10_000)[:, None] * 65_536 * (widths + 0.25) // 8
    costs = np.exp(2 * random.normal(size=10_000))[:, None] * 4.0 ** -widths.astype(float)
    costs[:, -1] = 0
    limit = float(4.5 / 16.25 * weights[:, -1].sum())
    chosen = solve(costs.ravel(), weights.ravel().astype(float), np.arange(10_000) * 5, limit)
    assert (chosen // 5 == np.arange(10_000)).all()
    assert weights.ravel()[chosen].sum() <= limit
    total = costs.ravel()[chosen].sum()
    bound = max((costs + price * weights).min(1).sum() - price * limit for price in np.geomspace(1e-14, 1e-4, 4000))
    assert bound <= total * (1 + 1e-12)
    assert total == pytest.approx(bound, rel=1e-4)
