"""Execute a plan: swap dense modules for packed ones, so that a dense weight is freed before the next is packed.

Rounding to nearest takes one module at a time and no data. The other methods take one block at a time, with what it is
called with behind the blocks that are rounded already, and what it gave in the original model: two streams of outputs
are carried through the model side by side.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.utils import logging

from .arithmetic import working_dtype
from .calibration import batches_on, tokens_in
from .errors import ModelError, PlanError, in_module
from .experts import fuse_again
from .grid import QuantizedWeight
from .memory import mapped_ranges, release, trim
from .model_view import predicts_one_class, sharing_with
from .modules import PACKED_CLASSES, kind_of, matrix_of, packed_modules, replace_module, set_dequantized
from .plan import EMBEDDING, BitPlan, LayerScheme, ModulePlan
from .recipe import Recipe
from .rounding import BLOCK_ROUNDINGS, Tuning, round_nearest
from .rounding.curvature import check_finite, gradients_of_outputs
from .sensitivity.metrics import Batch
from .sensitivity.prefix import Call, Outputs, Prefix
from .tied import tie, tied_layers

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it


@torch.no_grad()
def apply_plan(model: nn.Module, plan: BitPlan) -> None:
    """Round the modules of a plan to nearest and pack them, in place.

    Raises:
        PlanError, ModelError: as `check_fits`; nothing is changed then.
        ModelError: a weight holds NaN or infinity.
    """
    check_fits(model, plan)
    for decision in logging.tqdm(plan.packed, desc="Quantizing"):
        _pack_nearest(model, decision)


@torch.no_grad()
def apply_plan_by_blocks(model: PreTrainedModel, plan: BitPlan, batches: Sequence[Batch], recipe: Recipe) -> None:
    """Round the modules of a plan block by block, each behind the rounded ones before it, and pack them, in place.
    What lies outside the blocks is rounded to nearest afterwards.

    Args:
        model: dense, in evaluation mode, in memory.
        plan: the decisions.
        batches: calibration data; a step of tuning takes one of them.
        recipe: `rounding`, `iters`, `seed`.

    Raises:
        PlanError, ModelError: as `check_fits`, or a weight is offloaded; nothing is changed then.
        ModelError: a weight or an input holds NaN or infinity.
    """
    check_fits(model, plan)
    check_in_memory(model, plan)
    if plan.inside.packed:
        _tune_blocks(model, plan.inside, batches, recipe)
    for decision in plan.packed:
        if decision.outside:
            _pack_nearest(model, decision)


def _tune_blocks(model: PreTrainedModel, plan: BitPlan, batches: Sequence[Batch], recipe: Recipe) -> None:
    """As `apply_plan_by_blocks`, for a plan that packs modules in blocks, and no others."""
    of_block: dict[str, dict[str, LayerScheme]] = {module.block: {} for module in plan.modules}
    untuned: dict[str, list[ModulePlan]] = {module.block: [] for module in plan.modules}
    for module in plan.packed:
        if module.linear:
            of_block[module.block][module.name.removeprefix(module.block + ".")] = module.scheme
        else:
            untuned[module.block].append(module)
    if any(untuned.values()):
        logger.warning(
            f"{sum(map(len, untuned.values()))} convolutions are rounded to nearest: rounding={recipe.rounding!r} is"
            " for linear layers."
        )
    _warn_of_few_tokens(plan, batches)
    prefix = Prefix(model, batches[0], list(of_block))
    by_curvature = recipe.compensates and predicts_one_class(model)  # or else there are no labels to draw
    gradients = gradients_of_outputs(model, prefix.order, batches, recipe.seed) if by_curvature else {}
    original: list[Outputs] = [{} for _ in batches]
    rounded: list[Outputs] = [{} for _ in batches]
    for position, name in enumerate(logging.tqdm(prefix.order, desc="Rounding", unit="block")):
        block, stack = model.get_submodule(name), name.rpartition(".")[0]
        work = _WorkingCopy(block)
        loaded = zip(batches_on(batches, model), original, rounded, strict=True)
        pairs = [tuple(work.call(prefix.call(batch, one, position)) for one in both) for batch, *both in loaded]
        outputs = [work(call) for call, _ in pairs]
        originals, calls = [call for call, _ in pairs], [call for _, call in pairs]
        for decision in untuned[name]:
            _pack_nearest(model, decision)
            layer = work.block.get_submodule(decision.name.removeprefix(name + "."))
            set_dequantized(layer, model.get_submodule(decision.name).quantized())
        if of_block[name]:
            targets = [output[0] if isinstance(output, tuple) else output for output in outputs]
            tuning = Tuning(work.dtype, recipe.iters, recipe.seed, originals, gradients.pop(name, ()))
            for target in targets:
                check_finite(name, "its outputs", target)
            with in_module(name):
                found = BLOCK_ROUNDINGS[recipe.rounding](work.block, of_block[name], calls, targets, tuning)
            for layer, quantized in found.items():
                set_dequantized(work.block.get_submodule(layer), quantized)
                _pack(model, f"{name}.{layer}", quantized)
        for before, output in zip(original, outputs, strict=True):
            before[stack] = work.as_the_model(output)
        for before, call in zip(rounded, calls, strict=True):
            before[stack] = work.as_the_model(work(call))
        trim()


class _WorkingCopy:
    """A block in the format that its device computes fast in, called with what the model calls the block with. If that
    is the model's own format, both have their parameters in the same memory.

    Attributes:
        block: the copy.
        dtype: of the model's block.
    """

    def __init__(self, block: nn.Module) -> None:
        weight = next(parameter for parameter in block.parameters() if parameter.dim() > 1)
        self.dtype = weight.dtype
        self._working = working_dtype(weight.dtype, weight.device)
        shared = {id(each): nn.Parameter(each.detach(), requires_grad=False) for each in block.parameters()}
        self.block = copy.deepcopy(block, shared)
        if self._working != self.dtype:
            self.block.to(self._working)

    def call(self, call: Call) -> Call:
        """The arguments in the copy's format."""
        return _recast(call, self.dtype, self._working)

    def __call__(self, call: Call) -> Any:
        args, kwargs = call
        return self.block(*args, **kwargs)

    def as_the_model(self, output: Any) -> Any:
        """An output of the copy as the model's block gives it."""
        return _recast(output, self._working, self.dtype)


