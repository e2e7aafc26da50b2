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
from conftest import AUTO_CLASSES, COMPRESSED_TENSORS, PACKED_DENSELY, TRANSFORMERS, WIDTHS_OF_THEIRS, tiny_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from hf_cptquant import BitPlan, CPTQuantConfig
from hf_cptquant.model_view import view_model
from hf_cptquant.modules import packed_modules

SCRIPT = Path(__file__).with_name("plain_transformers.py")
PACKAGES = ("torch", "transformers", "compressed-tensors")
TOKENS = torch.arange(40).view(1, -1)
SENTENCE = "The history of the steam engine begins in the first century, when Hero described a device that turned."


@dataclass(frozen=True)
class Case:
    """A tiny model, and the bits of its modules in turn; `options` are those of `CompressedTensorsConfig`."""

    bits: Sequence[int] = (4, 8, 16)
    kind: str = "llama"
    group_size: int = 32
    symmetric: bool = True
    dtype: torch.dtype = torch.float32
    changes: dict = field(default_factory=dict)
    vocabulary: int | None = None
    save: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    outside: tuple[str, ...] = ()

    @property
    def dense(self) -> PreTrainedModel:
        return tiny_model(self.kind, **self.changes).to(self.dtype)

    def plan(self) -> BitPlan:
        undecided = view_model(self.dense, outside=self.outside).plan("module")
        bits = dict(zip((module.unit for module in undecided.modules), itertools.cycle(self.bits), strict=False))
        return undecided.with_bits(bits, self.group_size, self.symmetric)

    def quantized(self, folder: Path, plan: BitPlan | Path) -> PreTrainedModel:
        """The dense model in a folder by a plan, or by that in a folder."""
        config = CPTQuantConfig(quality="fast", plan=plan)
        model = AUTO_CLASSES[self.kind].from_pretrained(folder, dtype=self.dtype, quantization_config=config)
        if self.vocabulary is not None:
            model.resize_token_embeddings(self.vocabulary, mean_resizing=False)
        return model


CASES = {
    "4, 8 and 16 bits": Case(),
    "2 bits": Case((2, 16)),
    "8 bits": Case((8,)),
    "float16": Case((2, 4, 8), dtype=torch.float16),
    "per channel": Case(group_size=-1),
    "sharded": Case(save={"max_shard_size": "50KB"}),
    "tied embeddings": Case(changes={"tie_word_embeddings": True}),
    "head": Case(outside=("lm_head",), changes={"vocab_size": 500}),
    "head of 8 bits": Case((8,), outside=("lm_head",), dtype=torch.bfloat16),
    "resized": Case(vocabulary=520),
    "tied and resized": Case(changes={"tie_word_embeddings": True}, vocabulary=520),
    "OPT": Case(kind="opt"),
    "BERT": Case(kind="bert-mlm"),
    "BERT classifier": Case(kind="bert-classifier"),
}
if PACKED_DENSELY:
    CASES |= {
        "2 and 3 bits": Case((2, 3)),
        "5 and 6 bits": Case((5, 6, 3)),
        "3 bits per channel": Case((3,), "opt", group_size=-1),
    }
ONE_SCHEME = {
    "zero points, dequantized": Case((4,), symmetric=False, options={"dequantize": True}),
    "T5, dequantized": Case((4,), "t5", options={"dequantize": True}),
}
ALL_CASES = {**CASES, **ONE_SCHEME, "zero points": Case(symmetric=False), "T5": Case(kind="t5")}
LOADED_AGAIN = {
    "saved compressed": ("4, 8 and 16 bits", "compressed"),
    "saved dense": ("4, 8 and 16 bits", "dense"),
    "saved dense, tied": ("tied embeddings", "dense"),
}


@dataclass(frozen=True)
class Job:
    """A folder to load, and the model that was saved there."""

    model: PreTrainedModel
    folder: Path
    out: Path
    tokens: Sequence[int] = tuple(range(40))
    options: dict = field(default_factory=dict)
    resaved: bool = False

    def to_dict(self) -> dict:
        return {
            "folder": str(self.folder),
            "out": str(self.out),
            "model_class": type(self.model).__name__,
            "tokens": self.tokens,
            "options": self.options,
            "resaved": self.resaved,
        }


