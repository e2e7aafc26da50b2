"""Interrupted and killed runs that go on from their work folder: the very table of an uninterrupted run, nothing
measured twice, and no results of one run taken for those of another."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SMALL_SETTINGS, tiny_model

from hf_cptquant import CPTQuantConfig
from hf_cptquant.errors import ConfigError
from hf_cptquant.pipeline import measure_sensitivity
from hf_cptquant.work_folder import Journal

METHODS = {
    "pmpq": {"method": "pmpq"},
    "tdmpq": {"method": "tdmpq", "estimator": "perturbation"},
    "taylor": {"method": "tdmpq", "estimator": "taylor"},
    "cmpq": {"method": "cmpq"},
}
UNITS = [
    f"model.layers.{block}.{unit}"
    for block in range(3)
    for unit in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
]
KEYS = {
    "pmpq": {"the unchanged model", *UNITS},
    "tdmpq": {"the unchanged model", *UNITS},
    "taylor": {"sequences 0 to 2", "sequences 3 to 5", "sequences 6 to 7"},
    "cmpq": {"correlations over input_ids"},
}


def config_for(method, tokens, **settings) -> CPTQuantConfig:
    return CPTQuantConfig(**{"dataset": tokens, **SMALL_SETTINGS, **METHODS[method], **settings})


def journal_keys(folder: Path) -> list[str]:
    """Keys of the finished lines in a work folder, in order."""
    keys = []
    for path in sorted(folder.glob("*/results-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                keys.append(json.loads(line)[0])
            except ValueError:
                continue
    return keys


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Interruption:
    """A forward hook that counts the calls of the last block and raises at one of them."""

    def __init__(self, model, at: int | None = None) -> None:
        self.calls, self.at = 0, at
        self.handle = model.model.layers[-1].register_forward_hook(self)

    def __call__(self, *_):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def expected(tokens):
    """Method → the table of an uninterrupted run without a work folder, and the calls of the last block it took."""
    found = {}
    for method in METHODS:
        model = tiny_model("llama")
        counter = Interruption(model)
        found[method] = measure_sensitivity(model, config_for(method, tokens)), counter.calls
    return found


@pytest.fixture(scope="module")
def finished(expected, tokens, tmp_path_factory):
    """Method → the work folder of a finished run."""
    folders = {}
    for method in METHODS:
        folders[method] = tmp_path_factory.mktemp(f"finished-{method}")
        table = measure_sensitivity(tiny_model("llama"), config_for(method, tokens, work_dir=folders[method]))
        assert table == expected[method][0]
    return folders


def test_the_runs_differ_in_what_they_find(expected):
    tables = [table.raw for table, _ in expected.values()]
    assert all(first != second for index, first in enumerate(tables) for second in tables[:index])
    assert all(max(map(abs, raw.values())) > 1e-3 for raw in tables)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on_to_the_same_table(method, share, expected, tokens, tmp_path):
    table, calls = expected[method]
    config = config_for(method, tokens, work_dir=tmp_path)
    model = tiny_model("llama")
    interruption = Interruption(model, at=1 + round(share * (calls - 1)))
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(model, config)
    interruption.handle.remove()
    before = journal_keys(tmp_path)
    assert set(before) < KEYS[method]
    if share >= 0.4 and method != "cmpq":  # whose only stack is measured in one pass
        assert before

    assert measure_sensitivity(model, config) == table
    after = journal_keys(tmp_path)
    assert after[: len(before)] == before
    assert len(after) == len(set(after))  # nothing was measured twice
    assert set(after) == KEYS[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_interrupted_again_and_again_gets_there(method, expected, tokens, tmp_path):
    config = config_for(method, tokens, work_dir=tmp_path)
    table, calls = expected[method]
    model = tiny_model("llama")
    interruptions = 0
    for at in (max(1, calls // 4), calls // 3, calls // 3):
        interruption = Interruption(model, at)
        try:
            measure_sensitivity(model, config)
        except KeyboardInterrupt:
            interruptions += 1
        interruption.handle.remove()
    assert interruptions >= 2
    assert measure_sensitivity(model, config) == table
    assert sorted(journal_keys(tmp_path)) == sorted(KEYS[method])


@pytest.mark.parametrize("method", ["pmpq", "tdmpq", "taylor"])
def test_an_end_between_two_results_changes_nothing(method, expected, tokens, tmp_path, monkeypatch):
    table, _ = expected[method]
    add = Journal.add
    for stop in range(1, len(KEYS[method]), 3):  # also in the midst of the sequences of one batch
        config = config_for(method, tokens, work_dir=tmp_path / str(stop))
        added = []

        def until(journal, key, result, added=added, stop=stop):
            if len(added) == stop:
                raise KeyboardInterrupt
            added.append(key)
            add(journal, key, result)

        with monkeypatch.context() as stopping:
            stopping.setattr(Journal, "add", until)
            with pytest.raises(KeyboardInterrupt):
                measure_sensitivity(tiny_model("llama"), config)
        assert journal_keys(tmp_path / str(stop)) == added
        resumed = measure_sensitivity(tiny_model("llama"), config)
        assert resumed.base == pytest.approx(table.base, abs=1e-6), stop
        assert resumed.raw == pytest.approx(table.raw, abs=1e-6), stop
        assert resumed == table, stop


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_is_read_and_not_measured(method, finished, expected, tokens, monkeypatch):
    before = contents(finished[method])
    added = []
    monkeypatch.setattr(Journal, "add", lambda _, key, result: added.append(key))
    model = tiny_model("llama")
    counter = Interruption(model)
    assert measure_sensitivity(model, config_for(method, tokens, work_dir=finished[method])) == expected[method][0]
    assert added == []
    assert counter.calls <= 1  # which finds the order of the blocks
    assert contents(finished[method]) == before


def test_methods_may_share_a_work_folder(expected, tokens, tmp_path):
    for method in METHODS:
        config = config_for(method, tokens, work_dir=tmp_path)
        assert measure_sensitivity(tiny_model("llama"), config) == expected[method][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cmpq", "pmpq", "tdmpq-perturbation", "tdmpq-taylor"]


SCRIPT = """
import json, os, signal, sys
import torch
from transformers import AutoModelForCausalLM
from hf_cptquant import CPTQuantConfig
from hf_cptquant.pipeline import measure_sensitivity

