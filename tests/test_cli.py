"""The commands, as a user types them."""

import dataclasses
import inspect
import json
import re

import pytest
import torch
from conftest import run_command as run
from rich.console import Console
from transformers import AutoModelForCausalLM

from hf_cptquant import BitPlan, CPTQuantConfig, cli, explain_choice, terminal
from hf_cptquant.demo import DemoResult
from hf_cptquant.kernels import BY_PLANES, without_dot, without_numba
from hf_cptquant.modules import packed_modules
from hf_cptquant.options import takes_settings
from hf_cptquant.plan import LayerScheme, ModulePlan
from hf_cptquant.recipe import Recipe
from hf_cptquant.record import QuantizationRecord
from hf_cptquant.table import SensitivityTable


@pytest.fixture
def data(tmp_path, texts):
    path = tmp_path / "data.txt"
    path.write_text("\n\n".join(texts[:4]))
    return path


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
        "--quality",
        "fast",
    ]
    assert run("quantize", smollm2, "--output", output, "--dataset", data, *options) == 0
    total = 49152 * 576 + 30 * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)  # tied embeddings once, blocks
    assert f"of {total:,} weights" in logged.text
    assert f"Written to {output}" in capsys.readouterr().out
    plan = BitPlan.load(output)
    assert {module.scheme.bits for module in plan.modules} == {4, 8}
    assert (output / "tokenizer.json").exists()
    AutoModelForCausalLM.from_pretrained(output)

    command = f"cptquant quantize {smollm2.name} --output out --dataset data.txt {' '.join(map(str, options))}"
    record = QuantizationRecord.load(output)
    assert record.run["command"] == command  # and no folders of this machine
    assert record.inherited == {"license": "apache-2.0", "language": "en"}
    assert record.run["peak_bytes"]["cpu"] > plan.original_bytes
    card = (output / "README.md").read_text()
    assert f"```console\n$ {command}\n```" in card
    assert str(tmp_path) not in card + (output / "cptquant_plan.json").read_text()

    assert run("inspect", output, "--units") == 0
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


