"""The journal of finished measurements: exact values, lines that a kill cut short, runs that must not be mixed up."""

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hf_cptquant.errors import ConfigError
from hf_cptquant.work_folder import FACTS_FILE, Journal, fingerprint

FACTS = {"model": "LlamaForCausalLM", "weights": "ab" * 32, "seed": 0, "scale": 0.1, "bits": [4, 8]}
CHANGES = {
    "model": "GPT2LMHeadModel",
    "weights": "cd" * 32,
    "seed": 1,
    "scale": 0.1 + 2**-55,
    "bits": [8, 4],
}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def results_file(folder: Path) -> Path:
    (path,) = folder.glob("results-*.jsonl")
    return path


def test_without_a_folder_results_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal(None, FACTS)
    assert journal.results == {}
    journal.add("layers.0", [0.5, 1.5])
    journal.add("layers.1", {"loss": 2.0})
    assert journal.results == {"layers.0": [0.5, 1.5], "layers.1": {"loss": 2.0}}
    assert list(tmp_path.iterdir()) == []
    assert Journal(None, FACTS).results == {}


def test_results_survive_each_as_soon_as_it_is_added(tmp_path):
    folder = tmp_path / "some" / "where"
    journal = Journal(folder, FACTS)
    expected = {}
    for index, result in enumerate(([1.0], {"terms": [[0.25, -3e-9]]}, None, "text é", 7)):
        journal.add(f"unit {index} é", result)
        expected[f"unit {index} é"] = result
        assert Journal(folder, FACTS).results == expected


def test_a_later_result_replaces_an_earlier_one(tmp_path):
    for result in (1.0, 2.0):
        Journal(tmp_path / "run", FACTS).add("unit", result)
    assert Journal(tmp_path / "run", FACTS).results == {"unit": 2.0}


@given(st.lists(st.floats(allow_nan=False), min_size=1))
@example([-0.0, 0.0, 5e-324, -5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 0.1, 1 / 3, float("inf")])
def test_floats_come_back_bit_for_bit(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("floats") / "run"
    Journal(folder, FACTS).add("unit", values)
    found = Journal(folder, FACTS).results["unit"]
    assert [value.hex() for value in found] == [value.hex() for value in values]  # tells -0.0 from 0.0


def test_a_line_cut_short_at_any_byte_is_passed_over(tmp_path):
    whole = tmp_path / "whole"
    results = {"layers.0": [0.125, -1e-9], "layers.é": {"terms": [[12.5, -0.0]]}, "layers.2": [12345.678]}
    journal = Journal(whole, FACTS)
    ends = []
    for key, result in results.items():
        journal.add(key, result)
        ends.append(results_file(whole).stat().st_size)
    content = results_file(whole).read_bytes()
    assert ends[-1] == len(content)
    for cut in range(len(content) + 1):
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        (folder / FACTS_FILE).write_bytes((whole / FACTS_FILE).read_bytes())
        (folder / results_file(whole).name).write_bytes(content[:cut])
        kept = {key: result for end, (key, result) in zip(ends, results.items(), strict=True) if end <= cut}
        resumed = Journal(folder, FACTS)
        assert resumed.results == kept, cut
        resumed.add("layers.3", [cut / 7])
        again = Journal(folder, FACTS)
        assert again.results == {**kept, "layers.3": [cut / 7]}, cut
        for key in results.keys() - kept.keys():
            again.add(key, results[key])
        assert Journal(folder, FACTS).results == {**results, "layers.3": [cut / 7]}, cut


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_and_told_apart(tmp_path, name):
    folder = tmp_path / "run"
    Journal(folder, FACTS).add("unit", 1.0)
    before = files(folder)
    with pytest.raises(ConfigError) as refused:
        Journal(folder, {**FACTS, name: CHANGES[name]})
    message = str(refused.value)
    assert str(folder) in message
    there, here = json.dumps(FACTS[name]), json.dumps(CHANGES[name])
    if len(there) > 40:  # hashes are shortened, but still tell one from the other
        there, here = there[:10], here[:10]
    assert f"{name} {there}" in message
    assert here in message
    assert "give another folder or delete it" in message
    assert not any(f"{other} " in message for other in FACTS.keys() - {name, "model"})
    assert files(folder) == before


def test_all_differing_facts_are_named(tmp_path):
    folder = tmp_path / "run"
    Journal(folder, FACTS)
    with pytest.raises(ConfigError, match=r"seed 0 there, 1 here, scale 0\.1 there, 0\.5 here\)"):
        Journal(folder, {**FACTS, "seed": 1, "scale": 0.5})


@pytest.mark.parametrize("more", ["there", "here"])
def test_a_fact_that_only_one_run_has_is_a_difference(tmp_path, more):
    folder = tmp_path / "run"
    extended = {**FACTS, "perturb": "all"}
    Journal(folder, extended if more == "there" else FACTS)
    with pytest.raises(ConfigError, match="perturb"):
        Journal(folder, FACTS if more == "there" else extended)


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"not a folder of an earlier run and not empty; give another folder"):
        Journal(tmp_path, FACTS)
    assert files(tmp_path) == {"notes.md": b"mine"}


