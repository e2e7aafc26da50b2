"""Mixtures of experts as linear layers.

transformers 5 keeps the experts of a layer in one module with a three-dimensional parameter for each projection, as its
grouped products want them. Files, inference engines and all of this package know a matrix for each projection of each
expert. So `LinearExperts` takes the place of such a module while weights are measured, and for good where they are
packed: each expert then runs on the kernels of its own layers, and no dense copy is made of more than one of them.

The names of projections are those that checkpoints of the model have (`experts.0.w1`, `experts.0.gate_proj`), which
transformers' own conversion of weights tells. Where it tells none they are the commonest, which inference engines read
for Llama 4, too, whose original checkpoint is fused.

How the parameters lie says a mark of transformers' on most classes. Those without it are in a table, each with the way
in which its model calls it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightTransform

from .errors import ModelError, in_module
from .modules import packed_modules, replace_module

GATED, UNGATED, DOWN, ALONE = "gate_up_proj", "up_proj", "down_proj", "weight"
PLAIN_NAMES = {GATED: ("gate_proj", "up_proj"), UNGATED: ("up_proj",), DOWN: ("down_proj",), ALONE: ("linear",)}


@dataclass(frozen=True)
class Layout:
    """How the parameters of fused experts lie.

    Attributes:
        weights: names of the three-dimensional parameters, in the order in which an expert uses them.
        transposed: `[experts, in, out]` instead of `[experts, out, in]`.
        concatenated: projections that share a parameter lie one after the other, not in turn.
        biased: each has a bias, `[experts, out]`, called `…_bias`.
    """

    weights: tuple[str, ...] = (GATED, DOWN)
    transposed: bool = False
    concatenated: bool = True
    biased: bool = False

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all parameters."""
        return (*self.weights, *(f"{name}_bias" for name in self.weights if self.biased))


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module, of the experts that transformers keeps fused and that can be taken apart."""
    return {name: module for name, module in model.named_modules() if layout_of(module) is not None}


def layout_of(module: nn.Module) -> Layout | None:
    """How the parameters of a module lie, or None if it holds no fused experts that can be taken apart."""
    layout = _layout_in_table(module) or _marked_layout(module)
    if layout is None or module._parameters.keys() != set(layout.parameters):
        return None
    weights = [module._parameters[name] for name in layout.weights]
    return layout if all(weight is not None and weight.dim() == 3 for weight in weights) else None


def _layout_in_table(module: nn.Module) -> Layout | None:
    unmarked = UNMARKED.get(type(module).__name__)
    return None if unmarked is None else unmarked[0]


def _marked_layout(module: nn.Module) -> Layout | None:
    """How the parameters lie by what `use_experts_implementation` of transformers has marked the class with."""
    marks = vars(module)
    if not {"is_transposed", "is_concatenated", "has_gate", "has_bias"} <= marks.keys():
        return None
    if marks.get("has_post_expert_norm"):  # which `LinearExperts` does not know
        return None
    weights = (GATED if module.has_gate else UNGATED, DOWN)
    return Layout(weights, module.is_transposed, module.is_concatenated, module.has_bias)


def _checked_layout(fused: nn.Module) -> Layout:
    layout = layout_of(fused)
    assert layout is not None, "the caller has looked whether it can be taken apart"
    return layout


def experts_in(fused: nn.Module) -> int:
    """How many experts a fused module has. (LongCat's first parameter has rows for more, which compute nothing.)"""
    return min(len(fused._parameters[name]) for name in _checked_layout(fused).weights)


def unused_bytes(fused: nn.Module) -> int:
    """Bytes of what belongs to no expert, which is written for fused modules alone."""
    count = experts_in(fused)
    weights = (fused._parameters[name] for name in _checked_layout(fused).weights)
    return sum((len(weight) - count) * prod(weight.shape[1:]) * weight.element_size() for weight in weights)


def projection_names(model: PreTrainedModel, experts: str, fused: nn.Module) -> dict[str, tuple[str, ...]]:
    """Fused parameter → what checkpoints call its parts, for each expert."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    names = {}
    for parameter in _checked_layout(fused).weights:
        names[parameter] = PLAIN_NAMES[parameter]
        for conversion in conversions:
            if _gives(conversion, f"{experts}.{parameter}"):
                found = [re.search(r"(\w+)\.weight$", source) for source in conversion.source_patterns]
                leaves = tuple(match[1] for match in found if match is not None)
                if len(leaves) == len(PLAIN_NAMES[parameter]):
                    names[parameter] = leaves
    return names


def without_merging(
    conversions: Sequence[WeightTransform], apart: Sequence[str], packed: Sequence[str]
) -> list[WeightTransform]:
    """Conversions of weights between files and model, without those that fuse experts or split matrices that are here
    in parts: a packed part has a scheme of its own, and tensors that cannot be joined.

    Args:
        conversions: transformers'.
        apart: names of experts that are linear layers.
        packed: names of packed layers.
    """
    fused = [f"{experts}.{parameter}" for experts in apart for parameter in PLAIN_NAMES]
    made = [*fused, *(f"{name}.{tensor}" for name in packed for tensor in ("weight_packed", "bias"))]
    return [each for each in conversions if not any(_gives(each, name) for name in made)]


def _gives(conversion: WeightTransform, parameter: str) -> bool:
    """Whether a conversion makes the parameter of that name out of others."""
    return isinstance(conversion, WeightConverter) and any(
        re.search(target, parameter) for target in conversion.target_patterns
    )


def matrices_of(fused: nn.Module, names: dict[str, tuple[str, ...]]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name below the experts, weight `[out, in]` and bias `[out]` of every projection, as views of the parameters."""
    layout = _checked_layout(fused)
    for expert in range(experts_in(fused)):
        for parameter, leaves in names.items():
            weight = fused._parameters[parameter].detach()[expert]
            bias = fused._parameters[f"{parameter}_bias"].detach()[expert] if layout.biased else None
            weight = weight.t() if layout.transposed else weight
            for index, leaf in enumerate(leaves):
                part = _part(len(weight), index, len(leaves), layout.concatenated)
                yield f"{expert}.{leaf}", weight[part], None if bias is None else bias[part]


def _part(rows: int, index: int, count: int, concatenated: bool) -> slice:
    """The rows of one of several projections that share a parameter, one after the other or in turn."""
    size = rows // count
    return slice(index * size, (index + 1) * size) if concatenated else slice(index, None, count)


class LinearExperts(nn.ModuleList):
    """The experts of a layer, each a dict of linear layers: `0.gate_proj`, `0.up_proj`, `0.down_proj`, `1.gate_proj`, …
    How a model calls them, its subclasses know.

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
        self._layout = _checked_layout(fused)
        self._rows = {name: len(fused._parameters[name]) for name in self._layout.weights}
        for parameter in fused.parameters(recurse=False):
            parameter.data = parameter.new_empty(0)
        self._fused = (fused,)  # in a tuple, since it is no part of this module
        self._names = names

    def __getattr__(self, name: str) -> Any:
        """The emptied parameters, too: some models of transformers initialize those of their experts by name."""
        (fused,) = self.__dict__.get("_fused", (None,))
        if fused is not None and name in fused._parameters:
            return fused._parameters[name]
        return super().__getattr__(name)

    def _output(self, expert: int, routed: Tensor) -> Tensor:
        """What an expert makes of the tokens that are routed to it, `[tokens, hidden]`."""
        *before, down = self[expert].values()
        return down(self._activated([layer(routed) for layer in before]))

    def _activated(self, inner: list[Tensor]) -> Tensor:
        (fused,) = self._fused
        if len(inner) == 1:
            return fused.act_fn(inner[0])
        if _layout_in_table(fused) is not None:
            gate, up = inner
            return up * fused.act_fn(gate)
        joined = torch.cat(inner, -1) if self._layout.concatenated else torch.stack(inner, -1).flatten(-2)
        return fused._apply_gate(joined)  # which marked classes have

    def fuse(self) -> nn.Module:
        """The module that this one stands for, with the weights of these layers, which must be dense. Rows that belong
        to no expert are zero."""
        (fused,), layout = self._fused, self._layout
        for parameter, leaves in self._names.items():
            layers = [[expert[leaf] for leaf in leaves] for expert in self]
            weight = torch.stack([_joined([layer.weight for layer in each], layout.concatenated) for each in layers])
            weight = weight.transpose(1, 2).contiguous() if layout.transposed else weight
            if unused := self._rows[parameter] - len(weight):
                weight = torch.cat((weight, weight.new_zeros(unused, *weight.shape[1:])))
            _fill(fused, parameter, weight)
            if layout.biased:
                biases = [_joined([layer.bias for layer in each], layout.concatenated) for each in layers]
                _fill(fused, f"{parameter}_bias", torch.stack(biases))
        return fused.train(self.training)


class OfRoutedTokens(LinearExperts):
    """Called as transformers has agreed on: with all tokens, and which expert each is for."""

    beyond_is_identity = False  # what lies beyond the experts means none

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As transformers' own eager implementation: each expert on those tokens that are routed to it.

        Args:
            hidden_states: `[tokens, hidden]`.
            top_k_index, top_k_weights: `[tokens, k]`, the experts of each token and what they count.
        """
        result = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert < len(self) or self.beyond_is_identity:
                tokens, rank = torch.where(top_k_index == expert)
                output = self._output(expert, hidden_states[tokens]) * top_k_weights[tokens, rank, None]
                result.index_add_(0, tokens, output.to(result.dtype))
        return result


class WithIdentities(OfRoutedTokens):
    """LongCat's: what lies beyond the experts gives the token back."""

    beyond_is_identity = True

    def _output(self, expert: int, routed: Tensor) -> Tensor:
        return routed if expert >= len(self) else super()._output(expert, routed)


class OfRepeatedTokens(LinearExperts):
    """Llama 4's, which come after the weighting, not before it."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Each expert on its own tokens. Those that are not routed to it are zero, and what it makes of them, too.

        Args:
            hidden_states: `[experts · tokens, hidden]`, all tokens for the first expert, for the second one, …, each
                multiplied by what the expert counts for it.
        """
        repeated = hidden_states.view(len(self), -1, hidden_states.shape[-1])
        result = torch.zeros_like(repeated)
        for expert, routed in enumerate(repeated.any(-1)):
            if bool(routed.any()):
                result[expert, routed] = self._output(expert, repeated[expert, routed])
        return result.flatten(0, 1)


class OfSortedTokens(LinearExperts):
    """JetMoE's, of which each is one matrix."""

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        """Each expert on its own rows.

        Args:
            inputs: `[rows, in]`, those of the first expert first.
            expert_size: how many rows each expert has.
        """
        parts = zip(self, inputs.split(expert_size), strict=True)
        return torch.cat([expert["linear"](rows) for expert, rows in parts if len(rows)])


# Class of transformers → how its parameters lie, and what takes its place.
UNMARKED: dict[str, tuple[Layout, type[LinearExperts]]] = {
    "Llama4TextExperts": (Layout(transposed=True), OfRepeatedTokens),
    "LongcatFlashExperts": (Layout(), WithIdentities),
    "JetMoeParallelExperts": (Layout((ALONE,)), OfSortedTokens),
}


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
            _, kind = UNMARKED.get(type(fused).__name__, (None, OfRoutedTokens))
            replace_module(model, name, kind(fused, projection_names(model, name, fused)))


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
