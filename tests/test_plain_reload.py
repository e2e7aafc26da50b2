"""Reloading with nothing of ours: an environment of its own with transformers, torch and compressed-tensors, in the
versions of this one. All folders are loaded by one process of it, since importing takes longest.
"""

import copy
import importlib.metadata
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from conftest import COMPRESSED_TENSORS, PACKED_DENSELY, TRANSFORMERS, WIDTHS_OF_THEIRS, tiny_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from hf_cptquant import BitPlan, CPTQuantConfig
from hf_cptquant.model_view import view_model
from hf_cptquant.modules import packed_modules

SCRIPT = Path(__file__).with_name("plain_transformers.py")
PACKAGES = ("torch", "transformers", "compressed-tensors")
TOKENS = torch.arange(40).view(1, -1)
SENTENCE = "The history of the steam engine begins in the first century, when Hero described a device that turned."
DEQUANTIZES_ON_LOADING = TRANSFORMERS >= (5, 23)  # before, it loads as it does without, and dequantizes then


@dataclass(frozen=True)
class Case:
    """A tiny model, and the bits of its modules in turn. It is loaded as `auto_class`, with options that are those of
    `CompressedTensorsConfig`."""

    bits: Sequence[int] = (4, 8, 16)
    kind: str = "llama"
    auto_class: str = "AutoModelForCausalLM"
    group_size: int = 32
    symmetric: bool = True
    changes: dict = field(default_factory=dict)
    vocabulary: int | None = None
    save: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)


CASES = {
    "4, 8 and 16 bits": Case(),
    "2 bits": Case((2, 16)),
    "8 bits": Case((8,)),
    "per channel": Case(group_size=-1),
    "sharded": Case(save={"max_shard_size": "50KB"}),
    "tied embeddings": Case(changes={"tie_word_embeddings": True}),
    "resized": Case(vocabulary=520),
    "tied and resized": Case(changes={"tie_word_embeddings": True}, vocabulary=520),
    "OPT": Case(kind="opt"),
    "BERT": Case(kind="bert-mlm", auto_class="AutoModelForMaskedLM"),
    "BERT classifier": Case(kind="bert-classifier", auto_class="AutoModelForSequenceClassification"),
}
if PACKED_DENSELY:
    CASES |= {
        "2 and 3 bits": Case((2, 3)),
        "5 and 6 bits": Case((5, 6, 3)),
        "3 bits per channel": Case((3,), "opt", group_size=-1),
    }
ZERO_POINTS = {"zero points": Case(symmetric=False)}
T5 = {"T5": Case(kind="t5", auto_class="AutoModelForSeq2SeqLM")}
ONE_SCHEME = {
    "zero points, dequantized": Case((4,), symmetric=False, options={"dequantize": True}),
    "T5, dequantized": Case((4,), "t5", "AutoModelForSeq2SeqLM", options={"dequantize": True}),
}
LOADED_AGAIN = {
    "saved compressed": ("4, 8 and 16 bits", "compressed"),
    "saved dense": ("4, 8 and 16 bits", "dense"),
    "saved dense, tied": ("tied embeddings", "dense"),
}


