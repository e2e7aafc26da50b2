"""The frontier: what every number of bytes can buy, from the smallest plan to the one that costs least.

The greedy walk. Of each unit the lower convex hull of (bytes, cost) is kept, and its edges, sorted by what a byte more
gains, are taken one after the other. Each plan on the way is the cheapest of its size; sizes between two steps are for
the integer program, whose costs lie between theirs.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..plan import BitPlan
from ..recipe import Recipe
from ..table import SensitivityTable
from .budget import check_grid, options
from .integer import Option


@dataclass(frozen=True)
class FrontierPoint:
    """One plan on the frontier.

    Attributes:
        plan: the decisions.
        predicted: its cost: the rise of the loss (nats) if the table's method prices bit widths, otherwise in units of
            the scores.
        measured: the rise of the loss (nats) with the weights rounded, if it was measured.
    """

    plan: BitPlan
    predicted: float
    measured: float | None = None


def frontier(table: SensitivityTable, recipe: Recipe, count: int) -> list[FrontierPoint]:
    """Plans of the walk at about equal distances in bytes, ascending, the first and the last included.

    Args:
        table: scores or costs.
        recipe: `bits`, `bits_override`, `regularization`; `group_size` and `symmetric` as in the table.
        count: at most so many plans, at least 2.

    Raises:
        PlanError: as `allocate`.
    """
    check_grid(table, recipe)
    return [
        FrontierPoint(
            table.plan.with_bits(
                {unit: option.bits for unit, option in chosen.items()}, table.group_size, table.symmetric
            ),
            math.fsum(option.cost for option in chosen.values()),
        )
        for chosen in walk(options(table, recipe), count)
    ]


def walk(options: Mapping[str, Sequence[Option]], count: int) -> list[dict[str, Option]]:
    """Unit → option, for at most so many steps of the walk at about equal distances in bytes."""
    hulls = {unit: lower_hull(of_unit) for unit, of_unit in options.items()}
    chosen = {unit: hull[0] for unit, hull in hulls.items()}
    edges = [(unit, *edge) for unit, hull in hulls.items() for edge in pairwise(hull)]
    edges.sort(key=lambda edge: _slope(*edge[1:]))  # stable: a unit's own edges stay in order
    start = sum(option.nbytes for option in chosen.values())
    sizes = list(accumulate((after.nbytes - before.nbytes for _, before, after in edges), initial=start))
    wanted = {nearest(sizes, start + (sizes[-1] - start) * index / (count - 1)) for index in range(count)}
    found = []
    for step in range(len(sizes)):
        if step:
            unit, _, after = edges[step - 1]
            chosen[unit] = after
        if step in wanted:
            found.append(dict(chosen))
    return found


def nearest(sizes: Sequence[int], nbytes: float) -> int:
    """Index of the nearest of ascending sizes."""
    above = bisect_left(sizes, nbytes)
    return min(range(max(0, above - 1), min(above + 1, len(sizes))), key=lambda index: abs(sizes[index] - nbytes))


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options that are best for some price of a byte, in ascending bytes and strictly descending cost."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    return (after.cost - before.cost) / (after.nbytes - before.nbytes)