@dataclass(frozen=True)
class Reloaded:
    """What a plain process made of all jobs."""

    jobs: Mapping[str, Job]
    report: dict

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        assert name not in self.report["failures"], self.report["failures"][name]
        return load_file(self.jobs[name].out.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def plain_python(tmp_path_factory) -> Path:
    """The interpreter of an environment without this package. Its files are links into uv's cache."""
    uv = os.environ.get("UV") or shutil.which("uv")
    assert uv, f"uv makes the environment for these tests: pip install uv, or leave them out: --ignore {__file__}"
    folder = tmp_path_factory.mktemp("plain")
    python, pins, forced = folder / "venv" / "bin" / "python", folder / "versions.txt", folder / "forced.txt"

    environment = {name: value for name, value in os.environ.items() if name != "UV_COMPILE_BYTECODE"}  # of the links

    def run(*command: object) -> str:
        done = subprocess.run([uv, *map(str, command)], capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, (
            f"`{' '.join(map(str, done.args))}` failed. It needs a package index, or uv's cache with the packages of"
            f" this environment, which `uv run pytest` fills. To do without: --ignore {__file__}\n{done.stderr}"
        )
        return done.stdout

    frozen = run("pip", "freeze", "--exclude-editable", "--python", sys.executable)
    pins.write_text(frozen)
    forced.write_text("".join(line for line in frozen.splitlines(True) if line.startswith("torch==")))
    run("venv", "--python", sys.executable, folder / "venv")
    links = ("--link-mode", "symlink")
    versions = ("--constraints", pins, "--overrides", forced)  # compressed-tensors asks for a newer torch than it needs
    # accelerate, since compressed-tensors before 0.20 imports psutil without requiring it
    run("pip", "install", *links, *versions, "--python", python, *PACKAGES, "accelerate")
    return python


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """The dense folder of each case."""
    root = tmp_path_factory.mktemp("sources")
    for name, case in ALL_CASES.items():
        case.dense.save_pretrained(root / name)
    return {name: root / name for name in ALL_CASES}


@pytest.fixture(scope="module")
def reloaded(plain_python, sources, quantized, tmp_path_factory) -> Reloaded:
    root = tmp_path_factory.mktemp("reloaded")
    model, folder = quantized
    sentence = tuple(AutoTokenizer.from_pretrained(folder)(SENTENCE)["input_ids"])
    jobs = {"SmolLM2": Job(model, folder, root / "SmolLM2", sentence)}
    resaved = {case for case, _ in LOADED_AGAIN.values()}
    for name, case in ALL_CASES.items():
        model, folder = case.quantized(sources[name], case.plan()), root / "saved" / name
        model.save_pretrained(folder, **case.save)
        jobs[name] = Job(model, folder, root / name, options=case.options, resaved=name in resaved)
    for name, (case, kind) in LOADED_AGAIN.items():
        jobs[name] = Job(jobs[case].model, root / f"{case}-{kind}", root / name)
    (root / "jobs.json").write_text(json.dumps({name: job.to_dict() for name, job in jobs.items()}))
    done = subprocess.run(  # -I: neither this folder nor PYTHONPATH is searched for modules
        [plain_python, "-I", SCRIPT, root / "jobs.json"], capture_output=True, text=True, check=False, cwd=root
    )
    assert done.returncode == 0, done.stderr
    return Reloaded(jobs, json.loads(done.stdout.splitlines()[-1]))


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
    job = reloaded.jobs[name]
    plan = job.model.hf_quantizer.record.plan
    assert {module.scheme.bits for module in plan.modules} == set(CASES[name].bits)
    assert {module.name for module in plan.packed if module.outside} == set(CASES[name].outside)
    assert (job.folder / "model.safetensors.index.json").exists() == (name == "sharded")
    check_same(job.model, reloaded.weights(name))


@torch.no_grad()
def test_a_real_model_is_the_same_and_our_kernels_as_near_to_exact_logits(reloaded):
    model, found = reloaded.jobs["SmolLM2"].model, reloaded.weights("SmolLM2")
    dense, tokens = check_weights(model, found), torch.tensor([reloaded.jobs["SmolLM2"].tokens])
    exact = dense.float()(tokens).logits
    plain, ours = ((logits.float() - exact).norm() / exact.norm() for logits in (found["logits"], model(tokens).logits))
    assert ours < 2 * plain  # both only differ by what bfloat16 rounds
    assert plain < 0.1


@pytest.mark.parametrize("name", LOADED_AGAIN)
def test_what_plain_transformers_saves_again_is_the_same(name, reloaded):
    job = reloaded.jobs[name]
    check_same(job.model, reloaded.weights(name))
    ours = transformers.AutoModelForCausalLM.from_pretrained(job.folder)
    ours(TOKENS)  # compressed-tensors decompresses before the first forward pass
    assert not packed_modules(ours)
    check_weights(job.model, ours.state_dict())


@pytest.mark.parametrize("name", ["4, 8 and 16 bits", "tied embeddings"])
def test_the_plan_file_is_usable_beside_a_dense_save_of_others(name, reloaded, sources, tmp_path):
    job = reloaded.jobs[name]
    folder = shutil.copytree(job.out.with_name(f"{name}-dense"), tmp_path / "dense")
    shutil.copy(job.folder / "cptquant_plan.json", folder)
    plan = job.model.hf_quantizer.record.plan
    assert BitPlan.load(folder) == plan
    again = CASES[name].quantized(sources[name], folder)
    assert again.hf_quantizer.record.plan == plan
    for key, module in packed_modules(job.model).items():
        assert torch.equal(again.get_submodule(key).weight, module.weight), key


def test_zero_points_are_read_where_it_is_said(reloaded):
    if TRANSFORMERS < (5, 23) or COMPRESSED_TENSORS < (0, 18):
        check_same(reloaded.jobs["zero points"].model, reloaded.weights("zero points"))
    else:
        assert "ignore_mismatched_sizes" in reloaded.report["failures"]["zero points"]


def test_t5_is_not_read_as_it_is_said(reloaded):
    assert "has no attribute 'weight'" in reloaded.report["failures"]["T5"]


@pytest.mark.skipif(TRANSFORMERS < (5, 23), reason="transformers dequantizes on loading since 5.23")
@pytest.mark.parametrize("name", ONE_SCHEME)
def test_one_scheme_is_read_by_dequantizing_on_loading(name, reloaded):
    check_same(reloaded.jobs[name].model, reloaded.weights(name))


# compressed-tensors itself, in this process


@pytest.mark.parametrize(("kind", "outside"), [("llama", ()), ("llama", ("lm_head",)), ("opt", ())])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_writes_and_reads_our_tensors(kind, outside, group_size, symmetric, tmp_path):
    """Its compressor, given the dense model, our section of `config.json` and our scales, writes what we write; and
    reads it as we do."""
    case = Case(WIDTHS_OF_THEIRS, kind, group_size, symmetric, outside=outside)
    theirs = case.dense
    theirs.save_pretrained(tmp_path / "dense")
    ours = case.quantized(tmp_path / "dense", case.plan())
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
