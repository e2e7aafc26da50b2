"""Which architectures of transformers can be quantized, saved and reloaded: all that it registers for our tasks.

Every default config is shrunk (two layers, narrow ones, a small vocabulary) as far as its class allows, a random model
is made of it in bfloat16, and its weights are rounded to nearest at 4 and 8 bits in turn. Nothing is calibrated and no
forward pass is run. Each architecture has a process of its own and a time limit. Reloading is checked bit for bit, with
this package and, in a process that does not import it, in plain transformers with compressed-tensors.

    uv run python benchmarks/architectures.py                              # all: about ten minutes on one core
    uv run python benchmarks/architectures.py --only causal-lm/llama,image-classification/vit --output found.json
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from architectures_plain import difference, digests
from environment import environment
from forks import run_steps
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hf_cptquant import BitPlan, CPTQuantConfig
from hf_cptquant.model_view import view_model
from hf_cptquant.modules import packed_modules

ROOT = Path(__file__).parent
TASKS = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq-lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "image-text-to-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "speech-seq2seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "ctc": modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
    "audio-classification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
}
STEPS = ("loads", "plans", "packs", "saves", "reloads packed", "reloads plain")
SECONDS = 300
LARGEST = 250_000_000  # parameters that are made here
VOCABULARY = 512
IDS = ("_token_id", "_token_index")
BITS = (4, 8)
MISFITS = (  # the ways of classes to say that settings do not fit
    AttributeError,
    AssertionError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)

# Setting → its value in a small model, where the default is larger. Widths are products of heads and their sizes.
FEWER = dict.fromkeys(
    ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "depth",
     "num_decoder_layers", "num_encoder_layers"), 2
) | {"num_kv_shared_layers": 0, "first_k_dense_replace": 1}  # fmt: skip
WORDS = {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY}
NARROWER = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim", "out_hidden_size",
         "projection_dim", "encoder_hidden_size", "text_hidden_size", "embed_dim"), 64),
    **dict.fromkeys(
        ("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "n_inner", "hidden_dim",
         "mlp_dim", "ffn_hidden_size"), 128),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 64),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
         "linear_num_value_heads", "index_n_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(
        ("head_dim", "d_kv", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim", "index_head_dim",
         "q_lora_rank", "kv_lora_rank", "qk_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
}  # fmt: skip
SHRINKINGS: tuple[Mapping[str, int], ...] = (
    {**FEWER, **WORDS, **NARROWER},
    {**FEWER, **WORDS, **{name: NARROWER[name] for name in ("num_experts", "num_local_experts", "n_routed_experts")}},
    {**FEWER, **WORDS},
    FEWER,
    {},
)


def small_config(config_class: type[PreTrainedConfig], limits: Mapping[str, int]) -> PreTrainedConfig:
    """The default config with the settings in `limits`, and the token ids that this needs, made smaller."""
    return config_class(**_smaller(config_class(), limits))


def _smaller(config: PreTrainedConfig, limits: Mapping[str, int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found[name] = {"model_type": value.model_type, **_smaller(value, limits)}
        elif type(value) is int and value > limits.get(name, value):
            found[name] = limits[name]
        elif (
            type(value) is int
            and name.endswith(("_token_id", "_token_index"))
            and value >= VOCABULARY
            and "vocab_size" in limits
        ):
            found[name] = VOCABULARY - 1
        elif value is None and name in ("head_dim", "vocab_size") and name in limits:
            found[name] = limits[name]
    if "num_attention_heads" in found and vars(config).get("num_key_value_heads") == config.num_attention_heads:
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def empty_model(task: str, model_type: str) -> PreTrainedModel:
    """The smallest model of an architecture that can be made, without weights.

    Raises:
        MemoryError: even that is larger than what is made here.
        MISFITS: what the class raises for its default config.
    """
    classes = TASKS[task][model_type]
    model_class = getattr(transformers, classes if isinstance(classes, str) else classes[0])
    config_class = model_class.config_class or getattr(transformers, CONFIG_MAPPING_NAMES[model_type])
    reasons, size = [], math.inf
    for limits in SHRINKINGS:
        try:
            with torch.device("meta"):
                model = model_class(small_config(config_class, limits))
        except MISFITS as error:
            reasons.append(error)
            continue
        size = sum(parameter.numel() for parameter in model.parameters())
        if size <= LARGEST:
            return model
    if reasons and math.isinf(size):
        raise reasons[-1]
    raise MemoryError(f"{size / 1e6:,.0f} million weights at the least")


class Walk:
    """One architecture through all steps; each method is a step.

    Args:
        task, model_type: which.
        folder: for its files.
    """

    def __init__(self, task: str, model_type: str, folder: Path) -> None:
        self._task, self._model_type, self._folder = task, model_type, folder
        folder.mkdir(parents=True)

    def loads(self) -> None:
        """Make the model and look at its structure."""
        torch.manual_seed(0)
        empty = empty_model(self._task, self._model_type)
        self._class, config = type(empty), empty.config
        self._view = view_model(empty)
        self._class(config).to(torch.bfloat16).save_pretrained(self._folder / "dense")

    def plans(self) -> None:
        """Make a plan, and read it from its file."""
        undecided = self._view.plan("group")
        bits = dict(zip(dict.fromkeys(module.unit for module in undecided.modules), cycle(BITS), strict=False))
        undecided.with_bits(bits, group_size=32).save(self._folder / "plan.json")
        self._plan = BitPlan.load(self._folder / "plan.json")
        assert self._plan.applied_to(undecided) == self._plan, "the plan is not the same after saving"

    def packs(self) -> None:
        """Quantize on loading."""
        config = CPTQuantConfig(plan=self._plan, quality="fast")
        self._model = self._class.from_pretrained(self._folder / "dense", quantization_config=config)
        shutil.rmtree(self._folder / "dense")
        assert len(packed_modules(self._model)) == len(self._plan.packed), "not all of the plan is packed"

    def saves(self) -> None:
        """Write it, and what plain transformers needs to know to compare."""
        self._model.save_pretrained(self._folder / "quantized")
        self._packed = digests(self._model)
        job = {
            "folder": str(self._folder / "quantized"),
            "model_class": self._class.__name__,
            "expected": digests(self._model.dequantize()),
        }
        (self._folder / "job.json").write_text(json.dumps(job), encoding="utf-8")

    def reloads_packed(self) -> None:
        """Load it with this package."""
        again = self._class.from_pretrained(self._folder / "quantized")
        assert len(packed_modules(again)) == len(self._plan.packed), "not all of the plan is packed"
        different = difference(self._packed, digests(again))
        assert different is None, different

    def steps(self) -> Iterator[tuple[str, Any]]:
        """All but plain reloading, which others do."""
        for name in STEPS[:-1]:
            yield name, getattr(self, name.replace(" ", "_"))


def walk(names: list[str], root: Path) -> dict[str, dict[str, str | None]]:
    """Architecture (`"task/model_type"`) → step → why it failed, or None. Steps that were not come to are left out."""
    found = {}
    for number, name in enumerate(names, start=1):
        task, model_type = name.split("/")
        found[name] = run_steps(list(Walk(task, model_type, root / name).steps()), SECONDS)
        failed = next((f"{step}: {reason}" for step, reason in found[name].items() if reason), "done")
        print(f"{number}/{len(names)} {name}: {failed}", file=sys.stderr, flush=True)
    jobs = {name: root / name / "job.json" for name in names if found[name].get("saves", "") is None}
    (root / "jobs.json").write_text(
        json.dumps({name: json.loads(path.read_text(encoding="utf-8")) for name, path in jobs.items()})
    )
    script = ROOT / "architectures_plain.py"
    done = subprocess.run([sys.executable, script, root / "jobs.json"], stdout=subprocess.PIPE, text=True, check=True)
    for name, reason in json.loads(done.stdout.splitlines()[-1]).items():
        found[name]["reloads plain"] = reason
    return found


def all_names() -> list[str]:
    """Every architecture of every task. Classes that are listed for two tasks have the first."""
    names, seen = [], set()
    for task, table in TASKS.items():
        for model_type, classes in table.items():
            if (model_type, classes) not in seen:
                names.append(f"{task}/{model_type}")
                seen.add((model_type, classes))
    return names


def main() -> None:
    """Walk through all architectures, or some, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="tasks, or task/model_type, with commas; what the file has of others stays")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "architectures.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    wanted = options.only.split(",") if options.only else list(TASKS)
    names = [name for name in all_names() if name in wanted or name.partition("/")[0] in wanted]
    found = {}
    if options.only and options.output.exists():
        found = json.loads(options.output.read_text(encoding="utf-8"))["architectures"]
    with tempfile.TemporaryDirectory() as root:
        for _, step in Walk("causal-lm", "llama", Path(root) / "warm").steps():
            step()  # here, so that the processes have imported what all of them need
        found |= walk(names, Path(root))
    found = {name: found[name] for name in all_names() if name in found}
    about = environment()
    about["versions"] |= {"compressed-tensors": importlib.metadata.version("compressed-tensors")}
    options.output.write_text(json.dumps({**about, "architectures": found}, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({step: sum(of.get(step, "") is None for of in found.values()) for step in STEPS}))


if __name__ == "__main__":
    main()
