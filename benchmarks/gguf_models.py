"""A tiny model of every class that is written as GGUF, and a tokenizer for it.

All sizes that can differ do, windows of attention are shorter than texts, and there are layers enough for every kind
that a class has. The tests and `llama_cpp.py` share them.
"""

from __future__ import annotations

import base64
import json
import zlib
from functools import partial

import torch
import transformers
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX as QWEN2
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX as QWEN35

VOCABULARY = 112
CONTEXT = 96
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "bos_token_id": 0,
         "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "intermediate_size": 64}
ROPE = {"rope_type": "default", "rope_theta": 5000.0}
ENCODER_DECODER = {"d_model": 128, "d_ff": 192, "d_kv": 64, "num_heads": 3, "num_layers": 3, "num_decoder_layers": 2,
                   "relative_attention_num_buckets": 20, "decoder_start_token_id": 3,
                   **dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                    "num_key_value_heads", "tie_word_embeddings", "rope_parameters"))}  # fmt: skip
QUARTER = {**ROPE, "partial_rotary_factor": 0.25}

LINEAR_ATTENTION = {
    "head_dim": 64,
    "num_hidden_layers": 4,
    "rope_parameters": QUARTER,
    "linear_conv_kernel_dim": 3,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
}

# Class → class of its config, and what differs from `SHAPE`; None takes a setting away.
MODELS: dict[str, tuple[str, dict]] = {
    "LlamaForCausalLM": ("LlamaConfig", {"head_dim": 64, "attention_bias": True, "mlp_bias": True}),
    "MistralForCausalLM": ("MistralConfig", {"head_dim": 64}),
    "MixtralForCausalLM": ("MixtralConfig", {**EXPERTS, "num_local_experts": 4}),
    "Qwen2ForCausalLM": ("Qwen2Config", {"tie_word_embeddings": True}),
    "Qwen2MoeForCausalLM": ("Qwen2MoeConfig", {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96, "intermediate_size": 192}),
    "Qwen3ForCausalLM": ("Qwen3Config", {"head_dim": 128}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", {**EXPERTS, "num_local_experts": 4, "moe_intermediate_size": 64,
        "head_dim": 64, "norm_topk_prob": True}),
    "Qwen3NextForCausalLM": ("Qwen3NextConfig", {**EXPERTS, **LINEAR_ATTENTION, "num_experts": 4,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96, "intermediate_size": 192}),
    "Qwen3_5ForCausalLM": ("Qwen3_5TextConfig", {**LINEAR_ATTENTION, "tie_word_embeddings": True}),
    "Qwen3_5MoeForCausalLM": ("Qwen3_5MoeTextConfig", {**EXPERTS, **LINEAR_ATTENTION, "num_experts": 4,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 96, "intermediate_size": None}),
    "GemmaForCausalLM": ("GemmaConfig", {"head_dim": 64, "tie_word_embeddings": True}),
    "Gemma2ForCausalLM": ("Gemma2Config", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16,
        "tie_word_embeddings": True, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16,
        "tie_word_embeddings": True, "num_hidden_layers": 7, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}}}),
    "Gemma4ForCausalLM": ("Gemma4TextConfig", {"head_dim": 32, "global_head_dim": 64, "num_global_key_value_heads": 1,
        "attention_k_eq_v": True, "sliding_window": 16, "final_logit_softcapping": 3.0, "tie_word_embeddings": True,
        "num_hidden_layers": 6, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 3, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": VOCABULARY, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 96, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 2000.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 50000.0, "partial_rotary_factor": 0.25}}}),
    "Phi3ForCausalLM": ("Phi3Config", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.75}}),
    "PhiForCausalLM": ("PhiConfig", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "StableLmForCausalLM": ("StableLmConfig", {"rope_parameters": QUARTER, "use_qkv_bias": True}),
    "Starcoder2ForCausalLM": ("Starcoder2Config", {"tie_word_embeddings": True, "sliding_window": CONTEXT}),
    "GPT2LMHeadModel": ("GPT2Config", {"tie_word_embeddings": True, "num_key_value_heads": None,
        "intermediate_size": None}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {"rope_parameters": QUARTER, "num_key_value_heads": None,
        "hidden_act": "gelu"}),
    "BloomForCausalLM": ("BloomConfig", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": None,
        "intermediate_size": None, "tie_word_embeddings": True}),
    "FalconForCausalLM": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2,
        "ffn_hidden_size": 192, "num_key_value_heads": None, "intermediate_size": None}),
    "MambaForCausalLM": ("MambaConfig", {"state_size": 24, "time_step_rank": 32, "intermediate_size": None,
        "tie_word_embeddings": True, "num_attention_heads": None, "num_key_value_heads": None}),
    "Lfm2ForCausalLM": ("Lfm2Config", {"block_multiple_of": 32, "block_ffn_dim_multiplier": 1.2,
        "layer_types": ["conv", "full_attention", "conv"], "tie_word_embeddings": True}),
    "MiniMaxM2ForCausalLM": ("MiniMaxM2Config", {**EXPERTS, "num_local_experts": 4, "head_dim": 64,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "GptOssForCausalLM": ("GptOssConfig", {**EXPERTS, "num_local_experts": 4, "head_dim": 64, "sliding_window": 16}),
    "OlmoForCausalLM": ("OlmoConfig", {"clip_qkv": 0.5}),
    "Olmo2ForCausalLM": ("Olmo2Config", {}),
    "OlmoeForCausalLM": ("OlmoeConfig", {**EXPERTS, "num_experts": 4, "num_key_value_heads": 4}),
    "CohereForCausalLM": ("CohereConfig", {"tie_word_embeddings": True, "logit_scale": 0.25}),
    "Cohere2ForCausalLM": ("Cohere2Config", {"tie_word_embeddings": True, "logit_scale": 0.25, "head_dim": 32,
        "sliding_window": 16, "num_hidden_layers": 5}),
    "GraniteForCausalLM": ("GraniteConfig", {"embedding_multiplier": 3.0, "logits_scaling": 2.0,
        "residual_multiplier": 0.5, "attention_multiplier": 0.1, "tie_word_embeddings": True}),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", {**EXPERTS, "embedding_multiplier": 3.0, "logits_scaling": 2.0,
        "residual_multiplier": 0.5, "attention_multiplier": 0.1, "num_local_experts": 4}),
    "SmolLM3ForCausalLM": ("SmolLM3Config", {"num_hidden_layers": 5, "tie_word_embeddings": True}),
    "NemotronForCausalLM": ("NemotronConfig", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}),
    "SeedOssForCausalLM": ("SeedOssConfig", {"head_dim": 64}),
    "ArceeForCausalLM": ("ArceeConfig", {"head_dim": 64}),
    "Ernie4_5ForCausalLM": ("Ernie4_5Config", {"head_dim": 64, "tie_word_embeddings": True}),
    "T5ForConditionalGeneration": ("T5Config", {**ENCODER_DECODER, "feed_forward_proj": "relu"}),
    "UMT5ForConditionalGeneration": ("UMT5Config", {**ENCODER_DECODER, "feed_forward_proj": "gated-gelu"}),
}  # fmt: skip


