"""From a budget to the integer program and back: what each unit may be, what it costs, how many bytes there are.

The cost of a unit is A + λ·R (equations 4 and 5 of arXiv 2412.03599): A the predicted rise of the loss, R the squared
rounding error relative to the weights. A method that prices bit widths gives A; from one that gives a unit a single
score it is score · R, because the loss grows linearly with the relative squared error (HIGGS, arXiv 2411.17525).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from ..errors import PlanError
from ..plan import BitPlan, scheme_for
from ..recipe import Recipe
from ..runtimes import RUNTIMES, Runtime, matrices, problems
from ..table import SensitivityTable
from .integer import Option, cheapest, smallest

SPARE = 0.25  # bits per weight above the smallest plan, where no budget is given


def integer_program(table: SensitivityTable, recipe: Recipe) -> dict[str, int]:
    """Unit → bits with the least predicted rise of the loss in the recipe's budget, or, for `max_loss_increase`, the
    fewest bytes whose predicted rise stays within it.

    Raises:
        PlanError: the budget cannot be met (the feasible range is named), or as `options`.
    """
    choices = options(table, recipe)
    if recipe.max_loss_increase is not None:
        if not table.costs:
            raise PlanError(
                f"max_loss_increase needs costs in nats, which a table of method={table.method!r} has not; measure with"
                " estimator='taylor', or use target_bits"
            )
        bits = smallest(choices, recipe.max_loss_increase)
        if bits is None:
            least = sum(min(option.cost for option in unit) for unit in choices.values())
            raise PlanError(
                f"max_loss_increase={recipe.max_loss_increase} is less than the {least:.4g} nats that the best choice"
                f" from bits={list(recipe.bits)} is predicted to cost"
            )
        return bits
    check_budget(table.plan, recipe)
    bits = cheapest(choices, largest_bytes(table.plan, recipe))
    assert bits is not None, "a budget that the smallest plan meets can be met"
    return bits


def check_budget(plan: BitPlan, recipe: Recipe) -> None:
    """Find out without scores, so before any are measured, whether overrides fit a plan and a budget can be met.

    Raises:
        PlanError: as `fixed_bits`; or the budget in bytes cannot be met, with the feasible range.
    """
    sizes = unit_sizes(plan, recipe)
    if recipe.allocation == "integer" and recipe.max_loss_increase is None:
        least, most = (sum(pick(of_unit.values()) for of_unit in sizes.values()) for pick in (min, max))
        if least > largest_bytes(plan, recipe):
            raise PlanError(_infeasible(least, most, plan, recipe))


def check_grid(table: SensitivityTable, recipe: Recipe) -> None:
    """Raise `PlanError` if the figures of a table are for another rounding than the recipe's."""
    if (recipe.group_size, recipe.symmetric) != (table.group_size, table.symmetric):
        raise PlanError(
            f"the sensitivity table is for group_size={table.group_size} and symmetric={table.symmetric}, not for"
            f" group_size={recipe.group_size} and symmetric={recipe.symmetric}; use its settings, or measure again"
        )


def options(table: SensitivityTable, recipe: Recipe) -> dict[str, list[Option]]:
    """Unit → what it may be, in ascending bits.

    Raises:
        PlanError: the table has no figures for a bit width, or an override does not fit.
    """

    def cost(unit: str, bits: int) -> float:
        if bits == 16 or unit not in table.raw:  # what lies outside the blocks costs the same in every plan
            return 0.0
        if bits not in (table.costs or table.errors).get(unit, ()) or (by_error and bits not in table.errors[unit]):
            known = ", ".join(map(str, (table.costs or table.errors).get(unit, ())))
            raise PlanError(
                f"the sensitivity table has no figures for {bits} bits, only for {known or 'no bit width'}; measure"
                f" again with bits that include {bits}"
            )
        error = table.errors[unit][bits] if by_error else 0.0
        predicted = table.costs[unit][bits] if table.costs else max(0.0, table.raw[unit]) * error
        return predicted + recipe.regularization * error

    by_error = recipe.regularization > 0 or not table.costs
    return {
        unit: [Option(bits, cost(unit, bits), nbytes) for bits, nbytes in of_unit.items()]
        for unit, of_unit in unit_sizes(table.plan, recipe).items()
    }


def unit_sizes(plan: BitPlan, recipe: Recipe) -> dict[str, dict[int, int]]:
    """Unit → bit width that it may have, ascending → bytes.

    Raises:
        PlanError: as `fixed_bits` and `loadable_bits`; an override is not among what the target runtime loads; fused
            modules are in different units.
    """
    fixed = fixed_bits(plan, recipe)
    loadable = _loadable(plan, recipe, fixed)
    sizes: dict[str, dict[int, int]] = {}
    for module in plan.modules:
        allowed = (fixed[module.unit],) if module.unit in fixed else loadable[module.unit]
        of_unit = sizes.setdefault(module.unit, dict.fromkeys(allowed, 0))
        for bits in of_unit:
            scheme = scheme_for(bits, module.in_features, recipe.group_size, recipe.symmetric)
            of_unit[bits] += scheme.nbytes(module.out_features, module.in_features, module.element_size)
    return sizes


