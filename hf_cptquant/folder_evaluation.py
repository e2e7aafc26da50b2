"""Measuring a model that lies in a folder, against another one that may not fit into memory beside it.

What can go wrong without weights (no such head, another vocabulary, unusable data) is found on empty models first. Both
models are loaded if the bytes of their weights, and of the logits of a batch, are fewer than are free; otherwise the
original runs first, its predictions wait in a temporary file, and it is gone before the other one is loaded.

A control says what the plan is worth: the original with one bit width for all weights, as near to the size of the
quantized model as there is one, rounded to nearest and measured on the same windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import get_max_memory
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel
from transformers.utils import logging

from .calibration import LOGIT_BYTES, sequences_in
from .config import CPTQuantConfig
from .errors import EvaluationError
from .evaluate import check_comparable, evaluation_data, measure_windows, name_of, results_of
from .experts import linear_experts
from .model_view import CLASSIFIERS, EVALUATED, class_named_in, read_config, task_of
from .plan import PACKED_BITS, BitPlan
from .predictions import kept_in_a_file, predictions, predictions_per_window
from .quantize import apply_plan, dequantize_model
from .record import QuantizationRecord
from .results import EvaluationResult
from .sensitivity.metrics import Batch

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

WORKING_BYTES = 4 * LOGIT_BYTES  # the logits of a batch and what they are compared by, in float32


def evaluate_folder(
    source: str,
    config: CPTQuantConfig,
    against: str | None = None,
    device_map: str | None = None,
    control: BitPlan | None = None,
) -> list[EvaluationResult]:
    """Load a model and measure it, as `evaluate.evaluate_model`.

    Args:
        source: folder (or name on the Hub) of a model, quantized or not.
        config: the data.
        against: the original, in the same way.
        device_map: as for `from_pretrained`, for both.
        control: a plan by which the original is rounded to nearest and measured, too (`uniform_control`).

    Raises:
        PlanError: the control is a plan for another model.
        ModelError: there is no model, or a weight is not finite.
        EvaluationError, CalibrationError: as `evaluate_model`; or there is no room for the original's predictions.
    """
    recipe = config.recipe()
    empty = _empty_model(source)
    if against is None:
        data = evaluation_data(empty, recipe, compared=False)
        figures = measure_windows(_load(source, device_map), data.batches)
        return results_of(figures, empty, data, recipe, None)
    original = _empty_model(against)
    check_comparable(empty, original)
    data = evaluation_data(empty, recipe, compared=True)
    figures = _measure(partial(_load, source, device_map), empty, original, data.batches, against, device_map)
    if control is None:
        return results_of(figures, empty, data, recipe, name_of(original))
    load = partial(_load_rounded, against, device_map, control)
    of_control = _measure(load, original, original, data.batches, against, device_map)
    return results_of(figures, empty, data, recipe, name_of(original), of_control, _in_words(control))


def uniform_control(record: QuantizationRecord) -> BitPlan:
    """A plan with the same bits everywhere, in the groups of the record's settings: of those possible the one whose
    size is nearest to that of the record's plan."""
    units = {module.unit for module in record.plan.modules}
    grid = record.settings["group_size"], record.settings["symmetric"]
    plans = [record.plan.with_bits(dict.fromkeys(units, bits), *grid) for bits in PACKED_BITS]
    return min(plans, key=lambda plan: abs(plan.nbytes - record.plan.nbytes))


def _in_words(control: BitPlan) -> str:
    schemes = ", ".join(sorted({module.scheme.in_words for module in control.packed}))
    return f"{schemes}; {control.bits_per_weight:.3f} bits per weight with scales, {control.nbytes / 1e6:.1f} MB"


def _load_rounded(source: str, device_map: str | None, plan: BitPlan) -> PreTrainedModel:
    """A dense model with its weights rounded to nearest."""
    model = _load(source, device_map)
    with linear_experts(model):
        apply_plan(model, plan)
    dequantize_model(model)
    return model


def _measure(
    load: Callable[[], PreTrainedModel],
    empty: PreTrainedModel,
    original: PreTrainedModel,
    batches: Sequence[Batch],
    against: str,
    device_map: str | None,
) -> dict[str, np.ndarray]:
    """The figures of a model against the original, beside it or after it.

    Args:
        load: gives the model.
        empty, original: the model and the original, without weights.
        against: where the original is.
    """
    needed = _weight_bytes(empty) + _weight_bytes(original) + WORKING_BYTES
    free = _free_bytes(device_map)
    if needed <= free:
        model, beside = load(), _load(against, device_map)
        return measure_windows(model, batches, predictions(beside, batches))
    logger.warning(
        f"Both models need about {needed / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free: the original is run"
        " first, and its predictions wait in a temporary file."
    )
    return _measure_in_turn(load, original, batches, against, device_map)


def _measure_in_turn(
    load: Callable[[], PreTrainedModel],
    original: PreTrainedModel,
    batches: Sequence[Batch],
    against: str,
    device_map: str | None,
) -> dict[str, np.ndarray]:
    task = str(task_of(original))
    windows = sum(sequences_in(batch) for batch in batches)
    classes = original.num_labels if task in CLASSIFIERS else original.config.get_text_config().vocab_size
    nbytes = windows * predictions_per_window(task, batches[0]) * classes * _dtype(original).itemsize
    with kept_in_a_file(predictions(_load(against, device_map), batches, "Running the original"), nbytes) as kept:
        clear_device_cache(garbage_collection=True)
        return measure_windows(load(), batches, kept)


def _empty_model(source: str) -> PreTrainedModel:
    """A model without weights, by its config."""
    config = read_config(source)
    model_class = class_named_in(config)
    if model_class is None:
        named = ", ".join(config.architectures or ()) or "no class"
        raise EvaluationError(
            f"{source} holds {named}, with none of the heads that are evaluated: {', '.join(EVALUATED)}"
        )
    with torch.device("meta"):
        return model_class(config)


def _load(source: str, device_map: str | None) -> PreTrainedModel:
    model_class = class_named_in(read_config(source))
    assert model_class is not None, "an empty one was made"
    return model_class.from_pretrained(source, dtype="auto", device_map=device_map).eval()


def _dtype(empty: PreTrainedModel) -> torch.dtype:
    return empty.config.dtype or torch.float32


def _weight_bytes(empty: PreTrainedModel) -> int:
    """Of the files in the model's folder, or as many as its parameters have."""
    files = list(Path(empty.name_or_path).glob("*.safetensors")) if empty.name_or_path else []
    if files:
        return sum(file.stat().st_size for file in files)
    return sum(parameter.numel() for parameter in empty.parameters()) * _dtype(empty).itemsize


def _free_bytes(device_map: str | None) -> int:
    """Memory that is free where models are loaded: that of all accelerators if they are used, otherwise the CPU's."""
    free = get_max_memory()
    accelerators = [size for device, size in free.items() if device != "cpu"]
    return sum(accelerators) if device_map is not None and accelerators else free.get("cpu", sum(accelerators))