def config_of(kind: str, **changes: object) -> PretrainedConfig:
    """The config of the tiny model of a class."""
    config_class, differences = MODELS[kind]
    settings = {**SHAPE, "rope_parameters": ROPE, **differences}
    given = {key: each for key, each in settings.items() if each is not None}
    config = getattr(transformers, config_class)(**{**given, **changes})
    config.architectures = [kind]
    return config


def model_of(kind: str, **changes: object) -> PreTrainedModel:
    """A random model of a class in float32, the same at every call, in which norms and biases matter, too."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config_of(kind, **changes))
    for name, parameter in model.named_parameters():
        if name.endswith("Attention.q.weight"):  # T5's attention divides by no root of the size of heads
            torch.nn.init.normal_(parameter, std=0.15 * model.config.d_kv**-0.5)
        elif parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        else:
            parameter.data += torch.randn_like(parameter) * 0.2
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved:
            buffer += torch.randn_like(buffer) * 0.2
    return model.eval()


def tokenizer_of() -> PreTrainedTokenizerFast:
    """Byte-level BPE for ASCII, so that each token is text by itself, which llama.cpp's server needs to show it."""
    merges = [("t", "h"), ("th", "e"), ("Ġ", "t"), ("Ġ", "a"), ("1", "2"), ("Ġ", "Ġ"), ("Ċ", "Ċ"), ("'", "s")]
    tokens = ["<s>", *map(chr, range(33, 127)), "Ġ", "Ċ", *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")


BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
SPACE = "▁"
METASPACE = "llama, space before some texts"
# White space → " ", U+000B → nothing, "ﬁ" → "fi", as SentencePiece compiles it; compressed.
CHARACTERS = zlib.decompress(base64.b64decode(
    "eNol00VsVVEURuH1ChOgJDDHgkuAYMHdvbi7u7u1QGkpDsWlOBSKu7sGd5cWAiS4O6wHgy/nHhns8+9zSQ5kghTpIWVaSKXQFJA6NQQg3N3wyO"
    "KwIDSE8AIQV8SFsBAiOjpPE0LCwBCim8HEVhBTDyLOQ7rqkL42ZCgPGSt7fpjro2BsPxg3CMZ3g8heMKEdRHWCZB6xBLIos7Ipq3Iou3Ipp/Io"
    "t/Jq6QbI75hPa29D/H0o5HdBWSKFVVSbToDlU0wlVUKlVUplVUaWSTlVVAVZMpVUVVXkdaimmqohr0Yt1VUdeW3C1ED11UgN1USNZTw0VQs1l1"
    "HRUm3UWsZAW3VQexkJHdVFnWVcdFUPdZfR0VN91FvGSl8NUH8ZMQM1RINl/AzVCA2XrWCkxmi0Ivjf6HEaq0iNV5QmaKKiNUkxmqLJmqapmqHp"
    "mqWZmq1YzdUczdc8LdQCLdYixWmJlgX7qRVarlVaqTVarfhgj7Ve62TrSQj2Vhu1RZu1TVu1Q9u1Szu1R7u1T3t1QPt1SAd1RId1TEflk+G4Tu"
    "mkzuh0cC9dgLOOPnHO6aIu6LIu6aqu6Lqu6aZuyOfJLd3VHflUuaeHeqDHeqQkJeqpnuiZ3qQJ8CJ45nmAxHkBkmIDvHL+Mrin13qnt/qg9/qk"
    "j/qiz/qmr/qh7/qln/qj3/z7/zt34y/dtZs0"
))  # fmt: skip


def byte_level_rules() -> dict[str, pre_tokenizers.PreTokenizer]:
    """Name of a rule of byte-level BPE → how it cuts text, as in `tokenizer.json` of the models that have it."""
    bytes_of = partial(pre_tokenizers.ByteLevel, add_prefix_space=False)
    patterns = {"qwen2": QWEN2, "qwen35": QWEN35, "dbrx": LLAMA3, "llama-bpe": LLAMA3, "bloom": BLOOM}
    return {
        "gpt-2": bytes_of(),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of()]),
        **{
            name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_of(use_regex=False)])
            for name, pattern in patterns.items()
        },
    }


