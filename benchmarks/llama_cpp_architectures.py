"""What llama.cpp computes for a tiny model of every class that is written as GGUF, and how it cuts text by every rule.

As in `llama_cpp.py`, each file is run with all tensors dequantized to float32, where llama.cpp does not round
activations, so that its probabilities are those of the model here: to about 1e-4, or to a few thousandths where the
activation is GELU, which llama.cpp takes from a table of float16. What does not agree may not be in the table of
architectures, so the script fails then.

    uv run --with xllamacpp --with django python benchmarks/llama_cpp_architectures.py

Nothing is done where that build is absent. Django's translations are text of a hundred languages.
"""

from __future__ import annotations

import argparse
import gettext
import importlib.metadata
import json
import random
import re
import tempfile
import unicodedata
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from environment import environment
from gguf_models import CONTEXT, METASPACE, MODELS, joining_tokenizers, model_of, tokenizer_of, trained_tokenizers
from llama_cpp import BUILD, EncoderDecoder, LlamaCpp, compare, rewritten
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_cptquant import CPTQuantConfig
from hf_cptquant.demo import python_help_texts
from hf_cptquant.llama_cpp import export_gguf
from hf_cptquant.llama_cpp.vocabulary import read_vocabulary

RESULTS = Path(__file__).parent / "results" / "llama_cpp_architectures.json"
PROMPTS, PROMPT_LENGTH, TOKENS = 2, 60, 16
LARGEST_DIFFERENCE, LARGEST_KL = 0.01, 1e-5  # of log-probabilities
VOCABULARY = 1500
TEXTS_OF_A_KIND = 500
TEXTS = (
    "Hello, World! It's 7 o'clock; 2,048 tokens cost $3.50 (they'll say). WE'LL see, I'M sure",
    "  indented\n\n\tdef f(x):\n        return x**2  # naïve café — 東京 🙂\r\n\r\n",
    "1234567 12 3.14159 ½ ² Ⅳ ٣٤ x86_64 0xFF",
    "<s>user\nHi<tool> there<tool>\n<s> again",
    " leading, trailing   \n   \n",
    "हिन्दी में Ελληνικά Русский ПРИВЕТмир العربية עברית ไทย 한국어 日本語",
    "👩‍👩‍👧‍👦 e\u0301 \u00a0 \u2003 \u200b zero",
    "a" * 70 + "!" * 40 + " " * 33 + "x",
)


def settings(**changes: Any) -> CPTQuantConfig:
    """Rounding to nearest, to bits of every kind that GGUF has a type for."""
    tokens = torch.randint(1, 105, (8, 32), generator=torch.Generator().manual_seed(1))
    data = {"dataset": tokens, "num_samples": 8, "sequence_length": 16, "batch_size": 4}
    widths = {"bits": (3, 4, 5, 8, 16), "target_bits": 6, "group_size": 32, "granularity": "group"}
    return CPTQuantConfig(**{**data, **widths, "quality": "fast", **changes})


def exported(kind: str, work: Path) -> tuple[Path, Path, Counter[str]]:
    """A quantized model of a class: its folder, its GGUF file, and how many modules are held as which type."""
    original, folder, file = work / "original", work / "quantized", work / "model.gguf"
    model_of(kind).to(torch.bfloat16).save_pretrained(original)
    getattr(transformers, kind).from_pretrained(original, quantization_config=settings()).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    report = export_gguf(folder, file)
    assert not report.largest_difference, kind
    types: Counter[str] = Counter()
    for held, count in report.modules.items():
        types[held.kind] += count
    return folder, file, types


def measured(kind: str) -> dict[str, Any]:
    """How far llama.cpp is from the model of a class."""
    with tempfile.TemporaryDirectory() as work:
        folder, file, types = exported(kind, Path(work))
        control = Path(work, "float32.gguf")
        rewritten(file, control)
        model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32)
        random = torch.Generator().manual_seed(3)
        prompts = [torch.randint(1, 105, (PROMPT_LENGTH,), generator=random).tolist() for _ in range(PROMPTS)]
        other = EncoderDecoder(control) if model.config.is_encoder_decoder else LlamaCpp(control, CONTEXT)
        found = compare(model, other, prompts, TOKENS)
    assert found["largest_difference"] < LARGEST_DIFFERENCE, (kind, found)
    assert found["kl_divergence"] < LARGEST_KL, (kind, found)
    return {**found, "modules": dict(sorted(types.items()))}


