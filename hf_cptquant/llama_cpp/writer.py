"""A quantized model → one GGUF file that llama.cpp loads, with our own integers.

Llama alone (`LlamaForCausalLM`: Llama 3, SmolLM, and others of that class) is written, since what llama.cpp
computes for it was compared with the model (`benchmarks/llama_cpp.py`); for the others there is `tensor_types.py`. What
the file says follows llama.cpp's own converter (conversion/llama.py):

- llama.cpp turns neighbouring features of a head together, transformers those of its first and second half. So rows of
  q_proj and k_proj change their order; rows are independent in our grid, so integers and scales just move along.
- Matrices that are not quantized keep the model's dtype; norms and biases are float32, as llama.cpp wants them.
- Llama 3's scaling of rotary frequencies is a tensor, `rope_freqs.weight`: by how much each is divided.

The file is written beside its place and moved there when it is complete.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, size_label
from gguf.quants import quant_shape_to_byte_shape
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import ExportError, in_module
from ..model_view import read_config
from ..modules import PackedLayer, packed_modules
from ..plan import LayerScheme
from ..record import QuantizationRecord
from .blocks import block_type, encode, largest_difference
from .tensor_types import gguf_name, name_map, refuse_existing
from .vocabulary import Vocabulary, read_vocabulary

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

ARCHITECTURE = "LlamaForCausalLM"
ROPE_TYPES = ("default", "llama3")
DENSE_TYPES = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}


class Held(NamedTuple):
    """How modules of a scheme are held: as which of ggml's types."""

    scheme: LayerScheme
    kind: str


@dataclass(frozen=True)
class GGUFReport:
    """What was written.

    Attributes:
        nbytes: size of the file.
        modules: scheme and ggml type → number of packed modules.
        largest_difference: module → how far its weights may be from ours; only modules where it is not 0.
    """

    nbytes: int
    modules: Mapping[Held, int]
    largest_difference: Mapping[str, float]


@dataclass(frozen=True)
class _GGUFTensor:
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


def export_gguf(folder: str | Path, path: str | Path) -> GGUFReport:
    """Write a quantized model as GGUF.

    Args:
        folder: what `save_pretrained` wrote, with the tokenizer.
        path: a new file.

    Raises:
        ExportError: another architecture or tokenizer than described above, groups that are no multiples of 32, zero
            points of 8 bits, scales beyond float16, or the file exists.
        ModelError, PlanError: the folder holds no quantized model of ours.
    """
    folder, path = Path(folder), Path(path)
    refuse_existing(path)
    record = QuantizationRecord.load(folder)
    config = read_config(str(folder))
    _check_config(config)
    vocabulary = _load_vocabulary(folder, config.vocab_size)
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    held: dict[str, Held] = {}
    differences: dict[str, float] = {}
    for name, module in packed_modules(model).items():
        quantized = module.quantized()
        with in_module(name):
            held[name] = Held(module.scheme, block_type(quantized))
        difference = largest_difference(quantized)
        if difference > 0:
            differences[name] = difference
    if differences:
        worst = max(differences, key=lambda name: differences[name])
        logger.warning(
            f"{len(differences)} of {len(held)} modules have scales that float16 does not hold exactly; weights differ"
            f" by up to {differences[worst]:.2g} ({worst})"
        )

    tensors = tuple(_tensors(model, {name: of_module.kind for name, of_module in held.items()}))
    kinds = Counter(tensor.kind.name for tensor in tensors if len(tensor.shape) > 1)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as staging:
        written = Path(staging) / path.name
        with closing(GGUFWriter(written, "llama")) as writer:
            for tensor in tensors:
                shape = quant_shape_to_byte_shape(tensor.shape, tensor.kind)
                writer.add_tensor_info(
                    tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=tensor.kind
                )
            _add_description(writer, record, folder, FILE_TYPES[kinds.most_common(1)[0][0]])
            _add_hyperparameters(writer, config)
            vocabulary.add_to(writer)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in logging.tqdm(tensors, desc="Writing GGUF", unit="tensor"):
                writer.write_tensor_data(tensor.data())
        written.replace(path)
    return GGUFReport(path.stat().st_size, Counter(held.values()), differences)


