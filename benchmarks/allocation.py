"""What plans are worth: perplexity of SmolLM2-135M under plans of the same size, from methods and from controls.

Every plan gives each fused group 4, 8 or 16 bits (groups of 64, rounding to nearest) and fills the same budget. The
methods' plans are those of the integer program; the controls spend the bits without measuring: at random, on the first
and last blocks, or on `down_proj`. Calibration and evaluation text are different files.

    uv run python benchmarks/allocation.py --calibration wikitext2_valid.txt --evaluation wikitext2_test.txt
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_cptquant import CPTQuantConfig, measure_sensitivity
from hf_cptquant.allocation import allocate
from hf_cptquant.demo import write_bundled_model
from hf_cptquant.evaluate import perplexity
from hf_cptquant.model_view import view_model
from hf_cptquant.plan import BitPlan
from hf_cptquant.quantize import apply_plan
from hf_cptquant.sensitivity.rounding_errors import relative_errors

BUDGETS = (4.5, 5.0, 6.0)
GROUP_SIZE, CALIBRATION, EVALUATION, LENGTH = 64, 16, 16, 512
RANDOM_PLANS = 3
METHODS = {
    "tdmpq, taylor": {"method": "tdmpq", "estimator": "taylor"},
    "tdmpq, perturbation": {"method": "tdmpq", "estimator": "perturbation"},
    "cmpq": {"method": "cmpq"},
}
RESULTS = Path(__file__).parent / "results" / "allocation.json"


def filled(plan: BitPlan, order: Iterable[str], budget: float) -> BitPlan:
    """Raise units from 4 to 8 bits, in an order, while the budget lasts."""
    bits = {module.unit: 4 for module in plan.modules}
    for unit in order:
        raised = {**bits, unit: 8}
        if plan.with_bits(raised, GROUP_SIZE).bits_per_weight <= budget:
            bits = raised
    return plan.with_bits(bits, GROUP_SIZE)


def controls(plan: BitPlan, budget: float) -> dict[str, BitPlan]:
    """Plans that measure nothing."""
    units = list(dict.fromkeys(module.unit for module in plan.modules))
    blocks = list(plan.by_block())
    block_of = {module.unit: blocks.index(module.block) for module in plan.modules}
    plans = {}
    for seed in range(RANDOM_PLANS):
        plans[f"random {seed}"] = filled(plan, random.Random(seed).sample(units, len(units)), budget)
    by_edge = sorted(units, key=lambda unit: min(block_of[unit], len(blocks) - 1 - block_of[unit]))
    plans["first and last blocks"] = filled(plan, by_edge, budget)
    plans["down_proj"] = filled(plan, sorted(units, key=lambda unit: not unit.endswith("down_proj")), budget)
    return plans


def main() -> None:
    """Score, plan, round, evaluate; write the result file and print it as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_bundled_model(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)

    def windows(path: Path, count: int) -> torch.Tensor:
        ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"][0]
        return ids[: count * LENGTH].view(count, LENGTH)

    calibration, evaluation = windows(arguments.calibration, CALIBRATION), windows(arguments.evaluation, EVALUATION)

    def measured(plan: BitPlan, name: str) -> dict[str, float]:
        rounded: PreTrainedModel = copy.deepcopy(model)
        apply_plan(rounded, plan)
        found = perplexity(rounded, evaluation, 8, name)
        return {"perplexity": round(found, 3), "bits_per_weight": round(plan.bits_per_weight, 4)}

    plan = view_model(model).plan("group")
    found: dict[str, dict[str, dict[str, float]]] = {
        "all": {
            "bfloat16": {"perplexity": round(perplexity(model, evaluation, 8), 3), "bits_per_weight": 16.0},
            "uniform 4 bits": measured(filled(plan, (), 0.0), "uniform 4 bits"),
        }
    }
    config = {"granularity": "group", "group_size": GROUP_SIZE, "dataset": calibration, "num_samples": CALIBRATION}
    tables = {
        name: measure_sensitivity(model, CPTQuantConfig(**config, **settings, sequence_length=LENGTH, batch_size=8))
        for name, settings in METHODS.items()
    }
    errors = relative_errors(model, plan, CPTQuantConfig(**config).recipe())
    for budget in BUDGETS:
        recipe = CPTQuantConfig(**config, target_bits=budget).recipe()
        plans = {
            name: plan.with_bits(allocate(table, plan, errors, recipe), GROUP_SIZE) for name, table in tables.items()
        }
        for name, decided in {**plans, **controls(plan, budget)}.items():
            found.setdefault(f"{budget} bits", {})[name] = measured(decided, f"{name}, {budget} bits")
    result = {
        "command": f"python benchmarks/allocation.py --calibration {arguments.calibration.name}"
        f" --evaluation {arguments.evaluation.name}",
        "model": "SmolLM2-135M-Instruct",
        "calibration_tokens": calibration.numel(),
        "evaluation_tokens": evaluation.numel(),
        "group_size": GROUP_SIZE,
        "results": found,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
