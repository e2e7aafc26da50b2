"""What sensitivity methods cost and what their scores are worth, on SmolLM2-135M and the same tokens.

Speed: the engine against the literal algorithms 2 and 3 of the paper (a full forward pass for every variant), at
the granularity of blocks. Worth: the rank correlation (Spearman) of scores with the oracle, the measured rise of the
loss when each fused group alone is rounded to 4 and to 3 bits, at the granularity of groups; beside our methods the
strongest published scorers. The oracle is measured in float32: in bfloat16, the dtype of the model and of all scorers,
rounding hides the smallest rises, as its own row shows. Every part runs in a process of its own, which gives each its
own peak memory.

    uv run python benchmarks/sensitivity.py --text wikitext2_valid.txt
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from environment import environment
from scipy.stats import spearmanr
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from hf_cptquant import CPTQuantConfig, measure_sensitivity
from hf_cptquant.demo import write_bundled_model
from hf_cptquant.grid import dequantize
from hf_cptquant.memory import peak_bytes
from hf_cptquant.model_view import view_model
from hf_cptquant.plan import BitPlan, ModulePlan, scheme_for
from hf_cptquant.rounding.nearest import round_nearest
from hf_cptquant.sensitivity.engine import SuffixRunner, changed_weights
from hf_cptquant.sensitivity.metrics import METRICS, forward
from hf_cptquant.sensitivity.rounding_errors import rounding_errors
from hf_cptquant.sensitivity.taylor import gradient_of_weight, tapped
from hf_cptquant.sensitivity.tdmpq import perturbed

SEQUENCES, LENGTH, BATCH = 8, 256, 8
GROUP_SIZE, WIDTHS = 64, (3, 4)
LEVELS, NOISE = (0.3, 0.5, 0.7), 0.1
RESULTS = Path(__file__).parent / "results" / "sensitivity.json"


def load(folder: str, dtype: str) -> tuple[PreTrainedModel, Tensor]:
    """The model, and the tokens `[sequences, length]`."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), torch.load(Path(folder) / "tokens.pt")


def ours(model: PreTrainedModel, tokens: Tensor, granularity: str, **settings: object) -> dict[str, object]:
    """Scores of one of the package's methods."""
    config = CPTQuantConfig(
        bits=(*WIDTHS, 16), group_size=GROUP_SIZE, granularity=granularity, dataset=tokens, num_samples=SEQUENCES,
        sequence_length=LENGTH, batch_size=BATCH, quality="fast", **settings,
    )  # fmt: skip
    table = measure_sensitivity(model, config)
    return {"raw": dict(table.raw), "costs": {unit: dict(costs) for unit, costs in table.costs.items()}}


@torch.no_grad()
def literal(model: PreTrainedModel, tokens: Tensor, method: str) -> dict[str, object]:
    """Algorithms 2 and 3 as written: every variant is a full forward pass of the model with its own loss."""

    def loss() -> float:
        return model(input_ids=tokens, labels=tokens).loss.item()

    def pruned_losses(weights: list[Tensor]) -> float:
        originals = [weight.clone() for weight in weights]
        flattened = torch.cat([weight.abs().flatten() for weight in weights])
        losses = []
        for level in LEVELS:
            threshold = torch.quantile(flattened.float(), level)
            for weight in weights:
                weight.mul_(weight.abs() > threshold)
            losses.append(loss())
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)
        return sum(losses) / len(losses)

    base, raw = loss(), {}
    for block, members in view_model(model).plan("block").by_block().items():
        modules = {f"{block}.{name}": model.get_submodule(f"{block}.{name}") for name in members}
        if method == "pmpq":
            raw[block] = pruned_losses([module.weight for module in modules.values()]) - base
        else:
            with perturbed(modules, NOISE, 0):
                raw[block] = loss() - base
    return {"raw": raw}


def oracle(model: PreTrainedModel, tokens: Tensor) -> dict[str, object]:
    """The measured rise of the loss when each group alone is rounded; in float32 the weights are still bfloat16's."""
    plan = view_model(model).plan("group")
    batch = {"input_ids": tokens, "labels": tokens}
    runner = SuffixRunner(model, [batch], list(plan.by_block()), METRICS["loss"])
    (base,) = runner.measure()
    costs: dict[str, dict[int, float]] = {}
    for unit, members in by_unit(plan).items():
        modules = {member.name: model.get_submodule(member.name) for member in members}
        changes = [partial(changed_weights, modules, partial(rounded, width)) for width in WIDTHS]
        losses = runner.measure(members[0].block, changes)
        costs[unit] = {width: loss - base for width, loss in zip(WIDTHS, losses, strict=True)}
    return {"costs": costs}


