"""A model → the tensors of a GGUF file, in the model's own order.

What holds for all architectures follows llama.cpp's converter (conversion/base.py):

- Rows are independent in our grid, so where llama.cpp has them in another order, integers and scales just move along.
  Columns that move keep the scale that they had, which a block of ggml's has for itself.
- A projection of all experts of a layer is one tensor, for some architectures two of them. It has one of ggml's types:
  the smallest that holds the integers of all of them.
- Matrices that are not quantized keep the model's dtype; norms, biases, embeddings of positions and what routes tokens
  to experts are float32, as llama.cpp wants them; so are convolutions.
- What is special about rotary frequencies (Llama 3's scaling, the features that Gemma 4 does not turn) is a tensor,
  `rope_freqs.weight`: by how much each is divided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ExportError, in_module
from ..experts import LinearExperts, take_apart
from ..grid import QuantizedWeight
from ..modules import PackedLayer, kind_of, matrix_of
from ..plan import LayerScheme
from .architectures import Architecture
from .blocks import block_type, encode, largest_difference, per_block, shared_type
from .hyperparameters import rotary
from .tensor_types import gguf_name, names_in

DENSE_TYPES = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
IN_FLOAT32 = (  # ends of names in GGUF
    "position_embd.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "shortconv.conv.weight",
    "ssm_conv1d.weight",
)  # fmt: skip


class Held(NamedTuple):
    """How modules of a scheme are held: as which of ggml's types."""

    scheme: LayerScheme
    kind: str


