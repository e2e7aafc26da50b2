"""Packed weights in place of those of `nn.Linear`, GPT-2's `Conv1D`, convolutions and `nn.Embedding`.

A weight is packed as a matrix, outputs × inputs (`matrix_of`): the rows of an embedding are outputs, and the kernels of
all input channels that reach an output channel of a convolution are its inputs.

Each is an instance of the class that it replaces, so that adapter libraries, which look layers up by their class, take
it for what it is. Buffers only, no parameters: k-bit preparation of adapters casts parameters, and nothing here is
trained by gradient. At rest the buffers are in the layout that the device's kernel reads; `state_dict` always shows the
wire format, and a move to another device or dtype passes through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .arithmetic import is_linear
from .errors import ModelError
from .grid import QuantizedWeight, dequantize
from .kernels import (
    REFERENCE,
    WIRE,
    Choice,
    PackedTensors,
    choose_layout,
    dense_rows,
    dense_weight,
    kernel_of,
    linear,
    multiply,
    needs_op,
    reference,
    to_layout,
)
from .memory import trim
from .packing import pack, packed_length, unpack
from .plan import LayerScheme

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it


def take_constants(module: nn.Module, dense: nn.Module) -> None:
    """Give a module what was said when the dense one was made that it replaces (`padding_idx`, …)."""
    for name in getattr(dense, "__constants__", ()):  # where torch's own modules have the names
        setattr(module, name, getattr(dense, name))


class ComputedWeight(Tensor):
    """A dequantized weight. Operations on it give plain tensors, and so do copies and files of it; writing to its
    `data`, as merging of adapters does, is refused, since it would be lost."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:
        return self.as_subclass(Tensor).detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ModelError(
            "the weight of a packed layer is computed when it is asked for and cannot be written; call dequantize() on"
            " the transformers model first, for example before adapters are merged"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).__deepcopy__(memo)


