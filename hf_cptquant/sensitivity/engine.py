"""Measuring a model with one unit changed at a time, without running what the change cannot reach.

A unit lies in one block, and the blocks that run before it see no difference. So the blocks are visited in the order in
which they run; the outputs of the finished ones are carried along, and for each variant the model's own forward runs
with every finished block replaced by its carried output. Nothing about a block's arguments has to be known, the results
are those of the full forward bit for bit, and on average half of the work is left.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration import CalibrationSet, batches_on
from ..config import Recipe
from ..errors import CalibrationError, ModelError
from ..plan import BitPlan

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

Batch = Mapping[str, Tensor]
Level = float
Variant = TypeVar("Variant")
Outputs = dict[str, Any]  # stack of blocks (the name of their list) → output of its last finished block


class _BlockReached(BaseException):
    """Ends a forward pass early once the output that was wanted is there."""


def mean_loss(model: PreTrainedModel, batches: Iterable[Batch], desc: str | None = None) -> float:
    """Mean over all sequences of the model's own loss (nats), computed in float64 from the losses of the batches.

    Args:
        batches: keyword arguments of `model.forward` with labels; every sequence has equally many labels.
        desc: text of a progress bar over the batches, or None for no bar.
    """
    listed = list(batches)
    bar = logging.tqdm(listed, desc=desc) if desc else listed
    return _mean([(_loss(model, batch), len(batch["input_ids"])) for batch in batches_on(bar, model.device)])


def with_labels(model: PreTrainedModel, batches: Sequence[Batch]) -> tuple[Batch, ...]:
    """The batches, with the model's own predictions as labels where there are none (classifiers)."""
    if all("labels" in batch for batch in batches):
        return tuple(batches)
    logger.info("The calibration data have no labels: the model is measured against its own predictions.")
    with torch.no_grad():
        predicted = [model(**batch).logits.argmax(-1).cpu() for batch in batches_on(batches, model.device)]
    return tuple({**batch, "labels": labels} for batch, labels in zip(batches, predicted, strict=True))


def score_units(
    model: PreTrainedModel,
    plan: BitPlan,
    calibration: CalibrationSet,
    levels: Sequence[Level],
    change: Callable[[dict[str, nn.Module], Level], AbstractContextManager[None]],
) -> tuple[float, dict[str, float]]:
    """How much the loss rises when each unit of a plan is changed.

    Args:
        model: dense, in evaluation mode; left as it was, whatever happens.
        plan: the units; its bits are not read.
        calibration: what the loss is measured on.
        levels: the strengths of the change that are tried.
        change: (name → module of a unit, level) → context in which their weights are changed.

    Returns:
        The loss of the unchanged model, and unit → rise of the loss, averaged over the levels (nats).
    """
    units: dict[str, dict[str, nn.Module]] = {}
    variants: dict[str, dict[tuple[str, Level], None]] = {}
    for module in plan.modules:
        units.setdefault(module.unit, {})[module.name] = model.get_submodule(module.name)
        for level in levels:
            variants.setdefault(module.block, {})[module.unit, level] = None

    batches = with_labels(model, calibration.batches)
    base = mean_loss(model, batches, desc="Measuring the model")
    rises: dict[str, list[float]] = {unit: [] for unit in units}
    with logging.tqdm(total=len(units) * len(levels), desc="Scoring units") as bar:
        for (unit, _), loss in measure_variants(
            model, batches, variants, lambda variant: change(units[variant[0]], variant[1])
        ):
            rises[unit].append(loss - base)
            bar.update()
    return base, {unit: math.fsum(found) / len(levels) for unit, found in rises.items()}