folder, tokens, settings, at = sys.argv[1], torch.load(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(int(sys.argv[5]))
model = AutoModelForCausalLM.from_pretrained(folder)
calls = 0

def kill(*_):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)

model.model.layers[-1].register_forward_hook(kill)
measure_sensitivity(model, CPTQuantConfig(dataset=tokens, **settings))
print("never reached")
"""


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_process_loses_only_what_it_was_at(method, expected, tokens, tmp_path):
    table, calls = expected[method]
    tiny_model("llama").save_pretrained(tmp_path / "model")
    torch.save(tokens, tmp_path / "tokens.pt")
    settings = {**SMALL_SETTINGS, **METHODS[method], "work_dir": str(tmp_path / "work")}
    arguments = [tmp_path / "model", tmp_path / "tokens.pt", json.dumps(settings), 1 + calls // 2]
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments), str(torch.get_num_threads())],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert "never reached" not in process.stdout
    before = journal_keys(tmp_path / "work")
    assert set(before) < KEYS[method]
    assert method == "cmpq" or before

    model = tiny_model("llama")
    assert measure_sensitivity(model, config_for(method, tokens, work_dir=tmp_path / "work")) == table
    after = journal_keys(tmp_path / "work")
    assert len(after) == len(set(after))
    assert set(after) == KEYS[method]


def other_weights(model):
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3


def other_norm(model):
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3


@pytest.mark.parametrize("change", [other_weights, other_norm])
@pytest.mark.parametrize("method", METHODS)
def test_other_weights_are_another_run(method, change, finished, tokens):
    model = tiny_model("llama")
    change(model)
    before = contents(finished[method])
    with pytest.raises(ConfigError, match=r"belongs to another run \(weights "):
        measure_sensitivity(model, config_for(method, tokens, work_dir=finished[method]))
    assert contents(finished[method]) == before


OTHER_DATA = {"tokens": {"change": 1}, "fewer sequences": {"num_samples": 7}, "shorter": {"sequence_length": 15}}


@pytest.mark.parametrize("case", OTHER_DATA)
@pytest.mark.parametrize("method", METHODS)
def test_other_data_are_another_run(method, case, finished, tokens):
    settings = dict(OTHER_DATA[case])
    data = tokens.clone()
    data[:, 0] = (data[:, 0] + settings.pop("change", 0)) % 512
    before = contents(finished[method])
    with pytest.raises(ConfigError, match=r"another run \(calibration "):
        measure_sensitivity(tiny_model("llama"), config_for(method, data, work_dir=finished[method], **settings))
    assert contents(finished[method]) == before


REFUSED = [
    ("pmpq", {"sparsity_levels": (0.3, 0.5)}, "sparsity_levels"),
    ("pmpq", {"sparsity_levels": (0.3, 0.7, 0.5)}, "sparsity_levels"),
    ("pmpq", {"metric": "perplexity"}, "metric"),
    ("pmpq", {"metric": "accuracy"}, "metric"),
    ("pmpq", {"granularity": "block"}, "units"),
    ("pmpq", {"granularity": "module"}, "units"),
    ("pmpq", {"modules_to_not_convert": ["o_proj"]}, "units"),
    ("tdmpq", {"seed": 1}, "seed"),
    ("tdmpq", {"metric": "perplexity"}, "metric"),
    ("tdmpq", {"perturb": "first"}, "perturb"),
    ("tdmpq", {"perturbation_scale": 0.2}, "perturbation_scale"),
    ("tdmpq", {"granularity": "block"}, "units"),
    ("taylor", {"seed": 1}, "seed"),
    ("taylor", {"bits": (3, 4, 8)}, "bits"),
    ("taylor", {"group_size": 64}, "group_size"),
    ("taylor", {"symmetric": False}, "symmetric"),
    ("taylor", {"granularity": "block"}, "units"),
    ("cmpq", {"seed": 1}, "seed"),
    ("cmpq", {"cca_components": 8}, "cca_components"),
    ("cmpq", {"cca_samples": 50}, "cca_samples"),
    ("cmpq", {"granularity": "block"}, "units"),
]


@pytest.mark.parametrize(("method", "settings", "named"), REFUSED, ids=str)
def test_other_settings_of_the_method_are_another_run(method, settings, named, finished, tokens):
    before = contents(finished[method])
    with pytest.raises(ConfigError, match=rf"another run \(.*\b{named} .*give another folder or delete it"):
        measure_sensitivity(tiny_model("llama"), config_for(method, tokens, work_dir=finished[method], **settings))
    assert contents(finished[method]) == before


OF_OTHER_STEPS = {"rounding": "nearest", "allocation": "kmeans", "allow_skipped": True, "text_column": "text"}
TAKEN = [
    ("pmpq", {"bits": (2, 16)}),
    ("pmpq", {"group_size": 64}),
    ("pmpq", {"symmetric": False, "perturb": "first", "perturbation_scale": 0.5}),
    ("pmpq", {"estimator": "taylor", "cca_components": 3, "cca_samples": 9}),
    ("tdmpq", {"bits": (2, 16), "group_size": 64, "symmetric": False}),
    ("tdmpq", {"sparsity_levels": (0.9,), "cca_components": 3, "cca_samples": 9}),
    ("taylor", {"perturb": "first", "perturbation_scale": 0.5}),
    ("taylor", {"bits": (16, 8, 4)}),
    ("taylor", {"bits": (4, 8)}),
    ("taylor", {"sparsity_levels": (0.9,), "cca_components": 3, "cca_samples": 9}),
    ("cmpq", {"bits": (2, 16), "group_size": 64, "symmetric": False}),
    ("cmpq", {"sparsity_levels": (0.9,), "estimator": "taylor", "perturb": "first", "perturbation_scale": 0.5}),
    *((method, {"batch_size": 8}) for method in METHODS if method != "taylor"),  # which keeps results by batch
    *((method, OF_OTHER_STEPS) for method in METHODS),
]


@pytest.mark.parametrize(("method", "settings"), TAKEN, ids=str)
def test_settings_that_do_not_matter_to_the_method_are_no_other_run(method, settings, finished, expected, tokens):
    before = contents(finished[method])
    config = config_for(method, tokens, work_dir=finished[method], **settings)
    found = measure_sensitivity(tiny_model("llama"), config)
    of_rounding = {"errors": {}, "group_size": 128, "symmetric": True}
    assert replace(found, **of_rounding) == replace(expected[method][0], **of_rounding)
    assert contents(finished[method]) == before


def test_a_seed_that_chooses_other_windows_is_another_run(finished, tokens):
    config = config_for("pmpq", tokens, work_dir=finished["pmpq"], seed=1)
    with pytest.raises(ConfigError, match=r"another run \(calibration "):
        measure_sensitivity(tiny_model("llama"), config)


def test_a_moved_work_folder_is_still_good(finished, expected, tokens, tmp_path):
    (tmp_path / "moved").mkdir()
    for name, content in contents(finished["tdmpq"]).items():
        path = tmp_path / "moved" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    config = config_for("tdmpq", tokens, work_dir=str(tmp_path / "moved"))
    assert measure_sensitivity(tiny_model("llama"), config) == expected["tdmpq"][0]
    assert sorted(journal_keys(tmp_path / "moved")) == sorted(KEYS["tdmpq"])


@pytest.mark.parametrize("method", METHODS)
def test_without_a_work_folder_nothing_is_written(method, tokens, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measure_sensitivity(tiny_model("llama"), config_for(method, tokens))
    assert list(tmp_path.rglob("*")) == []
