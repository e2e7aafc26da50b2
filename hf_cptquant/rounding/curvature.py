"""How much the loss minds errors in the outputs of each block: the metric in which rounding is tuned.

To second order an error Δ in an output of a block costs ½ Δᵀ F Δ, with the Fisher information F = E[g gᵀ] of the loss
by that output, under labels drawn from the model (as in `sensitivity/taylor.py`; arXiv 2412.03599 §3.4). Averaged over
tokens it is one matrix for each block. Plain squared errors are governed by the few features that are largest, which
the norms behind the block divide by, and not by those that the loss hangs on. The matrix knows the calibration text
only, so as much again of plain squared errors is mixed in, for the sake of text of another kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arithmetic import linears_in_working_dtype
from ..calibration import batches_on, tokens_in
from ..sensitivity.metrics import Batch, forward
from ..sensitivity.scoring import with_labels
from ..sensitivity.taylor import differentiable, gradient_of_drawn, positions_of, uniform_numbers

DAMPING = 1.0  # of the mean of the diagonal, added to it
TOKENS = 8192  # of the calibration data that are enough for a matrix over the features of a block


def curvature_of_outputs(
    model: PreTrainedModel, blocks: Sequence[str], batches: Sequence[Batch], seed: int
) -> dict[str, Tensor]:
    """F of every block, from one forward and one backward pass.

    Args:
        model: dense, in evaluation mode, in memory.
        blocks: their names.
        batches: calibration data, of which the first 8192 tokens are taken.
        seed: of the drawn labels.

    Returns:
        Block → float32 `[features, features]`: the mean over tokens for the loss of their sequence, damped.

    Raises:
        ModelError: the model's outputs are no classes.
    """
    sums: dict[str, Tensor] = {}
    tokens, start = 0, 0

    def add(name: str, gradient: Tensor) -> None:
        rows = gradient.flatten(0, -2).float()
        product = rows.t() @ rows
        sums[name] = sums[name].add_(product) if name in sums else product

    def watch(name: str, _block: nn.Module, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            first.register_hook(partial(add, name))

    for batch in batches_on(with_labels(model, batches), model):
        numbers = range(start, start := start + len(batch["labels"]))
        uniform = uniform_numbers(positions_of(model, batch), seed, numbers)
        with ExitStack() as hooks:
            for name in blocks:
                hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(watch, name)))
            hooks.enter_context(linears_in_working_dtype(model))
            hooks.enter_context(differentiable(model, blocks))
            logits = forward(model, batch).logits
            logits.backward(len(batch["labels"]) * gradient_of_drawn(model, batch["labels"], logits.detach(), uniform))
        tokens += tokens_in(batch)
        if tokens >= TOKENS:
            break
    return {name: _damped(sums[name] / tokens) for name in blocks if name in sums}


def _damped(curvature: Tensor) -> Tensor:
    mean = curvature.diagonal().mean()
    return curvature + torch.diag(mean.expand(len(curvature)) * DAMPING)