def _recast(tree: Any, before: torch.dtype, after: torch.dtype) -> Any:
    """All tensors of one dtype in another."""

    def cast(value: Any) -> Any:
        return value.to(after) if isinstance(value, torch.Tensor) and value.dtype == before else value

    return pytree.tree_map(cast, tree)


def _warn_of_few_tokens(plan: BitPlan, batches: Sequence[Batch]) -> None:
    tokens = sum(tokens_in(batch) for batch in batches)
    tuned = [module for module in plan.packed if module.linear]
    widest = max(tuned, key=lambda module: module.in_features, default=None)
    if widest is not None and tokens < widest.in_features:
        logger.warning(
            f"{tokens} calibration tokens are fewer than the {widest.in_features} inputs of {widest.name}: rounding is"
            " tuned to these very tokens. Raise num_samples or sequence_length."
        )


def check_in_memory(model: nn.Module, plan: BitPlan) -> None:
    """Raise `ModelError` before any work is done if a weight is offloaded, which block by block cannot be rounded."""
    for module in plan.modules:
        if has_offloaded_params(model.get_submodule(module.name)):
            raise ModelError(
                f"{module.name} is offloaded, and only rounding to nearest without recovery takes offloaded"
                " weights; use quality='fast' without recover, or a device_map with enough memory"
            )


def _pack_nearest(model: nn.Module, decision: ModulePlan) -> None:
    """Round the weight of a module to nearest and pack it."""
    with in_module(decision.name):
        module = model.get_submodule(decision.name)
        with align_module_device(module):
            quantized = round_nearest(_matrix(module).detach().contiguous(), decision.scheme)
            _pack(model, decision.name, quantized, decision.shared_with)


def _pack(model: nn.Module, name: str, quantized: QuantizedWeight, shared_with: Sequence[str] = ()) -> None:
    """Put a packed module in the place of a dense one, and tied ones in the places of those that share its weight."""
    module = model.get_submodule(name)
    packed = PACKED_CLASSES[kind_of(module)].from_quantized(quantized, module._parameters.get("bias"))
    replace_module(model, name, packed.like(module))
    if shared_with:
        tie(model, name, shared_with)
    release(module.weight, mapped_ranges())


def _matrix(module: nn.Module) -> torch.Tensor:
    """The weight as `[out_features, in_features]`."""
    return matrix_of(type(module), module.weight)


def check_fits(model: nn.Module, plan: BitPlan) -> None:
    """Raise before any work is done if a plan cannot be executed on a model.

    Raises:
        PlanError: the plan names a module that the model does not have, or another shape, or other modules that share
            its weight.
        ModelError: a weight is neither in memory nor offloaded by accelerate.
    """
    modules = dict(model.named_modules())
    for decision in plan.modules:
        with in_module(decision.name):
            _check_fits(modules.get(decision.name), decision)
            if decision.kind == EMBEDDING:
                _check_sharing(sharing_with(model, decision.name), decision.shared_with)


def _check_fits(module: nn.Module | None, decision: ModulePlan) -> None:
    if module is None or kind_of(module) not in PACKED_CLASSES:
        found = "no such module" if module is None else f"a {type(module).__name__}"
        raise PlanError(f"the plan decides on it, but the model has {found} there; is the plan for another model?")
    if tuple(_matrix(module).shape) != (decision.out_features, decision.in_features):
        raise PlanError(
            f"the plan has shape {(decision.out_features, decision.in_features)}, the model"
            f" {tuple(_matrix(module).shape)}"
        )
    if module.weight.device.type == "meta" and not has_offloaded_params(module):
        raise ModelError("the weight was never loaded; load the model with from_pretrained")


def _check_sharing(found: Sequence[str], planned: Sequence[str]) -> None:
    """The model is asked after loading, when transformers has seen whether the weights are the same."""
    if found != planned:
        raise PlanError(
            f"by the plan its weight is shared with {', '.join(planned) or 'nothing'}, in the model with"
            f" {', '.join(found) or 'nothing'}; set tie_word_embeddings in config.json to what the weights are"
        )


def dequantize_model(model: PreTrainedModel) -> tuple[str, ...]:
    """Swap every packed module back for a dense one with the dequantized weight, in place, and give their names. What
    was tied is tied again."""
    packed, tied = packed_modules(model), tied_layers(model)
    for name, module in packed.items():
        replace_module(model, name, module.dense().train(module.training))
    names = {module: name for name, module in packed.items()}
    for name, layer in tied.items():
        replace_module(model, name, layer.dense(model.get_submodule(names[layer.embedding]).weight))
    if tied:
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    fuse_again(model)
    return *packed, *tied
