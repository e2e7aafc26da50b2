"""Calibration data of every kind, and what is said when they cannot be used."""

import copy
import json

import datasets
import pandas as pd
import pytest
import torch
from transformers import AutoTokenizer

from hf_cptquant.calibration import ModelFacts, load_calibration, spread_evenly
from hf_cptquant.errors import CalibrationError
from hf_cptquant.recipe import Recipe


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return AutoTokenizer.from_pretrained(minilm)


@pytest.fixture
def load(minilm):
    def run(task="causal-lm", vocabulary=30522, max_length=512, name=None, **settings):
        recipe = Recipe(**{"sequence_length": 32, "num_samples": 8, **settings})
        return load_calibration(recipe, ModelFacts(task, vocabulary, max_length, str(name or minilm)))

    return run


def all_ids(calibration) -> torch.Tensor:
    return torch.cat([batch["input_ids"] for batch in calibration.batches])


def test_every_form_of_the_same_text_gives_the_same_tokens(load, texts, tmp_path):
    documents = [text for text in texts[:6] if text.strip()]
    frame = pd.DataFrame({"text": documents})
    frame.to_parquet(tmp_path / "data.parquet")
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    (tmp_path / "data.txt").write_text("\n\n".join(documents))
    forms = [
        documents,
        datasets.Dataset.from_pandas(frame),
        tmp_path / "data.parquet",
        str(tmp_path / "data.jsonl"),
        str(tmp_path / "data.txt"),
    ]
    loaded = [load(dataset=form) for form in forms]
    hashes = {calibration.description["sha256"] for calibration in loaded}
    assert len(hashes) == 1
    assert all_ids(loaded[0]).shape == (8, 32)


def test_windows_are_pieces_of_the_text_in_order(load, texts, tokenizer):
    document = texts[3]
    stream = tokenizer(document + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
    pieces = [stream[start : start + 32] for start in range(0, len(stream) - 31, 32)]
    rows = all_ids(load(dataset=[document], num_samples=3)).tolist()
    positions = [pieces.index(row) for row in rows]
    assert len(rows) == 3
    assert positions == sorted(set(positions))
    everything = all_ids(load(dataset=[document], num_samples=10_000)).tolist()
    assert everything == pieces


def test_seed_decides_the_windows_and_batch_size_does_not(load, texts):
    first, again, other = (load(dataset=texts, seed=seed) for seed in (0, 0, 1))
    assert first.description == again.description != other.description
    split = load(dataset=texts, batch_size=3)
    assert [len(batch["input_ids"]) for batch in split.batches] == [3, 3, 2]
    assert torch.equal(all_ids(split), all_ids(first))


@pytest.mark.parametrize(("wanted", "rows"), [(1, [0]), (128, [0, 2, 4, 6]), (96, [0, 2, 5]), (10**9, range(8))])
def test_some_sequences_are_chosen_evenly(load, texts, wanted, rows):
    calibration = load(dataset=texts, batch_size=3)
    chosen = spread_evenly(calibration, wanted)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in chosen]), all_ids(calibration)[list(rows)])
    assert max(len(batch["input_ids"]) for batch in chosen) <= 3


def test_causal_labels_are_the_inputs(load, texts):
    for batch in load(dataset=texts).batches:
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert bool(batch["attention_mask"].all())


def test_masked_windows_have_equally_many_masks_and_the_right_labels(load, texts, tokenizer):
    document = [texts[3][:4000]]  # short, so that both draw from the same windows
    plain = all_ids(load(dataset=document, sequence_length=30))
    (batch,) = load("masked-lm", dataset=document, sequence_length=32).batches
    inputs, labels = batch["input_ids"], batch["labels"]
    masked = labels != -100
    assert masked.sum(1).tolist() == [round(0.15 * 30)] * 8
    assert bool((inputs[masked] == tokenizer.mask_token_id).all())
    assert bool((inputs[:, 0] == tokenizer.cls_token_id).all() and (inputs[:, -1] == tokenizer.sep_token_id).all())
    assert torch.equal(torch.where(masked, labels, inputs)[:, 1:-1], plain)


def test_encoder_decoder_windows_are_split_in_halves(load, tokens):
    (batch,) = load("seq2seq-lm", dataset=tokens).batches
    assert torch.equal(torch.cat((batch["input_ids"], batch["labels"]), 1), tokens)


def test_classifier_rows_are_padded_texts_with_their_labels(load, tokenizer):
    dataset = datasets.Dataset.from_dict(
        {"text": ["good", "a very bad film", ""], "label": [1, 0, 1], "id": ["a", "b", "c"]}
    )
    (batch,) = load("sequence-classification", dataset=dataset, label_column="label").batches
    assert batch["labels"].tolist() == [1, 0]
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["good", "a very bad film"]
    assert batch["attention_mask"].sum(1).tolist() == [3, 6]
    (unlabelled,) = load("sequence-classification", dataset=["good", "bad"]).batches
    assert "labels" not in unlabelled


