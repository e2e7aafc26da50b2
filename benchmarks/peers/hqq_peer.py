"""HQQ on the model of `benchmarks/accuracy.py`, in an environment of its own. It takes no calibration data.

    uv venv hqq && uv pip install --python hqq/bin/python hqq transformers
    hqq/bin/python benchmarks/peers/hqq_peer.py FOLDER --output weights.pt

`FOLDER` is what `accuracy.py` prepares. The last line printed is JSON. Zero points are 16-bit numbers, as scales are.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import time
from pathlib import Path

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from transformers import AutoModelForCausalLM

BITS, GROUP_SIZE = 4, 64


def main() -> None:
    """Round all linear layers of the blocks, and write the dequantized weights for `accuracy.py` to measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="dequantized weights")
    arguments = parser.parse_args()
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.folder / "model")
    settings = BaseQuantizeConfig(nbits=BITS, group_size=GROUP_SIZE)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers." in n}
    found = {}
    for name, layer in layers.items():
        rounded = HQQLinear(layer, settings, compute_dtype=layer.weight.dtype, device="cpu", del_orig=False)
        found[f"{name}.weight"] = rounded.dequantize()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    torch.save(found, arguments.output)
    version = importlib.metadata.version("hqq")
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "bits": dict.fromkeys(layers, BITS), "version": version}))


if __name__ == "__main__":
    main()
