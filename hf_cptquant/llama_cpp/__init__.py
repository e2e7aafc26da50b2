"""Quantized models for llama.cpp: a GGUF file with our own integers, and the types of a plan for `llama-quantize`.

    blocks.py           our integers as the blocks of ggml's types
    hyperparameters.py  what follows from a config of transformers
    architectures.py    what llama.cpp computes for a class of transformers
    tensors.py          a model → the tensors of a GGUF file
    vocabulary.py       a tokenizer as GGUF describes it
    writer.py           a quantized model → GGUF
    tensor_types.py     a plan → `llama-quantize --tensor-type-file`

The library `gguf` knows the names of tensors and metadata and the container. It is optional, so nothing else of the
package imports this one before somebody exports.
"""

from importlib.util import find_spec

from ..errors import ExportError

if find_spec("gguf") is None:
    raise ExportError("writing for llama.cpp needs the package gguf: pip install 'hf-cptquant[gguf]'")

from .tensor_types import refuse_existing, tensor_types, write_tensor_types
from .writer import GGUFReport, export_gguf

__all__ = ["GGUFReport", "export_gguf", "refuse_existing", "tensor_types", "write_tensor_types"]
