"""A tokenizer as GGUF describes it to llama.cpp.

GGUF has no room for a `tokenizer.json`. Of byte-level BPE it lists tokens, their kinds and merges, and *names* the rule
that cuts text into words before the merges; llama.cpp has these rules in its code (`tokenizer.ggml.pre`). Of BPE as in
SentencePiece (Llama 2, Mistral, Gemma), which does not cut text and falls back to bytes, it has a score for each token
in place of merges: that of the best merge is made first, whichever two tokens it joins. So there have to be merges for
all pairs that make a token, one after the other, which is how transformers makes merges from SentencePiece's scores. Of
Unigram as in T5 it has each token's score as it is, and the map of characters that text goes through first; llama.cpp
cuts at spaces alone, so the map has to make spaces of all that transformers cuts at.

All are written after comparing what llama.cpp makes of texts. Any other tokenizer is refused, since a model that sees
other tokens than it was trained on answers badly without saying why. (llama.cpp has rules by the names of "tekken",
"gpt-4o" and "falcon", too. The first two are simpler there: letters of Unicode beyond ASCII have no case, and marks are
no letters, so words of Hindi or Kannada are cut where GPT-OSS does not cut them. By the third more is punctuation.)
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import ExportError

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{SPACES}"
QWEN35_SPLIT = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{SPACES}"
)
BLOOM_SPLIT = r" ?[^(\s|[.,!?…。，、।۔،])]+"
LETTERS = r"\p{Lm}\p{Lo}\p{M}"  # without case, and marks
GPT4O_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]*[\p{{Ll}}{LETTERS}]+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{LETTERS}]+[\p{{Ll}}{LETTERS}]*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{SPACES}"
)
QWEN2_SPLIT = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*{SPACES}"
SPACE = "▁"
ESCAPED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPENDED = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, ESCAPED]}
ONE_WORD = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}
CUT_AT_SPACES = [
    {"type": "WhitespaceSplit"},
    {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True},
]
# What transformers cuts at; but U+0085, which SentencePiece's own maps keep, too.
WHITE_SPACE = [*" \t\n\v\f\r\xa0\u1680", *map(chr, range(0x2000, 0x200B)), *"\u2028\u2029\u202f\u205f\u3000"]
LOWEST = -1e6  # score of tokens that no text becomes, below all others
# Steps → how llama.cpp's rule for them differs.
DIFFERENT: dict[tuple[tuple[str, Any], ...], str] = {
    (("Split", GPT4O_SPLIT), ("ByteLevel", False)): (
        "as that of GPT-4o does (GPT-OSS, MiniMax-M2), and llama.cpp otherwise: it cuts at combining marks, as words of"
        " Hindi have them, and tells upper from lower case in ASCII alone"
    ),
    (("Punctuation", "Contiguous"), ("ByteLevel", True), ("Digits", False), ("Split", "[0-9][0-9][0-9]")): (
        "as that of Falcon does, and llama.cpp otherwise: 106 characters are punctuation to one of the two alone, most"
        " of them since they came with Unicode 8 or later (U+2E43), and it does not cut digits from what is beside them"
    ),
}
# Steps of the `pre_tokenizer` in tokenizer.json, and whether merges are skipped for words that are tokens → the name of
# the rule in llama.cpp (llama-vocab.cpp).
RULES: dict[tuple[tuple[tuple[str, Any], ...], bool], str] = {
    ((("ByteLevel", True),), False): "gpt-2",
    ((("Digits", True), ("ByteLevel", True)), False): "smollm",
    ((("Split", LLAMA3_SPLIT), ("ByteLevel", False)), True): "llama-bpe",
    ((("Split", LLAMA3_SPLIT), ("ByteLevel", False)), False): "dbrx",
    ((("Split", QWEN2_SPLIT), ("ByteLevel", False)), False): "qwen2",
    ((("Split", QWEN35_SPLIT), ("ByteLevel", False)), False): "qwen35",
    ((("Split", BLOOM_SPLIT), ("ByteLevel", False)), False): "bloom",
}


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF says of a tokenizer.

    Attributes:
        tokens: texts by id, in the byte-level alphabet or with "▁" for a space.
        types: kind of each token.
        values: method of `GGUFWriter` without `add_` → what else there is of this kind of tokenizer.
        special: "bos", "eos", "unk", "pad" → id; those that there are.
        adds_bos, adds_eos: whether text gets these tokens around it.
        chat_template: one Jinja template, or several by name, or None.
    """

    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    values: Mapping[str, Any]
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool
    chat_template: str | Mapping[str, str] | None

    def add_to(self, writer: GGUFWriter) -> None:
        """Write the vocabulary as metadata."""
        for name, value in self.values.items():
            getattr(writer, f"add_{name}")(value)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
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
        ExportError: neither byte-level BPE with one of the rules in `RULES` nor BPE as in SentencePiece nor Unigram as
            in T5, more tokens than embeddings, or special tokens around a text that are not those for its beginning and
            end.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    prefix, characters = _space_prefix(backend), _characters(tokenizer, backend)
    rule = _rule(backend) if prefix is None and characters is None else None
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise ExportError(f"the tokenizer has token {max(by_id)}, the model only {size} embeddings")
    tokens = [by_id.get(index, f"[PAD{index}]") for index in range(size)]
    types = [_type(index, by_id, tokenizer, prefix is not None) for index in range(size)]
    merges = [tuple(each.split(" ") if isinstance(each, str) else each) for each in backend["model"].get("merges", [])]
    values: dict[str, Any]
    if characters is not None:
        scores = [score for _, score in backend["model"]["vocab"]]
        if (np.array(scores, np.float32) != np.array(scores)).any():
            logger.warning(
                "This tokenizer has scores that float32, as in SentencePiece and GGUF, does not hold exactly; of two"
                " ways to cut a text that are as probable llama.cpp may take the other."
            )
        values = {"tokenizer_model": "t5", "tokenizer_pre": "default"}
        values["token_scores"] = scores[:size] + [LOWEST] * (size - len(scores))
        values |= {"add_space_prefix": True, "remove_extra_whitespaces": True, "precompiled_charsmap": characters}
    elif prefix is None:
        values = {"tokenizer_model": "gpt2", "tokenizer_pre": rule, "token_merges": [" ".join(pair) for pair in merges]}
    else:
        scores = _scores(tokens, types, merges)
        values = {"tokenizer_model": "llama", "tokenizer_pre": "default", "token_scores": scores}
        values["add_space_prefix"] = prefix
        tokens = [
            token.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else token
            for token, kind in zip(tokens, types, strict=True)
        ]
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "unk", "pad")}
    return Vocabulary(
        tuple(tokens),
        tuple(types),
        values,
        {kind: token for kind, token in ids.items() if token is not None},
        *_surroundings(tokenizer),
        tokenizer.chat_template,
    )


