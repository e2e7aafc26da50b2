"""Measuring a model: figures over windows of data, alone or against the original, and the losses of plans.

Every figure is found for each window, so that its confidence interval is the bootstrap's (`results.py`). All windows of
a run hold equally many predictions, so the mean over windows is the mean over predictions. What two models predict is
compared batch by batch and no logits are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import has_offloaded_params
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from . import ranks
from .calibration import CalibrationSet, facts_of, load_evaluation
from .config import CPTQuantConfig
from .errors import EvaluationError
from .grid import dequantize
from .model_view import CLASSIFIERS, EVALUATED, predicts_one_class, task_of
from .modules import matrix_of, weight_of
from .plan import BitPlan
from .predictions import predictions, predictions_per_window, targets
from .recipe import Recipe
from .results import EvaluationResult, Provenance, figure
from .rounding import round_nearest
from .sensitivity.engine import changed_weights
from .sensitivity.metrics import LOSS_CHUNK, Batch, mean_loss, not_finite
from .sources import EVALUATION_SPLITS

METRIC_MODULES = Path(__file__).with_name("metrics")
"""Folder of modules for `evaluate.load`, which need no network: `perplexity`, `pseudo_perplexity`, `accuracy`."""

LOSS_METRICS = {"causal-lm": "perplexity", "seq2seq-lm": "perplexity", "masked-lm": "pseudo_perplexity"}


def evaluate_model(
    model: PreTrainedModel, config: CPTQuantConfig, against: PreTrainedModel | None = None
) -> list[EvaluationResult]:
    """Measure a model on data, with 95 % confidence intervals.

    A causal language model or an encoder-decoder is measured by its perplexity, a masked language model by its
    pseudo-perplexity (each token masked in turn, arXiv 1910.14659), a classifier by its accuracy.

    Args:
        model: quantized or not, with one of these heads.
        config: `dataset` (one from the Hub gives its text for tests), `tokenizer`, `num_samples`, `sequence_length`,
            `batch_size`, `text_column`, `label_column`, `seed`; others have no effect.
        against: the original, whose figures are measured on the same data; then also how much the loss rises, the
            KL divergence of the predictions and how often the most probable ones agree.

    Raises:
        EvaluationError: the model has no such head, there are no labels, or the original does not fit to the model.
        CalibrationError: the data or the tokenizer cannot be used, or the predictions are not finite.
        ModelError: a weight is not finite.
    """
    recipe = config.recipe()
    if against is not None:
        check_comparable(model, against)
    data = evaluation_data(model, recipe, compared=against is not None)
    with evaluating(model):
        if against is None:
            figures = measure_windows(model, data.batches)
        else:
            with evaluating(against):
                figures = measure_windows(model, data.batches, predictions(against, data.batches))
    return results_of(figures, model, data, recipe, None if against is None else name_of(against))


def figure_of_texts(
    metric: str, texts: Sequence[str], model: PreTrainedModel, **settings: Any
) -> dict[str, float | int | None]:
    """What the modules in `METRIC_MODULES` give for a language model: the metric by its name, `"low"` and `"high"` (its
    confidence interval), `"windows"` and `"tokens"`.

    Args:
        metric: `"perplexity"` or `"pseudo_perplexity"`.
        settings: those that `evaluate_model` reads.

    Raises:
        EvaluationError: it is not the metric of this kind of model.
        CalibrationError, ModelError: as `evaluate_model`.
    """
    own = LOSS_METRICS.get(str(task_of(model)))
    if own != metric:
        raise EvaluationError(f"{metric} is not for {type(model).__name__}; models of this kind have {own or 'none'}")
    (result,) = evaluate_model(model, CPTQuantConfig(dataset=texts, **settings))
    limits = {"low": result.low, "high": result.high}
    return {metric: result.value, **limits, "windows": result.windows, "tokens": result.tokens}


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model in evaluation mode, and back."""
    training = model.training
    try:
        model.eval()
        yield
    finally:
        model.train(training)


def evaluation_data(model: PreTrainedModel, recipe: Recipe, compared: bool) -> CalibrationSet:
    """The data of a recipe to measure a model on; its weights are not read.

    Args:
        compared: whether there is an original to compare with, which needs no labels.

    Raises:
        EvaluationError: the model has no head that is measured, or there are no labels.
        CalibrationError: the data or the tokenizer cannot be used.
    """
    task = task_of(model)
    if task not in EVALUATED:
        raise EvaluationError(
            f"{type(model).__name__} has none of the heads that are evaluated: {', '.join(EVALUATED)}"
        )
    if not predicts_one_class(model):
        raise EvaluationError(f"{type(model).__name__} predicts no single class out of several, which accuracy needs")
    data = load_evaluation(recipe, facts_of(model))
    if "labels" not in data.batches[0] and not compared:
        raise EvaluationError(
            f"{data.description['source']} has no labels, which accuracy needs; set label_column, or compare with the"
            " original"
        )
    return data


