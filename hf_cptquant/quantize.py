"""Execute a plan: swap dense modules for packed ones, one at a time, so that a dense weight is freed before the next is
packed."""

from __future__ import annotations

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .errors import ModelError, PlanError, in_module
from .modules import PACKED_CLASSES, QuantLinear, packed_modules
from .plan import BitPlan, ModulePlan
from .rounding import ROUNDINGS


@torch.no_grad()
def apply_plan(model: nn.Module, plan: BitPlan, rounding: str = "nearest") -> None:
    """Quantize the modules of a plan in place.

    Raises:
        PlanError, ModelError: as `check_fits`; nothing is changed then.
        ModelError: a weight holds NaN or infinity.
    """
    check_fits(model, plan)
    for decision in logging.tqdm(plan.packed, desc="Quantizing"):
        with in_module(decision.name):
            replace_module(model, decision.name, _quantized(model.get_submodule(decision.name), decision, rounding))


def _quantized(module: nn.Module, decision: ModulePlan, rounding: str) -> QuantLinear:
    """The packed module, on the device that computes: an offloaded weight is loaded, and fits once it is packed."""
    with align_module_device(module):
        quantized = ROUNDINGS[rounding](_matrix(module).detach().contiguous(), decision.scheme)
        packed = PACKED_CLASSES[type(module)].from_quantized(quantized, module.bias)
    return packed.train(module.training)


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
