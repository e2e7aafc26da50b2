"""What a benchmark's figures were taken with; it stands in every result file."""

from __future__ import annotations

import platform

import torch
import transformers


def environment() -> dict[str, object]:
    """Versions of the libraries, and the machine."""
    return {
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