class PackedLayer(nn.Module):
    """A layer whose weight stays packed: all that does not depend on the class it replaces.

    Args:
        in_features, out_features: as in `nn.Linear`.
        scheme: bits (below 16), group size, symmetry.
        bias: whether there is a bias.
        dtype: of scales and bias; the model's.
        device: where the empty buffers are made.

    Buffers in the state dict: `weight_packed` int32, `weight_scale`, `weight_zero_point` int32 (asymmetric only),
    `weight_shape` int64 `[2]`, `bias`.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: Tensor
    bias: Tensor | None
    _is_hf_initialized = True  # or transformers, while it loads, would dequantize the weight and draw another

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: LayerScheme,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not that of the replaced class, which would make its weight
        self.in_features, self.out_features, self.scheme, self.layout = in_features, out_features, scheme, WIRE
        groups = scheme.groups(in_features)

        def empty(*shape: int, dtype: torch.dtype | None) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        self.register_buffer(
            "weight_packed", empty(out_features, packed_length(in_features, scheme.bits), dtype=torch.int32)
        )
        self.register_buffer("weight_scale", empty(out_features, groups, dtype=dtype))
        zero_point = (
            None if scheme.symmetric else empty(packed_length(out_features, scheme.bits), groups, dtype=torch.int32)
        )
        self.register_buffer("weight_zero_point", zero_point)
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        self.register_buffer("bias", empty(out_features, dtype=dtype) if bias else None)

    @classmethod
    def from_quantized(cls, quantized: QuantizedWeight, bias: Tensor | None) -> PackedLayer:
        """Pack integers `[out, in]`, scales and zero points into a module on the same device."""
        out_features, in_features = quantized.integers.shape
        scale = quantized.scale
        module = cls(in_features, out_features, quantized.scheme, bias is not None, scale.dtype, scale.device)
        if bias is not None:
            module.bias = bias.detach().to(scale.dtype)
        return module.take(quantized)

    def take(self, quantized: QuantizedWeight) -> PackedLayer:
        """Pack integers, scales and zero points of its shape and scheme in the place of those that are there."""
        bits, zero_point = quantized.scheme.bits, quantized.zero_point
        words = None if zero_point is None else pack(zero_point, bits, dim=0)
        wire = PackedTensors(pack(quantized.integers, bits), quantized.scale.contiguous(), words, WIRE)
        return self._hold(wire).settle()

    def like(self, dense: nn.Module) -> PackedLayer:
        """Take over what else the dense module is."""
        take_constants(self, dense)
        return self.train(dense.training)

    def quantized(self) -> QuantizedWeight:
        """The integers, scales and zero points that were packed: the reverse of `from_quantized`."""
        wire, bits = to_layout(self.tensors, WIRE, self.in_features), self.scheme.bits
        zero_point = None if wire.zero_point is None else unpack(wire.zero_point, bits, self.out_features, dim=0)
        return QuantizedWeight(unpack(wire.weight, bits, self.in_features), wire.scale, zero_point, self.scheme)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x [..., in_features]` times the packed weight, plus a bias → `[..., out_features]`."""
        if x.shape[-1] != self.in_features:
            raise ModelError(f"the input has {x.shape[-1]} features, this layer takes {self.in_features}")
        held, scheme = self._buffers, self.scheme  # not by attribute, which torch looks up in several places
        weight = (held["weight_packed"], held["weight_scale"], held["weight_zero_point"])
        product = linear if needs_op(x) else multiply
        return product(x, *weight, bias, scheme.bits, scheme.group_size, self.layout)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight in the shape that the dense module has, computed at each access and never kept."""
        return self._dense_weight().as_subclass(ComputedWeight)

    def _dense_weight(self) -> Tensor:
        return dense_weight(self.tensors, self.scheme.bits, self.in_features)

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """What the layer would give with another weight, `[out_features, in_features]`."""
        return reference.linear(x, matrix, self.bias)

    @property
    def tensors(self) -> PackedTensors:
        """The packed weight as it lies in memory."""
        return PackedTensors(self.weight_packed, self.weight_scale, self.weight_zero_point, self.layout)

    @property
    def choice(self) -> Choice:
        """The layout that fits where the module is now, and why."""
        scale = self.weight_scale
        return choose_layout(self.scheme, self.out_features, self.in_features, scale.device, scale.dtype)

    def settle(self) -> PackedLayer:
        """Bring the buffers into the layout of the device's kernel; the log tells of an accelerator without one."""
        choice, device, shape = self.choice, self.weight_scale.device, (self.out_features, self.in_features)
        kernel = kernel_of(choice.layout, shape, 1, self.weight_scale.dtype, device)
        if device.type not in ("cpu", "meta") and kernel == REFERENCE:
            logger.warning_once(f"Packed layers run slowly here: {choice.reason}.")
        return self._hold(to_layout(self.tensors, choice.layout, self.in_features))

    def _empty(self) -> nn.Module:
        """The dense module without values, on the meta device."""
        raise NotImplementedError

    def dense(self) -> nn.Module:
        """The equivalent dense module with the dequantized weight."""
        module = self._empty()
        module.weight = nn.Parameter(self._dense_weight(), requires_grad=False)
        if self.bias is not None:
            module.bias = nn.Parameter(self.bias, requires_grad=False)
        elif isinstance(module, Conv1D):  # which always has one
            module.bias = nn.Parameter(self.weight_scale.new_zeros(self.out_features), requires_grad=False)
        return module

    def _hold(self, tensors: PackedTensors) -> PackedLayer:
        self.weight_packed, self.weight_scale, self.layout = tensors.weight, tensors.scale, tensors.layout
        self.weight_zero_point = tensors.zero_point
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        """`.to()`, `.half()`, `.cuda()`, …: through the wire format into the layout of the new place."""
        self._hold(to_layout(self.tensors, WIRE, self.in_features))
        super()._apply(fn, recurse)
        self.settle()
        trim()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        wire = to_layout(self.tensors, WIRE, self.in_features)
        destination[prefix + "weight_packed"], destination[prefix + "weight_scale"] = wire.weight, wire.scale
        if wire.zero_point is not None:
            destination[prefix + "weight_zero_point"] = wire.zero_point

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._hold(to_layout(self.tensors, WIRE, self.in_features))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.settle()

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies hold the wire format, since they may be opened on another device or processor."""
        wire = to_layout(self.tensors, WIRE, self.in_features)
        held = {"weight_packed": wire.weight, "weight_scale": wire.scale, "weight_zero_point": wire.zero_point}
        return {**self.__dict__, "_buffers": {**self._buffers, **held}, "layout": WIRE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.settle()

    def __setattr__(self, name: str, value: Any) -> None:
        """When accelerate hooks a module, it has moved the buffers one by one before, without `_apply`. Those that it
        puts in at each call, of an offloaded module, are from the state dict."""
        super().__setattr__(name, value)
        if name == "_hf_hook" and self.layout != WIRE:
            self.settle()

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.scheme},"
            f" layout={self.layout}"
        )

    __repr__ = nn.Module.__repr__


class QuantLinear(PackedLayer, nn.Linear):
    """Packed form of `nn.Linear` and of classes that compute the same."""

    dense_class: type[nn.Linear] = nn.Linear

    def like(self, dense: nn.Module) -> PackedLayer:
        assert isinstance(dense, nn.Linear)
        self.dense_class = type(dense)
        return super().like(dense)

    def _empty(self) -> nn.Module:
        return self.dense_class(self.in_features, self.out_features, self.bias is not None, device="meta")


class QuantConv1D(PackedLayer, Conv1D):
    """Packed form of `transformers.pytorch_utils.Conv1D`, whose weight is stored as `[in, out]`."""

    @property
    def nf(self) -> int:
        """Output features, by the name that `Conv1D` gives them."""
        return self.out_features

    @property
    def nx(self) -> int:
        """Input features, by the name that `Conv1D` gives them."""
        return self.in_features

    def _dense_weight(self) -> Tensor:
        return super()._dense_weight().t().contiguous()

    def _empty(self) -> nn.Module:
        with torch.device("meta"):
            return Conv1D(self.out_features, self.in_features)


class PackedConvolution(PackedLayer):
    """A convolution whose weight stays packed, and is dequantized at each call."""

    kernel_size: tuple[int, ...]
    _conv_forward: Callable[..., Tensor]  # of torch's class: input, weight, bias → output

    @property
    def choice(self) -> Choice:
        return Choice(WIRE, "no packed kernel for convolutions: the reference dequantizes at each call")

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, super()._dense_weight())

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return self._conv_forward(x, self._with_kernels(matrix).to(x.dtype), bias)

    def _dense_weight(self) -> Tensor:
        return self._with_kernels(super()._dense_weight())

    def _with_kernels(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.out_features, -1, *self.kernel_size)

    def _empty(self) -> nn.Module:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        dense = nn.Conv1d if isinstance(self, nn.Conv1d) else nn.Conv2d
        return dense(**{name: getattr(self, name) for name in names}, bias=self.bias is not None, device="meta")


class QuantConv1d(PackedConvolution, nn.Conv1d):
    """Packed form of `nn.Conv1d`."""


class QuantConv2d(PackedConvolution, nn.Conv2d):
    """Packed form of `nn.Conv2d`."""


@dataclass(frozen=True)
class RowScale:
    """What classes of transformers multiply the rows of their embedding by (`Gemma3TextScaledWordEmbedding`, …).

    Attributes:
        kind: the class.
        factor: the number.
        rounded: whether it is held as a tensor, and so is rounded to the dtype of the rows.
    """

    kind: type[nn.Embedding]
    factor: float
    rounded: bool

    @classmethod
    def of(cls, dense: nn.Module) -> RowScale | None:
        """That of a dense embedding, or None for `nn.Embedding` itself."""
        if type(dense) is nn.Embedding:
            return None
        if isinstance(dense.embed_scale, Tensor):
            return cls(type(dense), dense.scalar_embed_scale, True)
        return cls(type(dense), dense.embed_scale, False)

    def applied_to(self, rows: Tensor) -> Tensor:
        """The rows, scaled."""
        return rows * (rows.new_tensor(self.factor) if self.rounded else self.factor)

    def empty(self, rows: int, columns: int, padding_idx: int | None, device: torch.device) -> nn.Embedding:
        """A dense embedding of the class with its weight on the meta device, and all else on another one."""
        with torch.device("meta"):
            module = self.kind(rows, columns, padding_idx, embed_scale=self.factor)
        if self.rounded:
            module.embed_scale = torch.tensor(self.factor, device=device)
        return module


class ScalableEmbedding(nn.Embedding):
    """What packed and tied embeddings have in common."""

    row_scale: RowScale | None = None

    def scaled(self, rows: Tensor) -> Tensor:
        return rows if self.row_scale is None else self.row_scale.applied_to(rows)

    def empty_on(self, device: torch.device) -> nn.Embedding:
        shape = self.num_embeddings, self.embedding_dim
        if self.row_scale is None:
            return nn.Embedding(*shape, self.padding_idx, device="meta")
        return self.row_scale.empty(*shape, self.padding_idx, device)


class QuantEmbedding(PackedLayer, ScalableEmbedding):
    """Packed form of `nn.Embedding`, and of those of transformers that scale its rows. Only the rows that are looked up
    are dequantized.

    Attributes:
        shared: whether other modules compute with its weight. It then lies as the kernel for products wants it.
    """

    shared = False

    def like(self, dense: nn.Module) -> PackedLayer:
        self.row_scale = RowScale.of(dense)
        return super().like(dense)

    @property
    def choice(self) -> Choice:
        if self.shared:
            return super().choice
        return Choice(WIRE, "rows are looked up in the wire format, and only they are dequantized")

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scaled(self.look_up(tokens))

    def look_up(self, tokens: Tensor) -> Tensor:
        """The rows of tokens `[...]` → `[..., in_features]` in the dtype of the scales."""
        rows = tokens.flatten()
        if not len(rows):
            return self.weight_scale.new_empty(*tokens.shape, self.in_features)
        found = dense_rows(self.tensors, rows, self.scheme.bits, self.in_features)
        return found.view(*tokens.shape, self.in_features)

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self.scaled(F.embedding(x, matrix))

    def _empty(self) -> nn.Module:
        return self.empty_on(self.weight_scale.device)


PACKED_CLASSES: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: QuantLinear,
    Conv1D: QuantConv1D,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Embedding: QuantEmbedding,
}
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
SCALED_EMBEDDING = "ScaledWordEmbedding"  # how the names of transformers' classes end that multiply the rows


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class that a dense module is packed as, a key of `PACKED_CLASSES`; its own if it cannot be packed."""
    if isinstance(module, nn.Embedding) and type(module).__name__.endswith(SCALED_EMBEDDING):
        return nn.Embedding
    return nn.Linear if is_linear(module) else type(module)