def _loadable(plan: BitPlan, recipe: Recipe, fixed: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Unit → bit widths to choose from, ascending: all, or those that the target runtime loads."""
    if recipe.target_runtime is None:
        return dict.fromkeys((module.unit for module in plan.modules), tuple(sorted(recipe.bits)))
    runtime = RUNTIMES[recipe.target_runtime]
    unit_of_matrix: dict[str, str] = {}
    matrix_of = matrices(module.name for module in plan.modules)
    for module in plan.modules:
        if unit_of_matrix.setdefault(matrix_of[module.name], module.unit) != module.unit:
            raise PlanError(
                f"{runtime.title} keeps {module.name} in one matrix with modules of other units; measure with"
                " granularity='group'"
            )
    for bits in set(fixed.values()):
        decided = replace(plan, modules=tuple(module for module in plan.modules if fixed.get(module.unit) == bits))
        loadable_bits(decided, (bits,), recipe, runtime)
    return loadable_bits(plan, recipe.offered_bits, recipe, runtime, decided=fixed.keys())


def loadable_bits(
    plan: BitPlan, widths: Sequence[int], recipe: Recipe, runtime: Runtime, decided: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Unit → the bit widths with which a runtime loads it, ascending.

    What a runtime asks for concerns one matrix, so a plan of equal bits shows it for every unit at once.

    Args:
        plan: its units; their schemes have no effect.
        widths: to choose from.
        recipe: `group_size`, `symmetric`.
        runtime: one of `RUNTIMES`.
        decided: units that need no choice.

    Raises:
        PlanError: a unit can have none of the widths.
    """
    units = {module.unit for module in plan.modules}
    unit_of = {module.name: module.unit for module in plan.modules}
    found: dict[str, dict[int, str]] = {}
    for bits in sorted(widths):
        uniform = plan.with_bits(dict.fromkeys(units, bits), recipe.group_size, recipe.symmetric)
        for problem in problems(uniform, runtime):
            for name in problem.modules:
                found.setdefault(unit_of[name], {}).setdefault(bits, f"{problem.modules[0]}: {problem.rule}")
    for unit, of_unit in found.items():
        if len(of_unit) == len(widths) and unit not in decided:
            raise PlanError(
                f"{runtime.title} loads {unit} with none of the bits {', '.join(map(str, sorted(widths)))}"
                f" ({next(iter(of_unit.values()))}); allow other bits, such as 16, or another group_size"
            )
    return {unit: tuple(bits for bits in sorted(widths) if bits not in found.get(unit, ())) for unit in units}


def fixed_bits(plan: BitPlan, recipe: Recipe) -> dict[str, int]:
    """Unit → bits where `bits_override` decides, and those of what lies outside the transformer layers.

    Raises:
        PlanError: a pattern matches no module, or patterns give modules of one unit different bits.
    """
    fixed: dict[str, tuple[int, str]] = {}
    for pattern, bits in recipe.bits_override:
        matching = [module for module in plan.inside.modules if fnmatchcase(module.name, pattern)]
        if not matching:
            raise PlanError(
                f"bits_override: {pattern!r} matches no quantizable module; they are named like"
                f" {plan.inside.modules[0].name!r}"
            )
        for module in matching:
            other = fixed.setdefault(module.unit, (bits, module.name))
            if other[0] != bits:
                raise PlanError(
                    f"bits_override gives {other[1]} {other[0]} bits and {module.name} {bits}, which share the unit"
                    f" {module.unit}; use a finer granularity"
                )
    outside = {module.unit: module.scheme.bits for module in plan.modules if module.outside}
    return {unit: bits for unit, (bits, _) in fixed.items()} | outside


def largest_bytes(plan: BitPlan, recipe: Recipe) -> int:
    """Bytes that the plan's modules may take: without a budget, a quarter of a bit per weight more than the smallest
    plan. Embeddings, norms and all else count for `target_size` and `target_compression`, and not for `target_bits`."""
    if recipe.target_bits is not None:
        return int(recipe.target_bits * plan.weights / 8)
    if recipe.target_size is not None:
        return recipe.target_size - plan.other_bytes
    if recipe.target_compression is not None:
        return int(plan.original_bytes / recipe.target_compression) - plan.other_bytes
    return sum(min(of_unit.values()) for of_unit in unit_sizes(plan, recipe).values()) + int(SPARE * plan.weights / 8)


def _infeasible(least: int, most: int, plan: BitPlan, recipe: Recipe) -> str:
    if recipe.target_bits is not None:
        given = f"target_bits={recipe.target_bits}"
        span = f"{8 * least / plan.weights:.4f} to {8 * most / plan.weights:.4f} bits per weight"
    elif recipe.target_size is not None:
        given = f"target_size={recipe.target_size / 1e6:.3f} MB"
        span = f"{(least + plan.other_bytes) / 1e6:.3f} to {(most + plan.other_bytes) / 1e6:.3f} MB"
    else:
        given = f"target_compression={recipe.target_compression}"
        ratios = (plan.original_bytes / (size + plan.other_bytes) for size in (most, least))
        span = " to ".join(f"{ratio:.4f}" for ratio in ratios)
    return (
        f"{given} cannot be met: bits={list(recipe.offered_bits)} in this model give {span} (with scales); allow fewer"
        " bits or another budget"
    )
