"""AutoRound's AutoScheme on the data of `benchmarks/accuracy.py`, in an environment of its own.

    uv venv autoround && uv pip install --python autoround/bin/python auto-round
    autoround/bin/python benchmarks/peers/auto_scheme.py FOLDER --target-bits 4.5 --bits 4,8

`FOLDER` is what `accuracy.py` prepares: the model, `calibration.jsonl`, `evaluation.pt`. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import auto_round
import torch
from auto_round import AutoRound, AutoScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP_SIZE, SAMPLES, LENGTH = 64, 32, 512


def options(bits: list[int]) -> list[QuantizationScheme]:
    """Weight-only schemes: groups below 8 bits, and one scale per output channel at 8 bits, as ours."""
    return [
        QuantizationScheme(bits=width, group_size=-1 if width == 8 else GROUP_SIZE, sym=width == 8, data_type="int")
        for width in bits
    ]


def main() -> None:
    """Search, round, and write the dequantized weights for `accuracy.py` to measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target-bits", type=float, required=True)
    parser.add_argument("--bits", required=True)
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True, help="dequantized weights")
    arguments = parser.parse_args()
    folder = str(arguments.folder / "model")
    start = time.perf_counter()
    rounder = AutoRound(
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        scheme=AutoScheme(
            avg_bits=arguments.target_bits,
            options=options([int(b) for b in arguments.bits.split(",")]),
            nsamples=SAMPLES,
            seqlen=LENGTH,
            batch_size=8,
            dataset=str(arguments.folder / "calibration.jsonl"),
        ),
        dataset=str(arguments.folder / "calibration.jsonl"),
        iters=arguments.iters,
        seqlen=LENGTH,
        nsamples=SAMPLES,
        batch_size=8,
        device_map="cpu",
    )
    model, layers = rounder.quantize()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    torch.save(model.state_dict(), arguments.output)
    widths = {name: layer.get("bits") for name, layer in layers.items() if "layers." in name}
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "bits": widths, "version": auto_round.__version__}))


if __name__ == "__main__":
    main()
