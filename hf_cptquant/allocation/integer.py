"""Bits by an exact integer program: the cheapest choice of one option per unit within a limit (equations 4 and 5).

The multiple-choice knapsack problem, min Σ c(u, b) subject to Σ w(u, b) ≤ limit with one b for each unit u, solved by
HiGHS through `scipy.optimize.milp`. Its size is cut down before, without losing exactness: a Lagrange multiplier prices
the constraint, which gives a lower bound L and a feasible solution U, and an option whose reduced cost exceeds U − L is
in no better solution. Of ten thousand units a few dozen are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_matrix

CORE = 300  # entries that the first solution is sought in
MARGIN = 1e-9  # for rounding errors of the bound
PRECISION = 1e3  # the solver stops at an absolute gap of 1e-6: a relative 1e-9 of the total


@dataclass(frozen=True)
class Option:
    """One way to store a unit.

    Attributes:
        bits: of its integers.
        cost: predicted rise of the loss (any unit; may be negative).
        nbytes: of its weights with scales and zero points.
    """

    bits: int
    cost: float
    nbytes: int


def cheapest(options: Mapping[str, Sequence[Option]], largest_bytes: int) -> dict[str, int] | None:
    """Unit → bits with the least total cost in a number of bytes, or None if they cannot suffice."""
    return _choose(options, lambda option: option.cost, lambda option: option.nbytes, largest_bytes)


def smallest(options: Mapping[str, Sequence[Option]], largest_cost: float) -> dict[str, int] | None:
    """Unit → bits in the fewest bytes with a total cost of at most so much, or None if there is no such choice."""
    return _choose(options, lambda option: option.nbytes, lambda option: option.cost, largest_cost)


def _choose(options, objective, weight, limit: float) -> dict[str, int] | None:
    units = list(options)
    starts = np.cumsum([0, *(len(options[unit]) for unit in units)])[:-1]
    flat = [option for unit in units for option in options[unit]]
    chosen = solve(
        np.array([objective(o) for o in flat], float), np.array([weight(o) for o in flat], float), starts, limit
    )
    return None if chosen is None else {unit: flat[index].bits for unit, index in zip(units, chosen, strict=True)}


def solve(values: np.ndarray, weights: np.ndarray, starts: np.ndarray, limit: float) -> np.ndarray | None:
    """Choose one entry of each segment, with the least sum of values and a sum of weights within a limit.

    Args:
        values, weights: float64 `[entries]`.
        starts: int `[segments]`, index of the first entry of each, ascending from 0.
        limit: largest sum of weights.

    Returns:
        int `[segments]`: the entry chosen in each, or None if no choice is within the limit.
    """
    segment = np.repeat(np.arange(len(starts)), np.diff([*starts, len(values)]))

    def best(keys: np.ndarray) -> np.ndarray:
        """First entry of each segment with the least key; of equal keys, the one of least weight."""
        order = np.lexsort((weights, keys, segment))
        return order[starts]

    if weights[best(weights)].sum() > limit:
        return None
    free = best(values)
    if weights[free].sum() <= limit:
        return free
    feasible, price = _priced(best, values, weights, limit)
    feasible = _filled(values, weights, segment, limit, feasible)
    bound = (values + price * weights)[best(values + price * weights)].sum() - price * limit
    reduced = values + price * weights
    reduced -= reduced[best(reduced)][segment]
    for size in (CORE, len(values)):  # a good solution first, so that few entries are left to prove that none is better
        allowed = reduced <= (values[feasible].sum() - bound) * (1 + MARGIN)
        allowed[feasible] = False  # added below, once each
        candidates = np.flatnonzero(allowed)
        least = candidates[np.argsort(reduced[candidates], kind="stable")[:size]]
        feasible = _solve_core(values, weights, segment, limit, feasible, np.sort(np.concatenate((feasible, least))))
    return feasible


def _priced(
    best: Callable[[np.ndarray], np.ndarray], values: np.ndarray, weights: np.ndarray, limit: float
) -> tuple[np.ndarray, float]:
    """A choice within the limit that is best for some price of weight, and that price."""
    low, high = 0.0, 1.0
    while weights[best(values + high * weights)].sum() > limit:
        low, high = high, high * 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if weights[best(values + middle * weights)].sum() <= limit else (middle, high)
    return best(values + high * weights), high


def _filled(
    values: np.ndarray, weights: np.ndarray, segment: np.ndarray, limit: float, chosen: np.ndarray
) -> np.ndarray:
    """The choice after taking, one by one, the best change of a single segment that the limit allows."""
    while True:
        gain, more = values - values[chosen][segment], weights - weights[chosen][segment]
        room = limit - weights[chosen].sum()
        fits = more <= room
        index = np.argmin(np.where(fits, gain, 0.0))
        if not gain[index] < 0 or not fits[index]:
            return chosen
        chosen[segment[index]] = index


def _solve_core(
    values: np.ndarray, weights: np.ndarray, segment: np.ndarray, limit: float, feasible: np.ndarray, kept: np.ndarray
) -> np.ndarray:
    """The exact choice among the entries that are left; the others are as in the feasible choice."""
    choosable = np.bincount(segment[kept])[segment[kept]] > 1
    kept = kept[choosable]
    if not len(kept):
        return feasible
    open_segments, position = np.unique(segment[kept], return_inverse=True)
    once = csr_matrix((np.ones(len(kept)), (position, np.arange(len(kept)))), shape=(len(open_segments), len(kept)))
    change = weights[kept] - weights[feasible][segment[kept]]  # against the feasible choice
    room = limit - weights[feasible].sum()
    scale = np.abs(change).max() or 1.0
    gain = (values[kept] - values[feasible][segment[kept]]) * PRECISION / (np.abs(values[feasible]).sum() or 1.0)
    result = milp(
        gain,
        integrality=np.ones(len(kept)),
        bounds=(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(csr_matrix(change[None] / scale), ub=room / scale)],
        options={"mip_rel_gap": 0, "presolve": False},  # which prints to standard output
    )
    chosen = feasible.copy()
    taken = kept[result.x > 0.5]
    chosen[segment[taken]] = taken
    within = weights[chosen].sum() <= limit  # the solver allows itself a relative 1e-6 of the largest weight
    return chosen if within else feasible
