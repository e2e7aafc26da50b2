"""What a model predicts for windows of data, one batch after the other, and the same kept in a file.

The logits of all windows together are far too large to hold, so they are streamed: whoever compares two models takes
one batch of each at a time. Where two models do not fit into memory at once, the first one's logits wait in a temporary
file until the second has been loaded. They are kept as they are, in the model's own dtype: half the size of float32 for
a model in bfloat16, and nothing is lost, so that both ways give the same figures bit for bit. Loading the two models by
turns for every few windows would need no file, but takes as many loads; storing the most probable classes only would
give a bound and not the divergence. The file has no name in its folder: the system removes it with the process.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .arithmetic import linears_in_working_dtype
from .calibration import batches_on
from .errors import EvaluationError
from .model_view import task_of
from .sensitivity.engine import backing_off
from .sensitivity.metrics import Batch, forward


def targets(task: str, batch: Batch) -> Tensor | None:
    """What should be predicted for a batch: int64 `[windows, predictions]`; None without labels.

    A causal language model predicts every token but the first of its window, a masked one every token that is no
    special one, an encoder-decoder its labels, and a classifier one class.
    """
    if "labels" not in batch:
        return None
    labels = batch["labels"]
    if task == "causal-lm":
        return labels[:, 1:]
    if task == "masked-lm":
        return labels[:, _scored(batch)]
    return labels if task == "seq2seq-lm" else labels[:, None]


def predictions_per_window(task: str, batch: Batch) -> int:
    """How many predictions a model makes for each window."""
    found = targets(task, batch)
    return 1 if found is None else found.shape[1]


def _scored(batch: Batch) -> Tensor:
    """Positions of a fully masked batch that hold no special token: bool `[length]`, the same in every window."""
    return batch["labels"][0] != -100


@torch.no_grad()
def predictions(model: PreTrainedModel, batches: Sequence[Batch], desc: str | None = None) -> Iterator[Tensor]:
    """The logits of all predictions, a batch at a time: `[windows, predictions, classes]`, in the model's dtype.

    Args:
        model: in evaluation mode.
        batches: of `calibration.load_evaluation`.
        desc: text of a progress bar over the forward passes, or None for no bar.
    """
    task = task_of(model)
    passes = [int(_scored(batch).sum()) if task == "masked-lm" else 1 for batch in batches]
    with logging.tqdm(total=sum(passes), desc=desc, unit="pass", disable=desc is None) as bar:
        for batch in batches:

            def run(parts: Sequence[Batch]) -> Tensor:
                with linears_in_working_dtype(model):
                    return torch.cat([_logits(model, str(task), part, bar) for part in batches_on(parts, model)])

            yield backing_off(run, [batch])


def _logits(model: PreTrainedModel, task: str, batch: Batch, bar: Any) -> Tensor:
    """The predictions for one batch, which lies on the model's device."""
    if task == "masked-lm":
        return _pseudo_logits(model, batch, bar)
    wanted = {name: tensor for name, tensor in batch.items() if name != "labels" or task == "seq2seq-lm"}
    logits = forward(model, wanted).logits
    bar.update()
    if task == "causal-lm":
        return logits[:, :-1]
    return logits if task == "seq2seq-lm" else logits[:, None]


def _pseudo_logits(model: PreTrainedModel, batch: Batch, bar: Any) -> Tensor:
    """What a masked language model predicts for each token behind a mask when it sees all others (Salazar et al. 2020,
    arXiv 1910.14659): one pass for each position."""
    masks, labels = batch["input_ids"], batch["labels"]
    tokens = torch.where(labels == -100, masks, labels)
    found = []
    for position in _scored(batch).nonzero()[:, 0].tolist():
        inputs = tokens.clone()
        inputs[:, position] = masks[:, position]
        logits = forward(model, {"input_ids": inputs, "attention_mask": batch["attention_mask"]}).logits
        found.append(logits[:, position].clone())  # the rest can go
        bar.update()
    return torch.stack(found, 1)


@contextmanager
def kept_in_a_file(stream: Iterable[Tensor], nbytes: int) -> Iterator[Iterator[Tensor]]:
    """Drain a stream of tensors into a temporary file, and give it again from there, on the CPU.

    Args:
        stream: of any shapes and dtypes.
        nbytes: how much it will be at most.

    Raises:
        EvaluationError: there is less room than that.
    """
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise EvaluationError(
            f"both models do not fit into memory at once, and the original's predictions need {nbytes / 1e9:.1f} GB in"
            f" {folder}, where {free / 1e9:.1f} GB are free; evaluate fewer or shorter windows, or set TMPDIR to a"
            " folder with more room"
        )
    with tempfile.TemporaryFile() as file:
        kinds = []
        for tensor in stream:
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
            kinds.append((tensor.shape, tensor.dtype))
        file.seek(0)
        yield (
            torch.frombuffer(bytearray(file.read(shape.numel() * dtype.itemsize)), dtype=dtype).view(shape)
            for shape, dtype in kinds
        )
