"""Every architecture in the table: other readers find our weights, and compute what the model does.

That llama.cpp computes the same, `benchmarks/llama_cpp_architectures.py` shows where a build of it is.
"""

import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM

from hf_cptquant import CPTQuantConfig
from hf_cptquant.demo import DENSE_GGUF
from hf_cptquant.errors import ExportError
from hf_cptquant.llama_cpp import export_gguf, tensor_types
from hf_cptquant.llama_cpp.architectures import ARCHITECTURES, architecture_of
from hf_cptquant.model_view import read_config, view_model
from hf_cptquant.plan import BitPlan

TRANSFORMERS = Version(transformers.__version__).release
BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
# Of those that transformers reads from GGUF, one for each way in which architectures differ: biases, experts, shared
# experts, offsets of norms, transposed weights, fused projections, parts of heads without rotary embeddings, heads of
# linear attention in another order.
READ_BY_TRANSFORMERS = (
    "Qwen2ForCausalLM", "Qwen3MoeForCausalLM", "Qwen2MoeForCausalLM", "Gemma2ForCausalLM", "NemotronForCausalLM",
    "GPT2LMHeadModel", "Phi3ForCausalLM", "StableLmForCausalLM", "MambaForCausalLM", "Lfm2ForCausalLM",
    "MiniMaxM2ForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM",
)  # fmt: skip


SINCE = {"Qwen3_5ForCausalLM": (5, 17), "Qwen3_5MoeForCausalLM": (5, 18)}  # versions of transformers that read them


@pytest.fixture
def quantized_folder(models, tmp_path):
    """A class → a folder with its tiny model quantized, with bits in turn for one unit after the other."""

    def build(
        kind: str,
        bits=(4, 8, 16, 5),
        symmetric: bool = True,
        granularity: str = "group",
        own_head: bool = False,
        group_size: int = 32,
        **changes,
    ) -> Path:
        original, folder = tmp_path / "original", tmp_path / "quantized"
        model = models.model_of(kind, **changes).to(torch.bfloat16)
        if own_head:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0).clone())
        model.save_pretrained(original)
        plan = view_model(model).plan(granularity)
        units = dict.fromkeys(module.unit for module in plan.modules)
        plan = plan.with_bits(
            {unit: bits[index % len(bits)] for index, unit in enumerate(units)}, group_size, symmetric
        )
        config = CPTQuantConfig(plan=plan, quality="fast")
        getattr(transformers, kind).from_pretrained(original, quantization_config=config).save_pretrained(folder)
        models.tokenizer_of().save_pretrained(folder)
        return folder

    return build


def test_the_benchmark_has_them_all(models):
    found = json.loads((BENCHMARKS / "results" / "llama_cpp_architectures.json").read_text())
    assert set(ARCHITECTURES) == set(models.MODELS) == set(found["models"])
    for kind, measured in found["models"].items():
        assert measured["kl_divergence"] < 1e-5, kind
        assert measured["same_most_probable_token"] == 1, kind


def test_what_is_taken_for_granted_is_a_setting(models):
    for kind, architecture in ARCHITECTURES.items():
        config = models.config_of(kind)
        missing = {name: value for name, value in architecture.assumed.items() if not hasattr(config, name)}
        if kind == "GptOssForCausalLM" and TRANSFORMERS < (5, 19):  # which has these fixed in the code
            experts = models.model_of(kind).model.layers[0].mlp.experts
            assert missing == {"swiglu_alpha": experts.alpha, "swiglu_limit": experts.limit}
        else:
            assert missing == {}, kind


def test_the_readme_names_them_all():
    text = (BENCHMARKS.parent / "README.md").read_text()
    listed = re.search(r"written for these classes \(`…ForCausalLM`\):(.*?)\. Each was", text, re.S)[1]
    names = re.findall(r"\w+", listed.replace(" (text)", "").replace(" and", ","))
    assert {name if name in ARCHITECTURES else f"{name}ForCausalLM" for name in names} == set(ARCHITECTURES)


