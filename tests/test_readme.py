"""The README's code runs, and its commands are the ones that exist."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import transformers
from typer.testing import CliRunner

from hf_cptquant import CPTQuantConfig, cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(
    r"^\$ (.*?)(?:\s+#.*)?$", "\n".join(re.findall(r"```console\n(.*?)```", README, re.DOTALL)), re.MULTILINE
)


@pytest.fixture
def offline_hub(monkeypatch, smollm2, texts, hub):
    """`from_pretrained` of the README's Hub names gives SmolLM2 and a small calibration instead; pushes stay here."""
    original = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(name, *args, quantization_config=None, **kwargs):
        if quantization_config is not None and name.startswith("facebook/"):
            name = smollm2
            quantization_config = CPTQuantConfig(
                **{
                    **quantization_config.recipe().to_dict(),
                    "dataset": texts,
                    "num_samples": 2,
                    "sequence_length": 64,
                    "iters": 2,
                }
            )
        extra = {} if quantization_config is None else {"quantization_config": quantization_config}
        return original(name, *args, **extra, **kwargs)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number, tmp_path, monkeypatch, offline_hub):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})


def test_there_are_the_two_commands_and_ci_runs_the_second():
    assert COMMANDS[:2] == ["pip install uv && uv run cptquant demo", "pip install uv && uv run pytest"]
    ci = (ROOT / ".ci" / "run").read_text()
    assert "pip install uv" in ci
    assert "\nuv run pytest" in ci


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("cptquant")])
def test_commands_are_understood(command):
    name, *options = shlex.split(command)[1:]
    flags = [option for option in options if option.startswith("--")]
    help_text = CliRunner(env={"COLUMNS": "200", "TERM": "dumb"}).invoke(cli.app, [name, "--help"]).output
    assert f"cptquant {name}" in help_text or f" {name} " in help_text
    assert all(flag in help_text for flag in flags)


def test_tables_are_made_from_the_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tables = importlib.import_module("tables")
    assert re.findall(r"<!-- table: (\w+) -->", README) == list(tables.TABLES)
    assert tables.with_tables(README) == README


def test_what_vllm_did_is_told():
    results = json.loads((ROOT / "benchmarks" / "results" / "vllm_serving.json").read_text())
    assert results["rules"]["different"] == []
    assert f"on all {results['rules']['cases']:,}\ncombinations" in README
    runs = [run for served in results["served"].values() for run in served["agreement"]]
    same = sum(run["same"] == run["of"] for run in runs)
    assert f"Of {len(runs)} greedy continuations of {runs[0]['of']} tokens {same} are the same as ours" in README
    apart = max(abs(run.get("logits_apart", 0.0)) for run in runs)
    assert f"at most {apart} apart" in README
    assert {served["vllm"] for served in results["served"].values()} == {"0.32.0"}


def test_figures_are_those_of_the_benchmark():
    results = json.loads((ROOT / "benchmarks" / "results" / "scale_sign.json").read_text())["results"]
    signed, zero_point, unsigned, original = (
        f"{results[grid]['perplexity']:.2f}" for grid in ("signed", "zero point", "unsigned", "bfloat16")
    )
    assert f"perplexity {signed} against {zero_point}" in README
    assert f"{unsigned} with an unsigned scale; {original} in bfloat16" in README

    tied = json.loads((ROOT / "benchmarks" / "results" / "tied_embedding.json").read_text())["results"]
    megabytes = {bits: f"{found['matrix_bytes'] / 1e6:.1f}" for bits, found in tied.items()}
    perplexity = {bits: f"{found['perplexity']:.2f}" for bits, found in tied.items()}
    assert f"take {megabytes['8']} MB instead of {megabytes['16']}, and perplexity goes\n" in README
    assert f"from {perplexity['16']} to {perplexity['8']}; 4 bits in groups of 64" in README
    assert f"are too few, {perplexity['4']} (8 × 1,024 tokens" in README
