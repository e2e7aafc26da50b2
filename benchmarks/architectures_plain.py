"""What `architectures.py` runs last: its folders, loaded by plain transformers with compressed-tensors.

Nothing of this package is imported here. The argument is a JSON file: name → folder, class, SHA-256 of every dense
tensor. The last line printed is JSON: name → why the folder does not load with the same weights, or null.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import compressed_tensors.compressors  # noqa: F401, so that the processes need not
import torch
import transformers
from forks import run_steps

SECONDS = 180


def digests(model: torch.nn.Module) -> dict[str, str]:
    """Name → dtype and SHA-256 of the bytes of each saved tensor."""

    def digest(tensor: torch.Tensor) -> str:
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return f"{str(tensor.dtype).removeprefix('torch.')} {hashlib.sha256(values).hexdigest()}"

    return {name: digest(tensor) for name, tensor in model.state_dict().items()}


def difference(expected: dict[str, str], found: dict[str, str]) -> str | None:
    """What is not as it was, or None."""
    differing = [name for name, digest in expected.items() if found.get(name) != digest]
    if not differing:
        return None
    before, now = (digests.get(differing[0], expected[differing[0]]).split()[0] for digests in (expected, found))
    what = "other weights than before" if now == before else f"{now} instead of {before}"
    return f"{what}: {differing[0]} and {len(differing) - 1} more of {len(expected)}"


def reload(folder: str, model_class: str, expected: dict[str, str]) -> None:
    """Load a folder, decompress as the first forward pass does, and compare."""
    method = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["quantization_config"][
        "quant_method"
    ]
    if method != "compressed-tensors":
        raise ValueError(f"quant_method={method!r}, which needs this package")
    model = getattr(transformers, model_class).from_pretrained(folder)
    model.hf_quantizer.compressor.decompress_model(model)
    if different := difference(expected, digests(model)):
        raise ValueError(different)


def main() -> None:
    """Every folder in a process of its own."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    jobs: dict[str, dict[str, Any]] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {}
    for name, job in jobs.items():
        done = run_steps([("reload", lambda job=job: reload(**job))], SECONDS)
        found[name] = done["reload"]
    assert "hf_cptquant" not in sys.modules
    print(json.dumps(found))


if __name__ == "__main__":
    main()