def float32(folder: Path) -> transformers.PreTrainedModel:
    model_class = getattr(transformers, read_config(str(folder)).architectures[0])
    model = model_class.from_pretrained(folder, dtype=torch.float32)
    if TRANSFORMERS < (5, 21):  # which leaves tensors that it renames as they are stored if others are packed
        model.float()
    return model.dequantize()


def read(file: Path) -> dict[str, np.ndarray]:
    tensors = gguf.GGUFReader(file).tensors
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in tensors}


@pytest.mark.parametrize("kind", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model(kind, quantized_folder, tmp_path):
    another_reader = kind == "Lfm2ForCausalLM" or kind in SINCE
    bits = (4, 8, 16) if another_reader else (4, 8, 16, 5)  # which knows no Q5_0
    if kind in SINCE and TRANSFORMERS < (5, 24):  # and in 5.17 no Q4_0; those between were not tried
        bits = (8, 16)
    if SINCE.get(kind, ()) > TRANSFORMERS:
        pytest.skip(f"transformers reads no GGUF of {kind} in this version")
    folder = quantized_folder(kind, bits, group_size=64)  # more than a head of linear attention has
    export_gguf(folder, tmp_path / "tiny.gguf")
    ours = float32(folder)
    config = ours.config  # this reader leaves some of it at its defaults
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32, config=config, **DENSE_GGUF
    ).state_dict()
    for name, tensor in ours.state_dict().items():
        rounding = 1e-6 if name.endswith("A_log") else 0  # of the logarithm that it takes again
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=rounding, msg=name)
    for name, tensor in theirs.items():
        assert tensor.any(), name


def test_gemma_4_has_layers_that_differ(quantized_folder, tmp_path):
    folder = quantized_folder("Gemma4ForCausalLM")
    export_gguf(folder, tmp_path / "tiny.gguf")
    theirs, ours = read(tmp_path / "tiny.gguf"), float32(folder).state_dict()
    for layer in range(6):
        before, block = f"model.layers.{layer}", f"blk.{layer}"
        scale = ours[f"{before}.layer_scalar"].numpy()
        assert scale != 1
        assert np.array_equal(theirs[f"{block}.layer_output_scale.weight"], scale)
        queries = ours[f"{before}.self_attn.q_proj.weight"].numpy()
        assert np.array_equal(theirs[f"{block}.attn_q.weight"], queries)
        assert len(queries) == 4 * (64 if layer in (2, 5) else 32)
        for leaf, expected in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
            experts = ours[f"{before}.experts.{expected}"].numpy()
            assert np.array_equal(theirs[f"{block}.ffn_{leaf}_exps.weight"], experts)
        for name, expected in (("ffn_gate_inp", "scale"), ("ffn_down_exps", "per_expert_scale")):
            assert np.array_equal(theirs[f"{block}.{name}.scale"], ours[f"{before}.router.{expected}"].numpy())
    assert tensor_types(BitPlan.load(folder), read_config(str(folder))).keys() < theirs.keys()
    assert {name for name in theirs if "attn_k.w" in name} == {f"blk.{layer}.attn_k.weight" for layer in range(3)}
    assert {name for name in theirs if "attn_v.w" in name} == {f"blk.{layer}.attn_v.weight" for layer in range(2)}
    embedding = ours["model.embed_tokens_per_layer.weight"].numpy()
    assert np.array_equal(theirs["per_layer_token_embd.weight"], embedding)
    assert theirs["rope_freqs.weight"] == pytest.approx([1.0] * 8 + [1e30] * 24)
    fields = gguf.GGUFReader(tmp_path / "tiny.gguf").fields
    expected = {
        "attention.key_length": 64, "attention.key_length_swa": 32, "rope.dimension_count": 64,
        "rope.dimension_count_swa": 32, "rope.freq_base": 50000.0, "rope.freq_base_swa": 2000.0,
        "attention.head_count_kv": [2, 2, 1] * 2, "feed_forward_length": [192] * 3 + [384] * 3,
        "attention.sliding_window_pattern": [True, True, False] * 2, "attention.shared_kv_layers": 3,
        "embedding_length_per_layer_input": 32, "expert_count": 4, "expert_used_count": 2,
        "expert_feed_forward_length": 96,
    }  # fmt: skip
    assert {name: fields[f"gemma4.{name}"].contents() for name in expected} == expected


