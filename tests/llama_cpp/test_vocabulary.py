"""A tokenizer as metadata, beside the metadata that llama.cpp's own converter wrote for the same model."""

import gguf
import pytest
from tokenizers import Regex, pre_tokenizers, processors
from transformers import AutoTokenizer

from hf_cptquant.errors import ExportError
from hf_cptquant.llama_cpp.vocabulary import LLAMA3_SPLIT, read_vocabulary

BYTE_LEVEL = {"add_prefix_space": False}
SIZE = 49152


@pytest.fixture
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def test_it_is_what_the_models_own_file_says(tokenizer, bundled):
    found = read_vocabulary(tokenizer, SIZE)
    assert list(found.tokens) == bundled["tokenizer.ggml.tokens"].contents()
    assert list(found.types) == bundled["tokenizer.ggml.token_type"].contents()
    assert list(found.merges) == bundled["tokenizer.ggml.merges"].contents()
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    special = {kind: bundled[f"tokenizer.ggml.{name}_token_id"].contents() for kind, name in names.items()}
    assert found.special == special
    assert found.adds_bos == bundled["tokenizer.ggml.add_bos_token"].contents()
    assert not found.adds_eos
    assert found.chat_template == bundled["tokenizer.chat_template"].contents()
    # transformers loses the cutting of digits when it reads that file, so the tokenizer itself cuts as GPT-2's
    assert bundled["tokenizer.ggml.pre"].contents() == "smollm"
    assert found.rule == "gpt-2"


def test_the_rule_is_that_of_the_tokenizer(tokenizer):
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(**BYTE_LEVEL)]
    )
    assert read_vocabulary(tokenizer, SIZE).rule == "smollm"

    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(use_regex=False, **BYTE_LEVEL)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    with pytest.raises(ExportError, match="Split and ByteLevel"):  # Llama 3 also skips merges for whole words
        read_vocabulary(tokenizer, SIZE)
    tokenizer.backend_tokenizer.model.ignore_merges = True
    assert read_vocabulary(tokenizer, SIZE).rule == "llama-bpe"

    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT.replace("{1,3}", "")), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    with pytest.raises(ExportError, match="gpt-2, smollm, llama-bpe"):
        read_vocabulary(tokenizer, SIZE)


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