@contextmanager
def changed_weights(modules: Mapping[str, nn.Module], new: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Give modules other weights, and put the very same tensors back on leaving.

    Args:
        modules: name → module with a `weight`.
        new: (name, weight) → another weight of the same shape and dtype; the given one stays as it is.
    """
    originals = {name: module.weight.data for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.weight.data = new(name, originals[name])
        yield
    finally:
        for name, module in modules.items():
            module.weight.data = originals[name]


def measure_variants(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    variants: Mapping[str, Iterable[Variant]],
    change: Callable[[Variant], AbstractContextManager[None]],
) -> Iterator[tuple[Variant, float]]:
    """The mean loss of each of many changes to single blocks.

    Args:
        model: in evaluation mode.
        batches: as for `mean_loss`.
        variants: block → the changes to try in it.
        change: variant → context in which weights of its block are changed; left before the result is yielded.

    Yields:
        (variant, mean loss) in the order in which the blocks run.
    """
    blocks = {name: model.get_submodule(name) for name in variants}
    order = running_order(model, batches[0], blocks)
    carried: list[Outputs] = [{} for _ in batches]
    for index, name in enumerate(order):
        finished = {block: blocks[block] for block in order[:index]}
        for variant in variants[name]:
            with change(variant):
                losses = _suffix_losses(model, batches, finished, carried)
            yield variant, _mean(losses)
        if index + 1 < len(order):
            _advance(model, batches, finished, carried, name, blocks[name])


def running_order(model: PreTrainedModel, batch: Batch, blocks: Mapping[str, nn.Module]) -> list[str]:
    """Names of the blocks in the order in which a forward pass calls them.

    Raises:
        ModelError: a block runs never or more than once, so that its output cannot be carried.
    """
    calls: list[str] = []
    with ExitStack() as hooks:
        for name, block in blocks.items():
            hooks.enter_context(block.register_forward_hook(lambda *_, name=name: calls.append(name)))
        _loss(model, next(batches_on([_first_sequence(batch)], model.device)))
    odd = [name for name in blocks if calls.count(name) != 1]
    if odd:
        raise ModelError(
            f"{odd[0]} runs {calls.count(odd[0])} times in one forward pass; blocks that run once are supported"
        )
    return calls


def _first_sequence(batch: Batch) -> Batch:
    return {name: tensor[:1] for name, tensor in batch.items()}


def _mean(losses: Sequence[tuple[float, int]]) -> float:
    mean = math.fsum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    if not math.isfinite(mean):
        raise CalibrationError(
            f"the model's loss on the calibration data is {mean}; try dtype=torch.float32 or other data"
        )
    return mean


@torch.no_grad()
def _loss(model: PreTrainedModel, batch: Batch) -> float:
    cache = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return float(model(**batch, **cache).loss)


def _suffix_losses(
    model: PreTrainedModel, batches: Sequence[Batch], finished: Mapping[str, nn.Module], carried: Sequence[Outputs]
) -> list[tuple[float, int]]:
    losses = []
    for batch, outputs in zip(batches_on(batches, model.device), carried, strict=True):
        with _replayed(finished, outputs):
            losses.append((_loss(model, batch), len(batch["input_ids"])))
    return losses


def _advance(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    finished: Mapping[str, nn.Module],
    carried: Sequence[Outputs],
    name: str,
    block: nn.Module,
) -> None:
    """Run one more block on every batch and carry its output."""

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs[_stack(name)] = output
        raise _BlockReached

    with block.register_forward_hook(keep):
        for batch, outputs in zip(batches_on(batches, model.device), carried, strict=True):
            with _replayed(finished, outputs):
                try:
                    _loss(model, batch)
                except _BlockReached:
                    continue


def _stack(block: str) -> str:
    return block.rpartition(".")[0]


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output


@contextmanager
def _replayed(finished: Mapping[str, nn.Module], outputs: Outputs) -> Iterator[None]:
    """Let every finished block return the last output of its stack instead of running.

    Only the last finished block's output reaches anything that still runs, so one output a stack is enough.
    """
    replaced = {block: block.__dict__.get("forward") for block in finished.values()}
    for name, block in finished.items():
        block.forward = _returning(outputs[_stack(name)])
    try:
        yield
    finally:
        for block, forward in replaced.items():
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def fingerprint(
    model: PreTrainedModel,
    plan: BitPlan,
    calibration: CalibrationSet,
    recipe: Recipe,
    names: Sequence[str],
    base: float,
) -> str:
    """Identifies what the figures of a method belong to.

    Args:
        names: the settings of the recipe that the method reads.
        base: the loss of the unchanged model, whose exact value stands for the weights.
    """
    facts = {
        "class": type(model).__name__,
        "modules": [(module.name, module.unit, module.out_features, module.in_features) for module in plan.modules],
        "base": base,
        "calibration": calibration.description["sha256"],
        "recipe": {name: getattr(recipe, name) for name in ("method", *names)},
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