def test_gpt_oss_has_sinks_and_biases_of_experts(quantized_folder, tmp_path):
    folder = quantized_folder("GptOssForCausalLM")
    export_gguf(folder, tmp_path / "tiny.gguf")
    theirs, ours = read(tmp_path / "tiny.gguf"), float32(folder).state_dict()
    for layer in range(3):
        before, block = f"model.layers.{layer}", f"blk.{layer}"
        assert np.array_equal(theirs[f"{block}.attn_sinks.weight"], ours[f"{before}.self_attn.sinks"].numpy())
        for leaf in ("weight", "bias"):
            router = ours[f"{before}.mlp.router.{leaf}"].numpy()
            assert np.array_equal(theirs[f"{block}.ffn_gate_inp.{leaf}"], router)
        gate_up, down = (ours[f"{before}.mlp.experts.{name}"].mT.numpy() for name in ("gate_up_proj", "down_proj"))
        biases, down_bias = (
            ours[f"{before}.mlp.experts.{name}_bias"].numpy() for name in ("gate_up_proj", "down_proj")
        )
        for first, leaf in enumerate(("gate", "up")):
            assert np.array_equal(theirs[f"{block}.ffn_{leaf}_exps.weight"], gate_up[:, first::2])
            assert np.array_equal(theirs[f"{block}.ffn_{leaf}_exps.bias"], biases[:, first::2])
        assert np.array_equal(theirs[f"{block}.ffn_down_exps.weight"], down)
        assert np.array_equal(theirs[f"{block}.ffn_down_exps.bias"], down_bias)


def test_qwen3_next_keeps_what_belongs_to_a_head_together(quantized_folder, tmp_path):
    folder = quantized_folder("Qwen3NextForCausalLM")
    export_gguf(folder, tmp_path / "tiny.gguf")
    theirs, ours = read(tmp_path / "tiny.gguf"), float32(folder).state_dict()
    names = {"in_proj_qkvz": "ssm_in", "in_proj_ba": "ssm_ba", "norm": "ssm_norm", "out_proj": "ssm_out"}
    for layer in (0, 1, 3):
        before, block = f"model.layers.{layer}.linear_attn", f"blk.{layer}"
        for leaf, name in names.items():
            assert np.array_equal(theirs[f"{block}.{name}.weight"], ours[f"{before}.{leaf}.weight"].numpy()), name
        assert np.array_equal(theirs[f"{block}.ssm_dt.bias"], ours[f"{before}.dt_bias"].numpy())
        assert theirs[f"{block}.ssm_a"] == pytest.approx(-ours[f"{before}.A_log"].exp().numpy(), rel=1e-6)
        assert np.array_equal(theirs[f"{block}.ssm_conv1d.weight"], ours[f"{before}.conv1d.weight"].squeeze(1).numpy())
    norm = ours["model.layers.2.self_attn.q_norm.weight"].numpy() + 1
    assert np.array_equal(theirs["blk.2.attn_q_norm.weight"], norm)
    fields = gguf.GGUFReader(tmp_path / "tiny.gguf").fields
    values = {
        "full_attention_interval": 3, "ssm.conv_kernel": 3, "ssm.state_size": 32, "ssm.group_count": 2,
        "ssm.time_step_rank": 6, "ssm.inner_size": 192, "rope.dimension_count": 16,
    }  # fmt: skip
    assert {name: fields[f"qwen3next.{name}"].contents() for name in values} == values


OF_ATTENTION = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_o"}
OF_STACKS = {
    "encoder": ({"layer.0.SelfAttention": ""}, ("attn_norm", "ffn_norm")),
    "decoder": (
        {"layer.0.SelfAttention": "", "layer.1.EncDecAttention": "cross_"},
        ("attn_norm", "cross_attn_norm", "ffn_norm"),
    ),
}


