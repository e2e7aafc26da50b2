"""How much of a rounding error is left when the other weights of the layer make up for it.

Rounding that looks at the inputs X of a layer (GPTQ, SignRound) chooses the integers so that errors cancel in the
outputs. If the errors of the columns are made up for one after the other, the one of column i counts by the part of
input i that the inputs still open cannot express: by the pivot d_i of the decomposition XXᵀ = LDLᵀ, where rounding to
nearest pays the whole square ‖x_i‖². The share that is left is Σd_i / Σ‖x_i‖² (QuIP, arXiv 2307.13304, theorem 1),
whatever the bit width. It differs by kind of layer: the inputs of attention have few directions, those of an MLP many,
so that without it a plan gives attention bits that tuning would have saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .. import ranks
from ..arithmetic import linears_in_working_dtype
from ..calibration import batches_on
from ..errors import ModelError, in_module
from ..memory import trim
from ..plan import BitPlan
from .metrics import Batch
from .prefix import Outputs, Prefix

Inputs = dict[str, list[Tensor]]  # of layers by name, one for each time that they are called

DAMPING = 0.01  # added to the diagonal of XXᵀ, as a share of its mean


@torch.no_grad()
def shares_left(model: PreTrainedModel, plan: BitPlan, batches: Sequence[Batch]) -> dict[str, float]:
    """Share of the squared error of each module that is left after compensation, from one pass block by block.

    Args:
        model: dense, in evaluation mode.
        plan: the modules; its bits are not read.
        batches: calibration data.

    Returns:
        Module → Σd_i / Σ‖x_i‖², in (0, 1]; 1 where no token comes, and for convolutions, which are not tuned.

    Raises:
        ModelError: an input holds NaN or infinity; a block runs never or more than once.
    """
    of_block: dict[str, list[str]] = {module.block: [] for module in plan.modules}
    for module in plan.modules:
        if module.linear:
            of_block[module.block].append(module.name.removeprefix(module.block + "."))
    shares = {module.name: 1.0 for module in plan.modules if not module.linear}
    before: list[Outputs] = [{} for _ in batches]
    with linears_in_working_dtype(model):
        prefix = Prefix(model, batches[0], list(of_block))
        bar = logging.tqdm(prefix.order, desc="Measuring inputs", unit="block", disable=ranks.rank() > 0)
        for position, name in enumerate(bar):
            layers = {layer: model.get_submodule(f"{name}.{layer}") for layer in of_block[name]}
            after: list[Outputs] = []

            def advance(batch: Batch, done: Outputs, position: int = position, after: list[Outputs] = after) -> None:
                after.append(prefix.outputs(batch, done, position, position + 1))

            on_device = batches_on(batches, model)
            passes = [partial(advance, *given) for given in zip(on_device, before, strict=True)]
            with in_module(name):
                for names, product in input_products(layers, passes):
                    shares |= dict.fromkeys((f"{name}.{layer}" for layer in names), share_left(product))
            before = after
            trim()
    return shares


def share_left(product: Tensor) -> float:
    """Σd_i / Σ‖x_i‖² of XXᵀ, `[in_features, in_features]`, damped; the largest inputs are made up for by all others."""
    diagonal = product.diagonal()
    if not bool(diagonal.any()):
        return 1.0
    order = diagonal.argsort(stable=True)
    damped = product[order][:, order]
    damped.diagonal().add_(DAMPING * diagonal.mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        factor = torch.linalg.cholesky(damped.double())
    return float(factor.diagonal().square().sum() / damped.diagonal().sum())


def inputs_in(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> Inputs:
    """What layers are called with while something runs, by name; those that are not called are left out."""
    seen: Inputs = {}

    def keep(name: str, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, []).append(inputs[0])

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(keep, name)))
        run()
    return seen


def sharing(seen: Inputs) -> list[tuple[str, ...]]:
    """The layers that share their inputs, in the order in which they are called."""
    by_inputs: dict[tuple[int, ...], list[str]] = {}
    for name, of_calls in seen.items():
        by_inputs.setdefault(tuple(map(id, of_calls)), []).append(name)
    return list(map(tuple, by_inputs.values()))


@torch.no_grad()
def input_products(
    layers: Mapping[str, nn.Module],
    passes: Sequence[Callable[[], Any]],
    observe: Callable[[int, Inputs], None] | None = None,
) -> list[tuple[tuple[str, ...], Tensor]]:
    """XXᵀ of the inputs of layers, float32 `[in_features, in_features]`, once for layers that share them.

    Args:
        layers: by name.
        passes: run what the layers belong to, on different data.
        observe: gets the number of a pass and what it gave the layers.

    Raises:
        ModelError: an input holds NaN or infinity.
    """
    sums: dict[tuple[str, ...], Tensor] = {}
    for number, run in enumerate(passes):
        seen = inputs_in(layers, run)
        if observe is not None:
            observe(number, seen)
        for key in sharing(seen):
            for inputs in seen[key[0]]:
                rows = inputs.flatten(0, -2).float()
                with in_module(key[0]):
                    if not bool(torch.isfinite(rows).all()):
                        raise ModelError("its inputs hold NaN or infinity; try dtype=torch.float32")
                product = rows.t() @ rows
                sums[key] = sums[key] + product if key in sums else product
    reached = {name for names in sums for name in names}
    for name, layer in layers.items():
        if name not in reached:
            size = layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]
            sums[name,] = torch.zeros(size, size, device=layer.weight.device)
    return list(sums.items())
