"""The steps in a row: model → data → scores → plan → packed model → record.

Everything that can go wrong without weights (structure, data, tokenizer) is found in `prepare`, which runs on the
empty model, so that nobody waits for a large download to be told of a misspelt column.
"""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from .allocation import FrontierPoint, allocate, check_budget, fixed_bits, frontier, loadable_bits
from .arithmetic import linears_in_working_dtype
from .base_card import inherited_from
from .calibration import CalibrationSet, facts_of, hold_out, in_batches, load_calibration, spread_evenly
from .config import CPTQuantConfig
from .doctor import describe_devices, library_versions
from .errors import ConfigError, ModelError, PlanError
from .evaluate import evaluating, losses_of_plans
from .experts import linear_experts
from .memory import peak_bytes
from .model_view import (
    TASKS,
    front_end,
    head_of,
    hub_name_of,
    input_embedding,
    max_length_of,
    output_embedding,
    task_of,
    view_model,
    vision_tower,
)
from .plan import LINEAR, BitPlan, LeftAlone, read_json, scheme_for
from .quantize import apply_plan, apply_plan_by_blocks, check_fits, check_in_memory
from .recipe import BUDGETS, Recipe
from .record import QuantizationRecord
from .recovery import recover, remember
from .refinement import refine
from .runtimes import RUNTIMES, model_problems, problems, refuse
from .self_text import sample_text
from .sensitivity import METHODS, score_by_all
from .sensitivity.metrics import Batch, mean_loss
from .sensitivity.rounding_errors import relative_errors
from .sensitivity.scoring import with_labels
from .table import SensitivityTable

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

DECIDING = ("allocation", "bits", *BUDGETS, "bits_override", "refine", "regularization", "target_runtime")
LEARNING = ("quality", "rounding", "iters", "recover")
PARTS = {"quantize_vision_tower": vision_tower, "quantize_front_end": front_end}  # many modules, some unfit perhaps
PREDICTED = "predicted_loss_increase"
REFINED = ("kl_before_refinement", "kl_after_refinement")
TOKENS_IN_A_STEP = 1024  # of tuning


@dataclass(frozen=True)
class Preparation:
    """What is known before the weights are.

    Attributes:
        plan: the undecided plan, with the bits of what lies outside the blocks.
        calibration: the data; None if nothing needs them, or if the model writes them itself.
        given: the record of the plan that the recipe gives, or leaves as the only one.
    """

    plan: BitPlan
    calibration: CalibrationSet | None
    given: QuantizationRecord | None = None

    @property
    def data(self) -> CalibrationSet:
        """The data, where something is measured."""
        assert self.calibration is not None, "measuring needs data, and `prepare` has loaded them"
        return self.calibration


def prepare(model: PreTrainedModel, recipe: Recipe, to_measure: bool = False) -> Preparation:
    """Check that a model and its data, or its plan if one is given, go together; the weights are not read.

    Args:
        model: dense.
        recipe: the settings. If they leave no choice, the only plan counts as given.
        to_measure: whether scores are wanted even so.

    Raises:
        ModelError: no task that gives a loss, nothing to quantize, or most of it unsupported.
        PlanError: the budget cannot be met, an override does not fit, the given plan is for another model, or the
            target runtime cannot load what the model becomes.
        CalibrationError: the data or the tokenizer cannot be used.
    """
    if task_of(model) is None:
        if head_of(model) == "image-text-to-text":
            raise ModelError(
                f"{type(model).__name__} cannot be run on text alone, on which language models that read images are"
                " calibrated; only those whose decoder reads text and images in one sequence can be quantized"
            )
        raise ModelError(
            f"{type(model).__name__} computes no loss that calibration could measure; load the model with one of"
            f" the heads"
            f" {', '.join(TASKS)} (AutoModelForCausalLM, AutoModelForMaskedLM, …)"
        )
    given = given_record(model, recipe) if recipe.plan is not None else None
    if given is not None:
        plan = given.plan.undecided
    else:
        plan = _undecided(model, recipe)
        check_budget(plan, recipe)
        if recipe.leaves_no_choice and not to_measure:
            given = _only_plan(plan, recipe)
    _check_runtime(model, plan if given is None else given.plan, recipe)
    later = recipe.names_no_data and task_of(model) == "causal-lm"
    wanted = recipe.learns or given is None
    calibration = _calibration_for(model, recipe) if wanted and not later else None
    return Preparation(plan, calibration, given)