def what_the_head_reads(folder: Path) -> float:
    """Divided by what comes out of the decoder."""
    model = float32(folder)
    with torch.no_grad():
        found = model(torch.tensor([[5, 6, 7]]), decoder_input_ids=torch.tensor([[3]]), output_hidden_states=True)
        return (found.logits.norm() / model.lm_head(found.decoder_hidden_states[-1]).norm()).item()


@pytest.mark.parametrize(
    ("kind", "own_head", "scaled"),
    [
        ("T5ForConditionalGeneration", False, True),
        ("UMT5ForConditionalGeneration", True, False),
    ],
)
def test_t5_has_two_stacks(kind, own_head, scaled, quantized_folder, tmp_path):
    folder = quantized_folder(kind, own_head=own_head, tie_word_embeddings=scaled)
    export_gguf(folder, tmp_path / "tiny.gguf")
    theirs, ours = read(tmp_path / "tiny.gguf"), float32(folder).state_dict()
    types = tensor_types(BitPlan.load(folder), read_config(str(folder)))
    assert types.keys() < theirs.keys()
    expected = {"token_embd.weight": "shared", "enc.output_norm.weight": "encoder.final_layer_norm"}
    for stack, (attentions, norms) in OF_STACKS.items():
        for layer in range({"encoder": 3, "decoder": 2}[stack]):
            before, block = f"{stack}.block.{layer}", f"{stack[:3]}.blk.{layer}"
            for attention, prefix in attentions.items():
                for leaf, name in OF_ATTENTION.items():
                    expected[f"{block}.{prefix}{name}.weight"] = f"{before}.{attention}.{leaf}"
            if kind.startswith("UMT5") or layer == 0:
                expected[f"{block}.attn_rel_b.weight"] = f"{before}.layer.0.SelfAttention.relative_attention_bias"
            feed_forward = f"{before}.layer.{len(norms) - 1}.DenseReluDense"
            ups = {"ffn_gate": "wi_0", "ffn_up": "wi_1"} if kind.startswith("UMT5") else {"ffn_up": "wi"}
            for name, leaf in {**ups, "ffn_down": "wo"}.items():
                expected[f"{block}.{name}.weight"] = f"{feed_forward}.{leaf}"
            for index, norm in enumerate(norms):
                expected[f"{block}.{norm}.weight"] = f"{before}.layer.{index}.layer_norm"
    if own_head:
        assert not torch.equal(ours["lm_head.weight"], ours["shared.weight"])
        expected["output.weight"] = "lm_head"
    before_head = theirs.pop("dec.output_norm.weight")
    assert theirs.keys() == expected.keys()
    for name, module in expected.items():
        assert np.array_equal(theirs[name], ours[f"{module}.weight"].numpy()), name
    scaled |= TRANSFORMERS < (5, 24)  # where UMT5 multiplies in any case
    factor = 128**-0.5 if scaled else 1  # of the original T5's hidden state, which llama.cpp does not multiply
    assert what_the_head_reads(folder) == pytest.approx(factor, rel=1e-5)
    assert before_head == pytest.approx(ours["decoder.final_layer_norm.weight"].numpy() * factor, rel=1e-6)
    fields = gguf.GGUFReader(tmp_path / "tiny.gguf").fields
    values = {
        "block_count": 3, "decoder_block_count": 2, "decoder_start_token_id": 3, "embedding_length": 128,
        "feed_forward_length": 192, "attention.head_count": 3, "attention.key_length": 64, "attention.value_length": 64,
        "attention.relative_buckets_count": 20,
    }  # fmt: skip
    assert {name: fields[f"t5.{name}"].contents() for name in values} == values


