"""Execute a plan: swap dense modules for packed ones, so that a dense weight is freed before the next is packed.

Rounding to nearest takes one module at a time and no data. The other methods take one block at a time, with what it is
called with behind the blocks that are rounded already, and what it gave in the original model: two streams of outputs
are carried through the model side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .calibration import batches_on
from .errors import ModelError, PlanError, in_module
from .grid import QuantizedWeight
from .modules import PACKED_CLASSES, packed_modules
from .plan import BitPlan, LayerScheme, ModulePlan
from .recipe import Recipe
from .rounding import BLOCK_ROUNDINGS, round_nearest
from .sensitivity.metrics import Batch
from .sensitivity.prefix import Outputs, Prefix


@torch.no_grad()
def apply_plan(model: nn.Module, plan: BitPlan) -> None:
    """Round the modules of a plan to nearest and pack them, in place.

    Raises:
        PlanError, ModelError: as `check_fits`; nothing is changed then.
        ModelError: a weight holds NaN or infinity.
    """
    check_fits(model, plan)
    for decision in logging.tqdm(plan.packed, desc="Quantizing"):
        with in_module(decision.name):
            module = model.get_submodule(decision.name)
            with align_module_device(module):
                _pack(model, decision.name, round_nearest(_matrix(module).detach().contiguous(), decision.scheme))


def apply_plan_by_blocks(model: PreTrainedModel, plan: BitPlan, batches: Sequence[Batch], recipe: Recipe) -> None:
    """Round the modules of a plan block by block, each behind the rounded ones before it, and pack them, in place.

    Args:
        model: dense, in evaluation mode, in memory.
        plan: the decisions.
        batches: calibration data; labels are not read.
        recipe: `rounding`, `iters`, `seed`.

    Raises:
        PlanError, ModelError: as `check_fits`, or a weight is offloaded; nothing is changed then.
        ModelError: a weight or an input holds NaN or infinity.
    """
    check_fits(model, plan)
    _refuse_offloaded(model, plan, recipe)
    of_block: dict[str, dict[str, LayerScheme]] = {module.block: {} for module in plan.modules}
    for module in plan.packed:
        of_block[module.block][module.name.removeprefix(module.block + ".")] = module.scheme
    prefix = Prefix(model, batches[0], list(of_block))
    original: list[Outputs] = [{} for _ in batches]
    rounded: list[Outputs] = [{} for _ in batches]

    def advanced(carried: list[Outputs], position: int) -> list[Outputs]:
        loaded = zip(batches_on(batches, model.device), carried, strict=True)
        return [prefix.outputs(batch, before, position, position + 1) for batch, before in loaded]

    for position, name in enumerate(logging.tqdm(prefix.order, desc="Rounding", unit="block")):
        block, stack = model.get_submodule(name), name.rpartition(".")[0]
        loaded = zip(batches_on(batches, model.device), rounded, strict=True)
        calls = [prefix.call(batch, before, position) for batch, before in loaded]
        original = advanced(original, position)
        targets = [output[stack][0] if isinstance(output[stack], tuple) else output[stack] for output in original]
        if of_block[name]:
            with in_module(name):
                found = BLOCK_ROUNDINGS[recipe.rounding](block, of_block[name], calls, targets, recipe)
            for layer, quantized in found.items():
                _pack(model, f"{name}.{layer}", quantized)
        rounded = advanced(rounded, position)


def _refuse_offloaded(model: nn.Module, plan: BitPlan, recipe: Recipe) -> None:
    for module in plan.modules:
        if has_offloaded_params(model.get_submodule(module.name)):
            raise ModelError(
                f"{module.name} is offloaded, and rounding={recipe.rounding!r} needs the model in memory; use"
                " rounding='nearest'"
            )


def _pack(model: nn.Module, name: str, quantized: QuantizedWeight) -> None:
    """Put a packed module in the place of a dense one."""
    module = model.get_submodule(name)
    packed = PACKED_CLASSES[type(module)].from_quantized(quantized, module.bias)
    replace_module(model, name, packed.train(module.training))


def _matrix(module: nn.Module) -> torch.Tensor:
    """The weight as `[out_features, in_features]`."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def check_fits(model: nn.Module, plan: BitPlan) -> None:
    """Raise before any work is done if a plan cannot be executed on a model.

    Raises:
        PlanError: the plan names a module that the model does not have, or another shape.
        ModelError: a weight is neither in memory nor offloaded by accelerate.
    """
    modules = dict(model.named_modules())
    for decision in plan.modules:
        with in_module(decision.name):
            _check_fits(modules.get(decision.name), decision)


def _check_fits(module: nn.Module | None, decision: ModulePlan) -> None:
    if module is None or type(module) not in PACKED_CLASSES:
        found = "no such module" if module is None else f"a {type(module).__name__}"
        raise PlanError(f"the plan decides on it, but the model has {found} there; is the plan for another model?")
    if tuple(_matrix(module).shape) != (decision.out_features, decision.in_features):
        raise PlanError(
            f"the plan has shape {(decision.out_features, decision.in_features)}, the model"
            f" {tuple(_matrix(module).shape)}"
        )
    if module.weight.device.type == "meta" and not has_offloaded_params(module):
        raise ModelError("the weight was never loaded; load the model with from_pretrained")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one with that dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def dequantize_model(model: nn.Module) -> None:
    """Swap every packed module back for a dense one with the dequantized weight, in place."""
    for name, module in packed_modules(model).items():
        replace_module(model, name, module.dense().train(module.training))