def by_unit(plan: BitPlan) -> dict[str, list[ModulePlan]]:
    """Unit → its modules."""
    units: dict[str, list[ModulePlan]] = {}
    for module in plan.modules:
        units.setdefault(module.unit, []).append(module)
    return units


def rounded(width: int, _name: str, weight: Tensor) -> Tensor:
    """A weight rounded to nearest, with scales in bfloat16."""
    quantized = round_nearest(weight.bfloat16(), scheme_for(width, weight.shape[1], GROUP_SIZE))
    return dequantize(quantized.integers, quantized.scale, quantized.zero_point).to(weight.dtype)


def published(model: PreTrainedModel, tokens: Tensor, scorer: str) -> dict[str, object]:
    """Scorers of other tools, at most one backward pass each, for the same rounding errors ΔW.

    `"outputs"`: Σ(δ·Δy)² over tokens and outputs, ModelOpt's auto_quantize. `"absolute"`: Σ|g·ΔW|, AutoRound's
    AutoScheme. `"empirical"`: Σ g²·ΔW² with the labels of the data. `"error"`: ‖ΔW‖². `"relative"`: ‖ΔW‖² / ‖W‖².
    """
    plan = view_model(model).plan("group")
    costs = {module.unit: dict.fromkeys(WIDTHS, 0.0) for module in plan.modules}

    def add(module: ModulePlan, of_error: Callable[[Tensor], Tensor]) -> None:
        schemes = [scheme_for(width, module.in_features, GROUP_SIZE) for width in WIDTHS]
        for width, error in zip(WIDTHS, rounding_errors(model.get_submodule(module.name), schemes), strict=True):
            costs[module.unit][width] += float(of_error(error))

    def observe(module: ModulePlan, inputs: Tensor, delta: Tensor) -> None:
        of_outputs = {"outputs": lambda error: ((inputs.float() @ error.t()) * delta.float()).square().sum()}
        gradients = (
            [] if scorer == "outputs" else [gradient_of_weight(*rows) for rows in zip(inputs, delta, strict=True)]
        )
        of_weights = {
            "absolute": lambda error: sum((gradient * error).abs().sum() for gradient in gradients),
            "empirical": lambda error: sum((gradient * error).square().sum() for gradient in gradients),
        }
        add(module, {**of_outputs, **of_weights}[scorer])

    if scorer in ("error", "relative"):
        for module in plan.modules:
            size = model.get_submodule(module.name).weight.float().square().sum() if scorer == "relative" else 1.0
            add(module, lambda error, size=size: error.square().sum() / size)
        return {"costs": costs}
    with tapped(model, plan, observe):
        forward(model, {"input_ids": tokens, "labels": tokens}).loss.backward()
    return {"costs": costs}


ORACLE = "oracle, float32"
PARTS: dict[str, Callable[[PreTrainedModel, Tensor], dict[str, object]]] = {
    "literal pmpq": partial(literal, method="pmpq"),
    "engine pmpq": partial(ours, granularity="block", method="pmpq"),
    "literal tdmpq": partial(literal, method="tdmpq"),
    "engine tdmpq": partial(ours, granularity="block", method="tdmpq", estimator="perturbation"),
    ORACLE: oracle,
    "oracle, bfloat16": oracle,
    "tdmpq, taylor": partial(ours, granularity="group", method="tdmpq", estimator="taylor"),
    "tdmpq, perturbation": partial(ours, granularity="group", method="tdmpq", estimator="perturbation"),
    "pmpq": partial(ours, granularity="group", method="pmpq"),
    "cmpq": partial(ours, granularity="group", method="cmpq"),
    **{name: partial(published, scorer=name) for name in ("outputs", "absolute", "empirical", "error", "relative")},
}


