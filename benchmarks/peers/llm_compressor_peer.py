"""llm-compressor's GPTQ on the data of `benchmarks/accuracy.py`, in an environment of its own.

    uv venv llm_compressor && uv pip install --python llm_compressor/bin/python llmcompressor
    llm_compressor/bin/python benchmarks/peers/llm_compressor_peer.py FOLDER --output weights.pt

`FOLDER` is what `accuracy.py` prepares. The last line printed is JSON.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from running import Rounded, parser, run
from torch import Tensor
from transformers import AutoModelForCausalLM

BITS, GROUP_SIZE = 4, 64


def quantize(model_folder: str, tokens: Tensor) -> Rounded:
    """Round all linear layers but the head."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    weights = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE}
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}),
        recipe=GPTQModifier(ignore=["lm_head"], config_groups={"all": {"targets": ["Linear"], "weights": weights}}),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )
    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers." in n}
    return {f"{name}.weight": layer.weight.detach() for name, layer in layers.items()}, dict.fromkeys(layers, BITS)


if __name__ == "__main__":
    arguments = parser().parse_args()
    data = torch.load(arguments.folder / "calibration.pt")
    run("llmcompressor", lambda: quantize(str(arguments.folder / "model"), data), arguments.output)
