"""Measuring a model: perplexity over windows of tokens, and the loss that plans would lead to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from . import ranks
from .grid import dequantize
from .plan import BitPlan
from .rounding import round_nearest
from .sensitivity.engine import changed_weights
from .sensitivity.metrics import Batch, mean_loss


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
    schemes = {module.name: module.scheme for module in plan.packed}
    modules = {name: model.get_submodule(name) for name in schemes}

    def rounded(name: str, weight: Tensor) -> Tensor:
        transposed = isinstance(modules[name], Conv1D)
        matrix = weight.t() if transposed else weight
        found = round_nearest(matrix.contiguous(), schemes[name])
        dense = dequantize(found.integers, found.scale, found.zero_point)
        return dense.t() if transposed else dense

    with changed_weights(modules, rounded):
        return mean_loss(model, batches)
