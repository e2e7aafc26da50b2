"""Pushing: the real client against a Hub on loopback; what arrives, what stays as it was, and what loads from there."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import run_command as run
from conftest import tiny_model
from hub_server import DROP, HALVE, LOSE, READING, WRITING, Repository
from huggingface_hub import HfApi, ModelCard, parse_eval_result_entries
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_cptquant import CPTQuantConfig, CPTQuantError, cli
from hf_cptquant.card import BEGIN, END
from hf_cptquant.checkpoint import add_results
from hf_cptquant.errors import CheckpointError, HubError
from hf_cptquant.hub import Target, push_folder
from hf_cptquant.results import Provenance, figure

SETTINGS = {"bits": (3, 4), "group_size": 32, "quality": "fast", "sequence_length": 32, "num_samples": 4}
WEIGHTS = {
    "config.json",
    "model.safetensors",
    "cptquant_plan.json",
    "cptquant_plan.png",
    "cptquant_sensitivity.png",
    "README.md",
    "generation_config.json",
}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
REPO = "me/llama-q"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A folder with a dense Llama and a tokenizer of as many words."""
    folder = tmp_path_factory.mktemp("source") / "llama"
    tiny_model("llama").save_pretrained(folder)
    words = Tokenizer(WordLevel({"?": 0, **{f"w{index}": index for index in range(1, 512)}}, unk_token="?"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(source, tokens):
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=CPTQuantConfig(dataset=tokens, **SETTINGS))


@pytest.fixture(scope="module")
def saved(model, source, tmp_path_factory) -> Path:
    """The folder that the model was saved to, with the tokenizer. Not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "llama-saved"
    model.save_pretrained(folder, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def pushed(hub, repo: str = REPO, ref: str = "main") -> dict[str, bytes]:
    files = hub.repositories[repo].files(ref)
    del files[".gitattributes"]
    return files


def commits(hub, repo: str = REPO) -> int:
    """Besides that which makes the repository."""
    return len(hub.repositories[repo].commits) - 1


def card_of(hub, repo: str = REPO, ref: str = "main") -> str:
    return pushed(hub, repo, ref)["README.md"].decode()


def edit(hub, path: str, content: str, repo: str = REPO) -> None:
    """What somebody does on the website."""
    found = hub.repositories[repo]
    files = {**found.commits[found.refs["main"]], path: (content.encode(), False)}
    found.commit("main", files, f"Update {path}")


# What arrives


def test_everything_arrives_in_one_commit(model, hub, source, tmp_path):
    commit = model.push_to_hub(REPO, private=True, commit_message="Here it is", tags=["mine"], max_shard_size="60KB")
    found, files = hub.repositories[REPO], pushed(hub)
    assert commits(hub) == 1
    assert found.private
    assert (commit.oid, found.messages[commit.oid]) == (found.refs["main"], "Here it is")
    assert files.keys() >= (WEIGHTS - {"model.safetensors"}) | TOKENIZER | {"model.safetensors.index.json"}
    assert sum(name.startswith("model-") for name in files) > 1
    assert files["tokenizer.json"] == (source / "tokenizer.json").read_bytes()
    model.save_pretrained(tmp_path / "saved", max_shard_size="60KB")
    for path in (tmp_path / "saved").iterdir():
        if path.name != "README.md":
            assert files[path.name] == path.read_bytes(), path.name
    card = card_of(hub)
    assert f"\n# {REPO}\n" in card
    assert f'from_pretrained("{REPO}")' in card
    assert {"cptquant", "mine"} <= set(ModelCard(card).data.tags)
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", card)
    assert pictures == ["cptquant_plan.png", "cptquant_sensitivity.png"]
    assert all(files[picture].startswith(b"\x89PNG") for picture in pictures)


def test_a_missing_tokenizer_is_a_warning(tiny_folder, tokens, hub, logged):
    config = CPTQuantConfig(dataset=tokens, **SETTINGS)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("opt"), quantization_config=config)
    model.push_to_hub(REPO)
    assert pushed(hub).keys() == WEIGHTS  # and not the empty one that transformers makes of OPT's folder
    assert f'push it with tokenizer.push_to_hub("{REPO}")' in logged.text
    assert "push_to_hub" in model.__dict__
    assert "push_to_hub" not in model.dequantize().__dict__  # a dense model is pushed by transformers


def test_saving_pushes_the_folder_under_its_name(model, hub, tmp_path):
    model.save_pretrained(tmp_path / "llama-saved", push_to_hub=True, commit_message="Saved")
    assert pushed(hub, "me/llama-saved").keys() >= WEIGHTS | TOKENIZER
    assert '("me/llama-saved")' in card_of(hub, "me/llama-saved")
    assert '("llama-saved")' in (tmp_path / "llama-saved" / "README.md").read_text()
    model.save_pretrained(tmp_path / "llama-saved", push_to_hub=True, repo_id=REPO, revision="v2", token=WRITING)
    assert pushed(hub, ref="v2").keys() >= WEIGHTS
    model.save_pretrained(tmp_path / "elsewhere", push_to_hub=True, repo_id="me/none", is_main_process=False)
    assert "me/none" not in hub.repositories


def test_branches_and_pull_requests(model, hub):
    commit = model.push_to_hub(REPO, revision="v2")
    assert commit.oid == hub.repositories[REPO].refs["v2"]
    assert not pushed(hub)
    assert pushed(hub, ref="v2").keys() >= WEIGHTS | TOKENIZER
    commit = model.push_to_hub(REPO, create_pr=True)
    assert commit.pr_url == f"{hub.url}/{REPO}/discussions/1"
    assert not pushed(hub)
    assert pushed(hub, ref="refs/pr/1").keys() >= WEIGHTS | TOKENIZER

    theirs = hub.repositories["you/theirs"] = Repository()
    theirs.commit("main", {".gitattributes": (b"", False)}, "initial commit")
    with pytest.raises(HubError, match="may write there, or create_pr=True"):
        model.push_to_hub("you/theirs")
    model.push_to_hub("you/theirs", create_pr=True)
    assert pushed(hub, "you/theirs", "refs/pr/1").keys() >= WEIGHTS


def test_only_what_has_changed_is_committed_and_stale_weights_go(model, hub, logged):
    model.push_to_hub(REPO, max_shard_size="60KB")
    edit(hub, "notes.txt", "mine")
    sent = hub.count("PUT", "/storage/")
    model.push_to_hub(REPO, max_shard_size="60KB")
    assert commits(hub) == 2
    assert hub.count("PUT", "/storage/") == sent
    model.push_to_hub(REPO)
    assert commits(hub) == 3
    assert [name for name in pushed(hub) if name.startswith("model")] == ["model.safetensors"]
    assert pushed(hub)["notes.txt"] == b"mine"


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of the saved folder."""
    return shutil.copytree(saved, tmp_path / "llama-copy")


def test_accuracies_on_benchmarks_go_to_their_leaderboards(folder, hub):
    source = Provenance("imdb", "test", 40, 32, 40, 3, "0" * 64, None)
    accuracy = figure(source, "accuracy", np.linspace(0, 1, 40))
    add_results(folder, [accuracy, figure(source, "kl_divergence", np.ones(40))])
    push_folder(folder, Target(REPO))
    assert not [name for name in pushed(hub) if name.startswith(".")]  # the dataset is no benchmark
    imdb = hub.repositories["stanfordnlp/imdb"] = Repository()
    tasks = "tasks:\n- {id: all, config: default, split: test}\n- {id: other, config: default, split: train}\n"
    imdb.commit("main", {"eval.yaml": (f"name: IMDB\n{tasks}".encode(), False)}, "initial commit")
    push_folder(folder, Target(REPO))
    (entry,) = parse_eval_result_entries(yaml.safe_load(pushed(hub)[".eval_results/hf-cptquant.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("stanfordnlp/imdb", "all", accuracy.value)
    assert "40 texts" in entry.notes


def test_hidden_files_stay(folder, hub):
    (folder / ".env").write_text("secret")
    (folder / "more" / ".cache").mkdir(parents=True)
    (folder / "more" / ".cache" / "file").write_text("secret")
    (folder / "more" / "file").write_text("to be seen")
    push_folder(folder, Target(REPO))
    assert pushed(hub)["more/file"] == b"to be seen"
    assert b"secret" not in b"".join(pushed(hub).values())


# The card


def test_what_somebody_wrote_on_the_hub_is_kept(model, hub):
    model.push_to_hub(REPO)
    first = card_of(hub)
    part = first[first.index(BEGIN) : first.index(END)]
    mine = f"---\nlicense: mit\n---\r\n\r\nRead this.\r\n\n{BEGIN}\nold\n{END}\n\nThe end.\n"
    edit(hub, "README.md", mine)
    model.push_to_hub(REPO)
    assert card_of(hub) == mine.replace(f"{BEGIN}\nold\n", part)
    edit(hub, "README.md", "# All mine\n")
    model.push_to_hub(REPO)
    assert card_of(hub) == f"# All mine\n\n{part}{END}\n"


def test_a_text_in_the_folder_that_is_not_pushed_is_said(folder, hub, logged):
    card = folder / "README.md"
    card.write_text(f"{card.read_text()}\nOf the folder.\n")
    push_folder(folder, Target(REPO))
    assert "Of the folder." in card_of(hub)
    push_folder(folder, Target(REPO))
    assert "different text" not in logged.text
    edit(hub, "README.md", card_of(hub).replace("Of the folder.", "Of the Hub."))
    push_folder(folder, Target(REPO))
    assert "Of the Hub." in card_of(hub)
    assert "README.md in the folder and in me/llama-q have different text" in logged.text


def test_an_edit_while_files_are_uploaded_is_kept(model, hub, monkeypatch):
    model.push_to_hub(REPO)
    original = HfApi.preupload_lfs_files
    edits = iter([card_of(hub) + "\nWritten meanwhile.\n"])

    def preupload(*args, **kwargs):
        original(*args, **kwargs)
        for text in edits:
            edit(hub, "README.md", text)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", preupload)
    model.push_to_hub(REPO, tags=["new"])
    assert card_of(hub).endswith("\nWritten meanwhile.\n")
    assert "new" in ModelCard(card_of(hub)).data.tags


@pytest.mark.parametrize("first", ["tokenizer", "model"])
def test_the_callers_tokenizer_and_our_card_stay_in_either_order(first, model, hub, source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.model_max_length = 33
    for part in (tokenizer, model) if first == "tokenizer" else (model, tokenizer):
        part.push_to_hub(REPO)
    card = card_of(hub)
    assert "More Information Needed" not in card  # of transformers' own card
    assert card.count(BEGIN) == card.count(END) == 1
    assert "cptquant" in ModelCard(card).data.tags
    assert b'"model_max_length": 33' in pushed(hub)["tokenizer_config.json"]


def test_the_tokenizer_of_the_settings_is_pushed(tiny_folder, source, tokens, hub):
    config = CPTQuantConfig(dataset=tokens, tokenizer=source, **SETTINGS)
    AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), quantization_config=config).push_to_hub(REPO)
    assert pushed(hub)["tokenizer.json"] == (source / "tokenizer.json").read_bytes()


# What goes wrong

REFUSALS = {
    "making the repository": ("POST", "/repos/create", 500, "Push again", 1),
    "looking it up": ("GET", "/api/models/", 503, "Push again", 1),
    "modes of upload": ("POST", "/preupload/", 500, "Push again", 6),
    "a batch": ("POST", "/objects/batch", 503, "Push again", 6),
    "an upload": ("PUT", "/storage/", 403, "may write there", 1),
    "uploads that break": ("PUT", "/storage/", DROP, "Error while uploading", 6),
    "a forbidden commit": ("POST", "/commit/", 403, "may write there", 1),
    "another commit": ("POST", "/commit/", 409, "failed at the commit", 3),
    "a commit and troubles": ("POST", "/commit/", 502, "failed at the commit", 3),
    "a commit that is cut off": ("POST", "/commit/", DROP, "If only the answer was lost", 3),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_one_error_after_few_tries_and_change_nothing(case, saved, hub, logged):
    method, path, how, message, tries = REFUSALS[case]
    hub.fail(method, path, how, times=1000)
    with pytest.raises(HubError, match=f"pushing to {REPO} failed") as caught:
        push_folder(saved, Target(REPO))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    asked = Counter(url for asked, url in hub.requests if asked == method and path in url)
    assert max(asked.values()) == tries
    assert max(hub.waits, default=0) <= 8
    assert REPO not in hub.repositories if path == "/repos/create" else commits(hub) == 0
    assert WRITING not in logged.text + str(caught.value)


def test_a_token_that_the_hub_does_not_know_is_one_error(saved, hub, logged):
    with pytest.raises(HubError, match="Log in with `hf auth login`") as caught:
        push_folder(saved, Target(REPO, token="hf_unknownToTheHub"))
    assert not hub.repositories
    assert "hf_unknownToTheHub" not in logged.text + str(caught.value)


def test_what_has_arrived_is_not_sent_again(saved, hub):
    push_folder(saved, Target("me/other"))  # to know the files
    shards = sorted(oid for oid in hub.repositories["me/other"].objects)
    assert len(shards) > 3
    hub.fail("PUT", f"/storage/{REPO}/{shards[0]}", DROP, times=100)
    with pytest.raises(HubError, match="what has arrived is not sent again"):
        push_folder(saved, Target(REPO))
    assert commits(hub) == 0
    arrived = hub.repositories[REPO].objects.keys()
    assert arrived == set(shards[1:])
    hub.failures.clear()
    hub.requests.clear()
    push_folder(saved, Target(REPO))
    assert [url for method, url in hub.requests if method == "PUT"] == [f"/storage/{REPO}/{shards[0]}"]
    assert pushed(hub).keys() == pushed(hub, "me/other").keys()


@pytest.mark.parametrize("how", [DROP, 500])
def test_an_upload_that_breaks_once_goes_on(how, saved, hub):
    hub.fail("PUT", "/storage/", how)
    hub.fail("POST", "/commit/", how)
    push_folder(saved, Target(REPO))
    assert commits(hub) == 1
    assert pushed(hub).keys() == {path.name for path in saved.iterdir()}
    assert hub.waits == [1, 1]


def test_a_commit_whose_answer_is_lost_is_not_made_twice(saved, hub):
    hub.fail("POST", "/commit/", LOSE)
    commit = push_folder(saved, Target(REPO))
    assert commits(hub) == 1
    assert commit.oid == hub.repositories[REPO].refs["main"]
    hub.fail("POST", "/commit/", LOSE)
    with pytest.raises(HubError, match="If only the answer was lost"):
        push_folder(saved, Target(REPO, create_pr=True, tags=("more",)))
    assert "refs/pr/1" in hub.repositories[REPO].refs
    assert "refs/pr/2" not in hub.repositories[REPO].refs


def test_what_is_no_quantized_model_is_refused(source, hub, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no quantized model: there is no cptquant_plan\.json"):
        push_folder(source, Target(REPO))
    with pytest.raises(CPTQuantError, match="holds no quantized model"):
        push_folder(tmp_path / "nowhere", Target(REPO))
    assert not hub.requests


def test_a_name_that_is_not_possible_is_one_error(saved, hub):
    with pytest.raises(HubError, match=r"pushing to me/a/b failed"):
        push_folder(saved, Target("me/a/b"))
    assert not hub.repositories


def test_without_a_network_the_error_says_so(saved, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="offline mode"):
        push_folder(saved, Target(REPO))


def test_the_token_is_nowhere(model, hub, logged, tmp_path):
    libraries = transformers.utils.logging, huggingface_hub.utils.logging
    for library in libraries:
        library.set_verbosity_debug()
    hub.fail("PUT", "/storage/", 500)
    try:
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id=REPO, token=WRITING)
    finally:
        for library in libraries:
            library.set_verbosity_warning()
    assert "/commit/main" in logged.text
    assert WRITING not in logged.text
    assert WRITING not in repr(Target(REPO, token=WRITING))
    saved = [path.read_bytes() for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert WRITING.encode() not in b"".join([*saved, *pushed(hub).values()])


# Commands


def test_push_command(model, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "saved"
    model.save_pretrained(folder)
    arguments = ["--private", "--revision", "v2", "--commit-message", "From a terminal"]
    assert run("push", folder, REPO, *arguments) == 0
    found = hub.repositories[REPO]
    assert found.private
    assert found.messages[found.refs["v2"]] == "From a terminal"
    assert f"Pushed to {hub.url}/{REPO}/commit/{found.refs['v2']}" in capsys.readouterr().out
    assert not pushed(hub, ref="v2").keys() & TOKENIZER  # a folder's source model is known to nobody else
    assert run("push", folder, REPO, "--create-pr") == 0
    assert f"Pushed to {hub.url}/{REPO}/discussions/1" in capsys.readouterr().out

    monkeypatch.setenv("HF_TOKEN", READING)
    assert run("push", folder, "me/other") == 1
    error = capsys.readouterr().err
    assert error.count("Error:") == 1
    assert "may write there" in error
    assert READING not in error


def test_quantize_pushes_what_it_writes(source, hub, tmp_path, capsys):
    (tmp_path / "data.txt").write_text(" ".join(f"w{index}" for index in range(512)))
    data = ["--dataset", tmp_path / "data.txt", "--num-samples", 2, "--sequence-length", 32, "--group-size", 32]
    options = ["--quality", "fast", "--max-shard-size", "60KB", "--push-to-hub", REPO, "--private"]
    assert run("quantize", source, "-o", tmp_path / "out", *data, *options) == 0
    assert commits(hub) == 1
    assert hub.repositories[REPO].private
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    files = pushed(hub)
    del written["README.md"], files["README.md"]
    assert files == written
    assert f"Pushed to {hub.url}/{REPO}/commit/" in capsys.readouterr().out


def test_the_example_pushes_and_loads(source, hub, tmp_path, capsys, monkeypatch):
    (tmp_path / "data.txt").write_text(" ".join(f"w{index}" for index in range(512)))
    monkeypatch.setattr(sys, "argv", ["", str(source), REPO, str(tmp_path / "data.txt")])
    runpy.run_path(str(Path(__file__).parent.parent / "examples" / "quantize_and_push.py"))
    url, sentence = capsys.readouterr().out.splitlines()
    assert url == f"{hub.url}/{REPO}/commit/{hub.repositories[REPO].refs['main']}"
    assert sentence.startswith("? w")


@pytest.mark.parametrize(
    ("token", "repo", "message"),
    [(READING, REPO, "may only read"), ("hf_x", REPO, "Log in"), ("", REPO, "token"), (WRITING, "me/a b", "me/a b")],
)
def test_what_cannot_be_pushed_is_not_quantized(token, repo, message, source, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert run("quantize", source, "-o", tmp_path / "out", "--push-to-hub", repo) == 1
    error = capsys.readouterr().err
    assert error.count("Error:") == 1
    assert message in error
    assert not hub.repositories


# Loading it again

LOAD = """
import sys, torch, hf_cptquant
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1000  # what has arrived of a file is in its place by then
from transformers import AutoModelForCausalLM, AutoTokenizer
found = {}
for revision in ("main", "v2"):
    model = AutoModelForCausalLM.from_pretrained("me/llama-q", revision=revision)
    tokens = AutoTokenizer.from_pretrained("me/llama-q", revision=revision)("w5 w17 w300", return_tensors="pt")
    with torch.no_grad():
        found[revision] = (tokens["input_ids"], model(**tokens).logits, str(model.hf_quantizer.record.plan))
torch.save(found, sys.argv[1])
"""


def test_it_loads_from_the_hub_in_a_new_process_by_revision_too(model, source, tokens, hub, tmp_path):
    model.push_to_hub(REPO, private=True)
    other = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=CPTQuantConfig(dataset=tokens, **{**SETTINGS, "bits": (8,)})
    )
    other.push_to_hub(REPO, revision="v2", max_shard_size="60KB")
    hub.fail("GET", "/cdn/", HALVE)
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_TOKEN": WRITING, "PYTHONWARNINGS": "ignore"}
    script = [sys.executable, "-c", LOAD, str(tmp_path / "out.pt")]
    hub.requests.clear()
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + str(hub.requests)
    assert WRITING not in done.stdout + done.stderr
    assert hub.count("GET", "/cdn/.* bytes=[1-9]") > 0  # the file that broke off went on where it was
    loaded = torch.load(tmp_path / "out.pt")
    for revision, expected in (("main", model), ("v2", other)):
        tokens, logits, plan = loaded[revision]
        assert torch.equal(tokens, AutoTokenizer.from_pretrained(source)("w5 w17 w300", return_tensors="pt").input_ids)
        with torch.no_grad():
            assert torch.equal(logits, expected(tokens).logits)
        assert plan == str(expected.hf_quantizer.record.plan)
