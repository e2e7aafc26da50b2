"""A quantized model → one GGUF file that llama.cpp loads, with our own integers.

Of which classes, and in what they differ, `architectures.py` says; of which tokenizers, `vocabulary.py`. For all others
there is `tensor_types.py`. The file is written beside its place and moved there when it is complete.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, size_label
from gguf.quants import quant_shape_to_byte_shape
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..errors import ExportError
from ..model_view import class_named_in, read_config
from ..record import QuantizationRecord
from .architectures import architecture_of
from .tensor_types import refuse_existing
from .tensors import Held, held_as, parts_of, tensors_of
from .vocabulary import Vocabulary, read_vocabulary

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

WAY_OUT = "export with --tensor-types-only, and let llama.cpp round the original model with the bits of the plan"
FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}


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


def export_gguf(folder: str | Path, path: str | Path) -> GGUFReport:
    """Write a quantized model as GGUF.

    Args:
        folder: what `save_pretrained` wrote, with the tokenizer.
        path: a new file.

    Raises:
        ExportError: another architecture or tokenizer than described above, or a model that llama.cpp's code for the
            architecture does not compute; groups that are no multiples of 32, zero points of 8 bits, scales beyond
            float16, experts of which only some are packed; or the file exists.
        ModelError, PlanError: the folder holds no quantized model of ours.
    """
    folder, path = Path(folder), Path(path)
    refuse_existing(path)
    record = QuantizationRecord.load(folder)
    config = read_config(str(folder))
    try:
        architecture = architecture_of(config)
    except ExportError as error:
        raise ExportError(f"{error}; {WAY_OUT}") from error
    vocabulary = _load_vocabulary(folder, config.vocab_size)
    model = (class_named_in(config) or AutoModelForCausalLM).from_pretrained(folder, device_map="cpu")
    parts = parts_of(model, architecture)
    held, differences = held_as(parts)
    if differences:
        worst = max(differences, key=lambda name: differences[name])
        logger.warning(
            f"{len(differences)} of {len(held)} modules have scales that float16 does not hold exactly; weights differ"
            f" by up to {differences[worst]:.2g} ({worst})"
        )

    tensors = tuple(tensors_of(model, architecture, parts, held))
    kinds = Counter(tensor.kind.name for tensor in tensors if len(tensor.shape) > 1)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as staging:
        written = Path(staging) / path.name
        with closing(GGUFWriter(written, architecture.name)) as writer:
            for tensor in tensors:
                shape = quant_shape_to_byte_shape(tensor.shape, tensor.kind)
                writer.add_tensor_info(
                    tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=tensor.kind
                )
            _add_description(writer, record, folder, FILE_TYPES[kinds.most_common(1)[0][0]])
            for name, value in architecture.hyperparameters(config).items():
                getattr(writer, f"add_{name}")(value)
            vocabulary.add_to(writer)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in logging.tqdm(tensors, desc="Writing GGUF", unit="tensor"):
                writer.write_tensor_data(tensor.data())
        written.replace(path)
    return GGUFReport(path.stat().st_size, Counter(held.values()), differences)


def _load_vocabulary(folder: Path, size: int) -> Vocabulary:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder} has no tokenizer, which is a part of GGUF: save it there ({error})") from error
    return read_vocabulary(tokenizer, size)


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
