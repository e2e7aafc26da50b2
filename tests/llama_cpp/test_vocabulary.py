"""A tokenizer as metadata, beside the metadata that llama.cpp's own converter wrote for the same model."""

import gguf
import pytest
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer, T5Tokenizer
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2

from hf_cptquant.errors import ExportError
from hf_cptquant.llama_cpp.vocabulary import RULES, read_vocabulary

BYTE_LEVEL = {"add_prefix_space": False}
SIZE = 49152
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + ENDINGS + r"|[^\r\n\p{L}\p{N}]?"
    r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + ENDINGS + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def test_it_is_what_the_models_own_file_says(tokenizer, bundled):
    found = read_vocabulary(tokenizer, SIZE)
    assert list(found.tokens) == bundled["tokenizer.ggml.tokens"].contents()
    assert list(found.types) == bundled["tokenizer.ggml.token_type"].contents()
    assert found.values["token_merges"] == bundled["tokenizer.ggml.merges"].contents()
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {kind: bundled[f"tokenizer.ggml.{name}_token_id"].contents() for kind, name in names.items()}
    assert found.special == special
    assert found.adds_bos == bundled["tokenizer.ggml.add_bos_token"].contents()
    assert not found.adds_eos
    assert found.chat_template == bundled["tokenizer.chat_template"].contents()
    # transformers loses the cutting of digits when it reads that file, so the tokenizer itself cuts as GPT-2's
    assert bundled["tokenizer.ggml.pre"].contents() == "smollm"
    assert (found.values["tokenizer_model"], found.values["tokenizer_pre"]) == ("gpt2", "gpt-2")


def rule_of(tokenizer) -> str:
    return read_vocabulary(tokenizer, SIZE).values["tokenizer_pre"]


def test_the_rule_is_that_of_the_tokenizer(models):
    rules = models.byte_level_rules()
    assert set(rules) == set(RULES.values())
    for name, rule in rules.items():
        tokenizer = models.tokenizer_of()
        tokenizer.backend_tokenizer.pre_tokenizer = rule
        tokenizer.backend_tokenizer.model.ignore_merges = name == "llama-bpe"
        assert rule_of(tokenizer) == name


def cut_by(tokenizer, pattern):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(use_regex=False, **BYTE_LEVEL)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])


def test_rules_that_llama_cpp_does_not_have_are_refused(tokenizer):
    cut_by(tokenizer, LLAMA3.replace("{1,3}", "{1,2}"))
    with pytest.raises(ExportError, match=r"Split and ByteLevel.*gpt-2, .*qwen2, qwen35, bloom is supported"):
        rule_of(tokenizer)
    cut_by(tokenizer, GPT4O)
    for whole_words in (False, True):
        tokenizer.backend_tokenizer.model.ignore_merges = whole_words
        with pytest.raises(ExportError, match=r"GPT-OSS.*it cuts at combining marks.*case in ASCII alone"):
            rule_of(tokenizer)
    as_falcon = [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(**BYTE_LEVEL),
        pre_tokenizers.Digits(),
        pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(as_falcon)
    with pytest.raises(ExportError, match=r"that of Falcon does.*106 characters are punctuation to one.*U\+2E43"):
        rule_of(tokenizer)


def test_normal_forms_are_told(tokenizer, logged):
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    assert rule_of(tokenizer) == "gpt-2"
    assert "normal form C first, which llama.cpp does not do" in logged.text
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(ExportError, match="is not one whose rule"):
        rule_of(tokenizer)


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = ["▁", "a", "b", "c", "▁a", "bc", "▁ab", "abc"]
MERGES = [("▁", "a"), ("b", "c"), ("▁a", "b"), ("a", "bc")]  # all that make a piece, in the order of the pieces


def sentencepiece(kind=GemmaTokenizer, pieces=PIECES, merges=MERGES, **settings):
    tokens = ["<pad>", "</s>", "<s>", "<unk>", "<mask>", *BYTES, *pieces]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return kind(vocab=vocabulary, merges=merges, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **settings)


def test_merges_become_scores():
    tokenizer = sentencepiece()
    tokenizer.add_tokens([AddedToken("▁▁▁", normalized=False)])
    found = read_vocabulary(tokenizer, 272)
    assert found.values["tokenizer_model"] == "llama"
    assert found.values["add_space_prefix"] is False
    scores = dict(zip(found.tokens, found.values["token_scores"], strict=True))
    assert [scores[piece] for piece in ("▁a", "bc", "▁ab", "abc")] == [0, -1, -2, -3]
    assert max(score for token, score in scores.items() if token not in PIECES[4:]) < -3
    assert found.tokens[261:] == (*PIECES, "   ", "[PAD270]", "[PAD271]")  # llama.cpp looks for it in the text itself
    assert found.types[5:261] == (gguf.TokenType.BYTE,) * 256
    assert set(found.types[:5]) == {gguf.TokenType.CONTROL}
    assert found.types[261:270] == (*(gguf.TokenType.NORMAL,) * 8, gguf.TokenType.USER_DEFINED)


def test_a_space_before_texts_is_told(logged):
    found = read_vocabulary(sentencepiece(LlamaTokenizer), 269)
    assert found.values["add_space_prefix"] is True
    assert "not after a special token; llama.cpp, like SentencePiece, puts one before every text" in logged.text

    tokenizer = sentencepiece()
    before = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.backend_tokenizer.normalizer = before
    assert read_vocabulary(tokenizer, 269).values["add_space_prefix"] is True


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"merges": MERGES[:3]}, r"'abc' has no merge of \('a', 'bc'\)"),
        (
            {"pieces": [*PIECES, "ab"], "merges": [*MERGES[:2], ("a", "b"), *MERGES[2:]]},
            r"no merge of \('(▁', 'ab|ab', 'c)",
        ),
        (
            {"pieces": [*PIECES, "ab"], "merges": [("a", "b"), ("▁", "ab"), *MERGES, ("ab", "c")]},
            "'▁ab' has merges between which there are those of others",
        ),
    ],
)
def test_merges_that_scores_cannot_say_are_refused(changes, complaint):
    with pytest.raises(ExportError, match=complaint):
        read_vocabulary(sentencepiece(**changes), 271)