def _only_plan(plan: BitPlan, recipe: Recipe) -> QuantizationRecord:
    """The record of the plan that settings with one bit width can only come to."""
    bits = dict.fromkeys((module.unit for module in plan.modules), recipe.offered_bits[0]) | fixed_bits(plan, recipe)
    only = plan.with_bits(bits, recipe.group_size, recipe.symmetric)
    return QuantizationRecord(only, None, _portable(recipe), {})


def _undecided(model: PreTrainedModel, recipe: Recipe) -> BitPlan:
    """The plan of a model in which only what lies outside the blocks has its bits, if it is to be quantized."""
    outside: dict[str, int] = {}
    parts = {
        setting: (find(model), bits)
        for setting, find in PARTS.items()
        if (bits := getattr(recipe, setting)) is not None
    }
    for names, bits in parts.values():
        outside |= dict.fromkeys(names, bits)
    in_parts = set(outside)
    if recipe.quantize_embeddings is not None:
        outside[input_embedding(model)] = recipe.quantize_embeddings
    if recipe.quantize_lm_head is not None:
        outside[output_embedding(model)] = recipe.quantize_lm_head
    view = view_model(model, recipe.modules_to_not_convert, recipe.allow_skipped, outside)
    left = {module.name: module.reason for module in view.left}
    for name in outside:
        if name in left and name not in in_parts:
            raise ConfigError(f"{name}, which a setting asks to quantize, cannot be: {left[name]}")
    for setting, (names, bits) in parts.items():
        if all(name in left for name in names):
            raise ConfigError(
                f"{setting}={bits} finds nothing that can be quantized, e.g. {names[0]}: {left[names[0]]}; leave it out"
            )
    plan = view.plan(recipe.granularity)
    modules = [
        replace(
            module, scheme=scheme_for(outside[module.name], module.in_features, recipe.group_size, recipe.symmetric)
        )
        if module.outside
        else module
        for module in plan.modules
    ]
    return replace(plan, modules=tuple(modules))


def _check_runtime(model: PreTrainedModel, plan: BitPlan, recipe: Recipe) -> None:
    """Find out before any work whether a runtime that the checkpoint is for, or must be for, can load it.

    Args:
        model: dense.
        plan: finished, or undecided.
        recipe: `target_runtime`, `strict`; what an undecided plan can become.
    """
    if recipe.target_runtime is None and not recipe.strict:
        return
    runtime = RUNTIMES[recipe.target_runtime or "vllm"]
    portable = all(module.kind == LINEAR for module in plan.modules)
    refuse((*model_problems(head_of(model), portable, runtime), *problems(plan, runtime)), runtime)
    if not plan.inside.packed and recipe.target_runtime is None:  # which the budget has minded otherwise
        loadable_bits(plan, recipe.bits, recipe, runtime, fixed_bits(plan, recipe).keys())


def _calibration_for(model: PreTrainedModel, recipe: Recipe) -> CalibrationSet:
    calibration = load_calibration(recipe, facts_of(model))
    if recipe.method == "auto" or recipe.recover:
        hold_out(calibration)  # enough data to judge by
    return calibration


def _with_own_text(model: PreTrainedModel, recipe: Recipe, preparation: Preparation) -> Preparation:
    """The preparation with the text that the model writes itself, now that it has its weights, where that is wanted."""
    if preparation.calibration is not None or (preparation.given is not None and not recipe.learns):
        return preparation
    length = min(recipe.sequence_length, max_length_of(model) or recipe.sequence_length)
    if recipe.dataset is None:
        logger.warning(
            f"No dataset= is given: calibrating on {recipe.num_samples} sequences of {length} tokens that the model"
            " itself writes."
        )
    rows = sample_text(model, recipe.num_samples, length, recipe.seed)
    calibration = _calibration_for(model, replace(recipe, dataset=rows))
    source = "text written by the model itself"
    return replace(
        preparation, calibration=replace(calibration, description={**calibration.description, "source": source})
    )


