"""What llama.cpp is told or takes for granted, where that is no attribute of a config but follows from several.

The table of architectures names these functions. Each takes the config as its last argument but rows: those that have
rows give them in the order in which llama.cpp wants the outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from gguf import RopeScalingType
from torch import Tensor
from transformers import PretrainedConfig


def head_dim(config: PretrainedConfig) -> int:
    """Features of a head, as transformers finds them."""
    return getattr(config, "head_dim", None) or implied_head_dim(config)


def rotary(config: PretrainedConfig) -> Mapping[str, Any]:
    """Parameters of the rotary embeddings; where windows have others, those of layers without one."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def implied_head_dim(config: PretrainedConfig) -> int:
    """Features of a head where all of them together are as wide as the hidden state."""
    return config.hidden_size // config.num_attention_heads


def heads_of_keys(config: PretrainedConfig) -> int:
    """Heads of keys and values, which several heads of queries may share."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def rotated(config: PretrainedConfig) -> int:
    """Features of a head with rotary embeddings."""
    return int(head_dim(config) * rotary(config).get("partial_rotary_factor", 1.0))


def scaling_type(config: PretrainedConfig) -> RopeScalingType | None:
    """How rotary embeddings are stretched, if they are."""
    return RopeScalingType.LINEAR if rotary(config)["rope_type"] == "linear" else None


def scaling_factor(config: PretrainedConfig) -> float | None:
    """By how much rotary embeddings are stretched, if they are."""
    return rotary(config)["factor"] if rotary(config)["rope_type"] == "linear" else None


def neighbours(heads: str, config: PretrainedConfig, rows: Tensor) -> Tensor:
    """Rows of each head, from its first and second half in turn: llama.cpp turns neighbouring features together,
    transformers those of the two halves."""
    return rows.unflatten(0, (getattr(config, heads), 2, -1)).transpose(1, 2).flatten(0, 2)


def parts_of_groups(groups: Callable[[PretrainedConfig], int], config: PretrainedConfig, rows: Tensor) -> Tensor:
    """Of each group of heads its queries, its key and its value → all queries, all keys, all values."""
    heads = rows.unflatten(0, (groups(config), -1, head_dim(config)))
    return torch.cat([part.flatten(0, 2) for part in heads.split((heads.shape[1] - 2, 1, 1), dim=1)])


def tiled(config: PretrainedConfig, rows: Tensor) -> Tensor:
    """Heads of values in linear attention, as many rows each as there are: the first of every head of keys, then the
    second of every one, and so on, where transformers has those of a head of keys together."""
    heads = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    return rows.unflatten(0, (*heads, -1)).transpose(0, 1).flatten(0, 2)


def queries_keys_tiled_values(config: PretrainedConfig, rows: Tensor) -> Tensor:
    """Queries and keys of linear attention as they are, values as in `tiled`."""
    values = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return torch.cat([rows[:values], tiled(config, rows[values:])])


def groups_of_falcon(config: PretrainedConfig) -> int:
    """Groups of heads that share a key and a value; what the config says of them counts in its new architecture."""
    if config.new_decoder_architecture:
        return config.num_kv_heads
    return 1 if config.multi_query else config.num_attention_heads


def gelu(config: PretrainedConfig) -> str:
    """llama.cpp takes GELU from a table of float16, which is as far from either form as one is from the other."""
    return config.hidden_act if config.hidden_act in ("gelu", "gelu_new", "gelu_pytorch_tanh") else "gelu"


def causal(config: PretrainedConfig) -> bool | None:
    """None is as good as False."""
    return False if config.use_bidirectional_attention else config.use_bidirectional_attention


def window_beyond_context(config: PretrainedConfig) -> int | None:
    """A window that no text is long enough for may stay; llama.cpp computes without any."""
    window = config.sliding_window
    return window if window is not None and window >= config.max_position_embeddings else None


def windows_but_every(step: int, config: PretrainedConfig) -> list[str]:
    """Kinds of layers if every so many have no window."""
    kinds = ("sliding_attention", "full_attention")
    return [kinds[(layer + 1) % step == 0] for layer in range(config.num_hidden_layers)]


def rotary_but_every_fourth(config: PretrainedConfig) -> list[int]:
    """1 for layers with rotary embeddings, if every fourth has none."""
    return [int((layer + 1) % 4 != 0) for layer in range(config.num_hidden_layers)]


def query_scale(layers: int, config: PretrainedConfig) -> int:
    """What Gemma divides the square of logits of attention by; llama.cpp knows the largest model by its layers."""
    if config.num_hidden_layers == layers:
        return config.hidden_size // config.num_attention_heads
    return config.head_dim


def local_and_global_rope(config: PretrainedConfig) -> dict[str, Any]:
    """Rotary embeddings where those of windows are always the same."""
    local = {"rope_type": "default", "rope_theta": 10000.0}
    return {**config.rope_parameters, "sliding_attention": local}


def full_attention_interval(config: PretrainedConfig) -> int:
    """Every so many layers there is attention that is not linear."""
    return [*config.layer_types, "full_attention"].index("full_attention") + 1


def linear_but_every(config: PretrainedConfig) -> list[str]:
    """Kinds of layers if all but every so many have linear attention."""
    kinds, step = ("linear_attention", "full_attention"), full_attention_interval(config)
    return [kinds[(layer + 1) % step == 0] for layer in range(config.num_hidden_layers)]


def linear_head_dim(config: PretrainedConfig) -> int:
    """Features of a head of values in linear attention: as many as those of a head of keys, in whole blocks of ggml's,
    since heads are moved."""
    return -(-config.linear_key_head_dim // 32) * 32


def linear_inner_size(config: PretrainedConfig) -> int:
    """Features of all heads of values in linear attention."""
    return config.linear_num_value_heads * config.linear_value_head_dim


def three_axes(config: PretrainedConfig) -> list[int]:
    """How many rotated pairs of features have the position in time, height and width, in turn, and none of a fourth
    kind: they are all the same in text, but llama.cpp gives 0 for those that belong to none."""
    pairs = rotated(config) // 2
    return [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0]


def layer_configs(config: PretrainedConfig) -> list[PretrainedConfig]:
    """The config of each layer, where they have different heads."""
    return [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]


def head_dim_of(kind: str, config: PretrainedConfig) -> int:
    """Features of a head in the layers of a kind, or in all where there is none of it."""
    layers = layer_configs(config)
    return next(
        (layer.head_dim for layer, each in zip(layers, config.layer_types, strict=True) if each == kind),
        layers[0].head_dim,
    )


def lengths_by_layer(config: PretrainedConfig) -> list[int]:
    """Features of the hidden layers of feed-forward networks, which may be double where keys are those of others."""
    own = config.num_hidden_layers - config.num_kv_shared_layers
    double = [config.use_double_wide_mlp and layer >= own for layer in range(config.num_hidden_layers)]
    return [config.intermediate_size * (1 + each) for each in double]


def last_before_shared(config: PretrainedConfig) -> list[str]:
    """llama.cpp takes shared keys and values from the last two layers that have own, the first with a window."""
    kinds, last = list(config.layer_types), config.num_hidden_layers - config.num_kv_shared_layers
    if config.num_kv_shared_layers:
        kinds[last - 2 : last] = ["sliding_attention", "full_attention"]
    return kinds


def local_rope(config: PretrainedConfig) -> dict[str, Any]:
    """Rotary embeddings where those of windows are not stretched."""
    local = {"rope_type": "default", "rope_theta": config.rope_parameters["sliding_attention"]["rope_theta"]}
    return {**config.rope_parameters, "sliding_attention": local}


def causal_text(config: PretrainedConfig) -> str | None:
    """Anything but "all": "vision" leaves text causal."""
    return None if config.use_bidirectional_attention == "all" else config.use_bidirectional_attention


def adjusted_length(config: PretrainedConfig) -> int:
    """Features of the hidden layer of a feed-forward network, as LFM2 finds them."""
    length = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        length = int(2 * length / 3)
        if config.block_ffn_dim_multiplier is not None:
            length = int(config.block_ffn_dim_multiplier * length)
            length = -(-length // config.block_multiple_of) * config.block_multiple_of
    return length


def heads_of_keys_by_layer(config: PretrainedConfig) -> list[int]:
    """0 where a layer is a convolution: that is how llama.cpp knows."""
    return [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]


def relu_or_gated_gelu(config: PretrainedConfig) -> str:
    """llama.cpp knows which of the two T5 has by whether there is a gate."""
    return "gated-gelu" if config.is_gated_act else "relu"


def no_more_than_of_the_encoder(config: PretrainedConfig) -> int:
    """Layers of the decoder: llama.cpp keeps keys and values for as many as the encoder has."""
    return min(config.num_decoder_layers, config.num_layers)


def scale_before_head(config: PretrainedConfig) -> float:
    """By what the original T5 multiplies what its head reads, and llama.cpp does not. Where transformers has no setting
    for it (UMT5 before 5.24), a tied embedding says so, which is all that its config knows there."""
    scaled = getattr(config, "scale_decoder_outputs", config.tie_word_embeddings)
    return config.d_model**-0.5 if scaled else 1.0
