"""What llama.cpp computes for a class of transformers: what it is told, where from, and what it takes for granted.

llama.cpp has code of its own for every architecture. It reads some hyperparameters from the file; the rest is fixed in
that code (src/models/*.cpp): an activation, whether attention has a window, which layers have rotary embeddings. A
model that differs there would load and compute something else without saying so. So what is fixed stands here, too, and
such a model is refused. What a file has to say follows llama.cpp's own converter (conversion/*.py).

Each entry of `ARCHITECTURES` was compared with llama.cpp: logits of a model of that class, with sizes that all differ
(`benchmarks/llama_cpp_architectures.py`). To add one, write its entry, and a model for it in that script.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from gguf import ExpertGatingFuncType
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import ExportError
from .hyperparameters import (
    adjusted_length,
    causal,
    causal_text,
    full_attention_interval,
    gelu,
    groups_of_falcon,
    head_dim,
    head_dim_of,
    heads_of_keys,
    heads_of_keys_by_layer,
    implied_head_dim,
    last_before_shared,
    layer_configs,
    lengths_by_layer,
    linear_but_every,
    linear_head_dim,
    linear_inner_size,
    local_and_global_rope,
    local_rope,
    neighbours,
    no_more_than_of_the_encoder,
    parts_of_groups,
    queries_keys_tiled_values,
    query_scale,
    relu_or_gated_gelu,
    rotary,
    rotary_but_every_fourth,
    rotated,
    scale_before_head,
    scaling_factor,
    scaling_type,
    three_axes,
    tiled,
    window_beyond_context,
    windows_but_every,
)

Rows = Callable[[PretrainedConfig, Tensor], Tensor]


@dataclass(frozen=True)
class Architecture:
    """A class of transformers as llama.cpp knows it.

    Values are attributes of the config, by name, or computed from the config.

    Attributes:
        name: `general.architecture`.
        values: method of `GGUFWriter` without `add_` → value, beside those that all have (`COMMON`). None is not
            written.
        assumed: attribute of the config → what it has to be, since llama.cpp is not told; may be computed.
        free_head_dim: whether heads may have another size than that of the hidden state over their number.
        rope_types: of the rotary embeddings that llama.cpp can be told; none if there are no such embeddings.
        partly_rotary: whether there may be features of a head without rotary embeddings.
        rows: last part of a module's name → how its rows are reordered.
        inputs: last part of a module's name → how what it multiplies is reordered, so that blocks of 32 stay together.
        renamed: part of the name of a module or parameter → what the library `gguf` calls it; projections of experts
            with one name are one tensor.
        norm_offset: what transformers adds to the weights of norms, and llama.cpp does not.
        plain_norms: parts of the names of norms whose weights transformers adds nothing to.
        computed: last part of a parameter's name → what llama.cpp wants of it, in float32.
        factors: norm → by what its weight is multiplied, since llama.cpp does not multiply what comes out of it.
    """

    name: str
    values: Mapping[str, Any]
    assumed: Mapping[str, Any]
    free_head_dim: bool = True
    rope_types: tuple[str, ...] = ("default",)
    partly_rotary: bool = False
    rows: Mapping[str, Rows] = field(default_factory=dict)
    inputs: Mapping[str, Rows] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0
    plain_norms: tuple[str, ...] = ()
    computed: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    factors: Mapping[str, Callable[[PretrainedConfig], float]] = field(default_factory=dict)

    def hyperparameters(self, config: PretrainedConfig) -> dict[str, Any]:
        """Method of `GGUFWriter` without `add_` → value."""
        values = {**COMMON, **(ROTARY if self.rope_types else {}), **self.values}
        found = {name: _value(value, config) for name, value in values.items()}
        return {name: value for name, value in found.items() if value is not None}

    def check(self, config: PretrainedConfig) -> None:
        """Refuse what the file could not say.

        Raises:
            ExportError: llama.cpp would compute something else than a model with this config.
        """
        for attribute, value in self.assumed.items():
            expected = value(config) if callable(value) else value
            found = getattr(config, attribute, expected)  # an older transformers may have fixed it, too
            if found != expected:
                raise ExportError(
                    f"llama.cpp computes {self.name} with {attribute} {expected!r}, this model has {found!r}"
                )
        if not self.free_head_dim and (found := head_dim(config)) != (implied := implied_head_dim(config)):
            raise ExportError(f"llama.cpp computes {self.name} with {implied} features a head, this model has {found}")
        if self.rope_types and (rope := rotary(config))["rope_type"] not in self.rope_types:
            raise ExportError(
                f"rotary embeddings of type {rope['rope_type']!r} are not written as GGUF for {self.name}, only"
                f" {', '.join(self.rope_types)}"
            )
        if self.rope_types and not self.partly_rotary and rotated(config) != head_dim(config):
            raise ExportError(
                f"llama.cpp computes {self.name} with rotary embeddings for all features of a head, this model has them"
                f" for {rotated(config)} of {head_dim(config)}"
            )

    def known_as(self, name: str) -> str:
        """The name by which the library `gguf` knows a module or parameter."""
        for ours, theirs in self.renamed.items():
            name = name.replace(ours, theirs)
        return name

    def offset(self, module: str) -> float:
        """What is added to the weight of a module of that name."""
        offset = module.endswith("norm") and not module.endswith(self.plain_norms)
        return self.norm_offset if offset else 0.0

    def factor(self, config: PretrainedConfig, module: str) -> float:
        """By what the weight of a norm of that name is multiplied."""
        return self.factors[module](config) if module in self.factors else 1.0

    def in_order(self, config: PretrainedConfig, module: str, rows: Tensor) -> Tensor:
        """The rows of a weight, of its scales or of a bias, as llama.cpp wants them in a module of that name."""
        reorder = self.rows.get(module.rpartition(".")[2])
        return rows if reorder is None else reorder(config, rows)

    def with_inputs_in_order(self, config: PretrainedConfig, module: str, columns: Tensor) -> Tensor:
        """The columns of a weight, or of its scales by blocks, as llama.cpp wants them in a module of that name."""
        reorder = self.inputs.get(module.rpartition(".")[2])
        return columns if reorder is None else reorder(config, columns.mT).mT


def _value(value: Any, config: PretrainedConfig) -> Any:
    return value(config) if callable(value) else getattr(config, value)


COMMON: Mapping[str, Any] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "head_count": "num_attention_heads",
    "head_count_kv": heads_of_keys,
    "key_length": head_dim,
    "value_length": head_dim,
    "vocab_size": "vocab_size",
}
ROTARY: Mapping[str, Any] = {
    "rope_dimension_count": rotated,
    "rope_freq_base": lambda config: rotary(config)["rope_theta"],
    "rope_scaling_type": scaling_type,
    "rope_scaling_factor": scaling_factor,
}


HEADS: Mapping[str, Rows] = {"query_key_value": partial(parts_of_groups, heads_of_keys)}
NEIGHBOURS: Mapping[str, Rows] = {
    "q_proj": partial(neighbours, "num_attention_heads"),
    "k_proj": partial(neighbours, "num_key_value_heads"),
}


RMS: Mapping[str, Any] = {"layer_norm_rms_eps": "rms_norm_eps"}
SILU: Mapping[str, Any] = {"hidden_act": "silu"}
CAUSAL: Mapping[str, Any] = {"use_bidirectional_attention": causal}
GELU_TANH: Mapping[str, Any] = {"hidden_activation": "gelu_pytorch_tanh"}
NO_WINDOW: Mapping[str, Any] = {"sliding_window": window_beyond_context}
NO_BIASES: Mapping[str, Any] = {"attention_bias": False}
EXPERTS: Mapping[str, Any] = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
MIXTRAL: Mapping[str, str] = {"mlp.experts": "block_sparse_moe.experts", "mlp.gate": "block_sparse_moe.gate"}
WITHOUT_ATTENTION: Mapping[str, Any] = {
    **dict.fromkeys(("head_count", "feed_forward_length"), lambda config: 0),  # llama.cpp asks for them
    **dict.fromkeys(("head_count_kv", "key_length", "value_length"), lambda config: None),
}
OF_RECURRENCE: Mapping[str, Callable[[Tensor], Tensor]] = {"A_log": lambda logarithms: -logarithms.exp()}
SHARED_EXPERTS: Mapping[str, Any] = {
    **EXPERTS,
    "expert_count": "num_experts",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
EVERY_LAYER: Mapping[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": []}

LLAMA = Architecture("llama", RMS, SILU, rope_types=("default", "llama3"), rows=NEIGHBOURS)
GEMMA = Architecture(
    "gemma",
    RMS,
    {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True, **NO_BIASES, **CAUSAL},
    norm_offset=1.0,
)
QWEN3 = Architecture("qwen3", RMS, {**SILU, **NO_BIASES, "use_sliding_window": False})
GRANITE = Architecture(
    "granite",
    {
        **RMS,
        "attention_scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
    {**SILU, **NO_BIASES},
    rows=NEIGHBOURS,
)
QWEN35 = Architecture(
    "qwen35",
    {
        **RMS,
        "rope_dimension_sections": three_axes,
        "full_attention_interval": full_attention_interval,
        "ssm_conv_kernel": "linear_conv_kernel_dim",
        "ssm_state_size": "linear_key_head_dim",
        "ssm_group_count": "linear_num_key_heads",
        "ssm_time_step_rank": "linear_num_value_heads",
        "ssm_inner_size": linear_inner_size,
    },
    {**SILU, **NO_BIASES, "layer_types": linear_but_every, "linear_value_head_dim": linear_head_dim},
    partly_rotary=True,
    rows={
        **dict.fromkeys(("linear_attn", "in_proj_z", "in_proj_a", "in_proj_b"), tiled),
        **dict.fromkeys(("in_proj_qkv", "conv1d"), queries_keys_tiled_values),
    },
    inputs={"out_proj": tiled},
    renamed={"linear_attn.dt_bias": "linear_attn.dt_proj.bias"},
    norm_offset=1.0,
    plain_norms=("linear_attn.norm",),
    computed=OF_RECURRENCE,
)
T5 = Architecture(
    "t5",
    {
        "context_length": lambda config: getattr(config, "n_positions", 512),
        "feed_forward_length": "d_ff",
        "decoder_block_count": "num_decoder_layers",
        "decoder_start_token_id": lambda config: getattr(config, "decoder_start_token_id", None),
        "relative_attn_buckets_count": "relative_attention_num_buckets",
        "layer_norm_rms_eps": "layer_norm_epsilon",
    },
    {
        "feed_forward_proj": relu_or_gated_gelu,
        "relative_attention_max_distance": 128,
        "num_decoder_layers": no_more_than_of_the_encoder,
    },
    rope_types=(),
    factors={"decoder.final_layer_norm": scale_before_head},
)

# The class that a config names → what llama.cpp makes of it.
ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": replace(LLAMA, assumed={**SILU, **NO_WINDOW}, rope_types=("default",)),
    "MixtralForCausalLM": replace(
        LLAMA,
        values={**RMS, **EXPERTS},
        assumed={**SILU, **NO_WINDOW},
        rope_types=("default",),
        renamed=MIXTRAL,
    ),
    "Qwen2ForCausalLM": Architecture("qwen2", RMS, {**SILU, "use_sliding_window": False}, free_head_dim=False),
    "Qwen2MoeForCausalLM": Architecture(
        "qwen2moe",
        {**RMS, **SHARED_EXPERTS},
        {
            **SILU,
            **EVERY_LAYER,
            "use_sliding_window": False,
            "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
        free_head_dim=False,
    ),
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": replace(
        QWEN3,
        name="qwen3moe",
        values={**RMS, **EXPERTS, "expert_feed_forward_length": "moe_intermediate_size"},
        assumed={**QWEN3.assumed, **EVERY_LAYER, "norm_topk_prob": True},
    ),
    "Qwen3NextForCausalLM": replace(
        QWEN35,
        name="qwen3next",
        values={
            **{name: value for name, value in QWEN35.values.items() if name != "rope_dimension_sections"},
            **SHARED_EXPERTS,
        },
        assumed={**QWEN35.assumed, **EVERY_LAYER, "norm_topk_prob": True},
        rows={},
        inputs={},
    ),
    "Qwen3_5ForCausalLM": QWEN35,
    "Qwen3_5MoeForCausalLM": replace(
        QWEN35,
        name="qwen35moe",
        values={**QWEN35.values, **SHARED_EXPERTS, "feed_forward_length": lambda config: None},
    ),
    "GemmaForCausalLM": GEMMA,
    "Gemma2ForCausalLM": replace(
        GEMMA,
        name="gemma2",
        values={
            **RMS,
            "sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        assumed={
            **GELU_TANH,
            **NO_BIASES,
            **CAUSAL,
            "attn_logit_softcapping": lambda config: config.attn_logit_softcapping or 50.0,
            "final_logit_softcapping": lambda config: config.final_logit_softcapping or 30.0,
            "tie_word_embeddings": True,
            "layer_types": partial(windows_but_every, 2),
            "query_pre_attn_scalar": partial(query_scale, 46),
        },
    ),
    "Gemma3ForCausalLM": replace(
        GEMMA,
        name="gemma3",
        values={**RMS, "sliding_window": "sliding_window", "final_logit_softcapping": "final_logit_softcapping"},
        assumed={
            **GELU_TANH,
            **NO_BIASES,
            "attn_logit_softcapping": None,
            **CAUSAL,
            "layer_types": partial(windows_but_every, 6),
            "query_pre_attn_scalar": partial(query_scale, 62),
            "rope_parameters": local_and_global_rope,
        },
        rope_types=("default", "linear"),
    ),
    "Gemma4ForCausalLM": Architecture(
        "gemma4",
        {
            **RMS,
            "sliding_window": "sliding_window",
            "sliding_window_pattern": lambda config: [kind == "sliding_attention" for kind in config.layer_types],
            "final_logit_softcapping": "final_logit_softcapping",
            "embedding_length_per_layer_input": lambda config: config.hidden_size_per_layer_input or 0,
            "shared_kv_layers": "num_kv_shared_layers",
            "expert_count": "num_experts",
            "expert_used_count": "top_k_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
            "feed_forward_length": lengths_by_layer,
            "head_count_kv": lambda config: [layer.num_key_value_heads for layer in layer_configs(config)],
            **{
                f"{name}{suffix}": partial(head_dim_of, kind)
                for name in ("key_length", "value_length", "rope_dimension_count")
                for suffix, kind in (("", "full_attention"), ("_swa", "sliding_attention"))
            },
            "rope_freq_base_swa": lambda config: config.rope_parameters["sliding_attention"]["rope_theta"],
        },
        {
            **GELU_TANH,
            **NO_BIASES,
            "use_bidirectional_attention": causal_text,
            "vocab_size_per_layer_input": lambda config: config.vocab_size,
            "layer_types": last_before_shared,
            "rope_parameters": local_rope,
        },
        rope_types=("proportional",),
        partly_rotary=True,
        renamed={
            "layer_scalar": "layer_scalar.weight",
            "router.scale": "router.proj.scale",
            "router.per_expert_scale": "experts.down_proj.scale",
            **dict.fromkeys(("experts.gate_proj", "experts.up_proj"), "experts.gate_up_proj"),
        },
    ),
    "Phi3ForCausalLM": Architecture("phi3", RMS, {**SILU, **NO_WINDOW}, free_head_dim=False, partly_rotary=True),
    "PhiForCausalLM": Architecture(
        "phi2",
        {"layer_norm_eps": "layer_norm_eps"},
        {"hidden_act": "gelu_new", "qk_layernorm": False, "tie_word_embeddings": False},
        free_head_dim=False,
        partly_rotary=True,
    ),
    "StableLmForCausalLM": Architecture(
        "stablelm",
        {"layer_norm_eps": "layer_norm_eps", "parallel_residual": "use_parallel_residual"},
        {**SILU, "qk_layernorm": False, "tie_word_embeddings": False},
        free_head_dim=False,
        partly_rotary=True,
    ),
    "Starcoder2ForCausalLM": Architecture(
        "starcoder2",
        {"layer_norm_eps": "norm_epsilon"},
        {"hidden_act": "gelu_pytorch_tanh", "use_bias": True, **NO_WINDOW},
        free_head_dim=False,
    ),
    "GPT2LMHeadModel": Architecture(
        "gpt2",
        {
            "layer_norm_eps": "layer_norm_epsilon",
            "feed_forward_length": lambda config: config.n_inner or 4 * config.n_embd,
        },
        {
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        free_head_dim=False,
        rope_types=(),
    ),
    "GPTNeoXForCausalLM": Architecture(
        "gptneox",
        {"layer_norm_eps": "layer_norm_eps", "parallel_residual": "use_parallel_residual"},
        {"hidden_act": gelu, "attention_bias": True, "tie_word_embeddings": False},
        free_head_dim=False,
        partly_rotary=True,
        rows=HEADS,
    ),
    "BloomForCausalLM": Architecture(
        "bloom",
        {
            "layer_norm_eps": "layer_norm_epsilon",
            "context_length": lambda config: getattr(config, "seq_length", 2048),  # ALiBi has no end
            "feed_forward_length": lambda config: 4 * config.hidden_size,
        },
        {"apply_residual_connection_post_layernorm": False},
        free_head_dim=False,
        rope_types=(),
        rows=HEADS,
    ),
    "FalconForCausalLM": Architecture(
        "falcon",
        {
            "layer_norm_eps": "layer_norm_epsilon",
            "feed_forward_length": "ffn_hidden_size",
            "head_count_kv": groups_of_falcon,
        },
        {"activation": "gelu", "alibi": False, "bias": False, "parallel_attn": True},
        free_head_dim=False,
        rows={"query_key_value": partial(parts_of_groups, groups_of_falcon)},
    ),
    "MambaForCausalLM": Architecture(
        "mamba",
        {
            "layer_norm_rms_eps": "layer_norm_epsilon",
            "context_length": lambda config: 2**20,  # it has no end
            "ssm_conv_kernel": "conv_kernel",
            "ssm_inner_size": "intermediate_size",
            "ssm_state_size": "state_size",
            "ssm_time_step_rank": "time_step_rank",
            **WITHOUT_ATTENTION,
        },
        {
            **SILU,
            "use_bias": False,
            "use_conv_bias": True,
            "intermediate_size": lambda config: 2 * config.hidden_size,
        },
        rope_types=(),
        computed=OF_RECURRENCE,
    ),
    "Lfm2ForCausalLM": Architecture(
        "lfm2",
        {
            "layer_norm_rms_eps": "norm_eps",
            "feed_forward_length": adjusted_length,
            "head_count_kv": heads_of_keys_by_layer,
            "shortconv_l_cache": "conv_L_cache",
        },
        {"conv_bias": False},
        free_head_dim=False,
    ),
    "MiniMaxM2ForCausalLM": Architecture(
        "minimax-m2",
        {
            **RMS,
            **EXPERTS,
            "expert_feed_forward_length": "intermediate_size",
            "expert_gating_func": lambda config: ExpertGatingFuncType.SIGMOID,
        },
        {**SILU, "tie_word_embeddings": False},
        partly_rotary=True,
        renamed={**MIXTRAL, "mlp.e_score_correction_bias": "mlp.e_score_correction.bias"},
    ),
    "GptOssForCausalLM": Architecture(
        "gpt-oss",
        {**RMS, **EXPERTS, "expert_feed_forward_length": "intermediate_size", "sliding_window": "sliding_window"},
        {
            **SILU,
            "attention_bias": True,
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "layer_types": partial(windows_but_every, 2),
            "tie_word_embeddings": False,
        },
        renamed={"self_attn.sinks": "self_attn.sinks.weight"},
    ),
    "OlmoForCausalLM": Architecture(
        "olmo",
        {"layer_norm_eps": lambda config: 1e-5, "clamp_kqv": "clip_qkv"},
        {**SILU, **NO_BIASES},
        free_head_dim=False,
        rows=NEIGHBOURS,
    ),
    "Olmo2ForCausalLM": Architecture(
        "olmo2", RMS, {**SILU, **NO_BIASES, "tie_word_embeddings": False}, free_head_dim=False
    ),
    "OlmoeForCausalLM": Architecture(
        "olmoe",
        {**RMS, **EXPERTS},
        {
            **SILU,
            **NO_BIASES,
            "clip_qkv": None,
            "norm_topk_prob": False,
            "num_key_value_heads": lambda config: config.num_attention_heads,
            "tie_word_embeddings": False,
        },
        free_head_dim=False,
    ),
    "CohereForCausalLM": Architecture(
        "command-r",
        {"layer_norm_eps": "layer_norm_eps", "logit_scale": "logit_scale"},
        {**SILU, **NO_BIASES, "use_qk_norm": False, "tie_word_embeddings": True},
        free_head_dim=False,
    ),
    "Cohere2ForCausalLM": Architecture(
        "cohere2",
        {"layer_norm_eps": "layer_norm_eps", "logit_scale": "logit_scale", "sliding_window": "sliding_window"},
        {**SILU, **NO_BIASES, "tie_word_embeddings": True, "layer_types": partial(windows_but_every, 4)},
        free_head_dim=False,
    ),
    "GraniteForCausalLM": GRANITE,
    "GraniteMoeForCausalLM": replace(
        GRANITE,
        name="granitemoe",
        values={**GRANITE.values, **EXPERTS},
        renamed={"block_sparse_moe.experts": "mlp.experts", "block_sparse_moe.router": "block_sparse_moe.router.layer"},
    ),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        RMS,
        {
            **SILU,
            **NO_BIASES,
            "mlp_bias": False,
            "use_sliding_window": False,
            "no_rope_layers": rotary_but_every_fourth,
        },
        rows=NEIGHBOURS,
    ),
    "NemotronForCausalLM": Architecture(
        "nemotron",
        {"layer_norm_eps": "norm_eps"},
        {"hidden_act": "relu2", "tie_word_embeddings": False},
        free_head_dim=False,
        partly_rotary=True,
        norm_offset=1.0,
    ),
    "SeedOssForCausalLM": Architecture("seed_oss", RMS, {**SILU, "attention_out_bias": False, "mlp_bias": False}),
    "ArceeForCausalLM": Architecture(
        "arcee", RMS, {"hidden_act": "relu2", **NO_BIASES, "mlp_bias": False}, rows=NEIGHBOURS
    ),
    "Ernie4_5ForCausalLM": Architecture("ernie4_5", RMS, {**SILU, "use_bias": False}),
    "T5ForConditionalGeneration": T5,
    "UMT5ForConditionalGeneration": T5,
}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The entry for a model's class.

    Raises:
        ExportError: there is none, or llama.cpp would compute something else than a model with this config.
    """
    named = (config.architectures or ["a model without a class"])[0]
    if named not in ARCHITECTURES:
        raise ExportError(f"{named} is not written as GGUF, only {', '.join(ARCHITECTURES)}")
    ARCHITECTURES[named].check(config)
    return ARCHITECTURES[named]