def test_token_tensors_need_no_tokenizer(load, tokens, tmp_path):
    assert torch.equal(all_ids(load(dataset=tokens, name=tmp_path)), tokens)
    stream = [tokens[0], tokens[1, :20]]
    rows = all_ids(load(dataset=stream, name=tmp_path, sequence_length=13))
    assert torch.equal(rows.flatten(), torch.cat(stream))


def test_sequences_are_no_longer_than_the_model_allows(load, texts):
    assert all_ids(load(dataset=texts, sequence_length=2048, max_length=40)).shape[1] == 40
    assert all_ids(load(dataset=texts, sequence_length=2048, max_length=None)).shape[1] == 512  # the tokenizer's limit


@pytest.mark.parametrize("name", ["wikitext2", "c4", "imdb"])
def test_hub_datasets_without_a_network_name_the_ways_that_need_none(load, name):
    with pytest.raises(CalibrationError, match=rf"'{name}' is on the Hugging Face Hub.*list of strings.*token tensors"):
        load(dataset=name)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("wikitext2", ("Salesforce/wikitext", "wikitext-2-raw-v1")),
        ("c4", ("allenai/c4", "en")),
        ("imdb", ("stanfordnlp/imdb",)),
    ],
)
def test_hub_datasets_are_asked_for_by_name(load, name, arguments, texts, monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append(args)
        rows = {"text": texts[:40], "label": [index % 2 for index in range(40)]}
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = "sequence-classification" if name == "imdb" else "causal-lm"
    calibration = load(task, dataset=name)
    assert asked == [arguments]
    assert calibration.description["source"] == name
    assert ("labels" in calibration.batches[0]) is True


BAD_DATA = {
    "nothing given": ({}, "no calibration data.*wikitext2.*list of strings"),
    "no texts": ({"dataset": []}, "hold no text"),
    "blank texts": ({"dataset": ["", "  \n"]}, "hold no text"),
    "too short": (
        {"dataset": ["three short words"]},
        r"hold \d tokens, not even one sequence of 32: .*sequence_length",
    ),
    "missing file": ({"dataset": "nowhere.txt"}, "nowhere.txt does not exist"),
    "column": (
        {"dataset": datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]})},
        r"no text column.*text_column=.*'a', 'b'",
    ),
    "wrong column": (
        {"dataset": datasets.Dataset.from_dict({"a": ["x"]}), "text_column": "b"},
        r"text column b.*\['a'\]",
    ),
    "no text at all": ({"dataset": datasets.Dataset.from_dict({"n": [1]})}, "no text column"),
    "float tokens": ({"dataset": torch.rand(2, 32)}, "must be integers"),
    "big tokens": ({"dataset": torch.full((2, 32), 30522)}, "ids from 30522 to 30522 do not fit .* 30522"),
    "negative tokens": ({"dataset": torch.full((2, 32), -1)}, "do not fit"),
    "object": ({"dataset": object()}, "dataset= is object"),
    "tokenizer object": ({"dataset": ["x"], "tokenizer": object()}, "tokenizer= is object"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_unusable_data(load, case):
    settings, message = BAD_DATA[case]
    with pytest.raises(CalibrationError, match=message):
        load(**settings)


def test_damaged_files(load, tmp_path):
    for name in ("data.parquet", "data.jsonl"):
        (tmp_path / name).write_bytes(b"{not valid")
        with pytest.raises(CalibrationError, match=rf"{name} cannot be read"):
            load(dataset=tmp_path / name)
    (tmp_path / "data.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CalibrationError, match="cannot be read"):
        load(dataset=tmp_path / "data.txt")


def test_labels_must_exist(load):
    dataset = datasets.Dataset.from_dict({"text": ["x"]})
    with pytest.raises(CalibrationError, match=r"no label column 'stars'; its columns are \['text'\]"):
        load("sequence-classification", dataset=dataset, label_column="stars")


def test_missing_tokenizer_and_one_of_another_vocabulary(load, texts, tmp_path):
    with pytest.raises(CalibrationError, match=r"no tokenizer at .*tokenizer="):
        load(dataset=texts, name=tmp_path)
    for vocabulary in (30521, 49152):
        with pytest.raises(
            CalibrationError, match=f"has 30522 tokens and the model {vocabulary}: it belongs to another model"
        ):
            load(dataset=texts, vocabulary=vocabulary)


def test_a_masked_model_needs_a_mask_token(load, texts, tokenizer):
    without = copy.deepcopy(tokenizer)
    without.mask_token = None
    with pytest.raises(CalibrationError, match="has no mask token"):
        load("masked-lm", dataset=texts, tokenizer=without)
