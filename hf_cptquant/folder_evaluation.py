"""Measuring a model that lies in a folder, against another one that may not fit into memory beside it.

What can go wrong without weights (no such head, another vocabulary, unusable data) is found on empty models first. Both
models are loaded if the bytes of their weights, and of the logits of a batch, are fewer than are free; otherwise the
original runs first, its predictions wait in a temporary file, and it is gone before the other one is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import get_max_memory
from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedModel
from transformers.utils import logging

from .calibration import LOGIT_BYTES
from .config import CPTQuantConfig
from .errors import EvaluationError
from .evaluate import check_comparable, evaluation_data, measure_windows, name_of, results_of
from .model_view import TASKS, class_named_in, read_config, task_of
from .predictions import kept_in_a_file, predictions, predictions_per_window
from .results import EvaluationResult
from .sensitivity.metrics import Batch

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

WORKING_BYTES = 4 * LOGIT_BYTES  # the logits of a batch and what they are compared by, in float32


def evaluate_folder(
    source: str, config: CPTQuantConfig, against: str | None = None, device_map: str | None = None
) -> list[EvaluationResult]:
    """Load a model and measure it, as `evaluate.evaluate_model`.

    Args:
        source: folder (or name on the Hub) of a model, quantized or not.
        config: the data.
        against: the original, in the same way.
        device_map: as for `from_pretrained`, for both.

    Raises:
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
    needed = _weight_bytes(empty) + _weight_bytes(original) + WORKING_BYTES
    free = _free_bytes(device_map)
    if needed <= free:
        model, beside = _load(source, device_map), _load(against, device_map)
        figures = measure_windows(model, data.batches, predictions(beside, data.batches))
    else:
        logger.warning(
            f"Both models need about {needed / 1e9:.1f} GB, of which {free / 1e9:.1f} GB are free: the original is run"
            " first, and its predictions wait in a temporary file."
        )
        figures = _measure_in_turn(source, original, data.batches, against, device_map)
    return results_of(figures, empty, data, recipe, name_of(original))


def _measure_in_turn(
    source: str, original: PreTrainedModel, batches: Sequence[Batch], against: str, device_map: str | None
) -> dict[str, np.ndarray]:
    task = str(task_of(original))
    windows = sum(len(batch["input_ids"]) for batch in batches)
    classes = original.num_labels if task == "sequence-classification" else original.config.get_text_config().vocab_size
    nbytes = windows * predictions_per_window(task, batches[0]) * classes * _dtype(original).itemsize
    with kept_in_a_file(predictions(_load(against, device_map), batches, "Running the original"), nbytes) as kept:
        clear_device_cache(garbage_collection=True)
        return measure_windows(_load(source, device_map), batches, kept)


def _empty_model(source: str) -> PreTrainedModel:
    """A model without weights, by its config."""
    config = read_config(source)
    model_class = class_named_in(config)
    if model_class is None:
        named = ", ".join(config.architectures or ()) or "no class"
        raise EvaluationError(f"{source} holds {named}, with none of the heads that are evaluated: {', '.join(TASKS)}")
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
