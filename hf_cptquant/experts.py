"""Mixtures of experts as linear layers.

transformers 5 keeps the experts of a layer in one module with a three-dimensional parameter for each projection, as its
grouped products want them. Files, inference engines and all of this package know a matrix for each projection of each
expert. So `LinearExperts` takes the place of such a module while weights are measured, and for good where they are
packed: each expert then runs on the kernels of its own layers, and no dense copy is made of more than one of them.

The names of projections are those that checkpoints of the model have (`experts.0.w1`, `experts.0.gate_proj`), which
transformers' own conversion of weights tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightTransform

from .errors import ModelError, in_module
from .modules import packed_modules, replace_module

GATED, UNGATED, DOWN = "gate_up_proj", "up_proj", "down_proj"
PLAIN_NAMES = {GATED: ("gate_proj", "up_proj"), UNGATED: ("up_proj",), DOWN: ("down_proj",)}


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module, of the experts that transformers keeps fused and that can be taken apart."""
    return {name: module for name, module in model.named_modules() if _is_fused(module)}


def _is_fused(module: nn.Module) -> bool:
    """Whether `use_experts_implementation` of transformers, which says how the parameters lie, has marked its class."""
    marks = vars(module)
    if not {"is_transposed", "is_concatenated", "has_gate", "has_bias"} <= marks.keys():
        return False
    if marks.get("has_post_expert_norm"):  # which `LinearExperts` does not know
        return False
    names = _fused_names(module)
    biases = [f"{name}_bias" for name in names] if module.has_bias else []
    parameters = module._parameters
    return parameters.keys() == {*names, *biases} and all(parameters[name].dim() == 3 for name in names)


def _fused_names(fused: nn.Module) -> tuple[str, str]:
    return (GATED if fused.has_gate else UNGATED, DOWN)


def projection_names(model: PreTrainedModel, experts: str, fused: nn.Module) -> dict[str, tuple[str, ...]]:
    """Fused parameter → what checkpoints call its parts, for each expert."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    names = {}
    for parameter in _fused_names(fused):
        names[parameter] = PLAIN_NAMES[parameter]
        for conversion in conversions:
            if _gives(conversion, f"{experts}.{parameter}"):
                found = [re.search(r"(\w+)\.weight$", source) for source in conversion.source_patterns]
                leaves = tuple(match[1] for match in found if match is not None)
                if len(leaves) == len(PLAIN_NAMES[parameter]):
                    names[parameter] = leaves
    return names


def without_merging(conversions: Sequence[WeightTransform], apart: Sequence[str]) -> list[WeightTransform]:
    """Conversions of weights on loading, without those that would fuse experts of which the names are given."""
    fused = [f"{experts}.{parameter}" for experts in apart for parameter in PLAIN_NAMES]
    return [each for each in conversions if not any(_gives(each, name) for name in fused)]


def _gives(conversion: WeightTransform, parameter: str) -> bool:
    """Whether a conversion makes the parameter of that name out of others."""
    return isinstance(conversion, WeightConverter) and any(
        re.search(target, parameter) for target in conversion.target_patterns
    )


def matrices_of(fused: nn.Module, names: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name below the experts, weight `[out, in]` and bias `[out]` of every projection, as views of the parameters."""
    for expert in range(len(fused._parameters[DOWN])):
        for parameter, leaves in names.items():
            weight = fused._parameters[parameter].detach()[expert]
            bias = fused._parameters[f"{parameter}_bias"].detach()[expert] if fused.has_bias else None
            weight = weight.t() if fused.is_transposed else weight
            for index, leaf in enumerate(leaves):
                part = _part(len(weight), index, len(leaves), fused.is_concatenated)
                yield f"{expert}.{leaf}", weight[part], None if bias is None else bias[part]


def _part(rows: int, index: int, count: int, concatenated: bool) -> slice:
    """The rows of one of several projections that share a parameter, one after the other or in turn."""
    size = rows // count
    return slice(index * size, (index + 1) * size) if concatenated else slice(index, None, count)