def _type(index: int, by_id: Mapping[int, str], tokenizer: PreTrainedTokenizerBase, has_bytes: bool) -> TokenType:
    added = tokenizer.added_tokens_decoder
    if index not in by_id:
        return TokenType.UNUSED
    if index in added:
        return TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
    return TokenType.BYTE if has_bytes and re.fullmatch("<0x[0-9A-F]{2}>", by_id[index]) else TokenType.NORMAL


def _space_prefix(backend: Mapping[str, Any]) -> bool | None:
    """Whether text gets a space before it; None if this is not BPE as in SentencePiece."""
    normalizer, first = backend.get("normalizer"), backend.get("pre_tokenizer")
    model = backend.get("model") or {}
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        return None
    if first is None or first.items() >= ONE_WORD.items():
        return normalizer == PREPENDED if normalizer in (ESCAPED, PREPENDED) else None
    if normalizer is None and first.items() >= METASPACE.items():
        if first["prepend_scheme"] != "never":
            logger.warning(
                "This tokenizer puts a space before a text that does not begin with one"
                + (", and not after a special token" if first["prepend_scheme"] == "first" else "")
                + "; llama.cpp, like SentencePiece, puts one before every text."
            )
        return first["prepend_scheme"] != "never"
    return None


def _characters(tokenizer: PreTrainedTokenizerBase, backend: Mapping[str, Any]) -> bytes | None:
    """The map of characters as SentencePiece has it; None if this is not Unigram.

    Raises:
        ExportError: Unigram, but not as in T5.
    """
    model, normalizer = backend.get("model") or {}, backend.get("normalizer") or {}
    if model.get("type") != "Unigram":
        return None
    steps = (backend.get("pre_tokenizer") or {}).get("pretokenizers")
    if normalizer.get("type") != "Precompiled" or steps != CUT_AT_SPACES or model.get("byte_fallback"):
        why = "is not a map of characters alone, after which text is cut at white space, without bytes for the rest"
    elif kept := [
        each for each in WHITE_SPACE if tokenizer.backend_tokenizer.normalizer.normalize_str(each).strip(" ")
    ]:
        why = f"keeps {', '.join(f'U+{ord(each):04X}' for each in kept)}, where llama.cpp does not cut"
    elif inside := [token for token, _ in model["vocab"] if re.search(f"[^{SPACE}]{SPACE}", token)]:
        why = f"has tokens of more than one word, such as {inside[0]!r}, which llama.cpp would take"
    elif SPACE not in tokenizer.get_vocab():
        why = f"has no token {SPACE!r}, without which llama.cpp makes one unknown token of several words"
    else:
        return base64.b64decode(normalizer["precompiled_charsmap"])
    raise ExportError(f"the tokenizer is Unigram, but not as in T5: it {why}")


