"""HQQ on the model of `benchmarks/accuracy.py`, in an environment of its own. It takes no calibration data.

    uv venv hqq && uv pip install --python hqq/bin/python hqq transformers
    hqq/bin/python benchmarks/peers/hqq_peer.py FOLDER --output weights.pt

`FOLDER` is what `accuracy.py` prepares. The last line printed is JSON. Zero points are 16-bit numbers, as scales are.
"""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from running import Rounded, parser, run
from transformers import AutoModelForCausalLM

BITS, GROUP_SIZE = 4, 64


def quantize(model_folder: str) -> Rounded:
    """Round all linear layers of the blocks."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    settings = BaseQuantizeConfig(nbits=BITS, group_size=GROUP_SIZE)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers." in n}
    found = {}
    for name, layer in layers.items():
        rounded = HQQLinear(layer, settings, compute_dtype=layer.weight.dtype, device="cpu", del_orig=False)
        found[f"{name}.weight"] = rounded.dequantize()
    return found, dict.fromkeys(layers, BITS)


if __name__ == "__main__":
    arguments = parser().parse_args()
    run("hqq", lambda: quantize(str(arguments.folder / "model")), arguments.output)