def test_other_ways_to_cut_before_merges_of_sentencepiece_are_refused():
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", split=True)
    with pytest.raises(ExportError, match=r"Metaspace.* is not one whose rule"):
        read_vocabulary(tokenizer, 269)
    tokenizer = sentencepiece()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    with pytest.raises(ExportError, match="is not one whose rule"):
        read_vocabulary(tokenizer, 269)


@pytest.fixture
def characters(models) -> bytes:
    """A map that makes spaces of white space, as SentencePiece compiles it."""
    return models.CHARACTERS


def unigram(pieces=(("▁", -4.0), ("▁a", -2.5), ("b", -3.0)), characters=None) -> T5Tokenizer:
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer([*special, *pieces], extra_ids=2, _spm_precompiled_charsmap=characters)


def test_unigram_has_scores_and_a_map_of_characters(characters):
    found = read_vocabulary(unigram(characters=characters), 10)
    assert found.tokens == (
        "<pad>", "</s>", "<unk>", "▁", "▁a", "b", "<extra_id_0>", "<extra_id_1>", "[PAD8]", "[PAD9]"
    )  # fmt: skip
    control, normal = (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL)
    assert found.types == (*(control,) * 3, *(normal,) * 3, *(control,) * 2, *(gguf.TokenType.UNUSED,) * 2)
    scores = found.values.pop("token_scores")
    assert scores[3:6] == [-4.0, -2.5, -3.0]
    assert max(scores[6:]) < -1000
    assert found.values == {
        "tokenizer_model": "t5", "tokenizer_pre": "default", "add_space_prefix": True,
        "remove_extra_whitespaces": True, "precompiled_charsmap": characters,
    }  # fmt: skip
    assert found.special == {"eos": 1, "unk": 2, "pad": 0}
    assert (found.adds_bos, found.adds_eos) == (False, True)


def test_scores_that_float32_does_not_hold_are_told(characters, logged):
    read_vocabulary(unigram(characters=characters), 10)
    assert "float32" not in logged.text
    read_vocabulary(unigram([("▁", -4.0), ("▁a", -2.1)], characters), 10)
    assert "scores that float32, as in SentencePiece and GGUF, does not hold exactly" in logged.text


def test_other_unigram_is_refused(characters):
    with pytest.raises(ExportError, match="not as in T5: it is not a map of characters alone"):
        read_vocabulary(unigram(), 10)
    whole = unigram(characters=characters)
    whole.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", split=False)
    with pytest.raises(ExportError, match="after which text is cut at white space"):
        read_vocabulary(whole, 10)
    with pytest.raises(ExportError, match="more than one word, such as 'a▁b', which llama"):
        read_vocabulary(unigram([("▁", -4.0), ("a▁b", -2.0)], characters), 10)
    with pytest.raises(ExportError, match="has no token '▁'"):
        read_vocabulary(unigram([("▁a", -2.0)], characters), 10)


def test_white_space_that_the_map_keeps_is_refused(characters):
    end = len(characters) - len(b"\0 \0fi\0")
    assert characters[end:] == b"\0 \0fi\0"
    kept = characters[:end] + b"\0_\0fi\0"  # another character in place of the space
    with pytest.raises(ExportError, match=r"it keeps U\+0009, U\+000A, .*U\+3000, where llama.cpp does not cut"):
        read_vocabulary(unigram(characters=kept), 10)


def test_another_kind_of_tokenizer_is_refused(minilm):
    with pytest.raises(ExportError, match="WordPiece, BertPreTokenizer"):
        read_vocabulary(AutoTokenizer.from_pretrained(minilm), 30522)


@pytest.mark.parametrize(("single", "adds"), [("<|im_start|> $A", (True, False)), ("$A <|im_end|>", (False, True))])
def test_tokens_around_a_text(single, adds, tokenizer):
    special = [("<|im_start|>", 1), ("<|im_end|>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single, special_tokens=special)
    found = read_vocabulary(tokenizer, SIZE)
    assert (found.adds_bos, found.adds_eos) == adds


def test_other_tokens_around_a_text_are_refused(tokenizer):
    special = [("<repo_name>", 3)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<repo_name> $A", special_tokens=special)
    with pytest.raises(ExportError, match="tokens around a text"):
        read_vocabulary(tokenizer, SIZE)


def test_embeddings_without_a_token_and_tokens_without_an_embedding(tokenizer):
    found = read_vocabulary(tokenizer, SIZE + 2)
    assert found.tokens[-2:] == ("[PAD49152]", "[PAD49153]")
    assert found.types[-2:] == (gguf.TokenType.UNUSED,) * 2
    with pytest.raises(ExportError, match="has token 49151, the model only 49000 embeddings"):
        read_vocabulary(tokenizer, 49000)
