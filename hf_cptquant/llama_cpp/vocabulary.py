"""A tokenizer as GGUF describes it to llama.cpp.

GGUF has no room for a `tokenizer.json`. It lists tokens, their kinds and merges, and *names* the rule that cuts text
into words before the merges; llama.cpp has these rules in its code (`tokenizer.ggml.pre`). Byte-level BPE with the
rules of GPT-2, SmolLM and Llama 3 is written, after comparing what llama.cpp makes of texts. Any other tokenizer
(SentencePiece, as Llama 2 has, among them) is refused, since a model that sees other tokens than it was trained on
answers badly without saying why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import ExportError

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{SPACES}"
QWEN2_SPLIT = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{SPACES}"
# Steps of the `pre_tokenizer` in tokenizer.json, and whether merges are skipped for words that are tokens → the name of
# the rule in llama.cpp (llama-vocab.cpp).
RULES: dict[tuple[tuple[tuple[str, Any], ...], bool], str] = {
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    ((("Split", LLAMA3_SPLIT), ("ByteLevel", False)), True): "llama-bpe",
    ((("Split", LLAMA3_SPLIT), ("ByteLevel", False)), False): "dbrx",
    ((("Split", QWEN2_SPLIT), ("ByteLevel", False)), False): "qwen2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF says of a tokenizer.

    Attributes:
        tokens: texts in the byte-level alphabet, by id.
        types: kind of each token.
        merges: pairs with a space between, the most important first.
        rule: `tokenizer.ggml.pre`.
        special: "bos", "eos", "unk", "pad" → id; those that there are.
        adds_bos, adds_eos: whether text gets these tokens around it.
        chat_template: one Jinja template, or several by name, or None.
    """

    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    merges: tuple[str, ...]
    rule: str
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | Mapping[str, str] | None

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the vocabulary as metadata."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for kind, token in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(token)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(self.adds_eos)
        if isinstance(self.chat_template, str):
            writer.add_chat_template(self.chat_template)
        elif self.chat_template:
            writer.add_chat_template(
                [{"name": name, "template": template} for name, template in self.chat_template.items()]
            )


def read_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer.

    Args:
        tokenizer: a fast one.
        size: rows of the model's embedding. Ids without a token become unused tokens.

    Raises:
        ExportError: not byte-level BPE with one of the rules in `RULES`, more tokens than embeddings, or special tokens
            around a text that are not those for its beginning and end.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    rule = _rule(backend)
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise ExportError(f"the tokenizer has token {max(by_id)}, the model only {size} embeddings")
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(size):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index not in by_id:
            types.append(TokenType.UNUSED)
        elif index in added:
            types.append(TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in backend["model"]["merges"])
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    return Vocabulary(
        tuple(tokens),
        tuple(types),
        tuple(" ".join(pair) for pair in pairs),
        rule,
        {kind: token for kind, token in ids.items() if token is not None},
        *_surroundings(tokenizer),
        tokenizer.chat_template,
    )


def _rule(backend: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is cut into words."""
    model, first = backend.get("model") or {}, backend.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    found = tuple((step.get("type"), _essence(step)) for step in steps)
    normalizer = (backend.get("normalizer") or {}).get("type")
    plain = normalizer in (None, "NFC") and not (model.get("byte_fallback") or model.get("continuing_subword_prefix"))
    prefixed = any(step.get("add_prefix_space") for step in steps)
    key = (found, bool(model.get("ignore_merges")))
    if model.get("type") != "BPE" or not plain or prefixed or key not in RULES:
        kinds = " and ".join(str(kind) for kind, _ in found if kind) or "no rule"
        raise ExportError(
            f"the tokenizer ({model.get('type')}, {kinds}) is not one whose rule llama.cpp is known to have; byte-level"
            f" BPE as in {', '.join(RULES.values())} is supported"
        )
    if normalizer is not None:
        logger.warning("This tokenizer brings text to Unicode's normal form C first, which llama.cpp does not do.")
    return RULES[key]


def _essence(step: Mapping[str, Any]) -> Any:
    """What decides how a step cuts."""
    if step.get("type") == "Split":
        ways = step.get("behavior"), step.get("invert")
        return step["pattern"].get("Regex") if ways == ("Isolated", False) else ways
    return step.get("use_regex", step.get("individual_digits"))


def _surroundings(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether a text gets a token for its beginning, and for its end."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for adds_bos in (False, True):
        for adds_eos in (False, True):
            around = [tokenizer.bos_token_id] * adds_bos, [tokenizer.eos_token_id] * adds_eos
            if whole == [*around[0], *bare, *around[1]]:
                return adds_bos, adds_eos
    raise ExportError(
        f"the tokenizer puts tokens around a text ({whole}) that are not those for its beginning"
        f" ({tokenizer.bos_token_id}) and end ({tokenizer.eos_token_id}), which llama.cpp cannot be told"
    )
