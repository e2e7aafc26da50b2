"""What bits cost a real encoder: accuracy of all-MiniLM-L6-v2, fine-tuned on reviews, by method and budget.

The plan of each row is the integer program's (2, 3, 4, 8 and 16 bits, fused groups), from the scores of one method for
the same reviews, and weights are rounded to nearest, so that rows differ by their scores alone. Checkpoints are
written, read again and measured in float32, as in `benchmarks/paper_tables.py`.

    uv run python benchmarks/encoder.py --reviews imdb_train.parquet --held-out imdb_test.parquet --work-dir work
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from environment import environment
from paper_tables import CALIBRATION_REVIEWS, CLASSIFICATION, folder_of, load, measured, value
from reviews import HELD_OUT, LENGTH, MINILM, TRAINING, labelled
from tables import encoder_table

from hf_cptquant import CPTQuantConfig, measure_sensitivity, solve
from hf_cptquant.model_view import view_model

ROWS = {
    "PMPQ, by accuracy": {"method": "pmpq", "metric": "accuracy"},
    "CMPQ": {"method": "cmpq"},
    "TDMPQ": {"method": "tdmpq"},
    "TDMPQ, with the costs of tuned rounding": {"method": "tdmpq", "quality": "balanced"},
    "TDMPQ, by perturbation": {"method": "tdmpq", "estimator": "perturbation"},
}
BUDGETS = (8.0, 4.5, 4.0)
SHARED = {"bits": (2, 3, 4, 8, 16), "group_size": 64, "quality": "fast"}
RESULTS = Path(__file__).parent / "results" / "encoder.json"


def main() -> None:
    """Score, plan, round and measure; add the rows to the result file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", default="imdb", help="Parquet file to learn from; default: from the Hub")
    parser.add_argument("--held-out", default="imdb", help="Parquet file to measure on; default: from the Hub")
    parser.add_argument("--work-dir", type=Path, required=True, help="where the classifier is made")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW", help=", ".join(ROWS))
    arguments = parser.parse_args()
    source = folder_of(MINILM, CLASSIFICATION, arguments.reviews, arguments.work_dir)
    assert source is not None
    evaluation = labelled(arguments.held_out, HELD_OUT)
    original = load(source, dtype=torch.float32)
    stored = view_model(load(source, dtype=torch.float16)).plan("group")  # 16 bits are what they take on disk
    unrounded = {"float32": value(original, evaluation, source), "float16": measured(None, source, evaluation)["value"]}
    print(unrounded, flush=True)
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if RESULTS.exists() else {}
    for name in arguments.rows:
        settings = {**SHARED, **ROWS[name], **labelled(arguments.reviews, CALIBRATION_REVIEWS)}
        table = replace(measure_sensitivity(original, CPTQuantConfig(**settings)), plan=stored)
        rows[name] = {}
        for target in BUDGETS:
            plan = solve(table, CPTQuantConfig(target_bits=target, **settings))
            rows[name][str(target)] = measured(plan, source, evaluation)
            print(name, target, rows[name][str(target)], flush=True)
    result = {
        "command": "python benchmarks/encoder.py --reviews imdb_train.parquet --held-out imdb_test.parquet"
        " --work-dir work",
        "model": MINILM,
        "fine_tuning": {"reviews": TRAINING, "length": LENGTH},
        "calibration_reviews": CALIBRATION_REVIEWS,
        "evaluation_reviews": HELD_OUT,
        "group_size": SHARED["group_size"],
        "unrounded": {dtype: round(found, 4) for dtype, found in unrounded.items()},
        "rows": {name: rows[name] for name in ROWS if name in rows},
        **environment(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(encoder_table(result))


if __name__ == "__main__":
    main()