def joining_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Name of a rule of byte-level BPE → a tokenizer by it that joins any two neighbouring characters which are not cut
    apart: the last byte of one and the first of the other are a token. So its tokens show all cuts.
    """
    letters = bytes_to_unicode()
    ascii_bytes, last_bytes, first_bytes = range(0x80), range(0x80, 0xC0), range(0xC2, 0xF5)
    merges = [
        (letters[last], letters[first])
        for last in (*ascii_bytes, *last_bytes)
        for first in (*ascii_bytes, *first_bytes)
    ]
    tokens = [*letters.values(), *(last + first for last, first in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    found = {}
    for name, rule in byte_level_rules().items():
        backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe"))
        backend.pre_tokenizer, backend.decoder = rule, decoders.ByteLevel()
        found[name] = _finished(backend)
    return found


def trained_tokenizers(texts: list[str], size: int) -> dict[str, PreTrainedTokenizerFast]:
    """Name of a rule → a tokenizer by it, trained on some texts, with added tokens and one before or after every text.

    Args:
        texts: to train on.
        size: how many tokens each has.
    """
    found = {name: _byte_level(rule, texts, size, name == "llama-bpe") for name, rule in byte_level_rules().items()}
    escape = normalizers.Replace(" ", SPACE)
    found["llama, space before"] = _sentencepiece(
        normalizers.Sequence([normalizers.Prepend(SPACE), escape]), None, texts, size
    )
    found["llama, no space before"] = _sentencepiece(
        escape, pre_tokenizers.Split(" ", "merged_with_previous"), texts, size
    )
    metaspace = pre_tokenizers.Metaspace(SPACE, "first", split=False)
    found[METASPACE] = _sentencepiece(None, metaspace, texts, size)
    found["t5"] = unigram_tokenizer(texts, size)
    return found


def unigram_tokenizer(texts: list[str], size: int) -> T5Tokenizer:
    """A tokenizer as that of T5, trained on some texts, with added tokens and one after every text."""
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.Precompiled(CHARACTERS)
    trained.pre_tokenizer = T5Tokenizer().backend_tokenizer.pre_tokenizer
    special = ["<pad>", "</s>", "<unk>", SPACE]
    trainer = trainers.UnigramTrainer(
        vocab_size=size - 12, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    scores = dict(json.loads(trained.to_str())["model"]["vocab"]) | {SPACE: -4.0}
    pieces = [(piece, torch.tensor(score).item()) for piece, score in scores.items()]  # float32, as in SentencePiece
    tokenizer = T5Tokenizer(pieces, extra_ids=10, _spm_precompiled_charsmap=CHARACTERS)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


def _byte_level(
    rule: pre_tokenizers.PreTokenizer, texts: list[str], size: int, whole_words: bool
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(ignore_merges=whole_words))
    backend.pre_tokenizer, backend.decoder = rule, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size - 2, initial_alphabet=alphabet, show_progress=False)
    )
    return _finished(backend)


def _sentencepiece(
    normalizer: normalizers.Normalizer | None, rule: pre_tokenizers.PreTokenizer | None, texts: list[str], size: int
) -> PreTrainedTokenizerFast:
    """Merges are made of pieces as transformers makes them: all pairs that make a piece, piece by piece."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", SPACE)
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]*"), "isolated")
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size - 2 - 257, show_progress=False))
    pieces = [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    known = set(pieces)
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    if rule is not None:
        backend.pre_tokenizer = rule
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    return _finished(backend)


def _finished(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(["<s>"])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    special = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<s>")
