"""What the peers of `benchmarks/accuracy.py` share: they read a folder, write dequantized weights, and print JSON.

It is imported from the folder of the script that runs, so it needs nothing of this package.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

Rounded = tuple[Mapping[str, Tensor], Mapping[str, int]]


def parser() -> argparse.ArgumentParser:
    """The arguments that `accuracy.py` gives to all of them."""
    options = argparse.ArgumentParser()
    options.add_argument("folder", type=Path, help="what accuracy.py has prepared")
    options.add_argument("--output", type=Path, required=True, help="file for the dequantized weights")
    return options


def run(library: str, quantize: Callable[[], Rounded], output: Path) -> None:
    """Time a quantizer, write its weights, and print seconds, peak memory (MiB), bits and version as the last line.

    Args:
        library: name of its package.
        quantize: gives parameter → dequantized weight, and module → bits.
        output: file for the weights.
    """
    start = time.perf_counter()
    weights, bits = quantize()
    seconds = time.perf_counter() - start
    # not `ru_maxrss`, which begins with the peak of the process that started this one
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    torch.save(dict(weights), output)
    version = importlib.metadata.version(library)
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "bits": dict(bits), "version": version}))