def _scores(tokens: Sequence[str], types: Sequence[TokenType], merges: Sequence[tuple[str, str]]) -> list[float]:
    """A score for each token, for which merging by scores gives what merging in that order does.

    Raises:
        ExportError: there are none, since some way to make a token is no merge, or others come in between; or bytes
            without a token.
    """
    if list(types).count(TokenType.BYTE) < 256:
        raise ExportError("the tokenizer falls back to bytes, but does not have a token for each of the 256")
    normal = {token: kind for token, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    ranks: dict[str, list[int]] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, []).append(rank)
    known = set(merges)
    for token in normal:
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        joined = [pair for pair in halves if all(len(half) == 1 or half in normal for half in pair)]
        of_token = ranks.get(token, [])
        missing = [pair for pair in joined if pair not in known]
        if missing or (of_token and of_token[-1] - of_token[0] >= len(of_token)):
            why = f"no merge of {missing[0]}" if missing else "merges between which there are those of others"
            raise ExportError(
                "the merges of the tokenizer cannot be said by scores, as llama.cpp wants them for SentencePiece:"
                f" {token!r} has {why}"
            )
    return [-float(ranks[token][0]) if token in normal and token in ranks else LOWEST for token in tokens]


def _rule(backend: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is cut into words."""
    model, first = backend.get("model") or {}, backend.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    found = tuple((step.get("type"), _essence(step)) for step in steps)
    normalizer = (backend.get("normalizer") or {}).get("type")
    plain = normalizer in (None, "NFC") and not (model.get("byte_fallback") or model.get("continuing_subword_prefix"))
    prefixed = any(step.get("add_prefix_space") for step in steps)
    key = (found, bool(model.get("ignore_merges")))
    if found in DIFFERENT:
        raise ExportError(f"the tokenizer cuts text into words {DIFFERENT[found]}")
    if model.get("type") != "BPE" or not plain or prefixed or key not in RULES:
        kinds = " and ".join(str(kind) for kind, _ in found if kind) or "no rule"
        raise ExportError(
            f"the tokenizer ({model.get('type')}, {kinds}) is not one whose rule llama.cpp is known to have; byte-level"
            f" BPE as in {', '.join(RULES.values())} is supported, BPE as in SentencePiece, and Unigram as in T5"
        )
    if normalizer is not None:
        logger.warning("This tokenizer brings text to Unicode's normal form C first, which llama.cpp does not do.")
    return RULES[key]


def _essence(step: Mapping[str, Any]) -> Any:
    """What decides how a step cuts."""
    if step.get("type") == "Split":
        ways = step.get("behavior"), step.get("invert")
        return step["pattern"].get("Regex") if ways == ("Isolated", False) else ways
    return step.get("use_regex", step.get("individual_digits", step.get("behavior")))


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