@dataclass(frozen=True)
class Part:
    """Modules whose weights are one tensor in GGUF: one, or a projection or several of all experts of a layer.

    Attributes:
        name: of the module, or of the first projection without the number of an expert.
        modules: name → module, expert by expert.
        stacked: whether these are experts.
        projections: how many of each expert, whose rows follow each other.
    """

    name: str
    modules: Mapping[str, nn.Module]
    stacked: bool = False
    projections: int = 1

    @property
    def packed(self) -> dict[str, PackedLayer]:
        """Those of the modules that are packed: all or none.

        Raises:
            ExportError: some.
        """
        packed = {name: module for name, module in self.modules.items() if isinstance(module, PackedLayer)}
        if packed and len(packed) < len(self.modules):
            raise ExportError(
                f"{len(packed)} of {len(self.modules)} experts are packed, which are one tensor in GGUF, with one type;"
                " quantize with granularity='group', which gives all of a layer the same bits"
            )
        return packed


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor before it is encoded, so that only one at a time is in memory twice.

    Attributes:
        name: in GGUF.
        kind: its type.
        shape: as in torch.
        data: makes the array to write.
    """

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: Callable[[], np.ndarray]


def parts_of(model: PreTrainedModel, architecture: Architecture) -> tuple[Part, ...]:
    """The modules of a model, those of experts put together, also projections that GGUF has under one name. Fused
    experts are taken apart."""
    take_apart(model)
    parts: list[Part] = []
    experts = "\0"  # the name of the last module of experts, whose own modules follow it
    for name, module in model.named_modules():
        if isinstance(module, LinearExperts):
            experts = f"{name}."
            by_name: dict[str, list[str]] = {}
            for leaf in module[0]:
                by_name.setdefault(architecture.known_as(f"{name}.{leaf}"), []).append(leaf)
            for leaves in by_name.values():
                layers = {
                    f"{name}.{index}.{leaf}": expert[leaf] for index, expert in enumerate(module) for leaf in leaves
                }
                parts.append(Part(f"{name}.{leaves[0]}", layers, stacked=True, projections=len(leaves)))
        elif not name.startswith(experts):
            parts.append(Part(name, {name: module}))
    return tuple(parts)


def held_as(parts: tuple[Part, ...]) -> tuple[dict[str, Held], dict[str, float]]:
    """Packed module → how it is held, and → how far its weights may be from ours, where that is not 0.

    Raises:
        ExportError: ggml has no type for some, or experts have no type in common.
    """
    held: dict[str, Held] = {}
    differences: dict[str, float] = {}
    for part in parts:
        with in_module(part.name):
            packed = part.packed
        kinds = {}
        for name, module in packed.items():
            quantized = module.quantized()
            with in_module(name):
                kinds[name] = block_type(quantized)
            difference = largest_difference(quantized)
            if difference > 0:
                differences[name] = difference
        if kinds:
            kind = shared_type(kinds.values())
            held |= {name: Held(module.scheme, kind) for name, module in packed.items()}
    return held, differences


def tensors_of(
    model: PreTrainedModel, architecture: Architecture, parts: tuple[Part, ...], held: Mapping[str, Held]
) -> Iterator[GGUFTensor]:
    """The tensors of a model.

    Args:
        model: whose parts these are.
        architecture: its entry.
        parts: as `parts_of` gives them.
        held: as `held_as` gives it.

    Raises:
        ExportError: the library `gguf` has no name for one.
    """
    config, names = model.config, names_in(architecture.name, model.config.num_hidden_layers)
    tied = _tied(model)
    if architecture.rope_types and rotary(config)["rope_type"] in ("llama3", "proportional"):
        factors = _rope_factors(model)
        yield GGUFTensor("rope_freqs.weight", GGMLQuantizationType.F32, tuple(factors.shape), partial(_bytes, factors))
    for part in parts:
        rows = partial(architecture.in_order, config, part.name)
        columns = partial(architecture.with_inputs_in_order, config, part.name)
        known = architecture.known_as(part.name)
        packed = part.packed
        if packed:
            kind = held[next(iter(packed))].kind
            first = next(iter(packed.values()))
            yield GGUFTensor(
                gguf_name(names, f"{known}.weight"),
                GGMLQuantizationType[kind],
                _shape(part, (first.out_features, first.in_features)),
                partial(_encoded, part, rows, columns, kind),
            )
        for leaf, tensors in _parameters(part).items():
            if leaf == "weight" and part.name in tied:
                continue  # llama.cpp takes the embedding where there is no other
            name = gguf_name(names, architecture.known_as(f"{part.name}.{leaf}"))
            if leaf in architecture.computed:
                tensors = [architecture.computed[leaf](tensor.float()) for tensor in tensors]
            elif name.endswith(IN_FLOAT32):
                tensors = [tensor.float().squeeze(0) for tensor in tensors]
            elif tensors[0].dim() == 1:
                added = architecture.offset(known) if leaf == "weight" else 0.0
                tensors = [(tensor.float() + added) * architecture.factor(config, part.name) for tensor in tensors]
            yield GGUFTensor(
                name,
                DENSE_TYPES[tensors[0].dtype],
                _shape(part, tuple(tensors[0].shape)),
                partial(_dense, tensors, rows, columns),
            )


def _tied(model: PreTrainedModel) -> set[str]:
    """Names of the modules that have the parameter of the embedding; T5's config says so also of a head that has its
    own. Those that share the weight of a packed embedding have no parameter."""
    embedding = model.get_input_embeddings()
    weight = embedding._parameters.get("weight")
    others = ((name, module) for name, module in model.named_modules() if module is not embedding)
    return {name for name, module in others if module._parameters.get("weight") is weight is not None}


def _shape(part: Part, of_module: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the tensor of modules that have tensors of a shape each."""
    if not part.stacked:
        return of_module
    return (len(part.modules) // part.projections, part.projections * of_module[0], *of_module[1:])


def _parameters(part: Part) -> dict[str, list[Tensor]]:
    """What is not packed, by name, of each of the modules; weights as `[out, in]`."""
    of_modules = [_parameters_of(module) for module in part.modules.values()]
    return {leaf: [parameters[leaf] for parameters in of_modules] for leaf in of_modules[0]}


def _parameters_of(module: nn.Module) -> dict[str, Tensor]:
    if isinstance(module, PackedLayer):
        return {} if module.bias is None else {"bias": module.bias}
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    found = {
        leaf: tensor.detach() for leaf, tensor in tensors.items() if leaf not in module._non_persistent_buffers_set
    }
    return {leaf: matrix_of(kind_of(module), each) if each.dim() > 1 else each for leaf, each in found.items()}


def _dense(tensors: list[Tensor], rows: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor]) -> np.ndarray:
    tensor = rows(torch.stack(tensors) if len(tensors) > 1 else tensors[0])
    return _bytes(columns(tensor) if tensor.dim() > 1 else tensor)


def _encoded(
    part: Part, rows: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor], kind: str
) -> np.ndarray:
    blocks = [encode(_reordered(module.quantized(), rows, columns), kind) for module in part.packed.values()]
    return np.stack(blocks) if part.stacked else blocks[0]


def _reordered(
    weight: QuantizedWeight, rows: Callable[[Tensor], Tensor], columns: Callable[[Tensor], Tensor]
) -> QuantizedWeight:
    """With a scale for each of ggml's blocks, so that columns need not keep to our groups."""
    scale, zero_point = (
        None if each is None else columns(rows(per_block(each, weight))) for each in (weight.scale, weight.zero_point)
    )
    assert scale is not None
    return replace(weight, integers=columns(rows(weight.integers)), scale=scale, zero_point=zero_point)


def _bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, since numpy has no bfloat16."""
    return tensor.contiguous().view(torch.uint8).numpy()


def _rope_factors(model: PreTrainedModel) -> Tensor:
    """By how much the frequencies of the rotary embedding are divided, float32 `[head_dim / 2]`: 1e30 where it is 0."""
    of_kinds = "full_attention" in model.config.rope_parameters
    embedding = model.model.rotary_emb
    scaled = (embedding.full_attention_inv_freq if of_kinds else embedding.inv_freq).float()
    exponents = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    return (rotary(model.config)["rope_theta"] ** -exponents / scaled).clamp(max=1e30)
