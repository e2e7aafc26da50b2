"""From measurements to a `SensitivityTable`: what a result belongs to, who measures what, what is kept on disk."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import ranks
from ..calibration import CalibrationSet, batches_on
from ..errors import CalibrationError
from ..model_view import predicts_one_class
from ..plan import BitPlan
from ..recipe import Recipe
from ..table import SensitivityTable
from ..work_folder import Journal, fingerprint
from .engine import SuffixRunner, backing_off
from .metrics import METRICS, Batch

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

Level = float
UNCHANGED = "the unchanged model"


@dataclass(frozen=True)
class Disturbance:
    """How a method changes a unit to see what the model suffers.

    Attributes:
        method: its name.
        levels: the strengths that are tried.
        change: (name → module of a unit, level) → context in which their weights are changed.
        settings: those that decide the result, for the table and the work folder.
    """

    method: str
    levels: tuple[Level, ...]
    change: Callable[[Mapping[str, nn.Module], Level], AbstractContextManager[None]]
    settings: Mapping[str, Any]


def score_by_changes(
    model: PreTrainedModel,
    plan: BitPlan,
    calibration: CalibrationSet,
    recipe: Recipe,
    disturbances: Sequence[Disturbance],
) -> list[SensitivityTable]:
    """How much worse the model's metric gets when each unit of a plan is changed, by each of some methods.

    The methods share the blocks that a change cannot reach, which are run once for all.

    Args:
        model: dense, in evaluation mode; left as it was, whatever happens.
        plan: the units; its bits are not read.
        calibration: what the metric is measured on.
        recipe: `metric`, `work_dir`.
        disturbances: the methods.

    Returns:
        For each disturbance, per unit the change of the metric for the worse, averaged over the levels.
    """
    metric = METRICS[recipe.metric]
    facts = [
        facts_of(model, plan, calibration, {"method": by.method, "metric": recipe.metric, **by.settings})
        for by in disturbances
    ]
    journals = [open_journal(recipe, of_method) for of_method in facts]
    units = modules_by_unit(model, plan)
    block_of = {module.unit: module.block for module in plan.modules}
    batches = with_labels(model, calibration.batches)
    runner = SuffixRunner(model, batches, list(dict.fromkeys(block_of.values())), metric)
    in_order = sorted(units, key=lambda unit: runner.order.index(block_of[unit]))  # stable: the plan's order in a block
    own = [UNCHANGED, *ranks.share(in_order)]
    work = [
        (unit, by, journal)
        for unit in own
        for by, journal in zip(disturbances, journals, strict=True)
        if unit not in journal.results
    ]
    costs = [_blocks_to_run(runner.order, block_of.get(unit), len(by.levels)) for unit, by, _ in work]
    with logging.tqdm(total=sum(costs), desc="Scoring units", unit="block", disable=ranks.rank() > 0) as bar:
        for (unit, by, journal), blocks in zip(work, costs, strict=True):
            changes = [partial(by.change, units[unit], level) for level in by.levels] if unit in units else []
            journal.add(unit, runner.measure(block_of.get(unit), changes))
            bar.update(blocks)
    tables = []
    for by, of_method, journal in zip(disturbances, facts, journals, strict=True):
        measured = {key: result for found in reversed(ranks.gather(journal.results)) for key, result in found.items()}
        (base,) = measured[UNCHANGED]
        raw = {unit: metric.worse * (math.fsum(measured[unit]) / len(by.levels) - base) for unit in units}
        tables.append(SensitivityTable(by.method, recipe.metric, base, raw, plan, by.settings, fingerprint(of_method)))
    return tables


def _blocks_to_run(order: Sequence[str], block: str | None, variants: int) -> int:
    """Work of measuring a unit: later blocks have shorter suffixes, and the progress bar foretells the end."""
    return len(order) if block is None else variants * (len(order) - order.index(block))


def modules_by_unit(model: nn.Module, plan: BitPlan) -> dict[str, dict[str, nn.Module]]:
    """Unit → name → module, in the plan's order."""
    units: dict[str, dict[str, nn.Module]] = {}
    for module in plan.modules:
        units.setdefault(module.unit, {})[module.name] = model.get_submodule(module.name)
    return units


def with_labels(model: PreTrainedModel, batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """The batches, with the model's own predictions as labels where there are none (classifiers).

    Raises:
        CalibrationError: there are none, and the model does not predict one class out of several.
    """
    if all("labels" in batch for batch in batches):
        return tuple(batches)
    if not predicts_one_class(model):
        raise CalibrationError(
            f"the calibration data have no labels, and {type(model).__name__} predicts no single class that could stand"
            " for them; set label_column"
        )
    logger.info("The calibration data have no labels: the model is measured against its own predictions.")

    @torch.no_grad()
    def labelled(batches: Sequence[Batch]) -> tuple[Batch, ...]:
        predicted = [model(**batch).logits.argmax(-1).cpu() for batch in batches_on(batches, model)]
        return tuple({**batch, "labels": labels} for batch, labels in zip(batches, predicted, strict=True))

    return backing_off(labelled, batches)


def open_journal(recipe: Recipe, facts: Mapping[str, Any]) -> Journal:
    """The results in the recipe's work folder, in a folder of the method's own."""
    name = "-".join(facts[key] for key in ("method", "estimator") if key in facts)
    return Journal(None if recipe.work_dir is None else Path(recipe.work_dir) / name, facts)


def facts_of(
    model: PreTrainedModel, plan: BitPlan, calibration: CalibrationSet, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What decides the figures of a method, as JSON values: weights, units, data, settings."""
    units = [(module.name, module.unit) for module in plan.modules]
    return {
        "model": type(model).__name__,
        "weights": hash_of_weights(model),
        "units": hashlib.sha256(repr(units).encode()).hexdigest(),
        "calibration": calibration.description["sha256"],
        **settings,
    }


@torch.no_grad()
def hash_of_weights(model: nn.Module) -> str:
    """SHA-256 of the names and bytes of all parameters and saved buffers, offloaded ones included."""
    digest = hashlib.sha256()
    for prefix, module in model.named_modules():
        with align_module_device(module):
            own = {**module._parameters, **module._buffers}
            for name, tensor in own.items():
                if tensor is None or name in module._non_persistent_buffers_set:
                    continue
                digest.update(f"{prefix}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
