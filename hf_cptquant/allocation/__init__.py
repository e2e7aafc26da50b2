"""Allocation: (scores or costs, undecided plan, recipe) → unit → bits. No model, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..plan import BitPlan, SensitivityTable
from ..recipe import Recipe
from .budget import check_budget, fixed_bits, integer_program
from .clusters import k_harmonic_means, kmeans

__all__ = ["allocate", "check_budget"]

CLUSTERS: dict[str, Callable[..., dict[str, int]]] = {"kmeans": kmeans, "k-harmonic-means": k_harmonic_means}


def allocate(
    table: SensitivityTable, plan: BitPlan, errors: Mapping[str, Mapping[int, float]], recipe: Recipe
) -> dict[str, int]:
    """Unit → bits, by the recipe's allocation.

    Args:
        table: scores or costs of the plan's units.
        plan: the units; its bits are not read.
        errors: unit → bit width → relative squared rounding error; read by the integer program only.
        recipe: `allocation`, `bits`, `bits_override`, the budget, `regularization`.

    Raises:
        PlanError: the budget cannot be met (the feasible range is named), or an override does not fit the plan.
    """
    if recipe.allocation == "integer":
        return integer_program(table, plan, errors, recipe)
    fixed = fixed_bits(plan, recipe)
    free = {unit: score for unit, score in table.scores.items() if unit not in fixed}
    return {**(CLUSTERS[recipe.allocation](free, recipe.bits) if free else {}), **fixed}
