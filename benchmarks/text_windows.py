"""What the benchmarks of one text share: its options, and the windows of the bundled model's tokens."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer

WINDOW = 1024


def arguments(description: str | None) -> argparse.Namespace:
    """`text` and `windows`, of the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="text file, tokenized once")
    parser.add_argument("--windows", type=int, default=24, help="windows of 1,024 tokens")
    return parser.parse_args()


def windows_of(text: Path, count: int, model: Path) -> Tensor:
    """The first tokens of a text, int64 `[count, 1024]`, by the tokenizer in a model's folder."""
    ids = AutoTokenizer.from_pretrained(model)(text.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)
    return ids["input_ids"][0, : count * WINDOW].view(-1, WINDOW)