def given_record(model: PreTrainedModel, recipe: Recipe) -> QuantizationRecord:
    """The recipe's plan for a model, with where it came from.

    Settings are those the plan was made with; only the rounding and recovery are the recipe's. What another model with
    this plan was evaluated to be is left out.

    Raises:
        PlanError: it is no plan, or one for another model.
    """
    given = recipe.plan
    if isinstance(given, (str, os.PathLike)):
        data = read_json(given)
        given = QuantizationRecord.from_dict(data) if "settings" in data else BitPlan.from_dict(data)
    if isinstance(given, BitPlan):
        settings = {**_portable(recipe), "granularity": given.granularity, "target_runtime": None}  # of nobody's choice
        given = QuantizationRecord(given, None, settings, {})
    assert given is not None, "there is a plan"
    if not given.plan.inside.packed:
        raise PlanError("the plan leaves everything at 16 bits; make one from its scores with `cptquant solve`")
    settings = {**given.settings, **{name: getattr(recipe, name) for name in LEARNING}}
    try:
        outside = [module.name for module in given.plan.modules if module.outside]
        view = view_model(model, settings["modules_to_not_convert"], settings["allow_skipped"], outside)
        undecided = view.plan(settings["granularity"])
    except KeyError as error:
        raise PlanError(f"the settings in the record of the plan lack {error}") from error
    return replace(given, plan=given.plan.applied_to(undecided), settings=settings, evaluation=())


def measure_sensitivity(model: PreTrainedModel, config: CPTQuantConfig) -> SensitivityTable:
    """Score the units of a dense model, and leave it as it is.

    Args:
        model: loaded in full precision, with a head that computes a loss; may be offloaded by accelerate.
        config: what `from_pretrained` would take; settings of allocation have no effect (but with `method="auto"`).

    Raises:
        ConfigError: a plan is given, or `work_dir` belongs to another run.
        ModelError, PlanError, CalibrationError: as `prepare`; a weight, an activation or the loss is not finite.
    """
    table = measure_record(model, config).table
    assert table is not None
    return table


def make_plan(model: PreTrainedModel, config: CPTQuantConfig) -> QuantizationRecord:
    """Score the units of a dense model and decide on them, and leave the model as it is.

    `CPTQuantConfig(plan=...)` takes the record, or the file that its `save` writes.

    Args:
        model, config: as for `measure_sensitivity`.

    Raises:
        ConfigError, ModelError, PlanError, CalibrationError: as `measure_sensitivity`.
    """
    recipe = config.recipe()
    preparation = _prepare_to_measure(model, recipe)
    with evaluating(model), linear_experts(model):
        check_fits(model, preparation.plan)
        return _decided(model, _with_own_text(model, recipe, preparation), recipe)


def measure_record(model: PreTrainedModel, config: CPTQuantConfig) -> QuantizationRecord:
    """The table of `measure_sensitivity` with where it came from; the plan is undecided."""
    recipe = config.recipe()
    preparation = _prepare_to_measure(model, recipe)
    with evaluating(model), linear_experts(model):
        check_fits(model, preparation.plan)
        return _scored(model, _with_own_text(model, recipe, preparation), recipe)


def solve(table: SensitivityTable, config: CPTQuantConfig) -> BitPlan:
    """Decide on the units of a table, without the model.

    Args:
        table: of `measure_sensitivity`, or loaded from a file.
        config: `allocation` and the budget, `bits`, `bits_override`, `regularization`; `group_size` and `symmetric` as
            in the table. Others have no effect.

    Raises:
        PlanError: the budget cannot be met (the feasible range is named); the table has no figures for a bit width, or
            those of another group size; an override does not fit.
    """
    return allocate(table, config.recipe())