@pytest.mark.parametrize("content", ["", "{cut", "[1, 2]", '"text"', "null"])
def test_a_damaged_or_foreign_file_of_facts_is_refused(tmp_path, content):
    (tmp_path / FACTS_FILE).write_text(content)
    with pytest.raises(ConfigError, match="give another folder"):
        Journal(tmp_path, FACTS)
    assert files(tmp_path) == {FACTS_FILE: content.encode()}


def test_an_empty_folder_is_taken(tmp_path):
    Journal(tmp_path, FACTS).add("unit", 1.0)
    assert Journal(tmp_path, FACTS).results == {"unit": 1.0}


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="give another folder"):
        Journal(path, FACTS)
    assert path.read_text() == "mine"


def test_a_file_in_the_place_of_the_parent_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="file"):
        Journal(path / "pmpq", FACTS)
    assert path.read_text() == "mine"


def test_a_run_that_was_killed_while_it_claimed_the_folder_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            Journal(tmp_path / "run", FACTS)
    Journal(tmp_path / "run", FACTS).add("unit", 1.0)
    assert Journal(tmp_path / "run", FACTS).results == {"unit": 1.0}


def test_files_of_several_processes_are_merged(tmp_path):
    Journal(tmp_path, FACTS).add("unit 0", 0.5)
    for rank, keys in ((1, ("unit 1", "unit 3")), (12, ("unit 2",))):
        lines = "".join("\n" + json.dumps([key, [rank]]) for key in keys)
        (tmp_path / f"results-{rank}.jsonl").write_text(lines + '\n["unit 9", [1')
    found = Journal(tmp_path, FACTS)
    assert found.results == {"unit 0": 0.5, "unit 1": [1], "unit 3": [1], "unit 2": [12]}
    others = {name: content for name, content in files(tmp_path).items() if name != "results-0.jsonl"}
    found.add("unit 4", 4.0)
    assert {name: files(tmp_path)[name] for name in others} == others  # each process writes only its own file


def test_tuples_equal_lists_after_a_round_trip(tmp_path):
    Journal(tmp_path / "tuples", {"bits": (4, 8), "nested": {"levels": (0.3, 0.5)}}).add("unit", 1.0)
    for facts in (
        {"bits": (4, 8), "nested": {"levels": (0.3, 0.5)}},
        {"bits": [4, 8], "nested": {"levels": [0.3, 0.5]}},
    ):
        assert Journal(tmp_path / "tuples", facts).results == {"unit": 1.0}
    with pytest.raises(ConfigError, match=r"bits \[4, 8\] there, \[4, 16\] here"):
        Journal(tmp_path / "tuples", {"bits": (4, 16), "nested": {"levels": (0.3, 0.5)}})


def test_resuming_is_told(tmp_path, logged):
    Journal(tmp_path, FACTS).add("unit", 1.0)
    assert "Resuming" not in logged.text
    Journal(tmp_path, FACTS)
    assert f"Resuming from {tmp_path}: 1 results" in logged.text


@pytest.mark.parametrize("name", CHANGES)
def test_the_fingerprint_changes_with_each_fact(name):
    assert fingerprint({**FACTS, name: CHANGES[name]}) != fingerprint(FACTS)
    assert fingerprint({key: value for key, value in FACTS.items() if key != name}) != fingerprint(FACTS)


def test_the_fingerprint_does_not_depend_on_the_order_of_keys():
    assert fingerprint(dict(reversed(FACTS.items()))) == fingerprint(FACTS)
    assert len(fingerprint(FACTS)) == 64


@given(st.permutations(list(FACTS)))
def test_no_order_of_facts_is_another_run(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("order") / "run"
    Journal(folder, FACTS).add("unit", 1.0)
    assert Journal(folder, {name: FACTS[name] for name in names}).results == {"unit": 1.0}
