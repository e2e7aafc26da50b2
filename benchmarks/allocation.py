"""What plans are worth at equal size, on SmolLM2-135M and WikiText-2, and how long the solver takes.

Scores of every method, on the same calibration tokens, become plans for 4.5, 5 and 6 bits per weight; beside them stand
plans that need no scores: random ones, the first and last blocks high, `down_proj` high. Each fills its budget.
Clusters choose their own size, so the integer program is given that size too. Perplexity is on other text than the
scores are measured on, weights are rounded to nearest, and the windows are the same for all plans.

    uv run python benchmarks/allocation.py --calibration wikitext2_valid.txt --evaluation wikitext2_test.txt
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from environment import environment
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_cptquant import BitPlan, CPTQuantConfig, SensitivityTable, measure_sensitivity, solve
from hf_cptquant.allocation.integer import Option, cheapest
from hf_cptquant.demo import write_bundled_model
from hf_cptquant.evaluate import losses_of_plans

GROUP_SIZE, BITS, BUDGETS = 64, (4, 8, 16), (4.5, 5.0, 6.0)
CALIBRATION = {"num_samples": 8, "sequence_length": 256, "batch_size": 8}
WINDOWS, LENGTH, BATCH = 32, 256, 8
SEEDS = 5
METHODS = {
    "tdmpq, taylor": {"method": "tdmpq", "estimator": "taylor"},
    "tdmpq, perturbation": {"method": "tdmpq", "estimator": "perturbation"},
    "pmpq": {"method": "pmpq"},
    "cmpq": {"method": "cmpq"},
}
CLUSTERS = ("kmeans", "k-harmonic-means")
OF_BLOCKS = {"granularity": "block", "allocation": "kmeans", "estimator": "perturbation"}
SOLVER_UNITS, SOLVER_WIDTHS = 10_000, (2, 3, 4, 8, 16)
RESULTS = Path(__file__).parent / "results" / "allocation.json"


def config(**settings: object) -> CPTQuantConfig:
    """The settings that all plans share, and some more."""
    return CPTQuantConfig(
        **{"quality": "fast", "bits": BITS, "group_size": GROUP_SIZE, "granularity": "group", **settings}
    )


def filled(plan: BitPlan, order: Sequence[str], target: float) -> BitPlan:
    """All units at 4 bits, then one after the other at 8, then at 16, as far as the budget allows."""
    bits = dict.fromkeys((module.unit for module in plan.modules), 4)
    for width in (8, 16):
        for unit in order:
            higher = plan.with_bits({**bits, unit: width}, GROUP_SIZE)
            if higher.bits_per_weight <= target:
                bits[unit] = width
    return plan.with_bits(bits, GROUP_SIZE)


def controls(plan: BitPlan, target: float) -> dict[str, BitPlan]:
    """Plans that need no scores."""
    units = list(dict.fromkeys(module.unit for module in plan.modules))
    blocks = list(plan.by_block())
    depth = {block: min(index, len(blocks) - 1 - index) for index, block in enumerate(blocks)}
    block_of = {module.unit: module.block for module in plan.modules}
    found = {
        f"random {seed}": filled(plan, random.Random(seed).sample(units, len(units)), target) for seed in range(SEEDS)
    }
    found["first and last blocks high"] = filled(plan, sorted(units, key=lambda unit: depth[block_of[unit]]), target)
    found["down_proj high"] = filled(plan, sorted(units, key=lambda unit: not unit.endswith("down_proj")), target)
    return found


def plans_of(tables: Mapping[str, SensitivityTable]) -> dict[str, BitPlan]:
    """Every plan that is measured, by a name that says where it comes from."""
    undecided = next(iter(tables.values())).plan
    plans = {"unrounded": undecided}
    for width in (4, 8):
        plans[f"uniform {width}"] = undecided.with_bits({m.unit: width for m in undecided.modules}, GROUP_SIZE)
    for name, table in tables.items():
        for target in BUDGETS:
            plans[f"{name} | integer | {target}"] = solve(table, config(target_bits=target))
        for clusters in CLUSTERS:
            found = solve(table, config(allocation=clusters))
            plans[f"{name} | {clusters}"] = found
            same_size = config(target_bits=found.bits_per_weight + 1e-9)
            plans[f"{name} | integer as {clusters}"] = solve(table, same_size)
    for target in BUDGETS:
        plans |= {f"{name} | {target}": plan for name, plan in controls(undecided, target).items()}
    return plans


def plans_of_blocks(table: SensitivityTable, undecided: BitPlan) -> dict[str, BitPlan]:
    """The paper's own way (clusters of blocks), and plans of its size that need no scores."""
    found = solve(table, config(**OF_BLOCKS))
    others = controls(undecided, found.bits_per_weight + 1e-9)
    return {"blocks | clusters": found, **{f"blocks | {name}": plan for name, plan in others.items()}}