@pytest.mark.parametrize(
    ("kind", "changes", "name", "groups", "queries", "size"),
    [
        ("GPTNeoXForCausalLM", {}, "gpt_neox.layers.1.attention", 4, 1, 32),
        ("BloomForCausalLM", {}, "transformer.h.1.self_attention", 6, 1, 16),
        ("FalconForCausalLM", {}, "transformer.h.1.self_attention", 2, 2, 32),
        ("FalconForCausalLM", {"new_decoder_architecture": False}, "transformer.h.1.self_attention", 1, 4, 32),
    ],
)
def test_queries_keys_and_values_of_heads_are_put_together(
    kind, changes, name, groups, queries, size, quantized_folder, tmp_path
):
    folder = quantized_folder(kind, symmetric=False, bits=(4, 3, 5), **changes)
    export_gguf(folder, tmp_path / "tiny.gguf")
    theirs, ours = read(tmp_path / "tiny.gguf"), float32(folder).state_dict()
    leaves = [leaf for leaf in ("weight", "bias") if f"{name}.query_key_value.{leaf}" in ours]
    assert leaves[1:] == ([] if kind == "FalconForCausalLM" else ["bias"])
    for leaf in leaves:
        fused = ours[f"{name}.query_key_value.{leaf}"].numpy()
        heads = [fused[start : start + size] for start in range(0, len(fused), size)]
        of_group = [heads[start : start + queries + 2] for start in range(0, len(heads), queries + 2)]
        assert len(of_group) == groups
        expected = [head for group in of_group for head in group[:queries]]
        expected += [group[part] for part in (-2, -1) for group in of_group]
        assert np.array_equal(theirs[f"blk.1.attn_qkv.{leaf}"], np.concatenate(expected))


def test_experts_share_the_type_that_holds_all(quantized_folder, tmp_path):
    folder = quantized_folder("MixtralForCausalLM", bits=(4, 3, 5, 4, 8), granularity="module")
    report = export_gguf(folder, tmp_path / "tiny.gguf")
    theirs, ours = read(tmp_path / "tiny.gguf"), float32(folder).state_dict()
    for layer in range(3):
        mixture = f"model.layers.{layer}.mlp"
        gate_up = ours[f"{mixture}.experts.gate_up_proj"].numpy()
        assert np.array_equal(theirs[f"blk.{layer}.ffn_gate_exps.weight"], gate_up[:, :64])
        assert np.array_equal(theirs[f"blk.{layer}.ffn_up_exps.weight"], gate_up[:, 64:])
        assert np.array_equal(theirs[f"blk.{layer}.ffn_down_exps.weight"], ours[f"{mixture}.experts.down_proj"].numpy())
        assert np.array_equal(theirs[f"blk.{layer}.ffn_gate_inp.weight"], ours[f"{mixture}.gate.weight"].numpy())
    kinds = {held.kind for held in report.modules if held.scheme.bits in (3, 4, 5)}
    assert kinds >= {"Q5_0", "Q8_0"}  # more than their own bits would take


