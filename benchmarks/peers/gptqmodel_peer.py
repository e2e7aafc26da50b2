"""GPTQModel on the data of `benchmarks/accuracy.py`, in an environment of its own.

    uv venv gptqmodel && uv pip install --python gptqmodel/bin/python gptqmodel
    GPTQMODEL_CPU_WORKERS=2 gptqmodel/bin/python benchmarks/peers/gptqmodel_peer.py FOLDER --output weights.pt

`FOLDER` is what `accuracy.py` prepares. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it fails on machines with few processors otherwise

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file
from torch import Tensor

BITS, GROUP_SIZE = 4, 64
PER_WORD = 32 // BITS


def dequantized(words: Tensor, zeros: Tensor, scales: Tensor, group_of: Tensor) -> Tensor:
    """A weight `[out, in]` from the tensors of the format "gptq", whose zero points are stored less one.

    Args:
        words: int32 `[in / 8, out]`.
        zeros: int32 `[groups, out / 8]`.
        scales: `[groups, out]`.
        group_of: int `[in]`.
    """
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32)
    integers = (words.unsqueeze(1) >> shifts.view(1, -1, 1)).bitwise_and(2**BITS - 1).flatten(0, 1)
    points = (zeros.unsqueeze(-1) >> shifts).bitwise_and(2**BITS - 1).flatten(1) + 1
    group = group_of.long()
    return ((integers - points[group]) * scales[group].float()).t()


def main() -> None:
    """Round all linear layers of the blocks, and write the dequantized weights for `accuracy.py` to measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="dequantized weights")
    arguments = parser.parse_args()
    tokens = torch.load(arguments.folder / "calibration.pt")
    start = time.perf_counter()
    settings = QuantizeConfig(bits=BITS, group_size=GROUP_SIZE)
    model = GPTQModel.load(str(arguments.folder / "model"), settings, device="cpu")
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens], batch_size=8)
    with tempfile.TemporaryDirectory() as saved:
        model.save(saved)
        tensors = {
            name: tensor for file in Path(saved).glob("*.safetensors") for name, tensor in load_file(file).items()
        }
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    parts = ("qweight", "qzeros", "scales", "g_idx")
    found = {f"{name}.weight": dequantized(*(tensors[f"{name}.{part}"] for part in parts)) for name in layers}
    torch.save(found, arguments.output)
    version = importlib.metadata.version("gptqmodel")
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "bits": dict.fromkeys(layers, BITS), "version": version}))


if __name__ == "__main__":
    main()
