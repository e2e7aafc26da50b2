"""llm-compressor's GPTQ on the data of `benchmarks/accuracy.py`, in an environment of its own.

    uv venv llm_compressor && uv pip install --python llm_compressor/bin/python llmcompressor
    llm_compressor/bin/python benchmarks/peers/llm_compressor_peer.py FOLDER --output weights.pt

`FOLDER` is what `accuracy.py` prepares. The last line printed is JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import time
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM

BITS, GROUP_SIZE = 4, 64


def main() -> None:
    """Round all linear layers but the head, and write the dequantized weights for `accuracy.py` to measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True, help="dequantized weights")
    arguments = parser.parse_args()
    tokens = torch.load(arguments.folder / "calibration.pt")
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(arguments.folder / "model")
    weights = {"num_bits": BITS, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP_SIZE}
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}),
        recipe=GPTQModifier(ignore=["lm_head"], config_groups={"all": {"targets": ["Linear"], "weights": weights}}),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers." in n]
    torch.save({f"{name}.weight": model.get_submodule(name).weight.detach() for name in layers}, arguments.output)
    version = importlib.metadata.version("llmcompressor")
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "bits": dict.fromkeys(layers, BITS), "version": version}))


if __name__ == "__main__":
    main()
