"""Allocation: (sensitivity table, recipe) → bit plan. No model, no torch."""

from __future__ import annotations

from collections.abc import Callable

from ..plan import BitPlan
from ..recipe import Recipe
from ..table import SensitivityTable
from .budget import (
    check_budget,
    check_grid,
    fixed_bits,
    integer_program,
    largest_bytes,
    loadable_bits,
    options,
    unit_sizes,
)
from .clusters import k_harmonic_means, kmeans
from .frontier import FrontierPoint, frontier
from .swaps import Swap, next_swap

__all__ = [
    "FrontierPoint",
    "Swap",
    "allocate",
    "check_budget",
    "fixed_bits",
    "frontier",
    "largest_bytes",
    "loadable_bits",
    "next_swap",
    "options",
]

CLUSTERS: dict[str, Callable[..., dict[str, int]]] = {"kmeans": kmeans, "k-harmonic-means": k_harmonic_means}


def allocate(table: SensitivityTable, recipe: Recipe) -> BitPlan:
    """Decide on the units of a table.

    Args:
        table: their scores, or their costs.
        recipe: `allocation`, `bits`, `bits_override`, the budget, `regularization`, `target_runtime`; `group_size` and
            `symmetric` as in the table.

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
        clustered = CLUSTERS[recipe.allocation](free, recipe.offered_bits) if free else {}
        choices = unit_sizes(table.plan, recipe)
        bits = {
            unit: next((bits for bits in choices[unit] if bits >= wanted), max(choices[unit]))
            for unit, wanted in clustered.items()
        } | fixed
    return table.plan.with_bits(bits, recipe.group_size, recipe.symmetric)