def measure_frontier(model: PreTrainedModel, config: CPTQuantConfig, count: int) -> list[FrontierPoint]:
    """Plans from the smallest to the best, with the rise of the loss that each is predicted and measured to cost.

    Scores are measured on the first three quarters of the calibration data, the plans on the rest.

    Args:
        model, config: as for `measure_sensitivity`.
        count: at most so many plans, at least 2.
    """
    recipe = config.recipe()
    preparation = _prepare_to_measure(model, recipe)
    with evaluating(model), linear_experts(model):
        check_fits(model, preparation.plan)
        preparation = _with_own_text(model, recipe, preparation)
        measured, judged = hold_out(preparation.data)
        table = score(model, replace(preparation, calibration=measured), recipe)
        points = frontier(table, recipe, count)
        batches = with_labels(model, judged.batches)
        base = mean_loss(model, batches)
        plans = {str(index): point.plan for index, point in enumerate(points)}
        losses = losses_of_plans(model, plans, batches)
    return [replace(point, measured=loss - base) for point, loss in zip(points, losses.values(), strict=True)]


def _prepare_to_measure(model: PreTrainedModel, recipe: Recipe) -> Preparation:
    preparation = prepare(model, recipe, to_measure=True)
    if preparation.given is not None:
        raise ConfigError("plan= is for quantizing; without it, there is something to measure")
    return preparation


def score(model: PreTrainedModel, preparation: Preparation, recipe: Recipe) -> SensitivityTable:
    """The table of the recipe's method, with the rounding errors."""
    with linears_in_working_dtype(model):
        if recipe.method == "auto":
            return _best_of_all(model, preparation, recipe)
        table = METHODS[recipe.method](model, preparation.plan.inside, preparation.data, recipe)
        return replace(table, **_rounding(model, preparation.plan, recipe))


def _best_of_all(model: PreTrainedModel, preparation: Preparation, recipe: Recipe) -> SensitivityTable:
    """The table whose plan gives the least loss on held-out data; its settings tell the losses of all."""
    plan = preparation.plan
    calibration, judged = hold_out(preparation.data)
    tables = score_by_all(model, plan.inside, calibration, recipe)
    rounding = _rounding(model, plan, recipe)
    tables = {name: replace(table, **rounding) for name, table in tables.items()}
    plans = {
        "unrounded": replace(plan, modules=()),
        **{name: allocate(table, recipe) for name, table in tables.items()},
    }
    losses = losses_of_plans(model, plans, with_labels(model, judged.batches))
    best = min(tables, key=lambda name: losses[name])
    found = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    logger.warning(f"Loss on held-out calibration data: {found}. The plan of {best} is taken.")
    return replace(tables[best], settings={**tables[best].settings, "held_out_losses": losses})


def _rounding(model: PreTrainedModel, plan: BitPlan, recipe: Recipe) -> dict[str, Any]:
    """What a table says of a plan, and of rounding to nearest."""
    errors = relative_errors(model, plan.inside, recipe)
    return {"plan": plan, "errors": errors, "group_size": recipe.group_size, "symmetric": recipe.symmetric}


def _scored(model: PreTrainedModel, preparation: Preparation, recipe: Recipe) -> QuantizationRecord:
    table = score(model, preparation, recipe)
    return QuantizationRecord(preparation.plan, table, _portable(recipe), preparation.data.description)


def decide(record: QuantizationRecord, recipe: Recipe) -> QuantizationRecord:
    """The record with the plan that a recipe's allocation makes of its table.

    Raises:
        PlanError: as `solve`; with `strict`, the runtime would not load the plan.
    """
    assert record.table is not None, "there are scores to decide by"
    return _with_plan(record, allocate(record.table, recipe), recipe)


def _decided(model: PreTrainedModel, preparation: Preparation, recipe: Recipe) -> QuantizationRecord:
    """The record with scores and the plan, refined if that is asked for."""
    record = decide(_scored(model, preparation, recipe), recipe)
    if not recipe.refine:
        return record
    assert record.table is not None, "it has just been made"
    plan, divergences = refine(model, record.plan, record.table, preparation.data, recipe)
    return _with_plan(record, plan, recipe, divergences)


