"""Several processes: the work is divided, all end with the table of a single one, and the death of one is survived."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL_SETTINGS, tiny_model
from transformers import AutoModelForMaskedLM

from hf_cptquant import BitPlan, CPTQuantConfig, ranks
from hf_cptquant.errors import CPTQuantError
from hf_cptquant.pipeline import measure_sensitivity
from hf_cptquant.table import SensitivityTable

METHODS = {
    "pmpq": {"method": "pmpq"},
    "tdmpq": {"method": "tdmpq", "estimator": "perturbation"},
    "taylor": {"method": "tdmpq", "estimator": "taylor"},
    "cmpq": {"method": "cmpq"},
}
OPTIONS = ["--num-samples", "4", "--sequence-length", "32", "--group-size", "32", "--granularity", "group"]
FIXED = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # one graphics card is too few
UNCHANGED = "the unchanged model"
SCRIPT = """
from hf_cptquant import ranks

ranks.join()

import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM
from hf_cptquant import CPTQuantConfig
from hf_cptquant.pipeline import measure_sensitivity

folder = Path(sys.argv[1])
tokens = torch.load(folder / "tokens.pt")
for name, settings in json.loads((folder / "settings.json").read_text()).items():
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    table = measure_sensitivity(model, CPTQuantConfig(dataset=tokens, work_dir=folder / "work" / name, **settings))
    (folder / f"table-{name}-{ranks.rank()}.json").write_text(json.dumps(table.to_dict()))
ranks.leave()
"""
DYING = """
import os, sys
import torch
from hf_cptquant import cli

calls = 0

def die(module, *_):
    global calls
    calls += type(module).__name__ == "BertLayer"
    if calls == 60 and os.environ["RANK"] == "1":
        os._exit(3)

torch.nn.modules.module.register_module_forward_hook(die)
cli.main(sys.argv[1:])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def environment(**more: object) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    return {
        **clean,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **{name: str(value) for name, value in more.items()},
    }


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port")
ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"),
)  # on CPUs too: --cpu starts a single process, or several by MPI