def in_every_place(character: str) -> str:
    """A character between others of several kinds."""
    return f"a{character}b {character} A{character}É 1{character}2 {character}{character}'s.{character}\n {character}\n"


def characters() -> list[str]:
    """All characters of Unicode that Python knows, but of letters without case (Han, Hangul, …) one of twenty."""
    known: dict[str, list[str]] = {}
    for character in map(chr, range(1, 0x110000)):
        known.setdefault(unicodedata.category(character), []).append(character)
    kinds = [known[kind][:: 20 if kind == "Lo" else 1] for kind in sorted(known.keys() - {"Cn", "Co", "Cs"})]
    return [character for kind in kinds for character in kind]


def texts_of_unicode(count: int) -> list[str]:
    """Texts with every character, some of random characters of all kinds, and as many of sentences in the languages of
    Django's translations."""
    seeded, every = random.Random(0), characters()
    texts = ["".join(map(in_every_place, every[first : first + 20])) for first in range(0, len(every), 20)]
    by_kind: dict[str, list[str]] = {}
    for character in every:
        by_kind.setdefault(unicodedata.category(character), []).append(character)
    pools = [" \n\t'aZz09.,-s", *by_kind.values()]
    texts += ["".join(seeded.choice(seeded.choice(pools)) for _ in range(40)) for _ in range(count)]
    sentences: set[str] = set()
    for path in sorted(Path(find_spec("django").submodule_search_locations[0]).glob("**/LC_MESSAGES/*.mo")):
        with path.open("rb") as file:
            found = gettext.GNUTranslations(file)._catalog
        sentences |= {text for key, text in found.items() if key and isinstance(text, str)}
    ordered = sorted(sentences - {""})
    return texts + [seeded.choice(" \n").join(seeded.sample(ordered, 3)) for _ in range(count)]


def cut_alike(tokenizers: dict[str, PreTrainedTokenizerFast], texts: list[str]) -> dict[str, int]:
    """Name of a rule → how many texts llama.cpp cuts as the tokenizer does: all, but where it is known to put a space
    before those that begin with one, and after special tokens."""
    found = {}
    size = max(map(len, tokenizers.values()))
    with tempfile.TemporaryDirectory() as work:
        original, folder, file = Path(work, "original"), Path(work, "quantized"), Path(work, "model.gguf")
        model_of("LlamaForCausalLM", vocab_size=size).save_pretrained(original)
        AutoModelForCausalLM.from_pretrained(original, quantization_config=settings()).save_pretrained(folder)
        tokenizers["gpt-2"].save_pretrained(folder)
        export_gguf(folder, file)
        for name, tokenizer in tokenizers.items():
            of_rule = Path(work, "tokenizer.gguf")
            rewritten(file, of_rule, read_vocabulary(tokenizer, size))
            server = LlamaCpp(of_rule, CONTEXT)
            alike = [text for text in texts if name != METASPACE or not re.match(r" |.*<(s|tool)>", text, re.S)]
            for text in alike:
                assert server.tokenize(text) == tokenizer(text)["input_ids"], (name, text)
            found[name] = len(alike)
            print(f"{name}: {found[name]} texts", flush=True)
    return found


def main() -> None:
    """Measure, write the result file, print it as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if find_spec(BUILD) is None or find_spec("django") is None:
        print(
            "skipped, llama.cpp or Django is not here:"
            " uv run --with xllamacpp --with django python benchmarks/llama_cpp_architectures.py"
        )
        return
    texts = [*TEXTS, *python_help_texts()[:60]]
    rules = cut_alike(trained_tokenizers(texts[len(TEXTS) :], VOCABULARY), texts)
    cuts = cut_alike(joining_tokenizers(), [*texts, *texts_of_unicode(TEXTS_OF_A_KIND)])
    models = {}
    for kind in MODELS:
        models[kind] = measured(kind)
        print(f"{kind}: {models[kind]}", flush=True)
    result = {
        "command": "python benchmarks/llama_cpp_architectures.py",
        "tokens": PROMPTS * TOKENS,
        "models": models,
        "texts": rules,
        "texts_of_unicode": cuts,
        BUILD: importlib.metadata.version(BUILD),
        **environment(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
