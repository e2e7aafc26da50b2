"""The steps in a row: model → data → scores → plan → packed model → record.

Everything that can go wrong without weights (structure, data, tokenizer) is found in `prepare`, which runs on the
empty model, so that nobody waits for a large download to be told of a misspelt column.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.utils import logging

from .allocation import allocate, check_budget
from .calibration import CalibrationSet, ModelFacts, load_calibration
from .config import CPTQuantConfig
from .errors import ModelError
from .model_view import TASKS, max_length_of, task_of, view_model
from .plan import BitPlan, LeftAlone, SensitivityTable
from .quantize import apply_plan, check_fits
from .recipe import Recipe
from .record import QuantizationRecord
from .sensitivity import METHODS
from .sensitivity.rounding_errors import relative_errors

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it


@dataclass(frozen=True)
class Preparation:
    """What is known before the weights are: the undecided plan, and the data."""

    plan: BitPlan
    calibration: CalibrationSet


def prepare(model: PreTrainedModel, recipe: Recipe) -> Preparation:
    """Check that a model and its data go together; the weights are not read.

    Raises:
        ModelError: no task that gives a loss, nothing to quantize, or most of it unsupported.
        PlanError: the budget cannot be met, or an override does not fit.
        CalibrationError: the data or the tokenizer cannot be used.
    """
    task = task_of(model)
    if task is None:
        raise ModelError(
            f"{type(model).__name__} computes no loss that calibration could measure; load the model with one of"
            f" the heads"
            f" {', '.join(TASKS)} (AutoModelForCausalLM, AutoModelForMaskedLM, …)"
        )
    plan = view_model(model, recipe.modules_to_not_convert, recipe.allow_skipped).plan(recipe.granularity)
    check_budget(plan, recipe)
    vocabulary = model.get_input_embeddings().num_embeddings
    facts = ModelFacts(task, vocabulary, max_length_of(model), model.name_or_path, getattr(model, "num_labels", 0))
    return Preparation(plan, load_calibration(recipe, facts))


def measure_sensitivity(model: PreTrainedModel, config: CPTQuantConfig) -> SensitivityTable:
    """Score the units of a dense model, and leave it as it is.

    Args:
        model: loaded in full precision, with a head that computes a loss; may be offloaded by accelerate.
        config: what `from_pretrained` would take; settings of allocation and rounding have no effect.

    Raises:
        ModelError, CalibrationError: as `prepare`; a weight, an activation or the loss is not finite.
        ConfigError: `work_dir` belongs to another run.
    """
    recipe = config.recipe()
    preparation = prepare(model, recipe)
    check_fits(model, preparation.plan)
    training = model.training
    try:
        return METHODS[recipe.method](model.eval(), preparation.plan, preparation.calibration, recipe)
    finally:
        model.train(training)


def quantize_model(model: PreTrainedModel, recipe: Recipe, preparation: Preparation) -> QuantizationRecord:
    """Score, plan, and quantize a dense model in place.

    Raises:
        ModelError: a weight holds NaN or infinity.
        CalibrationError: the loss is not finite.
    """
    check_fits(model, preparation.plan)
    start = time.perf_counter()
    table = METHODS[recipe.method](model, preparation.plan, preparation.calibration, recipe)
    by_error = recipe.allocation == "integer" and (recipe.regularization > 0 or not table.costs)
    errors = relative_errors(model, preparation.plan, recipe) if by_error else {}
    bits = allocate(table, preparation.plan, errors, recipe)
    plan = preparation.plan.with_bits(bits, recipe.group_size, recipe.symmetric)
    scored = time.perf_counter()
    apply_plan(model, plan, recipe.rounding)
    measured = {"seconds_scoring": round(scored - start, 2), "seconds_rounding": round(time.perf_counter() - scored, 2)}
    if table.costs:
        measured["predicted_loss_increase"] = math.fsum(table.costs[unit].get(bits[unit], 0.0) for unit in bits)
    logger.warning(report(plan))  # the default verbosity: nothing is left out silently
    settings = {**recipe.to_dict(), "dataset": None, "tokenizer": None, "work_dir": None}  # what only this machine has
    return QuantizationRecord(plan, table, settings, preparation.calibration.description, measured)


def report(plan: BitPlan) -> str:
    """How many of the weights are quantized, and which modules were left and why."""
    left: dict[str, list[LeftAlone]] = defaultdict(list)
    for module in plan.left:
        left[module.reason].append(module)
    everything = plan.weights + sum(module.weights for module in plan.left)
    packed = sum(module.weights for module in plan.packed)
    lines = [
        f"Quantized {packed:,} of {everything:,} weights ({packed / everything:.1%}) in {len(plan.packed)} of"
        f" {len(plan.modules)} quantizable modules:"
        f" {plan.bits_per_weight:.2f} bits per weight, {plan.original_bytes / 1e6:,.1f} → {plan.nbytes / 1e6:,.1f} MB"
        f" ({plan.compression_ratio:.2f}x smaller)."
    ]
    if untouched := [module for module in plan.modules if not module.scheme.packed]:
        lines.append(
            f"  16 bits by plan: {len(untouched)} modules, {sum(module.weights for module in untouched):,} weights"
        )
    for reason, modules in left.items():
        names = ", ".join(module.name for module in modules[:3]) + (", …" if len(modules) > 3 else "")
        lines.append(
            f"  left alone, {reason}: {len(modules)} modules, {sum(module.weights for module in modules):,} weights"
            f" ({names})"
        )
    return "\n".join(lines)