def run_part(name: str, folder: str) -> None:
    """Run one part in this process and print what it found, its seconds and its memory."""
    logging.disable_progress_bar()
    model, tokens = load(folder, "float32" if name == ORACLE else "bfloat16")
    model(input_ids=tokens[:1, :16])  # the first call sets kernels up
    before = peak_bytes()["cpu"]
    start = time.perf_counter()
    found = PARTS[name](model, tokens)
    seconds = time.perf_counter() - start
    peak = peak_bytes()["cpu"]
    print(json.dumps({**found, "seconds": seconds, "peak_mb": peak / 2**20, "loaded_mb": before / 2**20}))


def summarize(parts: dict[str, dict[str, object]]) -> dict[str, object]:
    """Ratios of times and scores, costs per 10,000 tokens, and rank correlations with the oracle."""
    tokens = SEQUENCES * LENGTH
    speed = {}
    for method in ("pmpq", "tdmpq"):
        slow, fast = parts[f"literal {method}"], parts[f"engine {method}"]
        differences = [abs(slow["raw"][block] - fast["raw"][block]) for block in slow["raw"]]
        speed[method] = {
            "literal_seconds": round(slow["seconds"], 1),
            "engine_seconds": round(fast["seconds"], 1),
            "ratio": round(slow["seconds"] / fast["seconds"], 2),
            "largest_difference_of_scores": max(differences),
            "largest_score": max(map(abs, slow["raw"].values())),
        }
    truth = {
        str(width): {unit: costs[str(width)] for unit, costs in parts[ORACLE]["costs"].items()} for width in WIDTHS
    }
    units = list(truth["4"])
    noise, relative = parts["tdmpq, perturbation"], parts["relative"]["costs"]
    draw = random.Random(0)
    derived = {
        "HIGGS": {unit: {str(w): noise["raw"][unit] * relative[unit][str(w)] for w in WIDTHS} for unit in units},
        "random": {unit: dict.fromkeys(map(str, WIDTHS), draw.random()) for unit in units},
    }
    methods = {}
    for name in (*(name for name in PARTS if not name.startswith(("literal", "engine")) and name != ORACLE), *derived):
        part = parts.get(name, {})
        costs = part.get("costs") or derived.get(name) or {
            unit: dict.fromkeys(map(str, WIDTHS), value) for unit, value in part["raw"].items()
        }  # fmt: skip
        methods[name] = {
            f"spearman_{width}_bits": round(
                spearmanr([costs[u][width] for u in units], [truth[width][u] for u in units])[0], 3
            )
            for width in truth
        }
        if part:
            methods[name] |= {
                "seconds": round(part["seconds"], 1),
                "seconds_per_10k_tokens": round(part["seconds"] * 10_000 / tokens, 1),
                "share_of_oracle_seconds": round(part["seconds"] / parts[ORACLE]["seconds"], 4),
                "peak_mb": round(part["peak_mb"]),
                "loaded_mb": round(part["loaded_mb"]),
            }
    return {"speed": speed, "oracle_seconds": round(parts[ORACLE]["seconds"], 1), "methods": methods}


def main() -> None:
    """Run every part, write the result file, print it as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="text file, tokenized once")
    parser.add_argument("--work-dir", type=Path, help="keep finished parts here, and do not run them again")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        run_part(arguments.part, arguments.folder)
        return
    parts = {}
    with tempfile.TemporaryDirectory() as folder:
        write_bundled_model(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(arguments.text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"]
        torch.save(ids[0, : SEQUENCES * LENGTH].view(SEQUENCES, LENGTH).clone(), Path(folder) / "tokens.pt")
        work = arguments.work_dir or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        for name in PARTS:
            finished = work / f"part {name}.json"
            if not finished.exists():
                command = [sys.executable, __file__, "--part", name, "--folder", folder]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                finished.write_text(output.splitlines()[-1], encoding="utf-8")
            parts[name] = json.loads(finished.read_text(encoding="utf-8"))
            print(
                f"{name}: {parts[name]['seconds']:.1f} s, {parts[name]['peak_mb']:.0f} MB", file=sys.stderr, flush=True
            )
    result = {
        "command": f"python benchmarks/sensitivity.py --text {arguments.text.name}",
        "model": "SmolLM2-135M-Instruct in bfloat16, the oracle in float32",
        "tokens": SEQUENCES * LENGTH,
        "units": {"speed": "30 blocks", "rank correlation": "120 fused groups"},
        "group_size": GROUP_SIZE,
        "results": summarize(parts),
        **environment(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