def test_experts_of_which_some_are_not_packed_are_refused(quantized_folder, tmp_path):
    folder = quantized_folder("MixtralForCausalLM", bits=(4, 16, 8, 4, 8), granularity="module")
    with pytest.raises(ExportError, match=r"model\.layers\.\d\.mlp\.experts\.w\d: \d of 4 experts are packed.*'group'"):
        export_gguf(folder, tmp_path / "tiny.gguf")
    assert not (tmp_path / "tiny.gguf").exists()


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
HALF = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("kind", "changes", "complaint"),
    [
        ("MistralForCausalLM", {"sliding_window": 32}, "llama with sliding_window None, this model has 32"),
        ("Phi3ForCausalLM", {"sliding_window": 32}, "phi3 with sliding_window None, this model has 32"),
        ("Starcoder2ForCausalLM", {"hidden_act": "gelu"}, "hidden_act 'gelu_pytorch_tanh', this model has 'gelu'"),
        ("Qwen2ForCausalLM", {"head_dim": 64}, "qwen2 with 32 features a head, this model has 64"),
        (
            "Qwen2ForCausalLM",
            {"rope_parameters": LINEAR},
            "type 'linear' are not written as GGUF for qwen2",
        ),
        (
            "Qwen3ForCausalLM",
            {"rope_parameters": HALF},
            "features of a head, this model has them for 64 of 128",
        ),
        ("Qwen3ForCausalLM", {"use_sliding_window": True}, "use_sliding_window False, this model has True"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias False, this model has True"),
        ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}, "norm_topk_prob True, this model has False"),
        ("Qwen2MoeForCausalLM", {"mlp_only_layers": [1]}, r"mlp_only_layers \[\], this model has \[1\]"),
        ("Qwen3_5ForCausalLM", {"linear_value_head_dim": 64}, "linear_value_head_dim 32, this model has 64"),
        (
            "Qwen3_5ForCausalLM",
            {"layer_types": ["full_attention"] * 3 + ["linear_attention"]},
            r"qwen35 with layer_types",
        ),
        ("GemmaForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention False"),
        ("Gemma2ForCausalLM", {"attn_logit_softcapping": None}, "attn_logit_softcapping 50.0, this model has None"),
        ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar 64, this model has 100"),
        ("Gemma3ForCausalLM", {"layer_types": ["full_attention"] * 7}, "gemma3 with layer_types"),
        ("Gemma4ForCausalLM", {"num_kv_shared_layers": 2}, "gemma4 with layer_types .*this model has"),
        ("Gemma4ForCausalLM", {"vocab_size_per_layer_input": 96}, "vocab_size_per_layer_input 112, this model has 96"),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx False"),
        (
            "BloomForCausalLM",
            {"apply_residual_connection_post_layernorm": True},
            "post_layernorm False, this model has",
        ),
        ("FalconForCausalLM", {"alibi": True}, "falcon with alibi False, this model has True"),
        ("FalconForCausalLM", {"parallel_attn": False}, "falcon with parallel_attn True, this model has False"),
        ("MambaForCausalLM", {"use_bias": True}, "mamba with use_bias False, this model has True"),
        ("MambaForCausalLM", {"expand": 3}, "mamba with intermediate_size 256, this model has 384"),
        ("Lfm2ForCausalLM", {"conv_bias": True}, "lfm2 with conv_bias False, this model has True"),
        ("MiniMaxM2ForCausalLM", {"tie_word_embeddings": True}, "tie_word_embeddings False, this model has True"),
        ("GptOssForCausalLM", {"swiglu_limit": 5.0}, "gpt-oss with swiglu_limit 7.0, this model has 5.0"),
        ("GptOssForCausalLM", {"rope_parameters": None}, "type 'yarn' are not written as GGUF for gpt-oss"),
        ("CohereForCausalLM", {"use_qk_norm": True}, "use_qk_norm False, this model has True"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1] * 5}, r"no_rope_layers \[1, 1, 1, 0, 1\]"),
        ("StableLmForCausalLM", {"tie_word_embeddings": True}, "tie_word_embeddings False, this model has True"),
        ("OlmoeForCausalLM", {"num_key_value_heads": 2}, "num_key_value_heads 4, this model has 2"),
        (
            "T5ForConditionalGeneration",
            {"feed_forward_proj": "gated-silu"},
            "'gated-gelu', this model has 'gated-silu'",
        ),
        (
            "T5ForConditionalGeneration",
            {"feed_forward_proj": "gelu"},
            "feed_forward_proj 'relu', this model has 'gelu'",
        ),
        ("T5ForConditionalGeneration", {"num_decoder_layers": 4}, "num_decoder_layers 3, this model has 4"),
        (
            "UMT5ForConditionalGeneration",
            {"relative_attention_max_distance": 64},
            "max_distance 128, this model has 64",
        ),
    ],
)
def test_what_llama_cpp_takes_for_granted_has_to_hold(kind, changes, complaint, models):
    assert architecture_of(models.config_of(kind)) is ARCHITECTURES[kind]
    with pytest.raises(ExportError, match=complaint):
        architecture_of(models.config_of(kind, **changes))


def test_windows_that_no_text_fills_are_none(models):
    assert architecture_of(models.config_of("MistralForCausalLM", sliding_window=96)).name == "llama"
