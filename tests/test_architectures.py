"""Fused groups on every causal language model that transformers registers, built empty from its default config.

Names that stand in no rule and not among those known to stand alone are reported with their architecture: somebody has
to look whether inference engines fuse them. What the rules do group must see the very same inputs.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from functools import cache

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_cptquant.experts import fused_experts, linear_experts
from hf_cptquant.model_view import ModelView, units, view_model
from hf_cptquant.runtimes import FUSED_GROUPS

# Projections that no engine fuses with others: they stand alone, or are fused already.
# fmt: off
ALONE = {
    # outputs of attention and of a mixer; what is fused already
    "o_proj", "out_proj", "dense", "attention_out", "out_lin", "Wo", "output", "output_linear", "c_proj", "qkv_proj",
    "query_key_value", "c_attn", "qkv", "Wqkv", "in_proj", "in_proj_qkvz", "in_proj_ba",
    # a convolution
    "conv_qk_grouped",
    # low-rank and index projections
    "q_b_proj", "kv_b_proj", "kv_proj", "wq_b", "wk", "q_gate_proj", "o_b_proj", "relative_pos_embeddings",
    # feed-forward
    "gate_up_proj", "down_proj", "fc1", "fc2", "fc_in", "fc_out", "c_fc", "dense_h_to_4h", "dense_4h_to_h", "lin1",
    "lin2", "w2", "dense1", "dense2", "intermediate", "layer_1", "layer_2", "w_0", "w_1", "w_out", "Wi", "input_linear",
    "proj_up", "proj_up_gate", "proj_down", "linear", "proj",
    # gates, and other small ones
    "gate", "shared_expert_gate", "output_gate", "g_proj", "a_proj", "b_proj", "f_proj", "f_a_proj", "f_b_proj",
    "g_a_proj", "g_b_proj", "weights_proj", "weight_proj", "sink_proj", "r_proj", "v_proj_current", "v_proj_delayed",
    "x_proj", "dt_proj", "linear_x", "linear_y", "linear_out", "linear_left", "linear_right", "receptance",
    "ogate_preact", "igate_preact", "fgate_preact", "per_layer_input_gate", "per_layer_projection", "correction_coefs",
    "prediction_coefs", "modality_router", "block_inject_weight", "input_mix_weight_down",
    "input_mix_weight_up", "layer", "classifier", "0", "1", "2",
}
# fmt: on
FUSED = {name for _, members in FUSED_GROUPS for name in members}
# Default configs that cannot be built, and forward passes that read values, which an empty model does not have.
UNBUILDABLE = (
    AttributeError,
    AssertionError,
    ImportError,
    KeyError,
    NotImplementedError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
UNRUNNABLE = (*UNBUILDABLE, IndexError, RuntimeError)


@cache
def build(model_type: str) -> PreTrainedModel | str:
    """The empty model of an architecture, with few layers where its config allows, or why there is none."""
    reason = ""
    for settings in ({"num_hidden_layers": 2}, {}):
        try:
            config = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])(**settings)
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])(config).eval()
        except UNBUILDABLE as error:
            reason = f"{type(error).__name__}: {error}"
    return reason


def view_of(model_type: str) -> tuple[PreTrainedModel, ModelView]:
    model = build(model_type)
    if isinstance(model, str):
        pytest.skip(f"its default config cannot be built ({model})")
    try:
        return model, view_model(model, allow_skipped=True)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_every_projection_has_a_known_name(model_type):
    _, view = view_of(model_type)
    names = {module.name.rpartition(".")[2] for module in view.modules}
    unknown = names - FUSED - ALONE
    assert not unknown, f"{model_type}: is any of {sorted(unknown)} fused with others by inference engines?"


@pytest.mark.parametrize("model_type", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
@torch.no_grad()
def test_what_is_fused_sees_the_same_inputs(model_type):
    model, view = view_of(model_type)
    groups = {unit: modules for unit, modules in units(view, "group").items() if len(modules) > 1}
    if not groups:
        pytest.skip("it has nothing to fuse")
    seen: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {module.name for module in view.modules}
        for name, module in model.named_modules():  # without experts, which are no modules of their own yet
            if name in names:
                hook = module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
                hooks.enter_context(hook)
        try:
            with torch.device("meta"):
                model(input_ids=torch.ones(1, 4, dtype=torch.long))
        except UNRUNNABLE as error:
            if not seen:
                pytest.skip(f"an empty model does not run ({type(error).__name__}: {error})")
    compared = 0
    for unit, modules in groups.items():
        inputs = [seen[module.name] for module in modules if module.name in seen]
        compared += len(inputs) > 1
        assert all(tensor is inputs[0] for tensor in inputs), f"{unit} has members with other inputs"
    if not compared:
        pytest.skip("the empty model did not come to what is fused")


def test_experts_of_all_architectures_come_apart():
    apart = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model = build(model_type)
        if not isinstance(model, str) and fused_experts(model):
            view = view_model(model, allow_skipped=True)
            with linear_experts(model):
                assert not fused_experts(model)
                assert view_model(model, allow_skipped=True) == view, model_type
            apart.append(model_type)
    assert len(apart) > 30


def test_most_architectures_can_be_built():
    """So that skipping hides little."""
    built = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if not isinstance(build(name), str)]
    assert len(built) > 0.85 * len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
