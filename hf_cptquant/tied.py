"""Layers that share their weight with a packed embedding: the head of most small language models, the embeddings of
encoder and decoder.

transformers ties such weights by giving one parameter to several modules (`tie_word_embeddings`). A packed weight is no
parameter, so the embedding alone is packed, and the others get classes here that hold no weight and compute with the
embedding's. That way it is in memory and in files once, and stays so when the model is moved, copied or saved, without
anybody minding it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from .kernels import reference
from .modules import QuantEmbedding, RowScale, ScalableEmbedding, kind_of, replace_module, take_constants


class TiedLayer(nn.Module):
    """A layer without a weight of its own, which computes with that of a packed embedding: all that does not depend on
    the class it replaces.

    The embedding is no part of this module. It may be on another device, or offloaded.

    Args:
        embedding: packed.
        dense: the module to replace; its bias is taken over as it is, since it may be tied, too.
    """

    bias: nn.Parameter | None
    _is_hf_initialized = True  # as that of `PackedLayer`

    def __init__(self, embedding: QuantEmbedding, dense: nn.Module) -> None:
        nn.Module.__init__(self)  # not that of the replaced class, which would make its weight
        self._embedding = (embedding,)  # in a tuple, or it would be registered as a part
        take_constants(self, dense)
        self.train(dense.training)

    @property
    def embedding(self) -> QuantEmbedding:
        """The embedding that holds the weight."""
        return self._embedding[0]

    @property
    def weight(self) -> Tensor:
        """As that of `PackedLayer`."""
        return self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        embedding = self.embedding
        if embedding.weight_packed.device.type == "meta":
            with align_module_device(embedding):  # which loads it, if it is offloaded
                return self._computed(x, embedding)
        return self._computed(x, embedding)

    def _computed(self, x: Tensor, embedding: QuantEmbedding) -> Tensor:
        raise NotImplementedError

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """What the layer would give with another weight, `[out_features, in_features]`."""
        raise NotImplementedError

    def dense(self, weight: nn.Parameter) -> nn.Module:
        """The equivalent dense module with the dequantized weight, which it shares."""
        raise NotImplementedError

    __repr__ = nn.Module.__repr__


class TiedLinear(TiedLayer, nn.Linear):
    """`nn.Linear` with the weight of a packed embedding, such as the head of a language model."""

    def __init__(self, embedding: QuantEmbedding, dense: nn.Module) -> None:
        super().__init__(embedding, dense)
        self.register_parameter("bias", dense._parameters.get("bias"))
        self._is_hf_initialized = self.bias is None

    def _computed(self, x: Tensor, embedding: QuantEmbedding) -> Tensor:
        product = embedding.multiply(x.to(embedding.weight_packed.device), None).to(x.device)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        return reference.linear(x, matrix.to(x.device), self.bias)

    def dense(self, weight: nn.Parameter) -> nn.Module:
        module = nn.Linear(self.in_features, self.out_features, False, device="meta")
        module.weight = weight
        module.register_parameter("bias", self.bias)
        return module.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, weight of a packed embedding"


class TiedEmbedding(TiedLayer, ScalableEmbedding):
    """`nn.Embedding` with the weight of another, packed one, such as those of encoder and decoder."""

    def __init__(self, embedding: QuantEmbedding, dense: nn.Module) -> None:
        super().__init__(embedding, dense)
        self.row_scale = RowScale.of(dense)

    def _computed(self, x: Tensor, embedding: QuantEmbedding) -> Tensor:
        return self.scaled(embedding.look_up(x.to(embedding.weight_packed.device))).to(x.device)

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self.scaled(F.embedding(x, matrix.to(x.device)))

    def dense(self, weight: nn.Parameter) -> nn.Module:
        module = self.empty_on(weight.device)
        module.weight = weight
        return module.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, weight of another, packed embedding"


TIED_CLASSES: dict[type[nn.Module], type[TiedLayer]] = {nn.Linear: TiedLinear, nn.Embedding: TiedEmbedding}


def tied_layers(model: nn.Module) -> dict[str, TiedLayer]:
    """Name → module that computes with the weight of a packed embedding, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TiedLayer)}


def tie(model: PreTrainedModel, name: str, others: Sequence[str]) -> None:
    """Let modules that share the weight of an embedding compute with it now that it is packed.

    transformers forgets that they are tied: it ties parameters, and there are none left.

    Args:
        name: of the packed embedding.
        others: of the modules, linear layers and embeddings, still dense.
    """
    embedding = model.get_submodule(name)
    assert isinstance(embedding, QuantEmbedding), "modules share the weight of an embedding"
    for other in others:
        dense = model.get_submodule(other)
        with align_module_device(dense):  # for its bias
            replace_module(model, other, TIED_CLASSES[kind_of(dense)](embedding, dense))
    weights = {f"{module}.weight" for module in (name, *others)}
    model.all_tied_weights_keys = {
        target: source for target, source in model.all_tied_weights_keys.items() if target not in weights
    }
    embedding.shared = True
    embedding.settle()