def padding_of(module: nn.Conv1d | nn.Conv2d) -> tuple[int, ...] | None:
    """Zeros on either side of each dimension, or None if the sides differ, as they may where `padding="same"`."""
    if not isinstance(module.padding, str):
        return tuple(module.padding)
    spans = (size * (kernel - 1) for size, kernel in zip(module.dilation, module.kernel_size, strict=True))
    both = [0 if module.padding == "valid" else span for span in spans]
    return None if any(size % 2 for size in both) else tuple(size // 2 for size in both)


def matrix_of(kind: type[nn.Module], weight: Tensor) -> Tensor:
    """The weight of a dense module of a class as it is packed, `[out_features, in_features]`; a view."""
    return weight.t() if kind is Conv1D else weight.flatten(1)


def weight_of(kind: type[nn.Module], matrix: Tensor, shape: torch.Size) -> Tensor:
    """Reverse of `matrix_of`, for a weight of a shape."""
    return (matrix.t() if kind is Conv1D else matrix).reshape(shape)


def set_dequantized(module: nn.Module, quantized: QuantizedWeight) -> None:
    """Let a dense module have the dequantized weight, in its dtype and shape; nothing is written to the one it had.

    Args:
        module: of a class that can be packed.
        quantized: integers `[out_features, in_features]` of its weight.
    """
    old = module.weight
    matrix = dequantize(quantized.integers, quantized.scale, quantized.zero_point).to(old.dtype)
    module.weight = nn.Parameter(weight_of(kind_of(module), matrix, old.shape).contiguous(), requires_grad=False)


def packed_modules(model: nn.Module) -> dict[str, PackedLayer]:
    """Name → packed module, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one with that dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def explain_choice(module: PackedLayer) -> str:
    """Which kernel a packed module runs on, and why not a faster one."""
    return f"{module.layout}: {module.choice.reason}"
