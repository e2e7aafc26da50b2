"""A GGUF file says what the model is, and other readers find our weights in it bit for bit."""

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from hf_cptquant.demo import DENSE_GGUF
from hf_cptquant.errors import ExportError, ModelError, PlanError
from hf_cptquant.grid import dequantize
from hf_cptquant.llama_cpp import export_gguf, tensors
from hf_cptquant.modules import packed_modules
from hf_cptquant.plan import BitPlan

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def dense_weights(folder) -> dict[str, torch.Tensor]:
    """Our weights in float32: scales are converted before they are multiplied, so nothing is rounded."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).dequantize().state_dict()


def read_by_transformers(file) -> transformers.PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **DENSE_GGUF)


def in_llama_cpps_order(tensor: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter has it (`LlamaModel.permute`)."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def test_a_real_model_is_the_same_in_transformers_own_reader(quantized, bundled, tmp_path):
    model, folder = quantized
    file = tmp_path / "smollm2.gguf"
    report = export_gguf(folder, file)
    plan = BitPlan.load(folder)
    assert report.largest_difference == {}
    assert sum(report.modules.values()) == len(plan.packed)
    assert report.nbytes == file.stat().st_size < plan.original_bytes
    assert [path.name for path in tmp_path.iterdir()] == [file.name]

    read, packed = read_by_transformers(file).state_dict(), packed_modules(model)
    for name, module in packed.items():
        ours = module.quantized()
        assert torch.equal(read.pop(f"{name}.weight"), dequantize(ours.integers, ours.scale.float(), None)), name
    dense = {name: tensor for name, tensor in model.state_dict().items() if name in read}
    assert len(dense) == len(read) == len(model.state_dict()) - 3 * len(packed)
    for name, tensor in dense.items():
        assert torch.equal(read[name], tensor.float()), name

    written = gguf.GGUFReader(file).fields
    ours_alone = {"general.quantized_by", "llama.attention.key_length", "llama.attention.value_length"}
    theirs_alone = {
        "general.organization", "general.finetune", "general.basename", "general.license", "general.languages",
        "tokenizer.ggml.add_space_prefix",
    }  # fmt: skip
    assert written.keys() - bundled.keys() == {*ours_alone, "tokenizer.ggml.add_eos_token"}
    assert bundled.keys() - written.keys() == theirs_alone
    for name in written.keys() & bundled.keys():
        if name.startswith("llama.") or name in ("general.size_label", "general.type", "general.quantization_version"):
            assert written[name].contents() == bundled[name].contents(), name
            assert written[name].types == bundled[name].types, name


def test_biases_heads_and_rotary_frequencies(quantized_folder, tmp_path):
    folder = quantized_folder(
        attention_bias=True, mlp_bias=True, head_dim=32, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=False
    )
    ours = dense_weights(folder)
    export_gguf(folder, tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    read = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert len(read) == len(ours) + 1
    for leaf, heads in (("q", 4), ("k", 2)):
        for kind in ("weight", "bias"):
            expected = in_llama_cpps_order(ours[f"model.layers.1.self_attn.{leaf}_proj.{kind}"].numpy(), heads)
            assert np.array_equal(read[f"blk.1.attn_{leaf}.{kind}"], expected)
    for name, other in (("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"), ("mlp.up_proj", "ffn_up")):
        for kind in ("weight", "bias"):
            assert np.array_equal(read[f"blk.2.{other}.{kind}"], ours[f"model.layers.2.{name}.{kind}"].numpy())
    assert np.array_equal(read["output.weight"], ours["lm_head.weight"].numpy())
    assert reader.get_tensor(0).name == "rope_freqs.weight"

    factors = read["rope_freqs.weight"]
    wavelengths = 2 * np.pi * 500000.0 ** (np.arange(16) / 16)
    assert factors.shape == (16,)
    assert factors[wavelengths < 32 / 4] == pytest.approx(1)
    assert factors[wavelengths > 32] == pytest.approx(8)
    smooth = (32 / wavelengths - 1) / (4 - 1)
    between = (wavelengths > 32 / 4) & (wavelengths < 32)
    assert between.any()
    assert factors[between] == pytest.approx((1 / ((1 - smooth) / 8 + smooth))[between], rel=1e-5)
    assert reader.fields["llama.attention.key_length"].contents() == 32
    assert reader.fields["llama.rope.dimension_count"].contents() == 32


def test_packed_embeddings_and_heads(quantized_folder, tmp_path):
    outside = {"quantize_embeddings": 4, "quantize_lm_head": 8}
    folder = quantized_folder(settings=outside, tie_word_embeddings=False)
    ours = dense_weights(folder)
    export_gguf(folder, tmp_path / "tiny.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert (kinds["token_embd.weight"], kinds["output.weight"]) == ("Q4_0", "Q8_0")
    read = read_by_transformers(tmp_path / "tiny.gguf").state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(read[name], ours[name])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_embedding_is_the_head_too(bits, quantized_folder, tmp_path):
    folder = quantized_folder(settings={"quantize_embeddings": bits}, tie_word_embeddings=True)
    ours = dense_weights(folder)
    assert torch.equal(ours["lm_head.weight"], ours["model.embed_tokens.weight"])
    export_gguf(folder, tmp_path / "tiny.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert kinds["token_embd.weight"] == {4: "Q4_0", 8: "Q8_0"}[bits]
    assert "output.weight" not in kinds  # for which llama.cpp takes the embedding
    read = read_by_transformers(tmp_path / "tiny.gguf").state_dict()
    assert torch.equal(read["lm_head.weight"], ours["lm_head.weight"])


def test_scales_that_are_rounded_are_told(quantized_folder, tmp_path, logged):
    folder = quantized_folder(dtype=torch.float32)
    report = export_gguf(folder, tmp_path / "tiny.gguf")
    assert len(report.largest_difference) == len(BitPlan.load(folder).packed)
    assert f"{max(report.largest_difference.values()):.2g} (model.layers." in logged.text
    read, ours = read_by_transformers(tmp_path / "tiny.gguf").state_dict(), dense_weights(folder)
    for name, tensor in ours.items():
        allowed = report.largest_difference.get(name.removesuffix(".weight"), 0)
        assert (read[name] - tensor).abs().max() <= allowed * (1 + 1e-5), name


@pytest.mark.parametrize(
    ("changes", "settings", "complaint"),
    [
        ({}, {"group_size": 16, "bits": (4, 8)}, r"model\.layers\.0\.\S+: groups of 16 do not fit"),
        ({"hidden_act": "gelu"}, {}, "hidden_act 'silu', this model has 'gelu'; export with --tensor-types-only"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            {},
            "rotary embeddings of type 'linear' .* --tensor-types-only",
        ),
        ({"kind": "opt"}, {}, "OPTForCausalLM is not written as GGUF, only LlamaForCausalLM, .* --tensor-types-only"),
    ],
)
def test_what_the_file_could_not_say_is_refused(changes, settings, complaint, quantized_folder, tmp_path):
    folder = quantized_folder(settings=settings, **changes)
    before = set(tmp_path.iterdir())
    with pytest.raises(ExportError, match=complaint):
        export_gguf(folder, tmp_path / "tiny.gguf")
    assert set(tmp_path.iterdir()) == before


def test_a_folder_that_lacks_something_is_refused(quantized_folder, tmp_path):
    folder = quantized_folder()
    file = tmp_path / "tiny.gguf"
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ExportError, match="has no tokenizer, which is a part of GGUF"):
        export_gguf(folder, file)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="no model at"):
        export_gguf(folder, file)
    with pytest.raises(PlanError, match="does not exist"):
        export_gguf(tmp_path / "nothing", file)
    assert not file.exists()


def test_a_file_is_whole_or_not_there_and_never_overwritten(quantized_folder, tmp_path, monkeypatch):
    folder = quantized_folder()
    file = tmp_path / "tiny.gguf"

    def fail(*_):
        raise OSError("disk full")

    before = set(tmp_path.iterdir())
    with monkeypatch.context() as broken:
        broken.setattr(tensors, "encode", fail)
        with pytest.raises(OSError, match="disk full"):
            export_gguf(folder, file)
    assert set(tmp_path.iterdir()) == before
    file.write_text("mine")
    with pytest.raises(ExportError, match=r"tiny\.gguf exists; give a new file"):
        export_gguf(folder, file)
    assert file.read_text() == "mine"
    with pytest.raises(ExportError, match=r"the folder of .* does not exist"):
        export_gguf(folder, tmp_path / "nowhere" / "tiny.gguf")
