"""Saving and reloading: by us, by plain transformers, in shards, again; and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)
from transformers.utils.quantization_config import CompressedTensorsConfig

from hf_cptquant import BitPlan, CPTQuantConfig, CPTQuantError, SensitivityTable, modules
from hf_cptquant.errors import CheckpointError
from hf_cptquant.modules import packed_modules
from hf_cptquant.record import QuantizationRecord

PROBE = """
import sys, torch
{imports}
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    logits = model(torch.arange(40).view(1, -1)).logits
weights = {{
    name: module.weight.detach().contiguous()
    for name, module in model.named_modules()
    if isinstance(getattr(module, "weight", None), torch.Tensor)
}}
torch.save({{"logits": logits, "weights": weights, "ours": "hf_cptquant" in sys.modules}}, sys.argv[2])
{after}
"""


TOKENS = torch.arange(40).view(1, -1)


def probe(folder: Path, out: Path, imports: str = "", after: str = "") -> dict:
    """Load a folder in a new process and return its logits and (dense) weights."""
    script = PROBE.format(imports=imports, after=after)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", script, str(folder), str(out)], check=True, env=environment, cwd=out.parent)
    return torch.load(out)


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {})
    return model(**inputs).logits


@pytest.fixture
def tiny(tiny_folder, tokens):
    """A tiny quantized model in memory and its folder."""

    def build(kind="llama", auto_class=AutoModelForCausalLM, **settings) -> tuple[PreTrainedModel, Path]:
        source = tiny_folder(kind)
        config = CPTQuantConfig(
            **{"dataset": tokens, "sequence_length": 32, "group_size": 32, "allocation": "kmeans", **settings}
        )
        model = auto_class.from_pretrained(source, quantization_config=config)
        folder = source.with_name("quantized")
        model.save_pretrained(folder)
        return model, folder

    return build


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_folder_holds_what_is_promised(quantized):
    model, folder = quantized
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "cptquant_plan.json", "model.safetensors.index.json"} <= names
    assert len([name for name in names if name.startswith("model-")]) > 2
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (section["quant_method"], section["format"]) == ("compressed-tensors", "pack-quantized")
    plan = BitPlan.load(folder / "cptquant_plan.json")
    assert plan == model.hf_quantizer.record.plan == QuantizationRecord.load(folder).plan
    assert SensitivityTable.load(folder).scores == (section["cptquant"]["sensitivity"])
    targets = [target for group in section["config_groups"].values() for target in group["targets"]]
    assert sorted(targets) == sorted(module.name for module in plan.packed)
    bits = {
        f"{block}.{name}": bits
        for block, named in section["cptquant"]["bit_plan"].items()
        for name, bits in named.items()
    }
    assert bits == {module.name: module.scheme.bits for module in plan.modules}


def test_size_on_disk_is_what_the_plan_says(quantized):
    model, folder = quantized
    data = 0
    for file in folder.glob("*.safetensors"):
        data += file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    plan = model.hf_quantizer.record.plan
    assert data == plan.nbytes + 16 * len(plan.packed)  # weight_shape: two int64 each


def test_reload_in_a_new_process_is_bit_identical_and_so_is_a_second_save(quantized, tmp_path):
    model, folder = quantized
    again = tmp_path / "again"
    loaded = probe(folder, tmp_path / "out.pt", "import hf_cptquant", f"model.save_pretrained({str(again)!r})")
    assert loaded["ours"]
    assert torch.equal(loaded["logits"], logits_of(model))
    saved = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    resaved = load_file(again / "model.safetensors")
    assert saved.keys() == resaved.keys()
    assert all(torch.equal(saved[name], resaved[name]) for name in saved)
    for name in ("config.json", "cptquant_plan.json"):
        assert json.loads((folder / name).read_text()) == json.loads((again / name).read_text())


def test_loading_dequantizes_nothing(quantized, tiny, monkeypatch):
    """transformers draws weights for all that it does not know to be filled, and asks for each before."""
    folders = [quantized[1], tiny(quantize_embeddings=8)[1]]
    monkeypatch.setattr(modules, "dense_weight", lambda *_: pytest.fail("a weight was dequantized"))
    for folder in folders:
        AutoModelForCausalLM.from_pretrained(folder)


def test_zero_points_reload_packed_and_the_limit_is_said(tiny, tmp_path, logged):
    model, folder = tiny("llama", symmetric=False, bits=(4,))
    assert "0.18" in logged.text
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(reloaded), logits_of(model))
    assert all(
        torch.equal(module.weight, packed_modules(reloaded)[name].weight)
        for name, module in packed_modules(model).items()
    )


def test_encoder_decoder_reloads_and_the_limit_is_said(tiny, logged):
    # T5's own initialization reads `.weight` of every projection, which compressed-tensors has taken away
    model, folder = tiny("t5", AutoModelForSeq2SeqLM)
    assert "T5ForConditionalGeneration" in logged.text
    assert "import hf_cptquant" in logged.text
    assert torch.equal(logits_of(AutoModelForSeq2SeqLM.from_pretrained(folder)), logits_of(model))


def test_no_limit_is_said_where_there_is_none(tiny, logged):
    tiny("opt")
    assert "import hf_cptquant" not in logged.text


def test_conv1d_is_written_for_us_alone_and_says_so(tiny, logged):
    model, folder = tiny("gpt2")
    assert "import hf_cptquant" in logged.text
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "cptquant"
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(reloaded), logits_of(model))


def test_foreign_compressed_tensors_checkpoints_load_as_if_we_were_not_there(tmp_path):
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = tiny_model("llama")
    arguments = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            grouped = module.weight.data.view(len(module.weight), -1, 32)
            module.weight_scale.data = grouped.abs().amax(-1) / 7
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "foreign")
    compressor.update_config(tmp_path / "foreign")
    without, with_us = (
        probe(tmp_path / "foreign", tmp_path / f"{index}.pt", imports)
        for index, imports in enumerate(("", "import hf_cptquant"))
    )
    assert with_us["ours"]
    assert torch.equal(with_us["logits"], without["logits"])
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):  # transformers' own
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path / "foreign", quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    assert not packed_modules(loaded)
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, without["weights"]["model.layers.0.mlp.up_proj"])


def test_saving_replaces_our_own_folder_and_its_stale_shards(tiny):
    model, folder = tiny()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model.save_pretrained(folder)
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(model))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["llama", "quantized"]  # no temporary folder stays


@pytest.mark.parametrize("beside", [[], ["cptquant_plan.json"]], ids=["alone", "with a plan beside"])
def test_saving_never_overwrites_another_model(tiny, beside):
    model, folder = tiny()
    source = folder.with_name("llama")
    for name in beside:  # as where others have saved our model again as a dense one
        shutil.copy(folder / name, source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(CheckpointError, match="holds another model"):
        model.save_pretrained(source)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_a_save_that_fails_leaves_nothing(tiny, monkeypatch):
    model, folder = tiny()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(QuantizationRecord, "save", fail)
    for target in (folder, folder.with_name("new")):
        with pytest.raises(OSError, match="disk full"):
            model.save_pretrained(target)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["llama", "quantized"]


PACKED = "model.layers.0.mlp.up_proj.weight_packed"
SCALE = "model.layers.0.mlp.up_proj.weight_scale"
SHAPE = "model.layers.0.mlp.up_proj.weight_shape"
BAD_WEIGHTS = {
    "missing tensor": (lambda t: t.pop(PACKED), "up_proj: weight_packed is missing"),
    "wrong dtype": (
        lambda t: t.update({PACKED: t[PACKED].float()}),
        "up_proj: weight_packed is stored as F32, not I32",
    ),
    "wrong shape": (
        lambda t: t.update({PACKED: t[PACKED][:-1]}),
        r"up_proj: weight_packed has shape \(127, 8\).*needs \(128, 8\)",
    ),
    "wrong groups": (lambda t: t.update({SCALE: t[SCALE][:, :1].contiguous()}), "up_proj: weight_scale has shape"),
    "other shape": (lambda t: t.update({SHAPE: torch.tensor([64, 128])}), r"up_proj: weight_shape is \[64, 128\]"),
    "scale not finite": (lambda t: t[SCALE].fill_(float("nan")), "up_proj: weight_scale holds NaN"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_damaged_tensors_are_refused(tiny, case):
    change, message = BAD_WEIGHTS[case]
    _, folder = tiny(bits=(4,))
    edit_weights(folder, change)
    with pytest.raises(CPTQuantError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_truncated_file_is_refused(tiny):
    _, folder = tiny()
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        AutoModelForCausalLM.from_pretrained(folder)


def first_group(section):
    return section["config_groups"]["group_00"]


def rename_target(section):
    first_group(section)["targets"][0] = "model.layers.7.mlp.up_proj"


BAD_PLANS = {
    "seven bits": (lambda s: first_group(s)["weights"].update(num_bits=7), "group_00 in config.json has 7 bits"),
    "float type": (lambda s: first_group(s)["weights"].update(type="float"), "of type 'float'"),
    "unknown module": (
        rename_target,
        r"model.layers.7.mlp.up_proj: config.json quantizes it, but LlamaForCausalLM has no",
    ),
    "embedding": (
        lambda s: first_group(s)["targets"].append("model.embed_tokens"),
        "model.embed_tokens: config.json quantizes",
    ),
    "group size": (lambda s: first_group(s)["weights"].update(group_size=48), r"group size 48 does not divide 64"),
    "negative group": (lambda s: first_group(s)["weights"].update(group_size=-7), "group size -7 is not possible"),
    "strategy": (lambda s: first_group(s)["weights"].update(strategy="tensor"), "strategy 'tensor'"),
    "twice": (lambda s: first_group(s)["targets"].append(first_group(s)["targets"][0]), "names it in two groups"),
    "contradiction": (
        lambda s: s["cptquant"]["bit_plan"]["model.layers.0"].update({"mlp.up_proj": 2}),
        "bit_plan .* says 2 bits",
    ),
    "missing part": (lambda s: s["cptquant"].pop("settings"), "incomplete: KeyError.*settings"),
    "no groups": (lambda s: s.pop("config_groups"), "incomplete: KeyError.*config_groups"),
    "version": (lambda s: s["cptquant"].update(version=99), "version 99"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_plans_that_do_not_fit_are_refused(tiny, case):
    change, message = BAD_PLANS[case]
    _, folder = tiny(bits=(4,))
    edit_config(folder, change)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_plan_for_other_shapes_is_refused(tiny):
    _, folder = tiny(bits=(4,))
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 96
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"down_proj: weight_packed has shape \(64, 16\), .* needs \(64, 12\)"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_the_plan_file_is_optional_for_loading(tiny):
    model, folder = tiny()
    (folder / "cptquant_plan.json").unlink()
    reloaded = AutoModelForCausalLM.from_pretrained(folder)
    found, expected = reloaded.hf_quantizer.record, model.hf_quantizer.record
    assert expected.table.errors  # which are in the plan's file alone
    assert expected.run  # which is there alone, too
    assert found == replace(expected, run={}, table=replace(expected.table, errors={}))
    shutil.rmtree(folder)
    reloaded.save_pretrained(folder)
    assert BitPlan.load(folder) == model.hf_quantizer.record.plan