@dataclass(frozen=True)
class Reloaded:
    """What came of all jobs: models as they were here, and what a plain process made of their folders."""

    models: dict[str, PreTrainedModel]
    folders: dict[str, Path]
    outputs: dict[str, Path]
    tokens: dict[str, list[int]]
    report: dict

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        assert name not in self.report["failures"], self.report["failures"][name]
        return load_file(self.outputs[name].with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def plain_python(tmp_path_factory) -> Path:
    """The interpreter of an environment without this package. Its files are links into uv's cache."""
    uv = os.environ.get("UV") or shutil.which("uv")
    assert uv, "uv makes the environment for these tests: pip install uv, or leave them out: --ignore " + __file__
    folder = tmp_path_factory.mktemp("plain")
    python = folder / "venv" / "bin" / "python"
    pins = folder / "versions.txt"
    install = ("pip", "install", "--link-mode", "symlink", "--no-compile-bytecode", "--python", str(python))
    for command in (
        ("pip", "freeze", "--exclude-editable", "--python", sys.executable),
        ("venv", "--python", sys.executable, str(folder / "venv")),
        (*install, "--constraints", str(pins), *PACKAGES),
    ):
        done = subprocess.run([uv, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (
            f"uv {' '.join(command)} failed; it needs a package index, or uv's cache with the packages of this"
            f" environment (`uv run pytest` fills it). To leave these tests out: --ignore {__file__}\n{done.stderr}"
        )
        if command[:2] == ("pip", "freeze"):
            pins.write_text(done.stdout)
    return python


def plan_of(model: PreTrainedModel, case: Case) -> BitPlan:
    undecided = view_model(model).plan("module")
    bits = dict(zip((module.unit for module in undecided.modules), itertools.cycle(case.bits), strict=False))
    return undecided.with_bits(bits, case.group_size, case.symmetric)


def quantized_from(folder: Path, case: Case, plan: BitPlan | Path) -> PreTrainedModel:
    config = CPTQuantConfig(quality="fast", plan=plan)
    return getattr(transformers, case.auto_class).from_pretrained(folder, quantization_config=config)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """The dense folder of each case."""
    root = tmp_path_factory.mktemp("sources")
    for name, case in {**CASES, **ZERO_POINTS, **T5, **ONE_SCHEME}.items():
        tiny_model(case.kind, **case.changes).save_pretrained(root / name)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def reloaded(plain_python, sources, quantized, tmp_path_factory) -> Reloaded:
    root = tmp_path_factory.mktemp("reloaded")
    cases = {**CASES, **ZERO_POINTS, **T5, **ONE_SCHEME}
    models, folders = {"SmolLM2": quantized[0]}, {"SmolLM2": quantized[1]}
    for name, case in cases.items():
        model = quantized_from(sources[name], case, plan_of(tiny_model(case.kind, **case.changes), case))
        if case.vocabulary is not None:
            model.resize_token_embeddings(case.vocabulary, mean_resizing=False)
        model.save_pretrained(root / "saved" / name, **case.save)
        models[name], folders[name] = model, root / "saved" / name
    for name, (case, kind) in LOADED_AGAIN.items():
        models[name], folders[name] = models[case], root / f"{case}-{kind}"
    resaved = {case for case, _ in LOADED_AGAIN.values()}
    tokens = dict.fromkeys(folders, TOKENS[0].tolist())
    tokens["SmolLM2"] = AutoTokenizer.from_pretrained(quantized[1])(SENTENCE)["input_ids"]
    jobs = {
        name: {
            "folder": str(folder),
            "out": str(root / name),
            "model_class": cases[name].auto_class if name in cases else "AutoModelForCausalLM",
            "tokens": tokens[name],
            "options": cases[name].options if name in cases else {},
            "resaved": name in resaved,
        }
        for name, folder in folders.items()
    }
    (root / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(  # -I: neither this folder nor PYTHONPATH is searched for modules
        [plain_python, "-I", SCRIPT, root / "jobs.json"], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    return Reloaded(models, folders, {name: root / name for name in jobs}, tokens, report)


def check_weights(model: PreTrainedModel, found: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """All weights are bit for bit those of the model. Returns the dense model that it is equal to."""
    dense = copy.deepcopy(model).dequantize()
    for name, weight in dense.state_dict().items():
        assert torch.equal(found[name], weight), name
    return dense


def check_same(model: PreTrainedModel, found: Mapping[str, torch.Tensor]) -> None:
    """Weights bit for bit, and logits."""
    dense = check_weights(model, found)
    decoder = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], dense(input_ids=TOKENS, **decoder).logits)


def test_the_environment_has_these_versions_and_nothing_of_ours(reloaded):
    assert reloaded.report["ours"] is False
    assert reloaded.report["versions"] == {name: importlib.metadata.version(name) for name in PACKAGES}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_the_same_bit_for_bit(name, reloaded):
    plan = reloaded.models[name].hf_quantizer.record.plan
    assert {module.scheme.bits for module in plan.modules} == set(CASES[name].bits)
    check_same(reloaded.models[name], reloaded.weights(name))


@torch.no_grad()
def test_a_real_model_is_the_same_and_our_kernels_as_near_to_exact_logits(reloaded):
    model, found = reloaded.models["SmolLM2"], reloaded.weights("SmolLM2")
    dense = check_weights(model, found)
    tokens = torch.tensor([reloaded.tokens["SmolLM2"]])
    exact = dense.float()(tokens).logits
    plain, ours = ((logits.float() - exact).norm() / exact.norm() for logits in (found["logits"], model(tokens).logits))
    assert ours < 2 * plain  # both only differ by what bfloat16 rounds
    assert plain < 0.1


@pytest.mark.parametrize("name", LOADED_AGAIN)
def test_what_plain_transformers_saves_again_is_the_same(name, reloaded):
    check_same(reloaded.models[name], reloaded.weights(name))
    ours = transformers.AutoModelForCausalLM.from_pretrained(reloaded.folders[name])
    ours(TOKENS)  # compressed-tensors decompresses before the first forward pass
    assert not packed_modules(ours)
    check_weights(reloaded.models[name], ours.state_dict())


@pytest.mark.parametrize("name", ["4, 8 and 16 bits", "tied embeddings"])
def test_the_plan_file_is_usable_beside_a_dense_save_of_others(name, reloaded, sources, tmp_path):
    folder = shutil.copytree(reloaded.outputs[name].with_name(f"{name}-dense"), tmp_path / "dense")
    shutil.copy(reloaded.folders[name] / "cptquant_plan.json", folder)
    plan = reloaded.models[name].hf_quantizer.record.plan
    assert BitPlan.load(folder) == plan
    again = quantized_from(sources[name], CASES[name], folder)
    assert again.hf_quantizer.record.plan == plan
    for key, module in packed_modules(reloaded.models[name]).items():
        assert torch.equal(again.get_submodule(key).weight, module.weight), key


def test_zero_points_are_read_where_it_is_said(reloaded):
    if COMPRESSED_TENSORS < (0, 18):
        check_same(reloaded.models["zero points"], reloaded.weights("zero points"))
    else:
        assert "ignore_mismatched_sizes" in reloaded.report["failures"]["zero points"]


def test_t5_is_not_read_as_it_is_said(reloaded):
    assert "has no attribute 'weight'" in reloaded.report["failures"]["T5"]


@pytest.mark.skipif(not DEQUANTIZES_ON_LOADING, reason="transformers before 5.23 cannot")
@pytest.mark.parametrize("name", ONE_SCHEME)
def test_one_scheme_is_read_by_dequantizing_on_loading(name, reloaded):
    check_same(reloaded.models[name], reloaded.weights(name))


# compressed-tensors itself, in this process


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_writes_and_reads_our_tensors(kind, group_size, symmetric, tmp_path):
    """Its compressor, given the dense model, our section of `config.json` and our scales, writes what we write; and
    reads it as we do."""
    case = Case(WIDTHS_OF_THEIRS, kind, group_size=group_size, symmetric=symmetric)
    theirs = tiny_model(kind)
    theirs.save_pretrained(tmp_path / "dense")
    ours = quantized_from(tmp_path / "dense", case, plan_of(theirs, case))
    section = ours.config.quantization_config.to_dict()
    named = {name: section[name] for name in ("config_groups", "ignore", "format")}
    config = QuantizationConfig.model_validate({"quant_method": "compressed-tensors", **named})
    apply_quantization_config(theirs, config)
    for name, module in packed_modules(ours).items():
        target, quantized = theirs.get_submodule(name), module.quantized()
        target.weight_scale.data = quantized.scale
        target.weight_zero_point.data = torch.zeros_like(quantized.scale, dtype=torch.int8)
        if not symmetric:
            target.weight_zero_point.data = quantized.zero_point
    compressor = ModelCompressor.from_pretrained_model(theirs)
    compressor.compress_model(theirs)
    written, expected = theirs.state_dict(), ours.state_dict()
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert written[name].dtype == tensor.dtype, name
        assert torch.equal(written[name], tensor), name
    compressor.decompress_model(theirs)
    for name, module in packed_modules(ours).items():
        assert torch.equal(theirs.get_submodule(name).weight, module.weight), name