COMMANDS = [
    "quantize", "sensitivity", "plan", "solve", "frontier", "inspect", "check", "evaluate", "card", "export", "doctor",
    "demo", "push",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_option(command, capsys):
    assert run(command, "--help") == 0
    assert "Usage: cptquant" in capsys.readouterr().out


BAD = {
    "method": (
        ["--method", "tdmqp"],
        "method='tdmqp' is not one of 'cmpq', 'pmpq', 'tdmpq', 'auto'; did you mean 'tdmpq'?",
    ),
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


@pytest.fixture
def measure(tiny_folder, data, tmp_path):
    """Run `sensitivity` on a tiny BERT; the exit status."""

    def call(*options) -> int:
        arguments = ["--dataset", data, "--num-samples", 4, "--sequence-length", 32, "--group-size", 32]
        return run("sensitivity", tiny_folder("bert-mlm"), *arguments, *options)

    return call


METHOD_OPTIONS = {
    "pmpq": ["--method", "pmpq", "--sparsity-levels", "0.5"],
    "tdmpq": ["--method", "tdmpq", "--metric", "perplexity"],
    "taylor": ["--estimator", "taylor", "--bits", "3,4,8"],
    "cmpq": ["--method", "cmpq", "--cca-components", 8],
}


@pytest.mark.parametrize("method", METHOD_OPTIONS)
def test_sensitivity_writes_prints_and_draws(method, measure, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    output, plot = tmp_path / "table.json", tmp_path / "plot.png"
    options = ["-o", output, "--plot", plot, "--granularity", "group", *METHOD_OPTIONS[method]]
    assert measure(*options) == 0
    table = SensitivityTable.load(output)
    stored = json.loads(output.read_text())
    assert stored["sensitivity"]["scores"] == table.scores
    assert len(table.scores) == 3 * 4  # blocks of q/k/v, attention output, and two dense layers
    assert all(type(score) is float for score in table.scores.values())
    assert max(map(abs, table.scores.values())) == 1
    if method == "taylor":
        assert all(list(costs) == [3, 4, 8] for costs in table.costs.values())
    assert plot.read_bytes().startswith(b"\x89PNG")

    shown = capsys.readouterr().out
    rows = {line.split()[1]: line for line in shown.splitlines() if "bert.encoder.layer." in line}
    assert list(rows) == list(table.raw)
    for unit, row in rows.items():
        assert f"{table.raw[unit]:.4g}" in row
        assert f"{table.scores[unit]:.3f}" in row
    full = {unit: row.count("█") for unit, row in rows.items()}
    assert max(full, key=full.get) == max(table.scores, key=table.scores.get)
    assert max(full.values()) > 10
    for unit, score in table.scores.items():
        assert full[unit] == pytest.approx(40 * max(0, score), abs=1)
    first, middle, last = table.deviations()
    assert (
        f"standard deviation from the mean sensitivity: first 30 % of the blocks {first:.3g}, middle {middle:.3g},"
        f" last 30 % {last:.3g}"
    ) in shown


def test_sensitivity_without_a_plot_writes_only_the_table(measure, tmp_path):
    before = set(tmp_path.iterdir())
    assert measure("-o", tmp_path / "table.json", "--granularity", "block") == 0
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {"table.json", "bert-mlm"}
    assert len(SensitivityTable.load(tmp_path / "table.json").raw) == 3


@pytest.mark.parametrize("option", ["-o", "--plot"])
def test_a_missing_folder_is_told_before_the_model_is_loaded(option, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    options = {"-o": tmp_path / "table.json", "--plot": tmp_path / "plot.png", option: tmp_path / "nowhere" / "file"}
    arguments = [part for pair in options.items() for part in pair]
    assert run("sensitivity", tmp_path, *arguments, "--dataset", data) == 1
    assert f"Error: the folder of {tmp_path / 'nowhere' / 'file'} does not exist" in capsys.readouterr().err


def test_sensitivity_goes_on_from_its_work_folder(measure, tmp_path, logged):
    work = tmp_path / "work"
    for name in ("first", "second"):
        assert measure("-o", tmp_path / f"{name}.json", "--work-dir", work, "--estimator", "perturbation") == 0
    assert "Resuming from" in logged.text
    assert (tmp_path / "first.json").read_text() == (tmp_path / "second.json").read_text()
    lines = (work / "tdmpq-perturbation" / "results-0.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines))


def test_another_run_in_the_work_folder_is_one_error(measure, tmp_path, capsys):
    options = ["--work-dir", tmp_path / "work", "--estimator", "perturbation"]
    assert measure("-o", tmp_path / "table.json", *options) == 0
    (tmp_path / "table.json").unlink()
    assert measure("-o", tmp_path / "table.json", *options, "--perturbation-scale", 0.5) == 1
    error = capsys.readouterr().err
    assert "perturbation_scale 0.1 there, 0.5 here" in error
    assert "Traceback" not in error
    assert not (tmp_path / "table.json").exists()


@pytest.mark.parametrize("command", ["quantize", "sensitivity", "plan", "frontier"])
def test_every_setting_is_an_option(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(command, "--help") == 0
    shown = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    settings = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Recipe)}
    assert settings <= shown
    own = {
        "--output",
        "--dtype",
        "--device-map",
        "--help",
        "--asymmetric",
        "--no-allow-skipped",
        "--plot",
        "--points",
        "--measure",
        "--max-shard-size",
        "--push-to-hub",
        "--private",
        "--public",
    }
    assert shown - settings <= own


def test_options_have_the_defaults_of_the_settings(monkeypatch):
    @takes_settings
    def command(*, config) -> None:
        seen.append(config)

    seen = []
    defaults = {
        name: parameter.default for name, parameter in inspect.signature(command, eval_str=True).parameters.items()
    }
    command(**defaults)
    expected = CPTQuantConfig(dataset="wikitext2")
    assert seen[0].to_dict() == expected.to_dict()


def test_every_option_reaches_its_setting():
    @takes_settings
    def command(*, config) -> None:
        seen.append(config.recipe())

    seen = []
    given = {
        "method": "pmpq",
        "metric": "accuracy",
        "bits": "3,4",
        "granularity": "block",
        "allocation": "integer",
        "target_bits": 4.5,
        "target_size": None,
        "target_compression": None,
        "max_loss_increase": None,
        "bits_override": ["*.down_proj=4", "a.*=16"],
        "quantize_lm_head": 8,
        "quantize_embeddings": 4,
        "quantize_vision_tower": 6,
        "quantize_front_end": 5,
        "refine": 5,
        "regularization": 0.5,
        "plan": None,
        "quality": "best",
        "rounding": "signround",
        "iters": 11,
        "recover": "scales",
        "group_size": 16,
        "symmetric": False,
        "dataset": "some.txt",
        "tokenizer": "tokenizer",
        "text_column": "text",
        "image_column": None,
        "label_column": "label",
        "num_samples": 3,
        "sequence_length": 9,
        "batch_size": 5,
        "estimator": "taylor",
        "taylor_samples": 99,
        "perturb": "first",
        "perturbation_scale": 0.25,
        "sparsity_levels": "0.125,0.5",
        "cca_components": 7,
        "cca_samples": 11,
        "modules_to_not_convert": ["a", "b"],
        "allow_skipped": True,
        "target_runtime": "vllm-cpu",
        "strict": True,
        "work_dir": "work",
        "seed": 13,
    }
    command(**given)
    overrides = (("*.down_proj", 4), ("a.*", 16))
    converted = {
        "bits_override": overrides,
        "bits": (3, 4),
        "sparsity_levels": (0.125, 0.5),
        "modules_to_not_convert": ("a", "b"),
    }
    assert given.keys() == {field.name for field in dataclasses.fields(Recipe)}
    assert seen == [Recipe(**{**given, **converted})]


# What runtimes load


@pytest.fixture
def plan_file(tmp_path):
    """bits of the value projection → the file of a plan of one attention with 8 bits elsewhere, per channel."""

    def write(value_bits, name="plan.json"):
        modules = tuple(
            ModulePlan(f"l.0.{leaf}", "l.0", "l.0", 576, 576, 2, LayerScheme(value_bits if leaf == "v_proj" else 8))
            for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        BitPlan(modules).save(tmp_path / name)
        return tmp_path / name

    return write


def test_check_names_module_rule_and_change(plan_file, capsys):
    assert run("check", plan_file(8)) == 0
    assert capsys.readouterr().out.endswith("keeps the rules of vLLM on CUDA (Marlin).\n")
    assert run("check", plan_file(4), "--for", "vllm") == 1
    problem, total = capsys.readouterr().out.splitlines()
    assert problem == (
        "l.0.q_proj (with k_proj, v_proj): vLLM on CUDA keeps them in one matrix of one scheme, and they have"
        " 4 sym channel and 8 sym channel; give all 8 bits, group_size -1, symmetric"
    )
    assert total.endswith("1 problem.")
    assert run("check", plan_file(8), "--hardware", "cpu") == 1
    assert "CPUWNA16 takes 4 bits, not 8 sym channel; give all 16 bits" in capsys.readouterr().out
    assert run("check", plan_file(8), "--for", "sglang") == 1
    assert "multiples of 64 × 128 or 128 × 64 (outputs × inputs), not 576 × 576" in capsys.readouterr().out
    assert run("check", plan_file(8), "--tensor-parallel", 5) == 1
    assert "576 output features cannot be split over 5 ranks; use fewer ranks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "tgi"], "no rules for --for tgi --hardware cuda; there are: --for vllm --hardware cuda, --for"),
        (["--for", "sglang", "--hardware", "cpu"], "no rules for --for sglang --hardware cpu"),
    ],
)
def test_check_refuses_what_it_has_no_rules_for(options, message, plan_file, capsys):
    assert run("check", plan_file(8), *options) == 1
    assert message in capsys.readouterr().err


def test_check_of_a_folder_minds_the_model_too(quantized, plan_file, tmp_path, capsys):
    _, folder = quantized
    assert run("check", folder) == 0
    assert run("check", folder, "--hardware", "cpu") == 1  # which has 8 bits
    capsys.readouterr()
    plan_file(8, "cptquant_plan.json")
    assert run("check", tmp_path) == 1
    assert "config.json is not that of a quantized model" in capsys.readouterr().err
    config = {"architectures": ["GPT2LMHeadModel"], "quantization_config": {"quant_method": "cptquant"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run("check", tmp_path) == 1
    assert "compressed-tensors, in which only linear layers are written" in capsys.readouterr().out
    config = {"architectures": ["BertForMaskedLM"], "quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run("check", tmp_path) == 1
    assert "only known to load causal language models" in capsys.readouterr().out
    assert run("check", tmp_path / "missing") == 1
    assert "missing does not exist" in capsys.readouterr().err


# Plans


@pytest.fixture(scope="module")
def scored(smollm2, texts, tmp_path_factory):
    """A folder with the table of SmolLM2's Taylor scores on two short sequences."""
    folder = tmp_path_factory.mktemp("scored")
    (folder / "data.txt").write_text("\n\n".join(texts[:4]))
    options = ["--num-samples", 4, "--sequence-length", 64, "--group-size", 64, "--bits", "3,4,8"]
    options += ["--estimator", "taylor", "--granularity", "group"]
    assert run("sensitivity", smollm2, "-o", folder / "table.json", "--dataset", folder / "data.txt", *options) == 0
    return folder


def test_solve_writes_a_plan_that_quantize_takes(scored, smollm2, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    plan_file = tmp_path / "plan.json"
    override = ["--bits-override", "*.0.mlp.down_proj=8"]
    arguments = [scored / "table.json", "-o", plan_file, "--plot", tmp_path / "plan.png", "--target-bits", 4.5]
    assert run("solve", *arguments, *override) == 0
    record = QuantizationRecord.load(plan_file)
    plan, table = record.plan, SensitivityTable.load(scored / "table.json")
    assert record.table == table
    assert (record.settings["target_bits"], record.settings["allocation"]) == (4.5, "integer")
    assert (record.settings["group_size"], record.settings["granularity"]) == (64, "group")
    assert record.calibration == QuantizationRecord.load(scored / "table.json").calibration
    assert 4.49 < plan.bits_per_weight <= 4.5
    bits = {module.name: module.scheme.bits for module in plan.modules}
    assert bits["model.layers.0.mlp.down_proj"] == 8
    assert {3, 4, 8} <= set(bits.values()) <= {3, 4, 8, 16}  # all in the table, and 16
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert plan.summary in shown
    assert f"predicted rise of the loss: {record.measured['predicted_loss_increase']:.4f} nats" in shown
    assert f"cptquant quantize MODEL --plan {plan_file}" in shown

    monkeypatch.undo()
    assert run("quantize", smollm2, "--plan", plan_file, "-o", tmp_path / "quantized", "--quality", "fast") == 0
    assert QuantizationRecord.load(tmp_path / "quantized").plan == plan
    assert run("inspect", tmp_path / "quantized") == 0
    assert plan.summary in capsys.readouterr().out


def test_plan_is_sensitivity_and_solve(scored, smollm2, tmp_path):
    options = ["--num-samples", 4, "--sequence-length", 64, "--group-size", 64, "--bits", "3,4,8", "--target-bits", 4.2]
    dataset = ["--dataset", scored / "data.txt"]
    assert run("plan", smollm2, "-o", tmp_path / "plan.json", *options, *dataset) == 0
    solving = ["--bits", "3,4,8", "--target-bits", 4.2]
    assert run("solve", scored / "table.json", "-o", tmp_path / "solved.json", *solving) == 0
    plan, solved = (QuantizationRecord.load(tmp_path / f"{name}.json") for name in ("plan", "solved"))
    assert plan.plan == solved.plan
    assert plan.table.costs == solved.table.costs
    assert plan.measured == solved.measured


@pytest.mark.parametrize("measure", [False, True])
def test_frontier_of_a_table_and_of_a_model(measure, scored, smollm2, tmp_path, capsys):
    output, plot = tmp_path / "frontier.json", tmp_path / "frontier.png"
    options = ["-o", output, "--plot", plot, "--bits", "3,4,8,16", "--points", 3, "--group-size", 64]
    data = ["--dataset", scored / "data.txt", "--num-samples", 4, "--sequence-length", 64]
    source = [smollm2, "--measure", *data] if measure else [scored / "table.json"]
    assert run("frontier", *source, *options) == 0
    stored = json.loads(output.read_text())
    points = stored["points"]
    assert stored["unit"] == "nats"
    assert len(points) == 3
    assert points[0]["bits_per_weight"] == pytest.approx(3.25)
    assert points[0]["bits_per_weight"] < points[1]["bits_per_weight"] < points[2]["bits_per_weight"] <= 16
    assert points[0]["predicted"] > points[1]["predicted"] > points[2]["predicted"]
    if measure:
        assert points[0]["measured"] > 0.2  # 3 bits everywhere hurt
        assert points[0]["measured"] > points[1]["measured"] > points[2]["measured"] - 0.05
    else:
        assert [point["measured"] for point in points] == [None] * 3
    shown = capsys.readouterr().out
    assert all(f"{point['bits_per_weight']:.3f}" in shown for point in points)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_solved_is_one_error(scored, tmp_path, capsys):
    output = tmp_path / "plan.json"
    QuantizationRecord(QuantizationRecord.load(scored / "table.json").plan, None, {}, {}).save(tmp_path / "bare.json")
    for arguments, message in (
        ([scored / "table.json", "--target-bits", 2], "target_bits=2.0 cannot be met: bits=[3, 4, 8, 16]"),
        ([scored / "table.json", "--target-bits", 4, "--bits", "2,4"], "no figures for 2 bits, only for 3, 4, 8"),
        ([tmp_path / "bare.json", "--target-bits", 4], "is a plan without the scores that it came from"),
        ([scored / "data.txt", "--target-bits", 4], "is not JSON"),
    ):
        assert run("solve", *arguments, "-o", output) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("Error:") == 1
    assert not output.exists()
    assert run("frontier", scored / "table.json", "--measure", "-o", output) == 1
    assert "--measure needs the model" in capsys.readouterr().err


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_map_of_a_plan_fits_the_terminal(width, scored, tmp_path, capsys, monkeypatch):
    assert run("solve", scored / "table.json", "-o", tmp_path / "plan.json", "--target-bits", 4.5) == 0
    capsys.readouterr()
    plan = BitPlan.load(tmp_path / "plan.json")
    monkeypatch.setattr(terminal, "console", Console(width=width, file=None))
    terminal.show_map(plan.maps()[0])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    margin = len("gate_up_proj ")
    shown = {}
    for line in lines:
        row = line[:margin].strip()
        shown[row] = shown.get(row, "") + line[margin:] + " "
    bits = {module.unit: str(module.scheme.bits) for module in plan.modules}
    for row in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        expected = [bits[f"model.layers.{index}.{row}"] for index in range(30)]
        assert re.findall("16|[0-9]", shown[row.rpartition(".")[2]]) == expected
    assert re.findall("[0-9]+", shown["model.layers"]) == ["0", "5", "10", "15", "20", "25"]


def test_a_plan_without_its_record_can_be_inspected(scored, tmp_path, capsys):
    plan = QuantizationRecord.load(scored / "table.json").plan
    plan.with_bits(dict.fromkeys((module.unit for module in plan.modules), 4), 64).save(tmp_path / "plan.json")
    assert run("inspect", tmp_path / "plan.json", "--units", "--plot", tmp_path / "plan.png") == 0
    assert "4.250 bits per weight" in capsys.readouterr().out


def test_a_frontier_of_scores_is_not_said_to_be_of_nats(scored, tmp_path):
    record = QuantizationRecord.load(scored / "table.json")
    dataclasses.replace(record, table=dataclasses.replace(record.table, costs={})).save(tmp_path / "scores.json")
    assert (
        run("frontier", tmp_path / "scores.json", "-o", tmp_path / "frontier.json", "--bits", "3,4,8", "--points", 3)
        == 0
    )
    assert json.loads((tmp_path / "frontier.json").read_text())["unit"] == "score × error"


def test_doctor_says_of_a_model_what_its_modules_say(tiny_folder, tokens, tmp_path, capsys, library):
    settings = {"bits": (3, 4, 8), "allocation": "kmeans", "granularity": "module", "group_size": 32}
    config = CPTQuantConfig(dataset=tokens, sequence_length=32, quality="fast", **settings)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("llama", torch.bfloat16), quantization_config=config)
    model.save_pretrained(tmp_path / "out")
    capsys.readouterr()
    assert run("doctor", tmp_path / "out", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert torch.__version__.startswith(found["versions"]["torch"])
    on_cpu = [report for report in found["kernels"] if report["device"] == "cpu"]
    assert sum(report["modules"] for report in on_cpu) == len(packed_modules(model))
    for report in on_cpu:
        module = model.get_submodule(report["example"])
        assert explain_choice(module) == f"{module.layout}: {report['reason']}"
        assert (report["decode"] == "dequantize, dense product") == (module.layout == "wire")
        by_numba = library != "torch" and module.layout in BY_PLANES
        expected = f"dequantize{' by numba' if by_numba else ''}, dense product"
        assert report["prefill"] == ("numba" if report["reason"] == "numba's kernel" else expected)
    assert run("doctor", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert all(str(report["modules"]) in shown for report in on_cpu)


def test_doctor_without_a_model_knows_every_kind_of_scheme(tmp_path, capsys):
    assert run("doctor", "--json") == 0
    reports = json.loads(capsys.readouterr().out)["kernels"]
    for dtype in ("bfloat16", "float16", "float32"):
        schemes = {report["scheme"] for report in reports if report["dtype"] == dtype}
        assert {int(scheme.split()[0]) for scheme in schemes} == {2, 3, 4, 5, 6, 8}
    assert all(report["reason"] for report in reports)
    kernels = {"numba"} if without_numba() is None else set()
    if without_dot() is not None:  # then zero points in float32 have no kernel, if anything has
        kernels.add("dequantize, dense product")
    assert {report["decode"] for report in reports if report["dtype"] == "float32"} == kernels
    assert run("doctor", tmp_path) == 1
    assert "cptquant_plan.json does not exist" in capsys.readouterr().err
