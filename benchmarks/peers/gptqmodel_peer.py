"""GPTQModel on the data of `benchmarks/accuracy.py`, in an environment of its own.

    uv venv gptqmodel && uv pip install --python gptqmodel/bin/python gptqmodel
    GPTQMODEL_CPU_WORKERS=2 gptqmodel/bin/python benchmarks/peers/gptqmodel_peer.py FOLDER --output weights.pt

`FOLDER` is what `accuracy.py` prepares. The last line printed is JSON.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it fails on machines with few processors otherwise

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from running import Rounded, parser, run
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


def quantize(model_folder: str, tokens: Tensor) -> Rounded:
    """Round all linear layers of the blocks."""
    model = GPTQModel.load(model_folder, QuantizeConfig(bits=BITS, group_size=GROUP_SIZE), device="cpu")
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens], batch_size=8)
    with tempfile.TemporaryDirectory() as saved:
        model.save(saved)
        files = Path(saved).glob("*.safetensors")
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    layers = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    parts = ("qweight", "qzeros", "scales", "g_idx")
    found = {f"{name}.weight": dequantized(*(tensors[f"{name}.{part}"] for part in parts)) for name in layers}
    return found, dict.fromkeys(layers, BITS)


if __name__ == "__main__":
    arguments = parser().parse_args()
    data = torch.load(arguments.folder / "calibration.pt")
    run("gptqmodel", lambda: quantize(str(arguments.folder / "model"), data), arguments.output)
