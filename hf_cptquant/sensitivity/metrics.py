"""What a model is measured by: loss, perplexity or accuracy, over labels and not over batches.

Equation 8 of the paper averages over batches. Here a batch counts by its labels, which is the same where batches are
equal and gives a ragged last batch the weight of what is in it. Every sequence of text has equally many labels, so it
is the mean over sequences too; what is said in clips of sound differs in length. To CTC it is one label, whose loss is
−log of its probability.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from ..calibration import batches_on, seen_or_heard, sequences_in
from ..errors import CalibrationError, ModelError
from ..model_view import task_of

Batch = Mapping[str, Tensor]

CACHES = {
    "cache",
    "past_key_values",
    "use_cache",
}  # arguments of models that remember keys and values unless told not to
LARGEST_LOSS = math.log(sys.float_info.max)
LOSS_CHUNK = 2**21  # logits that are turned into float32 at a time: 8 MiB, which stays in a CPU's cache


@dataclass(frozen=True)
class Metric:
    """A figure of merit of a model on data.

    Attributes:
        name: `"loss"` (nats), `"perplexity"` or `"accuracy"`.
        of_batch: mean over the labels of a batch.
        of_mean: from the mean over all labels to the figure.
        worse: +1 if a larger figure is worse, −1 if a smaller one is.
    """

    name: str
    of_batch: Callable[[PreTrainedModel, Batch], float]
    of_mean: Callable[[float], float]
    worse: int


def forward(model: PreTrainedModel, batch: Batch) -> Any:
    """The model's outputs for a batch with labels, its loss among them; without a cache of keys and values."""
    caches = CACHES & inspect.signature(model.forward).parameters.keys()
    with _chunked_loss(model), _loss_of_clips(model):
        outputs = model(**batch, **({"use_cache": False} if caches else {}))
    if task_of(model) == "ctc" and outputs.loss is not None:
        outputs.loss = outputs.loss / sequences_in(batch)
    return outputs


@torch.no_grad()
def batch_loss(model: PreTrainedModel, batch: Batch) -> float:
    """The model's own loss on a batch with labels (nats)."""
    return float(forward(model, batch).loss)


@torch.no_grad()
def batch_accuracy(model: PreTrainedModel, batch: Batch) -> float:
    """Share of the labels of a batch that the model predicts (equation 8): classes, masked tokens, or next tokens."""
    predicted = forward(model, batch).logits.argmax(-1)
    labels = batch["labels"].to(predicted.device)
    if task_of(model) == "causal-lm":
        predicted, labels = predicted[:, :-1], labels[:, 1:]
    counted = labels != -100
    return float((predicted == labels)[counted].double().mean())


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < LARGEST_LOSS else math.inf * loss  # NaN stays NaN


METRICS = {
    "loss": Metric("loss", batch_loss, float, 1),
    "perplexity": Metric("perplexity", batch_loss, _perplexity, 1),
    "accuracy": Metric("accuracy", batch_accuracy, float, -1),
}


def field_of_rows(rows: Tensor, batch: Batch) -> str | None:
    """Which tokens of a batch the rows of activations `[..., features]` stand for: its `input_ids`, its `labels`, or
    neither. (Some models flatten batch and length on the way.) Rows for images and sound are equally many for each, one
    after the other, but how many depends on the layer."""
    if name := seen_or_heard(batch):
        return name if len(rows) % sequences_in(batch) == 0 else None
    count = rows.numel() // rows.shape[-1]
    return next((name for name in ("input_ids", "labels") if name in batch and batch[name].numel() == count), None)


def labels_in(model: PreTrainedModel, batch: Batch) -> list[int]:
    """How many labels each sequence of a batch has to predict. To CTC all that is said is one."""
    if task_of(model) == "ctc":
        return [1] * sequences_in(batch)
    labels = batch["labels"][:, 1:] if task_of(model) == "causal-lm" else batch["labels"]
    return (labels.reshape(len(labels), -1) != -100).sum(1).tolist()


def mean(values: Sequence[float], counts: Sequence[int]) -> float:
    """Mean of the figures of batches, each weighted by its labels or its sequences, in float64."""
    return math.fsum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)


def mean_loss(model: PreTrainedModel, batches: Sequence[Batch], desc: str | None = None) -> float:
    """Mean over all labels of the model's own loss (nats).

    Args:
        batches: keyword arguments of `model.forward` with labels.
        desc: text of a progress bar over the batches, or None for no bar.

    Raises:
        CalibrationError, ModelError: the loss is not finite.
    """
    bar = logging.tqdm(batches, desc=desc) if desc else batches
    losses = [batch_loss(model, batch) for batch in batches_on(bar, model)]
    average = mean(losses, [sum(labels_in(model, batch)) for batch in batches])
    if not math.isfinite(average):
        raise not_finite(model, batches[0], f"the loss is {average}")
    return average


def not_finite(model: PreTrainedModel, batch: Batch, what: str) -> CalibrationError | ModelError:
    """The error for a figure that is NaN or infinite: it names the first module that is to blame.

    Args:
        what: where it happened, the beginning of the message.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.device.type != "meta" and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return ModelError(f"{what}: {name} holds NaN or infinity; repair the checkpoint")
    with ExitStack() as hooks:
        found: list[str] = []

        def look(name: str, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(first, Tensor) and first.is_floating_point() and not bool(torch.isfinite(first).all()):
                found.append(name)

        for name, module in model.named_modules():
            if name:
                hooks.enter_context(module.register_forward_hook(lambda *seen, name=name: look(name, seen[2])))
        with torch.no_grad():
            forward(model, next(batches_on([batch], model)))
    place = (
        f"the output of {found[0]} is the first that holds NaN or infinity"
        if found
        else "the outputs of the unchanged modules are finite"
    )
    return CalibrationError(f"{what}: {place}; try dtype=torch.float32 or other calibration data")


@contextmanager
def _loss_of_clips(model: PreTrainedModel) -> Iterator[None]:
    """Let a model with CTC add up the losses of the clips of a batch: −log p of all that is said in each, whatever its
    config makes of them."""
    if task_of(model) != "ctc":
        yield
        return
    own = model.config.ctc_loss_reduction
    model.config.ctc_loss_reduction = "sum"
    try:
        yield
    finally:
        model.config.ctc_loss_reduction = own


@contextmanager
def _chunked_loss(model: PreTrainedModel) -> Iterator[None]:
    """Let a causal language model compute the same loss without a float32 copy of all its logits.

    The copy and the softmax of it take as long as a third of SmolLM2's layers on a CPU. Losses other than transformers'
    `ForCausalLMLoss` are left alone.
    """
    if model.loss_function is not ForCausalLMLoss:
        yield
        return
    own = model.__dict__.get("_loss_function")
    model.loss_function = chunked_causal_loss
    try:
        yield
    finally:
        del model._loss_function
        if own is not None:
            model.loss_function = own


def chunked_causal_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """Mean negative log-likelihood of the next tokens: `ForCausalLMLoss`, in chunks of rows.

    Args:
        logits: `[batch, length, vocabulary]`, any float dtype.
        labels: int64 `[batch, length]`, −100 where nothing is predicted.
        vocab_size: size of the vocabulary.
    """
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten().to(logits.device)
    rows = max(1, LOSS_CHUNK // vocab_size)
    chunks = zip(logits.reshape(-1, vocab_size).split(rows), targets.split(rows), strict=True)
    total = sum(checkpoint(_summed_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks)
    return total / (targets != -100).sum()


def _summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Of rows `[rows, vocabulary]`, float32; computed again in the backward pass, so that no float32 copy is kept."""
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")