class LinearExperts(nn.ModuleList):
    """The experts of a layer, each a dict of linear layers: `0.gate_proj`, `0.up_proj`, `0.down_proj`, `1.gate_proj`, …

    Args:
        fused: transformers' module. Its parameters are emptied; `fuse` fills them again.
        names: as `projection_names` gives them.
    """

    def __init__(self, fused: nn.Module, names: dict[str, tuple[str, ...]]) -> None:
        experts: dict[str, dict[str, nn.Module]] = {}
        for name, weight, bias in matrices_of(fused, names):
            expert, leaf = name.split(".")
            experts.setdefault(expert, {})[leaf] = _linear(weight, bias)
        super().__init__(nn.ModuleDict(layers) for layers in experts.values())
        for parameter in fused.parameters(recurse=False):
            parameter.data = parameter.new_empty(0)
        self._fused = (fused,)  # in a tuple, since it is no part of this module
        self._names = names

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' own eager implementation: each expert on those tokens that are routed to it.

        Args:
            hidden_states: `[tokens, hidden]`.
            top_k_index, top_k_weights: `[tokens, k]`, the experts of each token and what they count.
        """
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert < len(self):  # what lies beyond means no expert
                tokens, rank = torch.where(top_k_index == expert)
                *before, down = self[expert].values()
                routed = hidden_states[tokens]
                inner = self._activated([layer(routed) for layer in before])
                output = down(inner) * top_k_weights[tokens, rank, None]
                result.index_add_(0, tokens, output.to(result.dtype))
        return result

    def _activated(self, inner: list[Tensor]) -> Tensor:
        (fused,) = self._fused
        if not fused.has_gate:
            return fused.act_fn(inner[0])
        return fused._apply_gate(torch.cat(inner, -1) if fused.is_concatenated else torch.stack(inner, -1).flatten(-2))

    def fuse(self) -> nn.Module:
        """The module that this one stands for, with the weights of these layers, which must be dense."""
        (fused,) = self._fused
        for parameter, leaves in self._names.items():
            layers = [[expert[leaf] for leaf in leaves] for expert in self]
            weight = torch.stack([_joined([layer.weight for layer in each], fused.is_concatenated) for each in layers])
            _fill(fused, parameter, weight.transpose(1, 2).contiguous() if fused.is_transposed else weight)
            if fused.has_bias:
                biases = [_joined([layer.bias for layer in each], fused.is_concatenated) for each in layers]
                _fill(fused, f"{parameter}_bias", torch.stack(biases))
        return fused.train(self.training)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return layer


def _joined(parts: list[Tensor], concatenated: bool) -> Tensor:
    """Rows of several projections as they lie in one parameter."""
    detached = [part.detach() for part in parts]
    return torch.cat(detached) if concatenated else torch.stack(detached, 1).flatten(0, 1)


def _fill(fused: nn.Module, name: str, values: Tensor) -> None:
    parameter = fused._parameters[name]
    if parameter.device == values.device:
        parameter.data = values  # the very parameter, which others may hold
    else:
        fused.register_parameter(name, nn.Parameter(values, parameter.requires_grad))


def has_linear_experts(model: nn.Module) -> bool:
    """Whether some layers see only those tokens that are routed to them."""
    return any(isinstance(module, LinearExperts) for module in model.modules())


def take_apart(model: PreTrainedModel) -> None:
    """Put `LinearExperts` in the place of all fused experts.

    Raises:
        ModelError: the weights of some are offloaded.
    """
    for name, fused in fused_experts(model).items():
        with in_module(name):
            if has_offloaded_params(fused):
                raise ModelError(
                    "the experts are offloaded; they are quantized in memory only: use a device_map with enough of it"
                )
            replace_module(model, name, LinearExperts(fused, projection_names(model, name, fused)))


def fuse_again(model: nn.Module) -> None:
    """Put transformers' own modules back in the place of all `LinearExperts`, whose layers must be dense."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LinearExperts):
            replace_module(model, name, module.fuse())


@contextmanager
def linear_experts(model: PreTrainedModel) -> Iterator[None]:
    """Within, experts are linear layers; so they stay if any was packed meanwhile, otherwise they are fused again.

    Raises:
        ModelError: as `take_apart`.
    """
    try:
        take_apart(model)
        yield
    finally:
        apart = {name: module for name, module in model.named_modules() if isinstance(module, LinearExperts)}
        if any(packed_modules(module) for module in apart.values()):
            for module in apart.values():
                _own_memory(module)
        else:
            fuse_again(model)


def _own_memory(experts: LinearExperts) -> None:
    """Copy what was not packed, so that it does not hold the memory of all experts of its layer."""
    for parameter in experts.parameters():
        parameter.data = parameter.data.clone()
