"""How much the loss minds errors in the outputs of blocks and of the layers in them: the metrics in which rounding
is judged.

To second order an error Δ in an output costs ½ Δᵀ F Δ, with the Fisher information F = E[g gᵀ] of the loss by that
output, under labels drawn from the model (as in `sensitivity/taylor.py`; arXiv 2412.03599 §3.4). Averaged over tokens
it is one matrix for each block or layer. Plain squared errors are governed by the few features that are largest, which
the norms behind a block divide by, and not by those that the loss hangs on.

One backward pass through the model leaves the gradients by the outputs of blocks, token by token. The layers of a block
have theirs from these by a backward pass through the block alone, when it is its turn, so that the matrices of one
block only are in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..arithmetic import linears_in_working_dtype
from ..calibration import batches_on, tokens_in
from ..errors import ModelError
from ..memory import trim
from ..sensitivity.metrics import Batch, forward
from ..sensitivity.prefix import Call
from ..sensitivity.scoring import with_labels
from ..sensitivity.taylor import differentiable, gradient_of_drawn, positions_of, tap, uniform_numbers

TOKENS = 8192  # of the calibration data that are enough for a matrix over the features of a block


def gradients_of_outputs(
    model: PreTrainedModel, blocks: Sequence[str], batches: Sequence[Batch], seed: int
) -> dict[str, list[Tensor]]:
    """The gradients of the loss of every sequence by the outputs of blocks, from one forward and one backward pass.

    Args:
        model: dense, in evaluation mode, in memory.
        blocks: their names.
        batches: calibration data, of which the first 8192 tokens are taken.
        seed: of the drawn labels.

    Returns:
        Block → a tensor for each of the first batches, in the shape and dtype of the block's output.

    Raises:
        ModelError: the model's outputs are no classes, or those of a block or the gradients by them hold NaN or
            infinity.
    """
    gradients: dict[str, list[Tensor]] = {}
    tokens, start = 0, 0

    def keep(name: str, gradient: Tensor) -> None:
        check_finite(name, "the gradients by its outputs", gradient)
        gradients.setdefault(name, []).append(gradient)

    def watch(name: str, _block: nn.Module, _args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        check_finite(name, "its outputs", first)
        if first.requires_grad:
            first.register_hook(partial(keep, name))

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
        trim()
        tokens += tokens_in(batch)
        if tokens >= TOKENS:
            break
    return gradients


def check_finite(block: str, what: str, numbers: Tensor) -> None:
    """Raise `ModelError` if numbers hold NaN or infinity."""
    if not bool(torch.isfinite(numbers).all()):
        raise ModelError(f"{block}: {what} hold NaN or infinity on the calibration data; try dtype=torch.float32")


def curvature_of(gradients: Sequence[Tensor]) -> Tensor:
    """F, the second moment of gradients `[…, features]`: float32 `[features, features]`."""
    rows = torch.cat([gradient.flatten(0, -2) for gradient in gradients]).float()
    return rows.t() @ rows / len(rows)


def with_plain_squares(curvature: Tensor) -> Tensor:
    """As much again of plain squared errors mixed in: the matrix knows the calibration text only, and text of another
    kind minds other errors."""
    mean = curvature.diagonal().mean()
    return curvature + torch.diag(mean.expand(len(curvature)))


def curvatures_of_layers(
    block: nn.Module, layers: Iterable[str], calls: Sequence[Call], gradients: Sequence[Tensor]
) -> dict[str, Tensor]:
    """F of the layers of a block by their outputs, up to a factor for each.

    Args:
        block: dense, its parameters without gradients.
        layers: names of linear layers in it.
        calls: arguments of the block, the first ones those that the gradients belong to.
        gradients: by the outputs of the block.

    Returns:
        Layer → float32 `[out_features, out_features]`. A layer that no token reaches is left out, as is one that the
        block's output does not depend on.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, _inputs: Tensor, gradient: Tensor) -> None:
        rows = gradient.flatten(0, -2).float()
        product = rows.t() @ rows
        sums[name] = sums[name].add_(product) if name in sums else product

    with ExitStack() as hooks:
        for name in layers:
            layer = block.get_submodule(name)
            hooks.enter_context(layer.register_forward_hook(_differentiable))
            hooks.enter_context(layer.register_forward_hook(partial(tap, partial(add, name))))
        for (args, kwargs), gradient in zip(calls, gradients, strict=False):
            with torch.enable_grad():
                output = block(*args, **kwargs)
                first = output[0] if isinstance(output, tuple) else output
                if first.requires_grad:  # it may depend on none of the layers
                    first.backward(gradient.to(first.dtype))
    return sums


def _differentiable(_layer: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()
