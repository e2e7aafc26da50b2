"""The paper's tables and the encoder's: what their rows say is what an independent calculation gives."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_cptquant import CPTQuantConfig, evaluate_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def by_equation_1(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Asymmetric min–max rounding of groups that share a scale; zero stays on the grid."""
    groups = weight.float().view(-1, group)
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).to(weight.dtype).float()
    zero = (-low / scale).round()
    return ((((groups / scale).round() + zero).clamp(0, 2**bits - 1) - zero) * scale).view_as(weight)


def test_rows_of_the_papers_table_2(benchmark_modules, tiny_folder, tokens):
    import paper_tables

    folder = tiny_folder("llama")
    data = {"dataset": tokens, "num_samples": 8, "sequence_length": 32}
    found = paper_tables.rows_of(str(folder), data, data)
    assert list(found["rows"]) == ["CMPQ", "PMPQ", "TDMPQ", "FP16", "uniform 8", "uniform 4"]
    assert all(len(deviations) == 3 for deviations in found["deviations"].values())

    weights = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    assert found["original"]["bytes"] == pytest.approx(4 * weights, abs=20_000)  # and the files' heads
    assert found["rows"]["FP16"]["bytes"] == pytest.approx(2 * weights, abs=20_000)
    packed = sum(
        module.weight.numel() for module in tiny_model("llama").model.layers.modules() if isinstance(module, nn.Linear)
    )
    eight, four = (found["rows"][f"uniform {bits}"]["bytes"] for bits in (8, 4))
    assert eight - four == pytest.approx(packed / 2, rel=0.2)  # 4 bits less, but more scales

    model = tiny_model("llama").half().float()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in name:
            module.weight.data = by_equation_1(module.weight.data.half(), 4, module.in_features).half().float()
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    expected = math.exp(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item())
    assert found["rows"]["uniform 4"]["value"] == pytest.approx(expected, rel=2e-3)
    assert found["rows"]["uniform 4"]["value"] != pytest.approx(found["original"]["value"], rel=1e-2)


def test_the_papers_tables_of_a_model_on_the_hub(
    benchmark_modules, hub, tiny_folder, minilm, texts, tmp_path, monkeypatch, capsys
):
    import paper_tables

    AutoModelForCausalLM.from_pretrained(tiny_folder("opt", max_position_embeddings=128)).push_to_hub("me/tiny")
    AutoTokenizer.from_pretrained(minilm).train_new_from_iterator(texts[::10], 512).push_to_hub("me/tiny")
    reviews = Dataset.from_list([{"text": text, "label": index % 2} for index, text in enumerate(texts[:24])])
    reviews.to_parquet(tmp_path / "reviews.parquet")
    (tmp_path / "help.txt").write_text("\n".join(texts), encoding="utf-8")
    for name, value in {
        "CALIBRATION_LENGTH": 32,
        "WINDOWS": 1,
        "WINDOW": 32,
        "CALIBRATION_REVIEWS": 16,
        "HELD_OUT": 16,
    }.items():
        monkeypatch.setattr(paper_tables, name, value)
    monkeypatch.setattr(paper_tables.fine_tune, "__defaults__", (16,))
    monkeypatch.setattr(paper_tables, "RESULTS", tmp_path / "paper_tables.json")
    data = {
        "--calibration": "help.txt",
        "--evaluation": "help.txt",
        "--reviews": "reviews.parquet",
        "--held-out": "reviews.parquet",
    }
    files = [str(word) for option, name in data.items() for word in (option, tmp_path / name)]
    monkeypatch.setattr(
        sys, "argv", ["paper_tables.py", "--models", "me/tiny", *files, "--work-dir", str(tmp_path / "work")]
    )
    paper_tables.main()
    tasks = json.loads((tmp_path / "paper_tables.json").read_text())["models"]["me/tiny"]
    assert list(tasks) == ["language modelling", "classification"]
    for found in tasks.values():
        assert found["rows"]["FP16"]["value"] == pytest.approx(found["original"]["value"], rel=1e-2)
        assert (
            found["rows"]["uniform 4"]["bytes"] < found["rows"]["uniform 8"]["bytes"] < found["rows"]["FP16"]["bytes"]
        )
    assert "| me/tiny | CMPQ |" in capsys.readouterr().out


def test_the_classifier_learns_from_reviews(benchmark_modules, tmp_path):
    import reviews

    words = {0: ("dreadful", "boring", "awful"), 1: ("wonderful", "great", "superb")}
    nouns = ("film", "movie", "story", "plot", "actor", "scene", "script", "cast", "end", "start", "music", "hero")
    rows = [
        {"text": f"A {word} {noun}, {again}.", "label": label}
        for label, choices in words.items()
        for word, noun, again in itertools.product(choices, nouns, choices)
    ]
    data = Dataset.from_list(rows).train_test_split(64, seed=0)
    data["train"].to_parquet(tmp_path / "train.parquet")
    reviews.fine_tune(reviews.MINILM, str(tmp_path / "train.parquet"), tmp_path / "classifier", len(data["train"]))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    config = CPTQuantConfig(dataset=data["test"], label_column="label", num_samples=64)
    (accuracy,) = evaluate_model(model, config)
    assert accuracy.value > 0.9