def launch(*arguments: object, launcher: tuple[str, ...] = TORCHRUN) -> subprocess.CompletedProcess:
    """A program in two processes."""
    return subprocess.run(
        [sys.executable, *launcher, str(free_port()), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )


def keys_of(path: Path) -> list[str]:
    return [json.loads(line)[0] for line in path.read_text().splitlines() if line]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the processes that are started, so that sums are added in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_single_process_does_everything():
    ranks.join()
    assert ranks.rank() == 0
    assert list(ranks.share(["a", "b", "c"])) == ["a", "b", "c"]
    assert ranks.gather({"a": 1}) == [{"a": 1}]
    assert ranks.gather(None) == [None]
    ranks.leave()


@pytest.mark.parametrize(("size", "items"), [(2, 7), (3, 7), (4, 2), (5, 0)])
def test_shares_are_disjoint_complete_and_even(size, items, monkeypatch):
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: size)
    shares = []
    for rank in range(size):
        monkeypatch.setattr(ranks.dist, "get_rank", lambda rank=rank: rank)
        shares.append(list(ranks.share(range(items))))
    assert sorted(item for share in shares for item in share) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_death_of_another_process_is_an_error_that_says_how_to_go_on(monkeypatch):
    def gone(*_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(ranks.dist, "all_gather_object", gone)
    with pytest.raises(CPTQuantError, match=r"another of the 2 processes ended .*run the same command again.*by peer"):
        ranks.gather(1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tokens):
    """A folder with tiny llama, tokens, and what two processes made of them."""
    folder = tmp_path_factory.mktemp("two")
    tiny_model("llama").save_pretrained(folder / "model")
    torch.save(tokens, folder / "tokens.pt")
    (folder / "settings.json").write_text(json.dumps({name: {**SMALL_SETTINGS, **METHODS[name]} for name in METHODS}))
    (folder / "script.py").write_text(SCRIPT)
    process = launch(folder / "script.py", folder)
    assert process.returncode == 0, process.stderr
    (folder / "errors.txt").write_text(process.stderr)
    return folder


@pytest.fixture(scope="module")
def single(tokens):
    """Method → the table of a single process."""
    return {
        method: measure_sensitivity(
            tiny_model("llama"), CPTQuantConfig(dataset=tokens, **SMALL_SETTINGS, **METHODS[method])
        )
        for method in METHODS
    }


@pytest.mark.parametrize("method", METHODS)
def test_all_processes_end_with_the_table_of_a_single_one(method, llama, single):
    first, second = (SensitivityTable.load(llama / f"table-{method}-{rank}.json") for rank in (0, 1))
    assert first == second
    assert list(first.raw) == list(single[method].raw)
    assert max(map(abs, first.raw.values())) > 1e-3
    assert first.raw == pytest.approx(single[method].raw, abs=1e-7 if method == "taylor" else 0)
    assert first.base == pytest.approx(single[method].base, rel=1e-6 if method == "taylor" else 0)
    assert (first.fingerprint, first.settings) == (single[method].fingerprint, single[method].settings)
    assert first.correlations == single[method].correlations
    assert first.costs.keys() == single[method].costs.keys()
    for unit, costs in single[method].costs.items():
        assert first.costs[unit] == pytest.approx(costs, abs=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_the_work_is_divided(method, llama, single):
    (work,) = (llama / "work" / method).iterdir()
    units = len(single[method].raw)
    if method == "cmpq":  # one pass, which the first process makes
        assert [path.name for path in work.glob("results-*")] == ["results-0.jsonl"]
        assert keys_of(work / "results-0.jsonl") == ["correlations over input_ids"]
        return
    shares = [keys_of(work / f"results-{rank}.jsonl") for rank in (0, 1)]
    assert all(len(share) == len(set(share)) for share in shares)
    if method == "taylor":
        assert shares == [["sequences 0 to 2", "sequences 6 to 7"], ["sequences 3 to 5"]]
        return
    assert [share.count(UNCHANGED) for share in shares] == [1, 1]
    found = [set(share) - {UNCHANGED} for share in shares]
    assert [len(share) for share in found] == [units // 2, units // 2]
    assert found[0] | found[1] == set(single[method].raw)
    blocks = [sorted(single[method].blocks[unit] for unit in share) for share in found]
    assert blocks[0] == blocks[1]  # early blocks take longest: each process has as many of them


def test_a_new_run_of_two_processes_is_not_called_resumed(llama):
    assert "Resuming" not in (llama / "errors.txt").read_text()


@pytest.mark.parametrize("method", ["pmpq", "taylor", "cmpq"])
def test_a_single_process_reads_the_results_of_two(method, llama, tokens, tmp_path):
    shutil.copytree(llama / "work" / method, tmp_path / "work")
    config = CPTQuantConfig(dataset=tokens, **SMALL_SETTINGS, **METHODS[method], work_dir=tmp_path / "work")
    table = measure_sensitivity(tiny_model("llama"), config)
    assert table == SensitivityTable.load(llama / f"table-{method}-0.json")
    before, after = (
        sorted((path.name, path.read_bytes()) for path in folder.rglob("results-*"))
        for folder in (llama / "work" / method, tmp_path / "work")
    )
    assert before == after  # nothing had to be measured


@pytest.fixture
def bert(tiny_folder, tmp_path, texts):
    """A tiny BERT with a tokenizer, and a text."""
    (tmp_path / "data.txt").write_text("\n\n".join(texts[:4]))
    return tiny_folder("bert-mlm"), tmp_path / "data.txt"


def test_quantize_in_two_processes_writes_one_good_folder(bert, tmp_path):
    folder, data = bert
    output = tmp_path / "out"
    process = launch("-m", "hf_cptquant.cli", "quantize", folder, "-o", output, "--dataset", data, *OPTIONS)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("Written to") == 1
    model = AutoModelForMaskedLM.from_pretrained(output)
    plan = BitPlan.load(output)
    assert len({module.scheme.bits for module in plan.modules}) > 1
    reference = AutoModelForMaskedLM.from_pretrained(
        folder,
        quantization_config=CPTQuantConfig(
            dataset=str(data), num_samples=4, sequence_length=32, group_size=32, granularity="group"
        ),
    )
    assert plan == reference.hf_quantizer.record.plan
    ids = torch.arange(5, 25)[None]
    assert torch.equal(model(ids).logits, reference(ids).logits)


def test_sensitivity_under_accelerate_prints_and_writes_once(bert, tmp_path):
    folder, data = bert
    arguments = [folder, "-o", tmp_path / "table.json", "--plot", tmp_path / "plot.png", "--dataset", data, *OPTIONS]
    command = ["-m", "hf_cptquant.cli", "sensitivity", *arguments, "--method", "pmpq"]
    process = launch(*command, launcher=ACCELERATE)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("standard deviation from the mean sensitivity") == 1
    table = SensitivityTable.load(tmp_path / "table.json")
    config = CPTQuantConfig(
        method="pmpq", dataset=str(data), num_samples=4, sequence_length=32, group_size=32, granularity="group"
    )
    assert table.raw == measure_sensitivity(AutoModelForMaskedLM.from_pretrained(folder), config).raw
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_an_error_of_ours_is_told_and_ends_the_launch(bert, tmp_path):
    folder, _ = bert
    process = launch("-m", "hf_cptquant.cli", "quantize", folder, "-o", tmp_path / "out", "--dataset", "nowhere.txt")
    assert process.returncode != 0
    assert "nowhere.txt does not exist" in process.stderr
    assert not (tmp_path / "out").exists()


def sensitivity_arguments(bert, tmp_path) -> list[str]:
    folder, data = bert
    work = ["--work-dir", tmp_path / "work", "--method", "pmpq"]
    return [*map(str, ["sensitivity", folder, "-o", tmp_path / "table.json", "--dataset", data, *work]), *OPTIONS]


def resumed(bert, tmp_path) -> None:
    """A single process goes on from the work folder, repeats nothing, and ends with the exact table."""
    folder, data = bert
    settings = {"method": "pmpq", "dataset": str(data), "num_samples": 4, "sequence_length": 32, "group_size": 32}
    before = {path.name: keys_of(path) for path in (tmp_path / "work" / "pmpq").glob("results-*")}
    done = {key for keys in before.values() for key in keys}
    config = CPTQuantConfig(**settings, granularity="group", work_dir=tmp_path / "work")
    table = measure_sensitivity(AutoModelForMaskedLM.from_pretrained(folder), config)
    after = {path.name: keys_of(path) for path in (tmp_path / "work" / "pmpq").glob("results-*")}
    added = after["results-0.jsonl"][len(before.get("results-0.jsonl", ())) :]
    assert done - {UNCHANGED}
    assert added
    assert not done & set(added)
    assert done | set(added) == {UNCHANGED, *table.raw}
    fresh = CPTQuantConfig(**settings, granularity="group")
    assert table == measure_sensitivity(AutoModelForMaskedLM.from_pretrained(folder), fresh)


def test_a_process_that_dies_under_a_launcher_ends_the_run_and_loses_nothing(bert, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    process = launch(tmp_path / "dying.py", *sensitivity_arguments(bert, tmp_path))
    assert process.returncode != 0
    assert "exitcode" in process.stderr
    assert not (tmp_path / "table.json").exists()
    resumed(bert, tmp_path)


def test_a_process_whose_companion_died_says_so_in_one_line(bert, tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    where = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    processes = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "dying.py"), *sensitivity_arguments(bert, tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(RANK=rank, LOCAL_RANK=rank, **where),
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert processes[1].returncode == 3
    assert processes[0].returncode == 1
    error = outputs[0][1]
    assert error.count("Error: another of the 2 processes ended before its share was done") == 1
    assert "run the same command again" in error
    assert "Traceback" not in error
    assert not (tmp_path / "table.json").exists()
    resumed(bert, tmp_path)
