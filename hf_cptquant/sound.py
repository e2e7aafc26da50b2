"""Sound → what speech models read: batches of features, as feature extractors and processors give them.

Raw recordings are not read here: every family of models has its own sampling rate, features and way of writing text
down, and its processor knows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import CalibrationError
from .recipe import WAYS_WITH_SOUND, Recipe, is_batch
from .sources import draw

SOUND_INPUTS = ("input_features", "input_values")  # what feature extractors give, and most models of sound read
SAMPLES_PER_TOKEN = 320  # of a wave: the models that read waves give a row for 20 ms at 16 kHz
IGNORED = -100  # a label that does not count


def sound_fields(recipe: Recipe, task: str, inputs: Sequence[str], classes: int) -> tuple[dict[str, Tensor], str]:
    """Inputs of a speech model, each `[clips, …]`, labels among them, and what to call the data.

    Args:
        recipe: `dataset`, `metric`, `num_samples`, `seed`.
        task: of the model.
        inputs: names that its `forward` takes, `main_input_name` first.
        classes: outputs of a classifier.

    Raises:
        CalibrationError: no batches of features, some that do not fit together or that the model does not take, or no
            labels where they are needed.
    """
    dataset, main = recipe.dataset, inputs[0]
    batches = [dataset] if isinstance(dataset, (Mapping, Tensor)) else dataset
    if isinstance(batches, (list, tuple)) and batches and all(isinstance(batch, Tensor) for batch in batches):
        batches = [{main: batch} for batch in batches]
    if not isinstance(batches, (list, tuple)) or not batches or not all(map(is_batch, batches)):
        raise CalibrationError(
            f"the model hears, and dataset= ({_named(dataset)}) holds no features; pass {WAYS_WITH_SOUND}"
        )
    if unknown := sorted({name for batch in batches for name in batch} - set(inputs)):
        raise CalibrationError(f"the model takes no {unknown[0]}; it takes {', '.join(inputs)}")
    fields = _joined([dict(batch) for batch in batches])
    if not any(name in fields and fields[name].is_floating_point() for name in SOUND_INPUTS):
        raise CalibrationError(f"the batches hold {sorted(fields)}, no features of sound; pass {WAYS_WITH_SOUND}")
    if "labels" not in fields and task != "audio-classification":
        raise CalibrationError(
            "the batches hold no labels, which the loss of a model that writes down speech needs: add the token ids of"
            f" what is said, [clips, tokens], with {IGNORED} behind the end of the shorter ones"
        )
    if recipe.metric == "accuracy" and (task == "ctc" or "labels" not in fields):
        told = "needs labels" if "labels" not in fields else "does not fit to CTC, which predicts no token at a place"
        raise CalibrationError(f"metric='accuracy' {told}; use metric='loss'")
    if task == "audio-classification" and "labels" in fields:
        _check_classes(fields["labels"], classes)
    chosen = draw(len(next(iter(fields.values()))), recipe)
    ordered = {name: fields[name][chosen].cpu() for name in sorted(fields, key=lambda name: name == "labels")}
    return {
        name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in ordered.items()
    }, "features"


def tokens_of_sound(features: Tensor) -> int:
    """How much a batch of clips counts where text is counted by tokens: frames, or spans of 20 ms of a wave.

    Args:
        features: `[clips, samples]`, or `[clips, frames, features]`, or the same with the last two turned round.
    """
    if features.dim() == 2:
        return len(features) * max(1, features.shape[1] // SAMPLES_PER_TOKEN)
    return len(features) * max(features.shape[1:])


def _joined(batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One batch of many; labels of different lengths are filled up."""
    if any(batch.keys() != batches[0].keys() for batch in batches):
        found = sorted({name for batch in batches for name in batch})
        raise CalibrationError(f"not every batch holds all of {', '.join(found)}")
    fields = {}
    for name in batches[0]:
        parts = [batch[name] for batch in batches]
        if name == "labels" and parts[0].dim() == 2:
            parts = _filled_up(parts)
        if len({part.shape[1:] for part in parts}) > 1:
            sizes = sorted({tuple(part.shape[1:]) for part in parts})
            raise CalibrationError(
                f"{name} has different sizes for a clip, {sizes}; cut or pad all clips to one length, as processors do"
                " with padding='max_length' and truncation=True"
            )
        fields[name] = torch.cat(parts)
    if len({len(tensor) for tensor in fields.values()}) > 1:
        counts = ", ".join(f"{len(tensor)} × {name}" for name, tensor in fields.items())
        raise CalibrationError(f"the batches hold {counts}; every field must have a row for each clip")
    return fields


def _filled_up(labels: Sequence[Tensor]) -> list[Tensor]:
    longest = max(part.shape[1] for part in labels)
    return [torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=IGNORED) for part in labels]


def _check_classes(labels: Tensor, classes: int) -> None:
    if labels.dim() != 1 or labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise CalibrationError(
            f"labels must be numbers of the model's {classes} classes, one for each clip, not {tuple(labels.shape)} of"
            f" {labels.dtype}"
        )


def _named(dataset: Any) -> str:
    return repr(dataset) if isinstance(dataset, str) else type(dataset).__name__