def _check_config(config: PretrainedConfig) -> None:
    """Refuse what the file could not say."""
    named = (config.architectures or ["a model without a class"])[0]
    way_out = "export with --tensor-types-only, and let llama.cpp round the original model with the bits of the plan"
    if not isinstance(config, LlamaConfig) or named != ARCHITECTURE:
        raise ExportError(f"{named} is not written as GGUF, only {ARCHITECTURE}; {way_out}")
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPE_TYPES or rope.get("partial_rotary_factor", 1) != 1:
        raise ExportError(f"rotary embeddings of type {rope['rope_type']!r} are not written as GGUF; {way_out}")
    if config.hidden_act != "silu":
        raise ExportError(f"llama.cpp computes Llama with silu, this model has {config.hidden_act!r}; {way_out}")


def _load_vocabulary(folder: Path, size: int) -> Vocabulary:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder} has no tokenizer, which is a part of GGUF: save it there ({error})") from error
    return read_vocabulary(tokenizer, size)


def _tensors(model: PreTrainedModel, kinds: Mapping[str, str]) -> Iterator[_GGUFTensor]:
    """The tensors of a model in its own order; packed ones have the type that `kinds` gives their module."""
    config, names = model.config, name_map(model.config)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if config.rope_parameters["rope_type"] == "llama3":
        factors = _rope_factors(model)
        yield _GGUFTensor("rope_freqs.weight", GGMLQuantizationType.F32, tuple(factors.shape), lambda: _bytes(factors))
    for name, module in model.named_modules():
        rows = _rows(heads.get(name.rpartition(".")[2]))
        if isinstance(module, PackedLayer):
            yield _GGUFTensor(
                gguf_name(names, f"{name}.weight"),
                GGMLQuantizationType[kinds[name]],
                (module.out_features, module.in_features),
                lambda module=module, rows=rows, kind=kinds[name]: _encoded(module, rows, kind),  # type: ignore[misc]
            )
            dense = {} if module.bias is None else {"bias": module.bias}
        else:
            dense = dict(module.named_parameters(recurse=False))
        for leaf, tensor in dense.items():
            if name == "lm_head" and leaf == "weight" and config.tie_word_embeddings:
                continue  # llama.cpp takes the embedding where there is no other
            ours = tensor.detach() if tensor.dim() > 1 else tensor.detach().float()
            yield _GGUFTensor(
                gguf_name(names, f"{name}.{leaf}"),
                DENSE_TYPES[ours.dtype],
                tuple(ours.shape),
                lambda ours=ours, rows=rows: _bytes(rows(ours)),  # type: ignore[misc]
            )


def _rows(heads: int | None) -> Callable[[Tensor], Tensor]:
    """Rows in llama.cpp's order: of every head, its two halves alternate. Without heads the order stays."""

    def moved(tensor: Tensor) -> Tensor:
        return tensor if heads is None else tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    return moved


def _encoded(module: PackedLayer, rows: Callable[[Tensor], Tensor], kind: str) -> np.ndarray:
    quantized = module.quantized()
    zero_point = None if quantized.zero_point is None else rows(quantized.zero_point)
    return encode(
        replace(quantized, integers=rows(quantized.integers), scale=rows(quantized.scale), zero_point=zero_point), kind
    )


def _bytes(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor, since numpy has no bfloat16."""
    return tensor.contiguous().view(torch.uint8).numpy()


def _rope_factors(model: PreTrainedModel) -> Tensor:
    """By how much Llama 3 divides the frequencies of the rotary embedding, float32 `[head_dim / 2]`."""
    scaled = model.model.rotary_emb.inv_freq.float()
    exponents = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    return model.config.rope_parameters["rope_theta"] ** -exponents / scaled


def _add_description(writer: GGUFWriter, record: QuantizationRecord, folder: Path, file_type: LlamaFileType) -> None:
    """What the model is and where it comes from."""
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_size_label(size_label(*writer.get_total_parameter_count()))
    writer.add_quantized_by("hf-cptquant")
    if record.base_model is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, record.base_model.rpartition("/")[2])
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{record.base_model}")
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)


def _add_hyperparameters(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """What llama.cpp needs to compute."""
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
