"""Every example runs as it stands, most of them on a tiny random model in the place of the bundled one."""

import json
import re
import runpy
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
from conftest import run_command, tiny_model
from datasets import Dataset
from nbclient import NotebookClient
from transformers import AutoTokenizer

from hf_cptquant import demo

EXAMPLES = Path(__file__).parent.parent / "examples"
ELSEWHERE = {  # tests/test_hub.py pushes; lm_eval and vllm (serve_with_vllm.sh) live in environments of their own
    "quantize_and_push.py",
    "evaluate_with_lm_eval.py",
    "serve_with_vllm.py",
    "classify_with_pmpq.py",  # below, with data
}
ALONE = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in ELSEWHERE)


def run(name: str, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture(scope="module")
def small_tokenizer(minilm, texts):
    """MiniLM's, with a vocabulary of 512 that fits the tiny models."""
    return AutoTokenizer.from_pretrained(minilm).train_new_from_iterator(texts[::10], 512)


@pytest.fixture(scope="module")
def tiny_bundled_model(small_tokenizer, tmp_path_factory):
    """A folder with what stands in the place of the bundled model."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    tiny_model("llama", max_position_embeddings=512).save_pretrained(folder)
    small_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in ALONE if name != "lora_on_quantized_model.py"])
def test_examples_run(name, tiny_bundled_model, tmp_path, monkeypatch, capsys):
    def write(folder: Path) -> None:
        shutil.copytree(tiny_bundled_model, folder, dirs_exist_ok=True)

    monkeypatch.setattr(demo, "write_bundled_model", write)
    monkeypatch.chdir(tmp_path)
    run(name, monkeypatch=monkeypatch)
    printed = capsys.readouterr().out
    assert printed
    assert "nan" not in printed


def test_lora_on_a_quantized_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("lora_on_quantized_model.py", monkeypatch=monkeypatch)
    before, after, loaded = map(float, re.findall(r"\d+\.\d+", capsys.readouterr().out))
    assert after < 0.8 * before
    assert loaded < after  # the loss is printed before the last step


def test_a_classifier_by_accuracy(tiny_folder, tmp_path, monkeypatch, capsys):
    reviews = [
        {"text": f"{word} film number {index}", "label": index % 2} for index, word in enumerate(["A", "The"] * 8)
    ]
    Dataset.from_list(reviews).to_parquet(tmp_path / "reviews.parquet")
    data = tmp_path / "reviews.parquet"
    run("classify_with_pmpq.py", tiny_folder("bert-classifier"), data, data, monkeypatch=monkeypatch)
    assert re.search(r"^accuracy: 0\.\d+ before, 0\.\d+, between", capsys.readouterr().out, re.MULTILINE)


def test_what_vllm_is_to_serve_keeps_its_rules(tiny_folder, small_tokenizer, texts, tmp_path, monkeypatch, capsys):
    """The commands in the example's head, on a model whose shapes vLLM's kernels take; the example itself with vLLM."""
    source = (EXAMPLES / "serve_with_vllm.py").read_text(encoding="utf-8")
    quantize, check = (shlex.split(line)[1:] for line in re.findall(r"^    (cptquant .*)$", source, re.MULTILINE))
    folder = tiny_folder("opt", hidden_size=128, word_embed_proj_dim=128, ffn_dim=256)
    small_tokenizer.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    Path("help.txt").write_text("\n".join(texts), encoding="utf-8")
    quantize[quantize.index("facebook/opt-125m")] = str(folder)
    small = ("--quality", "fast", "--dataset", "help.txt", "--num-samples", 2, "--sequence-length", 32)
    assert run_command(*quantize, *small) == 0
    assert run_command(*check) == 0
    assert "keeps the rules of vLLM" in capsys.readouterr().out
    compile(source, "serve_with_vllm.py", "exec")
    if find_spec("vllm"):
        run("serve_with_vllm.py", "opt-125m-cptquant", monkeypatch=monkeypatch)


def test_the_task_for_the_harness_is_sound():
    lines = (EXAMPLES / "lm_eval" / "capitals.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 32
    for row in map(json.loads, lines):
        assert len(set(row["choices"])) == 4
        assert 0 <= row["answer"] < 4


def test_the_notebook_runs(tmp_path, tiny_bundled_model):
    """In a kernel, with the tiny model; every cell that shows a picture shows one."""
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    patch = (
        "import shutil\nfrom hf_cptquant import demo\n"
        f"demo.write_bundled_model = lambda folder: shutil.copytree({str(tiny_bundled_model)!r}, folder)"
    )
    notebook.cells.insert(0, nbformat.v4.new_code_cell(patch))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [set(output.get("data", {})) for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in kinds for kinds in shown) == 3
    assert sum("text/html" in kinds for kinds in shown) == 1


def test_the_stored_notebook_is_executed_and_small():
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    assert all(cell["execution_count"] for cell in notebook.cells if cell.cell_type == "code")
    assert not any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", ()))
    assert (EXAMPLES / "tour.ipynb").stat().st_size < 500_000
