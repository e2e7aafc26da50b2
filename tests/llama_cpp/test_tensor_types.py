"""The types of a plan as `llama-quantize` takes them, and the command that writes them."""

import re
import sys

import gguf
import pytest
from conftest import run_command as run
from conftest import tiny_model
from transformers import AutoConfig

from hf_cptquant import BitPlan
from hf_cptquant.errors import ExportError
from hf_cptquant.llama_cpp import tensor_types
from hf_cptquant.model_view import view_model


def test_every_module_has_its_name_and_a_type_of_about_its_bits(quantized):
    _, folder = quantized
    plan = BitPlan.load(folder)
    types = tensor_types(plan, AutoConfig.from_pretrained(folder))
    assert len(types) == len(plan.modules) == 7 * 30
    names = {"q_proj": "attn_q", "o_proj": "attn_output", "gate_proj": "ffn_gate", "down_proj": "ffn_down"}
    for module in plan.modules:
        leaf = module.name.rpartition(".")[2]
        if leaf in names:
            kind = types[f"blk.{module.name.split('.')[2]}.{names[leaf]}.weight"]
            expected = {(4, 576): "iq4_nl", (4, 1536): "q4_k", (8, 576): "q8_0", (8, 1536): "q8_0"}
            assert kind == expected.get((module.scheme.bits, module.in_features), "bf16"), module
    assert len(set(types.values())) >= 3
    assert {kind.upper() for kind in types.values()} <= {kind.name.upper() for kind in gguf.GGMLQuantizationType}


@pytest.mark.parametrize(
    ("kind", "name", "tensor"),
    [
        ("gpt2", "transformer.h.2.attn.c_attn", "blk.2.attn_qkv.weight"),
        ("bert-mlm", "bert.encoder.layer.1.output.dense", "blk.1.ffn_down.weight"),
        ("t5", "encoder.block.1.layer.0.SelfAttention.q", "enc.blk.1.attn_q.weight"),
    ],
)
def test_names_of_other_architectures(kind, name, tensor):
    model = tiny_model(kind)
    plan = view_model(model).plan("module")
    types = tensor_types(plan, model.config)
    position = [module.name for module in plan.modules].index(name)
    assert list(types)[position] == tensor
    assert set(types.values()) == {"f32"}


def test_experts_of_a_layer_are_one_tensor():
    model = tiny_model("mixtral")
    model.config.architectures = ["MixtralForCausalLM"]  # as in the config of a folder
    plan = view_model(model).plan("module")
    plan = plan.with_bits({module.unit: 8 if ".experts.2." in module.name else 4 for module in plan.modules}, 32)
    types = tensor_types(plan, model.config)
    assert len(types) == 3 * (4 + 3)
    assert [types[f"blk.1.{name}.weight"] for name in ("attn_q", "ffn_down_exps")] == ["iq4_nl", "q8_0"]


def test_an_architecture_that_llama_cpp_lacks_is_refused():
    model = tiny_model("opt")
    with pytest.raises(ExportError, match="knows no architecture 'opt'"):
        tensor_types(view_model(model).plan("module"), model.config)


def test_the_command_writes_both_files(quantized_folder, tmp_path, monkeypatch, capsys):
    folder = quantized_folder(num_hidden_layers=11)
    monkeypatch.chdir(tmp_path)
    assert run("export", folder, "--format", "llama-cpp") == 0
    shown = capsys.readouterr().out
    assert "Q4_0" in shown
    assert "all integers and scales are the same" in shown
    assert "llama-quantize --tensor-type-file llama-quantized.tensor-types.txt" in shown
    reader = gguf.GGUFReader("llama-quantized.gguf")
    lines = (tmp_path / "llama-quantized.tensor-types.txt").read_text().split()  # at white space, as llama.cpp does
    assert len(lines) == 7 * 11
    names = [tensor.name for tensor in reader.tensors]
    for line in lines:
        pattern, _ = line.split("=")
        assert sum(re.search(pattern, name) is not None for name in names) == 1, line

    (tmp_path / "llama-quantized.gguf").unlink()  # the other file stays: nothing is written
    assert run("export", folder) == 1
    assert "llama-quantized.tensor-types.txt exists" in capsys.readouterr().err
    assert not (tmp_path / "llama-quantized.gguf").exists()


def test_the_types_alone_where_there_is_no_gguf(quantized_folder, tmp_path, capsys):
    folder = quantized_folder(hidden_act="gelu")
    output = tmp_path / "types.txt"
    assert run("export", folder, "--output", tmp_path / "x.gguf") == 1
    assert "--tensor-types-only" in capsys.readouterr().err
    assert run("export", folder, "--tensor-types-only", "--output", output) == 0
    assert output.read_text().startswith(r"^blk\.0\.attn_q\.weight$=")
    assert run("export", folder, "--format", "onnx") == 1
    assert "--format onnx is not one of llama-cpp" in capsys.readouterr().err


def test_without_the_library_the_command_says_what_to_install(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("hf_cptquant.llama_cpp")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert run("export", tmp_path) == 1
    assert "pip install 'hf-cptquant[gguf]'" in capsys.readouterr().err
