"""From measurements to a `SensitivityTable`: what a result belongs to, who measures what, what is kept on disk."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
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
from ..plan import BitPlan, SensitivityTable
from ..recipe import Recipe
from ..work_folder import Journal, fingerprint
from .engine import SuffixRunner, backing_off
from .metrics import METRICS, Batch

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

Level = float
UNCHANGED = "the unchanged model"


def score_by_change(
    model: PreTrainedModel,
    plan: BitPlan,
    calibration: CalibrationSet,
    recipe: Recipe,
    levels: Sequence[Level],
    change: Callable[[Mapping[str, nn.Module], Level], AbstractContextManager[None]],
    settings: Mapping[str, Any],
) -> SensitivityTable:
    """How much worse the model's metric gets when each unit of a plan is changed.

    Args:
        model: dense, in evaluation mode; left as it was, whatever happens.
        plan: the units; its bits are not read.
        calibration: what the metric is measured on.
        recipe: `method`, `metric`, `work_dir`.
        levels: the strengths of the change that are tried.
        change: (name → module of a unit, level) → context in which their weights are changed.
        settings: those that decide the result, for the table and the work folder.

    Returns:
        Per unit the change of the metric for the worse, averaged over the levels.
    """
    metric = METRICS[recipe.metric]
    facts = facts_of(model, plan, calibration, {"method": recipe.method, "metric": recipe.metric, **settings})
    journal = open_journal(recipe, facts)
    units = modules_by_unit(model, plan)
    block_of = {module.unit: module.block for module in plan.modules}
    batches = with_labels(model, calibration.batches)
    runner = SuffixRunner(model, batches, list(dict.fromkeys(block_of.values())), metric)
    in_order = sorted(units, key=lambda unit: runner.order.index(block_of[unit]))  # stable: the plan's order in a block
    own = [UNCHANGED, *ranks.share(in_order)]
    remaining = [unit for unit in own if unit not in journal.results]
    work = {unit: _blocks_to_run(runner.order, block_of.get(unit), len(levels)) for unit in remaining}
    with logging.tqdm(total=sum(work.values()), desc="Scoring units", unit="block", disable=ranks.rank() > 0) as bar:
        for unit, blocks in work.items():
            changes = [partial(change, units[unit], level) for level in levels] if unit in units else []
            journal.add(unit, runner.measure(block_of.get(unit), changes))
            bar.update(blocks)
    measured = {key: result for found in reversed(ranks.gather(journal.results)) for key, result in found.items()}
    (base,) = measured[UNCHANGED]
    return SensitivityTable(
        method=recipe.method,
        metric=recipe.metric,
        base=base,
        raw={unit: metric.worse * (math.fsum(measured[unit]) / len(levels) - base) for unit in units},
        blocks=block_of,
        settings=settings,
        fingerprint=fingerprint(facts),
    )


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
    if model.num_labels < 2 or model.config.problem_type == "multi_label_classification":
        raise CalibrationError(
            f"the calibration data have no labels, and {type(model).__name__} predicts no single class that could stand"
            " for them; set label_column"
        )
    logger.info("The calibration data have no labels: the model is measured against its own predictions.")

    @torch.no_grad()
    def labelled(batches: Sequence[Batch]) -> tuple[Batch, ...]:
        predicted = [model(**batch).logits.argmax(-1).cpu() for batch in batches_on(batches, model.device)]
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
