"""The paper's tables 1 and 2 (arXiv 2412.03599), by its own pipeline (`CPTQuantConfig.paper`), on models at hand.

Language modelling is on WikiText-2; classification is of IMDB reviews, by a classifier that is fine-tuned on the spot.
Losses and accuracies are compared with the model in float32, and sizes with its checkpoint in float32, which is what
the paper must have done for its FP16 to be twice as small. What stays at 16 bits is float16. Sizes are the bytes of the
weight files on disk. Every row is written, read again, dequantized and measured in float32, because CPUs are slow in
float16. Without `--models` these are SmolLM2-135M-Instruct on language modelling and all-MiniLM-L6-v2, which has no
head for it, on classification; a model from the Hub does both. Rows of other models in the result file stay.

    uv run python benchmarks/paper_tables.py --calibration wikitext2_valid.txt --evaluation wikitext2_test.txt \\
        --reviews imdb_train.parquet --held-out imdb_test.parquet --work-dir work
    uv run python benchmarks/paper_tables.py --models facebook/opt-125m bert-base-uncased --scale 8 --work-dir work
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from environment import environment
from reviews import HELD_OUT, LENGTH, MINILM, TRAINING, fine_tune, labelled, source_of
from tables import paper_tables
from transformers import PreTrainedModel

from hf_cptquant import BitPlan, CPTQuantConfig, evaluate_model, make_plan
from hf_cptquant.demo import write_bundled_model
from hf_cptquant.model_view import class_named_in, read_config, view_model
from hf_cptquant.record import QuantizationRecord

SMOLLM2 = "SmolLM2-135M-Instruct"
LANGUAGE, CLASSIFICATION = "language modelling", "classification"
BUNDLED = {SMOLLM2: (LANGUAGE,), MINILM: (CLASSIFICATION,)}
METHODS = ("cmpq", "pmpq", "tdmpq")
GROUP_SIZE = 128
CALIBRATION_WINDOWS, CALIBRATION_LENGTH, WINDOWS, WINDOW = 2, 256, 3, 1024
CALIBRATION_REVIEWS = 64
RESULTS = Path(__file__).parent / "results" / "paper_tables.json"


def load(folder: str | Path, **settings: Any) -> PreTrainedModel:
    """A model with the head that its config names, on the accelerator if there is one."""
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model_class = class_named_in(read_config(str(folder)))
    assert model_class is not None, f"{folder} has no head that computes a loss"
    return model_class.from_pretrained(folder, device_map=device, **settings)


def folder_of(name: str, task: str, reviews: str, work: Path) -> str | None:
    """Where the model for a task is, made first where it must be; None for a model without a head for it."""
    if task == CLASSIFICATION:
        folder = work / f"{name.replace('/', '--')}-reviews"
        if not (folder / "config.json").exists():
            fine_tune(name, reviews, folder)
        return str(folder)
    if name == SMOLLM2:
        if not (work / name / "config.json").exists():
            write_bundled_model(work / name)
        return str(work / name)
    return source_of(name) if class_named_in(read_config(source_of(name))) is not None else None


def data_of(task: str, arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings for the calibration data and for those to measure on."""
    scale = arguments.scale
    if task == CLASSIFICATION:
        return (
            labelled(arguments.reviews, scale * CALIBRATION_REVIEWS),
            labelled(arguments.held_out, scale * HELD_OUT),
        )
    return (
        {"dataset": arguments.calibration, "num_samples": scale * CALIBRATION_WINDOWS,
         "sequence_length": CALIBRATION_LENGTH},
        {"dataset": arguments.evaluation, "num_samples": scale * WINDOWS, "sequence_length": WINDOW},
    )  # fmt: skip


def papers_plans(original: PreTrainedModel, data: Mapping[str, Any]) -> dict[str, QuantizationRecord]:
    """Plan and scores of each method as the paper has them: PMPQ by accuracy where there are classes, else by loss."""
    metric = {"pmpq": "accuracy"} if "label_column" in data else {}
    return {
        method.upper(): make_plan(
            original, CPTQuantConfig.paper(method, group_size=GROUP_SIZE, metric=metric.get(method, "loss"), **data)
        )
        for method in METHODS
    }


