"""The commands, as a user types them."""

import json

import pytest
from transformers import AutoModelForCausalLM

from hf_cptquant import BitPlan, cli
from hf_cptquant.demo import DemoResult
from hf_cptquant.record import QuantizationRecord


@pytest.fixture
def data(tmp_path, texts):
    path = tmp_path / "data.txt"
    path.write_text("\n\n".join(texts[:4]))
    return path


def run(*arguments) -> int:
    """Exit status of a command."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_quantize_and_inspect(smollm2, data, tmp_path, capsys, logged):
    output = tmp_path / "out"
    options = [
        "--num-samples",
        2,
        "--sequence-length",
        64,
        "--group-size",
        64,
        "--bits",
        "4,8",
        "--granularity",
        "group",
    ]
    assert run("quantize", smollm2, "--output", output, "--dataset", data, *options) == 0
    total = 49152 * 576 + 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)  # tied embeddings once, blocks
    assert f"of {total:,} weights" in logged.text
    assert f"Written to {output}" in capsys.readouterr().out
    plan = BitPlan.load(output)
    assert {module.scheme.bits for module in plan.modules} == {4, 8}
    assert (output / "tokenizer.json").exists()
    AutoModelForCausalLM.from_pretrained(output)

    assert run("inspect", output) == 0
    shown = capsys.readouterr().out
    scores = QuantizationRecord.load(output).table.scores
    assert all(f"model.layers.{index}" in shown for index in range(30))
    assert f"{scores['model.layers.29.mlp.down_proj']:.3f}" in shown
    assert f"{plan.bits_per_weight:.3f} bits per weight" in shown
    assert f"compression ratio {plan.compression_ratio:.2f}" in shown
    assert f"{plan.original_bytes / 1e6:.1f} → {plan.nbytes / 1e6:.1f} MB" in shown


def test_the_class_in_the_config_is_used(tiny_folder, data, tmp_path):
    output = tmp_path / "out"
    options = ["--num-samples", 2, "--sequence-length", 32, "--group-size", 32, "--dtype", "bfloat16"]
    assert run("quantize", tiny_folder("bert-mlm"), "-o", output, "--dataset", data, *options) == 0
    config = json.loads((output / "config.json").read_text())
    assert config["architectures"] == ["BertForMaskedLM"]
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("command", ["quantize", "inspect", "demo"])
def test_help_explains_every_option(command, capsys):
    assert run(command, "--help") == 0
    assert "Usage: cptquant" in capsys.readouterr().out


BAD = {
    "method": (["--method", "tdmqp"], "method='tdmqp' is not one of 'pmpq', 'tdmpq'; did you mean 'tdmpq'?"),
    "bits": (["--bits", "4,7"], "bits=7 is not one of"),
    "bits text": (["--bits", "four"], "--bits four: give numbers with commas"),
    "dataset": (["--dataset", "wikitext3"], "did you mean 'wikitext2'?"),
    "hub": (["--dataset", "wikitext2"], "which could not be reached"),
    "file": (["--dataset", "nowhere.txt"], "nowhere.txt does not exist"),
    "dtype": (["--dtype", "int3"], "--dtype int3 is not one of"),
    "tokenizer": (["--tokenizer", "nowhere"], "no tokenizer at 'nowhere'"),
    "too long": (["--sequence-length", "9000"], "tokens, not even one sequence of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_one_error_and_leave_nothing(case, tiny_folder, minilm, tmp_path, capsys):
    arguments, message = BAD[case]
    short = tmp_path / "short.txt"
    short.write_text("only a few words")
    source = tiny_folder("bert-mlm")
    assert run("quantize", source, "-o", tmp_path / "out", "--dataset", short, *arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("Error:") == 1
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bert-mlm", "short.txt"]


def test_folders_that_are_not_ours_are_refused(smollm2, data, tmp_path, capsys):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "notes.md").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    for output, message in ((notes, "not empty"), (file, "is a file"), (smollm2, "holds another model")):
        assert run("quantize", smollm2, "-o", output, "--dataset", data) == 1
        assert message in capsys.readouterr().err
    assert [path.name for path in notes.iterdir()] == ["notes.md"]


def test_quantized_and_missing_models_are_refused(quantized, data, tmp_path, capsys):
    for model, message in ((quantized[1], "is quantized already"), (tmp_path / "nothing", "no model at")):
        assert run("quantize", model, "-o", tmp_path / "out", "--dataset", data) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_inspect_of_something_else(tmp_path, capsys):
    assert run("inspect", tmp_path) == 1
    assert "does not exist" in capsys.readouterr().err


def test_demo_shows_what_it_measured(quantized, tmp_path, monkeypatch, capsys):
    record = quantized[0].hf_quantizer.record
    result = DemoResult(record, 14.66, 17.01, "the wheel", "the compass", 0.0)
    monkeypatch.setattr(cli, "run_demo", lambda output: result)
    assert run("demo", "-o", tmp_path / "demo") == 0
    shown = capsys.readouterr().out
    for text in ("14.66", "17.01", "the wheel", "the compass", "agree bit for bit", f"{record.plan.nbytes / 1e6:.1f}"):
        assert text in shown
