"""AutoRound, with AutoScheme if a number of bits is asked for, on the data of `benchmarks/accuracy.py`, in an
environment of its own.

    uv venv auto_round && uv pip install --python auto_round/bin/python auto-round
    auto_round/bin/python benchmarks/peers/auto_round_peer.py FOLDER --target-bits 4.5 --bits 4,8 --output weights.pt

`FOLDER` is what `accuracy.py` prepares: the model and `calibration.jsonl`. The last line printed is JSON.
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


def scheme_for(bits: int) -> QuantizationScheme:
    """Weight-only: groups below 8 bits, and one scale per output channel at 8 bits, as ours."""
    return QuantizationScheme(bits=bits, group_size=-1 if bits == 8 else GROUP_SIZE, sym=bits == 8, data_type="int")


def main() -> None:
    """Search, round, and write the dequantized weights for `accuracy.py` to measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target-bits", type=float, help="AutoScheme searches for them; default: all weights alike")
    parser.add_argument("--bits", default="4")
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True, help="dequantized weights")
    arguments = parser.parse_args()
    folder = str(arguments.folder / "model")
    data = {
        "dataset": str(arguments.folder / "calibration.jsonl"),
        "nsamples": SAMPLES,
        "seqlen": LENGTH,
        "batch_size": 8,
    }
    start = time.perf_counter()
    scheme, *others = (scheme_for(int(bits)) for bits in arguments.bits.split(","))
    if arguments.target_bits is not None:
        scheme = AutoScheme(avg_bits=arguments.target_bits, options=[scheme, *others], **data)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rounder = AutoRound(model, tokenizer, scheme=scheme, iters=arguments.iters, device_map="cpu", **data)
    model, layers = rounder.quantize()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    torch.save(model.state_dict(), arguments.output)
    widths = {name: layer.get("bits") for name, layer in layers.items() if "layers." in name}
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "bits": widths, "version": auto_round.__version__}))


if __name__ == "__main__":
    main()
