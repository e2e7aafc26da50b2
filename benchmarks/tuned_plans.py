"""Whether the default's plan is worth its scores when rounding is tuned, on SmolLM2-135M and WikiText-2.

`benchmarks/allocation.py` rounds to nearest, which is `quality="fast"`. Here the plan of `CPTQuantConfig()` (costs that
know what tuning leaves, 4.5 bits per weight) and plans of its size that need no scores are each rounded as the default
does, on the same calibration tokens, and measured on other text. A plan takes minutes; several processes may divide
them, and all add to one result file.

    uv run python benchmarks/tuned_plans.py --calibration wikitext2_valid.txt --evaluation wikitext2_test.txt
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path

import torch
from allocation import BITS, GROUP_SIZE, SEEDS, controls
from environment import environment
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_cptquant import BitPlan, CPTQuantConfig, make_plan
from hf_cptquant.demo import write_bundled_model
from hf_cptquant.pipeline import prepare, quantize_model

SAMPLES, LENGTH, TARGET = 16, 512, 4.5
WINDOWS = 128
NAMES = [
    "default",
    "default, signed costs",
    "uniform 4",
    "first and last blocks high",
    "down_proj high",
    *(f"random {seed}" for seed in range(SEEDS)),
]
RESULTS = Path(__file__).parent / "results" / "tuned_plans.json"


def plan_of(name: str, model: PreTrainedModel, settings: dict[str, object]) -> BitPlan:
    """The plan of that name; the model is left as it is."""
    if name.startswith("default"):
        quality = "fast" if name.endswith("signed costs") else "balanced"
        return make_plan(model, CPTQuantConfig(quality=quality, target_bits=TARGET, bits=BITS, **settings)).plan
    undecided = prepare(model, CPTQuantConfig(**settings).recipe()).plan
    if name == "uniform 4":
        return undecided.with_bits({module.unit: 4 for module in undecided.modules}, GROUP_SIZE)
    return controls(undecided, TARGET)[name]


@torch.no_grad()
def compared(model: PreTrainedModel, original: PreTrainedModel, windows: Tensor) -> dict[str, float]:
    """Perplexity, and mean divergence of the predictions from the original's (nats)."""
    loss, divergence = [], []
    for row in windows:
        found, wanted = (
            each(row[None], use_cache=False).logits[0].float().log_softmax(-1) for each in (model, original)
        )
        loss.append(-found[:-1].gather(1, row[1:, None]).mean().item())
        divergence.append((wanted.exp() * (wanted - found)).sum(-1).mean().item())
    return {
        "perplexity": round(math.exp(math.fsum(loss) / len(windows)), 3),
        "kl": round(math.fsum(divergence) / len(windows), 5),
    }


def main() -> None:
    """Round and measure the plans; add each to the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", type=Path, required=True, help="text file")
    parser.add_argument("--evaluation", type=Path, required=True, help="text file")
    parser.add_argument("--plans", nargs="+", default=NAMES, choices=NAMES, metavar="PLAN", help=", ".join(NAMES))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_bundled_model(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        original = AutoModelForCausalLM.from_pretrained(folder)
        windows = tokenizer(arguments.evaluation.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)
        windows = windows["input_ids"][0, : WINDOWS * LENGTH].view(WINDOWS, LENGTH)
        data = {"dataset": str(arguments.calibration), "tokenizer": tokenizer}
        settings = {**data, "num_samples": SAMPLES, "sequence_length": LENGTH, "group_size": GROUP_SIZE}
        for name in arguments.plans:
            model = AutoModelForCausalLM.from_pretrained(folder)
            plan = plan_of(name, model, settings)
            recipe = CPTQuantConfig(plan=plan, **settings).recipe()
            quantize_model(model, recipe, prepare(model, recipe))
            figures = {"bits_per_weight": round(plan.bits_per_weight, 3), **compared(model, original, windows)}
            print(name, figures, flush=True)
            write(name, figures, f"--calibration {arguments.calibration.name} --evaluation {arguments.evaluation.name}")


def write(name: str, figures: dict[str, float], arguments: str) -> None:
    """Add one plan to the result file."""
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["plans"] if RESULTS.exists() else {}
    known[name] = figures
    result = {
        "command": f"python benchmarks/tuned_plans.py {arguments}",
        "model": "SmolLM2-135M-Instruct, bfloat16",
        "bits": list(BITS),
        "group_size": GROUP_SIZE,
        "calibration_tokens": SAMPLES * LENGTH,
        "evaluation_tokens": WINDOWS * LENGTH,
        "plans": {name: known[name] for name in NAMES if name in known},
        **environment(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
