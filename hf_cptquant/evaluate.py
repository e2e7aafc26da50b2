"""Measuring a model: perplexity over windows of tokens."""

from __future__ import annotations

import math

from torch import Tensor
from transformers import PreTrainedModel

from .sensitivity.metrics import mean_loss


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