def check_comparable(model: PreTrainedModel, original: PreTrainedModel) -> None:
    """Raise `EvaluationError` unless two models predict the same things from the same inputs; weights are not read."""
    tasks = task_of(model), task_of(original)
    of_both = [facts_of(each) for each in (model, original) if task_of(each)]
    facts = {
        "task": tasks,
        "vocabulary": tuple(each.vocabulary for each in of_both),
        "number of classes": tuple(each.classes for each in of_both) if tasks[0] in CLASSIFIERS else (0, 0),
    }
    for name, (own, other) in facts.items():
        if own != other:
            raise EvaluationError(
                f"{name_of(original)} is not the original of {name_of(model)}: the {name} is {other} there and {own}"
                " here"
            )


def name_of(model: PreTrainedModel) -> str:
    """A model's name on the Hub, the name of its folder, or that of its class if it was made in memory."""
    if not model.name_or_path:
        return type(model).__name__
    path = Path(model.name_or_path)
    return path.absolute().name if path.is_dir() else model.name_or_path


def measure_windows(
    model: PreTrainedModel, batches: Sequence[Batch], original: Iterable[Tensor] | None = None
) -> dict[str, np.ndarray]:
    """Figures of every window, each float64 `[windows]`: a mean over the predictions of the window.

    Args:
        model: in evaluation mode.
        batches: of `evaluation_data`.
        original: the original's predictions for these batches, in order.

    Returns:
        With labels `"loss"` (nats) and `"accuracy"`; with an original also `"kl_divergence"` (of the original's
        probabilities from the model's, nats) and `"top1_agreement"`; with both `"base_loss"` and `"base_accuracy"`.

    Raises:
        CalibrationError, ModelError: the predictions are not finite.
        EvaluationError: the original's are not.
    """
    task = str(task_of(model))
    found: dict[str, list[np.ndarray]] = {}
    base: Iterator[Tensor] | None = None if original is None else iter(original)
    for batch, logits in zip(batches, predictions(model, batches, "Evaluating"), strict=True):
        of_original = None if base is None else next(base)
        if of_original is not None and bool(of_original.isnan().any()):
            raise EvaluationError("the original predicts NaN on these data; are its weights and dtype right?")
        of_batch = compare(logits, targets(task, batch), of_original)
        for name, values in of_batch.items():
            of_windows = values.double().mean(1).numpy()
            if not np.isfinite(of_windows).all():
                raise not_finite(model, batch, f"the {name} is {of_windows[~np.isfinite(of_windows)][0]}")
            found.setdefault(name, []).append(of_windows)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def compare(logits: Tensor, wanted: Tensor | None, original: Tensor | None) -> dict[str, Tensor]:
    """The figures of every prediction, on the CPU: float32 or bool `[windows, predictions]`; see `measure_windows`.

    Args:
        logits: `[windows, predictions, classes]`.
        wanted: int64 `[windows, predictions]`, or None without labels.
        original: the original's logits, in the shape of `logits`.
    """
    rows = max(1, LOSS_CHUNK // logits.shape[-1])  # in float32 at a time
    found: dict[str, list[Tensor]] = {}
    given = (logits.flatten(0, 1), None if original is None else original.flatten(0, 1))
    for start in range(0, len(given[0]), rows):
        log_q, log_p = (
            None if each is None else each[start : start + rows].to(logits.device).float().log_softmax(-1)
            for each in given
        )
        assert log_q is not None
        of_rows: dict[str, Tensor] = {}
        best_q, best_p = (None if log is None else log.argmax(-1) for log in (log_q, log_p))
        if wanted is not None:
            labels = wanted.flatten()[start : start + rows].to(logits.device)
            for prefix, log, best in (("", log_q, best_q), ("base_", log_p, best_p)):
                if log is not None:
                    of_rows[f"{prefix}loss"] = F.nll_loss(log, labels, reduction="none")
                    of_rows[f"{prefix}accuracy"] = best == labels
        if log_p is not None:
            p = log_p.exp()
            of_rows["kl_divergence"] = torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)
            of_rows["top1_agreement"] = best_p == best_q
        for name, values in of_rows.items():
            found.setdefault(name, []).append(values.cpu())
    return {name: torch.cat(parts).view(logits.shape[:2]) for name, parts in found.items()}