def uniform(plan: BitPlan, bits: int) -> BitPlan:
    """Equal bits everywhere, on the paper's grids."""
    return plan.with_bits({module.unit: bits for module in plan.modules}, GROUP_SIZE, symmetric=False)


def value(model: PreTrainedModel, evaluation: Mapping[str, Any], tokenizer: str) -> float:
    """Accuracy, perplexity, or pseudo-perplexity of a masked language model."""
    return evaluate_model(model, CPTQuantConfig(tokenizer=tokenizer, **evaluation))[0].value


def bytes_on_disk(model: PreTrainedModel, folder: Path) -> int:
    """Write a model; what its weight files take."""
    model.save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measured(plan: BitPlan | None, source: str, evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Round to nearest by a plan (None: float16), write, read again, and measure in float32."""
    settings = {} if plan is None else {"quantization_config": CPTQuantConfig(plan=plan, quality="fast")}
    model = load(source, dtype=torch.float16, **settings)
    bits = 16.0 if plan is None else model.hf_quantizer.record.plan.bits_per_weight
    with tempfile.TemporaryDirectory() as folder:
        size = bytes_on_disk(model, Path(folder))
        written = load(folder)
        dense = written if plan is None else written.dequantize()
        found = value(dense.float(), evaluation, source)
    return {"value": round(found, 4), "bytes": size, "bits_per_weight": round(bits, 3)}


def rows_of(source: str, calibration: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """All figures of a model on a task: the original's, those of the rows of table 2, and the deviations of table 1."""
    original = load(source, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        size = bytes_on_disk(original, Path(folder))
    base = {"value": round(value(original, evaluation, source), 4), "bytes": size, "bits_per_weight": 32.0}
    records = papers_plans(original, {"tokenizer": source, **calibration})
    undecided = view_model(original).plan("block")
    plans = {name: record.plan for name, record in records.items()}
    plans |= {"FP16": None, "uniform 8": uniform(undecided, 8), "uniform 4": uniform(undecided, 4)}
    rows = {}
    for name, plan in plans.items():
        rows[name] = measured(plan, source, evaluation)
        print(name, rows[name], flush=True)
    deviations = {name: [float(f"{d:.3g}") for d in record.table.deviations()] for name, record in records.items()}
    return {"original": base, "rows": rows, "deviations": deviations, "blocks": len(view_model(original).blocks)}


def main() -> None:
    """Run the models; write the result file and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(BUNDLED), metavar="MODEL", help="names on the Hub, folders")
    parser.add_argument("--calibration", default="wikitext2", help="text file; default: from the Hub")
    parser.add_argument("--evaluation", default="wikitext2", help="text file; default: from the Hub")
    parser.add_argument("--reviews", default="imdb", help="Parquet file to learn from; default: from the Hub")
    parser.add_argument("--held-out", default="imdb", help="Parquet file to measure on; default: from the Hub")
    parser.add_argument("--scale", type=int, default=1, help="so many times the data to calibrate and to measure on")
    parser.add_argument("--work-dir", type=Path, required=True, help="models that are made")
    arguments = parser.parse_args()
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"models": {}}
    for name in arguments.models:
        found = {}
        for task in BUNDLED.get(name, (LANGUAGE, CLASSIFICATION)):
            source = folder_of(name, task, arguments.reviews, arguments.work_dir)
            if source is None:
                print(f"{name}: no head for {task}")
                continue
            calibration, evaluation = data_of(task, arguments)
            found[task] = rows_of(source, calibration, evaluation)
            found[task] |= {
                "calibration_samples": [calibration["num_samples"], calibration["sequence_length"]],
                "evaluation_samples": [evaluation["num_samples"], evaluation["sequence_length"]],
            }
        results["models"][name] = found
        results |= {
            "command": "python benchmarks/paper_tables.py --calibration wikitext2_valid.txt --evaluation"
            " wikitext2_test.txt --reviews imdb_train.parquet --held-out imdb_test.parquet --work-dir work",
            "group_size": GROUP_SIZE,
            "fine_tuning": {"reviews": TRAINING, "length": LENGTH},
            **environment(),
        }
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(paper_tables(results))


if __name__ == "__main__":
    main()