def perplexities(
    model: PreTrainedModel, plans: Mapping[str, BitPlan], windows: Tensor, known: Path
) -> dict[str, float]:
    """Of every plan, taken from the file where it stands there, and written there."""
    batches = [{"input_ids": rows, "labels": rows} for rows in windows.split(BATCH)]
    found = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
    for name, plan in plans.items():
        key = " ".join(str(module.scheme.bits) for module in plan.modules)
        if key not in found:
            found[key] = math.exp(losses_of_plans(model, {name: plan}, batches)[name])
            known.write_text(json.dumps(found), encoding="utf-8")
        print(f"{name}: {plan.bits_per_weight:.3f} bits per weight, perplexity {found[key]:.3f}", flush=True)
    return {name: found[" ".join(str(m.scheme.bits) for m in plan.modules)] for name, plan in plans.items()}


def solver_seconds() -> list[float]:
    """Exact solutions of a large made-up instance, at five budgets."""
    draw = np.random.default_rng(0)
    weights = draw.integers(1, 400, SOLVER_UNITS) * 4096
    scores = draw.lognormal(0, 2, SOLVER_UNITS)
    units = {
        str(unit): [
            Option(bits, float(scores[unit] * 4.0**-bits * draw.uniform(0.8, 1.2)), int(weights[unit] * bits / 8))
            for bits in SOLVER_WIDTHS
        ]
        for unit in range(SOLVER_UNITS)
    }
    seconds = []
    for target in (2.5, 3.0, 4.0, 6.0, 10.0):
        start = time.perf_counter()
        assert cheapest(units, int(weights.sum() * target / 8)) is not None
        seconds.append(round(time.perf_counter() - start, 2))
    return seconds


def summarize(plans: Mapping[str, BitPlan], found: Mapping[str, float]) -> dict[str, object]:
    """Perplexities by budget, and those of clusters beside the integer program's at the same size."""
    budgets: dict[str, dict[str, object]] = {}
    for target in BUDGETS:
        draws = [found[f"random {seed} | {target}"] for seed in range(SEEDS)]
        budgets[str(target)] = {
            **{name: round(found[f"{name} | integer | {target}"], 3) for name in METHODS},
            "first and last blocks high": round(found[f"first and last blocks high | {target}"], 3),
            "down_proj high": round(found[f"down_proj high | {target}"], 3),
            "random, mean of 5": round(mean(draws), 3),
            "random, best of 5": round(min(draws), 3),
        }
    clusters = {
        f"{name} | {kind}": {
            "bits_per_weight": round(plans[f"{name} | {kind}"].bits_per_weight, 3),
            "perplexity": round(found[f"{name} | {kind}"], 3),
            "integer_at_the_same_size": round(found[f"{name} | integer as {kind}"], 3),
        }
        for name in METHODS
        for kind in CLUSTERS
    }
    uniform = {
        name: {"bits_per_weight": round(plans[name].bits_per_weight, 3), "perplexity": round(found[name], 3)}
        for name in ("unrounded", "uniform 4", "uniform 8")
    }
    blocks = {name.partition(" | ")[2]: round(found[name], 3) for name in plans if name.startswith("blocks")}
    blocks["bits_per_weight"] = round(plans["blocks | clusters"].bits_per_weight, 3)
    return {"uniform": uniform, "budgets": budgets, "clusters": clusters, "blocks": blocks}


def main() -> None:
    """Measure, plan, evaluate; write the result file and print it as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="text file for the scores")
    parser.add_argument("--evaluation", type=Path, required=True, help="text file for the perplexities")
    parser.add_argument("--work-dir", type=Path, help="keep finished measurements here, and do not repeat them")
    arguments = parser.parse_args()
    seconds = solver_seconds()
    with tempfile.TemporaryDirectory() as folder:
        write_bundled_model(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        work = arguments.work_dir or Path(folder) / "work"
        data = {"dataset": str(arguments.calibration), "tokenizer": tokenizer, "work_dir": work, **CALIBRATION}
        tables = {name: measure_sensitivity(model, config(**data, **settings)) for name, settings in METHODS.items()}
        ids = tokenizer(arguments.evaluation.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)
        windows = ids["input_ids"][0, : WINDOWS * LENGTH].view(WINDOWS, LENGTH)
        by_block = measure_sensitivity(model, config(**{**data, **OF_BLOCKS, "work_dir": work / "block"}))
        plans = plans_of(tables)
        plans |= plans_of_blocks(by_block, plans["unrounded"])
        found = perplexities(model, plans, windows, work / "perplexities.json")
    names = f"--calibration {arguments.calibration.name} --evaluation {arguments.evaluation.name}"
    result = {
        "command": f"python benchmarks/allocation.py {names}",
        "model": "SmolLM2-135M-Instruct, bfloat16",
        "bits": list(BITS),
        "group_size": GROUP_SIZE,
        "calibration_tokens": CALIBRATION["num_samples"] * CALIBRATION["sequence_length"],
        "evaluation_tokens": WINDOWS * LENGTH,
        "results": summarize(plans, found),
        "solver": {"units": SOLVER_UNITS, "bit_widths": len(SOLVER_WIDTHS), "seconds": seconds},
        **environment(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