def results_of(
    figures: Mapping[str, np.ndarray],
    model: PreTrainedModel,
    data: CalibrationSet,
    recipe: Recipe,
    against: str | None,
    of_control: Mapping[str, np.ndarray] | None = None,
    control_plan: str | None = None,
) -> list[EvaluationResult]:
    """What goes into the record: the figures of all windows with their intervals.

    Args:
        figures: of `measure_windows`.
        against: name of the original.
        of_control: figures of the control against the same original.
        control_plan: what the control is, in words.
    """
    task = str(task_of(model))
    windows = data.description["sequences"]
    source = Provenance(
        dataset=data.description["source"],
        split=EVALUATION_SPLITS.get(recipe.dataset) if isinstance(recipe.dataset, str) else None,
        windows=windows,
        sequence_length=data.description["sequence_length"],
        tokens=windows * predictions_per_window(task, data.batches[0]),
        seed=recipe.seed,
        sha256=data.description["sha256"],
        against=against,
    )
    own, others = (_by_metric(task, each) for each in (figures, of_control or {}))
    base = figures.get("base_loss" if task in LOSS_METRICS else "base_accuracy")
    of_original = dict.fromkeys((*LOSS_METRICS.values(), "accuracy"), base)
    return [
        figure(source, metric, of_windows, of_original.get(metric), others.get(metric), control_plan)
        for metric, of_windows in own.items()
    ]


def _by_metric(task: str, figures: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Figures of `measure_windows` by the metrics of results."""
    metric, measured = (LOSS_METRICS[task], "loss") if task in LOSS_METRICS else ("accuracy", "accuracy")
    found = {metric: figures[measured]} if measured in figures else {}
    if "base_loss" in figures:
        found["loss_increase"] = figures["loss"] - figures["base_loss"]
    return found | {name: figures[name] for name in ("kl_divergence", "top1_agreement") if name in figures}


def perplexity(model: PreTrainedModel, windows: Tensor, batch_size: int = 8, desc: str | None = "Perplexity") -> float:
    """exp of the mean negative log-likelihood over the predicted tokens of all windows.

    Args:
        model: a causal language model.
        windows: int64 `[windows, length]`, non-overlapping.
        batch_size: windows at a time.
        desc: text of the progress bar, or None for no bar.
    """
    batches = [{"input_ids": rows, "labels": rows} for rows in windows.split(batch_size)]
    return math.exp(mean_loss(model, batches, desc))


def losses_of_plans(model: PreTrainedModel, plans: Mapping[str, BitPlan], batches: Sequence[Batch]) -> dict[str, float]:
    """Mean loss (nats) of a dense model with its weights rounded to nearest as each of some plans says.

    Args:
        model: left as it was, whatever happens.
        plans: by name; several processes divide them among themselves.
        batches: with labels.

    Raises:
        CalibrationError, ModelError: a loss is not finite.
    """
    own = logging.tqdm(ranks.share(list(plans)), desc="Measuring plans", disable=ranks.rank() > 0)
    found = ranks.gather({name: _loss_of_plan(model, plans[name], batches) for name in own})
    losses = {name: loss for part in found for name, loss in part.items()}
    return {name: losses[name] for name in plans}


@torch.no_grad()
def _loss_of_plan(model: PreTrainedModel, plan: BitPlan, batches: Sequence[Batch]) -> float:
    with rounded_as(model, plan):
        return mean_loss(model, batches)


@contextmanager
def rounded_as(
    model: PreTrainedModel, plan: BitPlan, left: Mapping[str, float] = MappingProxyType({})
) -> Iterator[None]:
    """A dense model with its weights rounded to nearest as a plan says, which are put back on leaving.

    Args:
        left: module → share of its squared error that is left; of the others all of it.
    """
    schemes = {module.name: module.scheme for module in plan.packed}
    for module in plan.packed:  # in memory those that share a weight have one parameter
        others = (name for name in module.shared_with if has_offloaded_params(model.get_submodule(name)))
        schemes |= dict.fromkeys(others, module.scheme)
    modules = {name: model.get_submodule(name) for name in schemes}

    def rounded(name: str, weight: Tensor) -> Tensor:
        kind = type(modules[name])
        found = round_nearest(matrix_of(kind, weight).contiguous(), schemes[name])
        new = weight_of(kind, dequantize(found.integers, found.scale, found.zero_point), weight.shape)
        return torch.lerp(weight, new, math.sqrt(left.get(name, 1.0)))

    with changed_weights(modules, rounded):
        yield