def _with_plan(
    record: QuantizationRecord, plan: BitPlan, recipe: Recipe, divergences: Mapping[str, float] = MappingProxyType({})
) -> QuantizationRecord:
    """The record with a plan that a recipe made of its table, and what refining it has measured."""
    table = record.table
    assert table is not None, "there are scores that the plan was made of"
    if recipe.strict:
        runtime = RUNTIMES[recipe.target_runtime or "vllm"]
        refuse(problems(plan, runtime), runtime)
    of_plans = (PREDICTED, *REFINED)
    measured = {name: value for name, value in record.measured.items() if name not in of_plans} | dict(divergences)
    if table.costs:
        bits = {module.unit: module.scheme.bits for module in plan.inside.modules}
        measured[PREDICTED] = math.fsum(table.costs[unit].get(bits[unit], 0.0) for unit in bits)
    given = _portable(recipe)
    settings = {**record.settings, **{name: given[name] for name in DECIDING}}
    return replace(record, plan=plan, settings=settings, measured=measured, evaluation=())


def _portable(recipe: Recipe) -> dict[str, Any]:
    """The settings without what only this machine has."""
    return {**recipe.to_dict(), "dataset": None, "tokenizer": None, "work_dir": None, "plan": None}


def quantize_model(model: PreTrainedModel, recipe: Recipe, preparation: Preparation) -> QuantizationRecord:
    """Score and plan, unless a plan is given, and quantize a dense model in place.

    Raises:
        ModelError: a weight holds NaN or infinity.
        CalibrationError: the loss is not finite.
    """
    with linear_experts(model):
        return _quantized(model, recipe, preparation)


def _quantized(model: PreTrainedModel, recipe: Recipe, preparation: Preparation) -> QuantizationRecord:
    check_fits(model, preparation.plan)
    if recipe.learns:
        check_in_memory(model, preparation.plan)
    preparation = _with_own_text(model, recipe, preparation)
    start = time.perf_counter()
    parts = hold_out(preparation.data) if recipe.recover else ()
    examples = [remember(model, _steps_of(part)) for part in parts]
    remembered = time.perf_counter()
    record = preparation.given or _decided(model, preparation, recipe)
    scored = time.perf_counter()
    if recipe.rounds_to_nearest:
        apply_plan(model, record.plan)
    else:
        # more batches than steps would only be carried from block to block
        used = recipe.iters if recipe.rounding == "signround" else None
        batches = _steps_of(parts[0] if parts else preparation.data, used)
        apply_plan_by_blocks(model, record.plan, batches, recipe)
    rounded = time.perf_counter()
    seconds = {} if preparation.given else {"scoring": scored - remembered}
    seconds["rounding"] = rounded - scored
    recovered: dict[str, float] = {}
    if examples:
        training, judging = examples
        recovered = recover(model, record.plan, training, judging, recipe.seed)
        seconds["recovering"] = time.perf_counter() - rounded + remembered - start
    logger.warning(report(record.plan))  # the default verbosity: nothing is left out silently
    return replace(
        record,
        measured={**record.measured, **recovered},
        base_model=hub_name_of(model),
        inherited=inherited_from(model.name_or_path),
        run=_description_of_run(model, seconds),
    )


def _description_of_run(model: PreTrainedModel, seconds: Mapping[str, float]) -> dict[str, Any]:
    used = {str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}
    return {
        "seconds": {step: round(value, 2) for step, value in seconds.items()},
        "peak_bytes": peak_bytes(),
        "hardware": {name: what for name, what in describe_devices().items() if name in used},
        "versions": library_versions(),
    }


def _steps_of(calibration: CalibrationSet, most: int | None = None) -> Sequence[Batch]:
    """The data in batches for a step of tuning each, or so many of them at most, evenly chosen."""
    length = calibration.description["sequence_length"]
    size = max(1, TOKENS_IN_A_STEP // length)
    batches = calibration.batches if most is None else spread_evenly(calibration, most * size * length)
    return in_batches(batches, size)


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
    lines += [
        f"  packed once: {module.name}, whose weight is that of {', '.join(module.shared_with)}, too"
        for module in plan.packed
        if module.shared_with
    ]
    for reason, modules in left.items():
        names = ", ".join(module.name for module in modules[:3]) + (", …" if len(modules) > 3 else "")
        lines.append(
            f"  left alone, {reason}: {len(modules)} modules, {sum(module.weights for module in modules):,} weights"
            f" ({names})"
        )
    return "\n".join(lines)
