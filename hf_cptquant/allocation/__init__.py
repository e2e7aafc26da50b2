"""Allocation: (sensitivity table, recipe) → bit plan. No model, no torch."""

from __future__ import annotations

from collections.abc import Callable

from ..plan import BitPlan
from ..recipe import Recipe
from ..table import SensitivityTable
from .budget import check_budget, check_grid, fixed_bits, integer_program
from .clusters import k_harmonic_means, kmeans
from .frontier import FrontierPoint, frontier

__all__ = ["FrontierPoint", "allocate", "check_budget", "frontier"]

CLUSTERS: dict[str, Callable[..., dict[str, int]]] = {"kmeans": kmeans, "k-harmonic-means": k_harmonic_means}


def allocate(table: SensitivityTable, recipe: Recipe) -> BitPlan:
    """Decide on the units of a table.

    Args:
        table: their scores, or their costs.
        recipe: `allocation`, `bits`, `bits_override`, the budget, `regularization`; `group_size` and `symmetric` as in
            the table.

    Raises:
        PlanError: the budget cannot be met (the feasible range is named); the table has no figures for a bit width, or
            those of another group size; an override does not fit.
    """
    check_grid(table, recipe)
    if recipe.allocation == "integer":
        bits = integer_program(table, recipe)
    else:
        fixed = fixed_bits(table.plan, recipe)
        free = {unit: score for unit, score in table.scores.items() if unit not in fixed}
        bits = {**(CLUSTERS[recipe.allocation](free, recipe.bits) if free else {}), **fixed}
    return table.plan.with_bits(bits, recipe.group_size, recipe.symmetric)
