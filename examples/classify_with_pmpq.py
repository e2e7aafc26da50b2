"""Quantize a classifier with PMPQ, scored by the accuracy that pruning costs, and measure it before and after.

The data are `imdb` from the Hub, or a Parquet or JSON Lines file with the columns `text` and `label`. Scores are of
calibration data and accuracies of others: `imdb` has splits for both, otherwise give a second file.

    uv run python examples/classify_with_pmpq.py textattack/bert-base-uncased-imdb imdb imdb
"""

import sys

from transformers import AutoModelForSequenceClassification

from hf_cptquant import CPTQuantConfig, evaluate_model

source, calibration, held_out = sys.argv[1:]
shared = {"tokenizer": source, "label_column": "label", "sequence_length": 256}
original = AutoModelForSequenceClassification.from_pretrained(source)
config = CPTQuantConfig(
    method="pmpq", metric="accuracy", target_bits=4.5, group_size=64, quality="fast",
    dataset=calibration, num_samples=256, **shared,
)  # fmt: skip
model = AutoModelForSequenceClassification.from_pretrained(source, quantization_config=config)

test = CPTQuantConfig(dataset=held_out, num_samples=512, **shared)
for result in evaluate_model(model, test, against=original):
    before = "" if result.base is None else f"{result.base:.3f} before, "
    print(f"{result.metric}: {before}{result.value:.3f}, between {result.low:.3f} and {result.high:.3f}")
