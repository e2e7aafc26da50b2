"""`cptquant evaluate` and `cptquant card`: models in folders, what is written beside them, and what is not touched."""

import gc
import json
import os
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import run_command as run
from conftest import tiny_model
from huggingface_hub import ModelCard
from test_card import rows_of
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from hf_cptquant import CPTQuantConfig, evaluate_model, folder_evaluation
from hf_cptquant.checkpoint import add_results, describe, rewrite_record, save_checkpoint
from hf_cptquant.errors import CheckpointError, EvaluationError, PlanError
from hf_cptquant.folder_evaluation import evaluate_folder, uniform_control
from hf_cptquant.pipeline import decide
from hf_cptquant.plan import PLAN_PICTURE
from hf_cptquant.record import QuantizationRecord
from hf_cptquant.results import tabulate

SMALL = {"sequence_length": 32, "batch_size": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokens):
    """A tiny model in bfloat16, and the same quantized."""
    root = tmp_path_factory.mktemp("models")
    tiny_model("llama").to(torch.bfloat16).save_pretrained(root / "original")
    settings = {"dataset": tokens, "target_bits": 5.0, "bits": (4, 8), "group_size": 32, "quality": "fast"}
    quantized = AutoModelForCausalLM.from_pretrained(
        root / "original", quantization_config=CPTQuantConfig(**settings, sequence_length=32)
    )
    quantized.save_pretrained(root / "quantized")
    return root / "original", root / "quantized"


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the quantized model to write into."""
    return shutil.copytree(folders[1], tmp_path / "quantized")


def state_of(folder):
    return {path.name: (path.stat().st_ino, path.read_bytes()) for path in folder.iterdir()}


def test_the_command_on_a_real_model(quantized, smollm2, texts, tmp_path, capsys, monkeypatch):
    """Figures against transformers' own logits; the table, the JSON, the plan's file and the card say the same."""
    monkeypatch.setenv("COLUMNS", "200")
    folder, data = tmp_path / "smollm2-cptquant", tmp_path / "data.txt"
    shutil.copytree(quantized[1], folder, copy_function=os.link)
    data.write_text("\n\n".join(texts[-15:]))
    before = state_of(folder)
    windows = ["--num-samples", 3, "--sequence-length", 128, "--batch-size", 2]
    output = tmp_path / "results.json"
    assert run("evaluate", folder, "--against", smollm2, "--dataset", data, *windows, "-o", output) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    assert json.loads(output.read_text()) == found
    assert (found["model"], found["against"]) == (str(folder), str(smollm2))
    assert "Evaluating: 100%" in captured.err

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    stream = torch.tensor(tokenizer("\n\n".join(texts[-15:]) + "\n\n", verbose=False)["input_ids"])
    stream = stream[: 8 * 3 * 128].view(-1, 128)  # windows are drawn from the beginning of the text
    drawn = stream[torch.randperm(len(stream), generator=torch.Generator().manual_seed(0))[:3].sort().values]
    log_p, log_q = (
        AutoModelForCausalLM.from_pretrained(path)(drawn).logits[:, :-1].detach().double().log_softmax(-1)
        for path in (smollm2, folder)
    )
    results = {result["metric"]: result for result in found["results"]}
    for name, log in (("base", log_p), ("value", log_q)):
        expected = (-log.gather(-1, drawn[:, 1:, None])).mean().exp().item()
        assert results["perplexity"][name] == pytest.approx(expected, rel=1e-2)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert results["kl_divergence"]["value"] == pytest.approx(divergence, rel=5e-2)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert results["top1_agreement"]["value"] == pytest.approx(agreement, abs=0.02)
    assert all(result["low"] < result["value"] < result["high"] for result in results.values())
    assert all((result["windows"], result["tokens"]) == (3, 3 * 127) for result in results.values())

    record = QuantizationRecord.load(folder)
    assert [result.to_dict() for result in record.evaluation] == found["results"]
    card = (folder / "README.md").read_text()
    assert run("inspect", folder) == 0
    inspected = capsys.readouterr().out
    _, rows = tabulate(record.evaluation)
    for row in rows:
        assert list(row) in rows_of(card)
        assert all(cell in captured.out and cell in inspected for cell in row)
    assert "was not evaluated" not in card
    after = state_of(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert (changed, after.keys()) == ({"cptquant_plan.json", "README.md"}, before.keys())
    assert "was not evaluated" in (quantized[1] / "README.md").read_text()  # the linked folder kept its own


@pytest.fixture
def loads(monkeypatch):
    """Which folders were loaded, and which of the earlier models were still alive then."""
    seen, models, load = [], [], folder_evaluation._load

    def spy(source, device_map):
        gc.collect()
        seen.append((source.rpartition("/")[2], sum(model() is not None for model in models)))
        model = load(source, device_map)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(folder_evaluation, "_load", spy)
    return seen


def test_models_that_do_not_fit_together_run_in_turn(folders, tokens, loads, logged, monkeypatch, tmp_path):
    original, quantized = map(str, folders)
    together = evaluate_folder(quantized, CPTQuantConfig(dataset=tokens, **SMALL), original)
    assert loads == [("quantized", 0), ("original", 1)]
    loads.clear()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(folder_evaluation, "get_max_memory", lambda: {"cpu": 10**6})
    in_turn = evaluate_folder(quantized, CPTQuantConfig(dataset=tokens, **SMALL), original)
    assert loads == [("original", 0), ("quantized", 0)]  # the original is gone before the other is loaded
    assert in_turn == together
    assert "1.1 GB, of which 0.0 GB are free: the original is run first" in logged.text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_gives_what_its_models_give(folders, tokens):
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    config = CPTQuantConfig(dataset=tokens, **SMALL)
    found = evaluate_folder(str(folders[1]), config, str(folders[0]))
    assert found == evaluate_model(models[1], config, models[0])
    assert {result.against for result in found} == {"original"}
    assert evaluate_folder(str(folders[0]), config)[0].value == found[0].base


def test_the_control_is_a_uniform_plan_of_the_nearest_size(folders, folder, tokens):
    original, record = folders[0], QuantizationRecord.load(folders[1])
    units = {module.unit for module in record.plan.modules}
    uniform = {bits: record.plan.with_bits(dict.fromkeys(units, bits), 32) for bits in (2, 3, 4, 5, 6, 8)}
    control = uniform_control(record)
    differences = {bits: abs(plan.nbytes - record.plan.nbytes) for bits, plan in uniform.items()}
    (bits,) = {module.scheme.bits for module in control.modules}
    assert (control, differences[bits]) == (uniform[bits], min(differences.values()))

    data = CPTQuantConfig(dataset=tokens, **SMALL)
    results = evaluate_folder(str(folder), data, str(original), control=control)
    alone = evaluate_folder(str(folder), data, str(original))
    assert [(result.value, result.base) for result in results] == [(result.value, result.base) for result in alone]
    given = CPTQuantConfig(plan=control, quality="fast")
    rounded = AutoModelForCausalLM.from_pretrained(original, quantization_config=given)
    expected = evaluate_model(rounded, data, AutoModelForCausalLM.from_pretrained(original))
    for result, other in zip(results, expected, strict=True):
        assert result.control == pytest.approx(other.value, rel=0.02, abs=0.01)
    add_results(folder, results)
    card = (folder / "README.md").read_text()
    assert f"rounded to nearest ({bits} bits in groups of 32; {control.bits_per_weight:.3f} bits per weight" in card
    (row,) = (row for row in rows_of(card) if row[0] == "perplexity")
    assert [cell.split()[0] for cell in row[2:5]] == [
        f"{value:.2f}" for value in (results[0].base, results[0].control, results[0].value)
    ]


def test_the_base_model_of_a_folder_can_be_named(folder, capsys):
    assert run("card", folder, "--base-model", "you/base") == 0
    assert ModelCard.load(folder / "README.md").data.base_model == "you/base"
    assert AutoModelForCausalLM.from_pretrained(folder).hf_quantizer.record.base_model == "you/base"


def test_results_of_the_same_data_are_replaced_and_others_kept(folder, tokens):
    def results(**settings):
        return evaluate_folder(str(folder), CPTQuantConfig(dataset=tokens, **{**SMALL, **settings}))

    first, other = results(), results(num_samples=4)
    add_results(folder, first)
    add_results(folder, other)
    add_results(folder, first)
    assert QuantizationRecord.load(folder).evaluation == (*other, *first)
    assert len([row for row in rows_of((folder / "README.md").read_text()) if row[0] == "perplexity"]) == 2


def test_saving_again_keeps_results_and_quantizing_again_does_not(folder, folders, tokens, tmp_path):
    add_results(folder, evaluate_folder(str(folder), CPTQuantConfig(dataset=tokens, **SMALL)))
    record = QuantizationRecord.load(folder)
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert QuantizationRecord.load(tmp_path / "again") == record
    again = AutoModelForCausalLM.from_pretrained(
        folders[0], quantization_config=CPTQuantConfig(plan=record, quality="fast")
    )
    again.save_pretrained(folder)
    assert QuantizationRecord.load(folder).evaluation == ()
    assert decide(record, CPTQuantConfig(target_bits=6.0, group_size=32).recipe()).evaluation == ()
    assert "was not evaluated" in (folder / "README.md").read_text()


def test_the_card_is_written_anew_without_weights(folder, capsys):
    expected = (folder / "README.md").read_text()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for name in ("README.md", PLAN_PICTURE):
        (folder / name).unlink()
    assert run("card", folder) == 0
    assert (folder / PLAN_PICTURE).read_bytes().startswith(b"\x89PNG")
    assert (folder / "README.md").read_text() == expected
    assert f"Written to {folder / 'README.md'}" in capsys.readouterr().out
    (folder / "README.md").write_text(expected.replace("Compression ratio", "Damaged") + "\nMine.\n")
    assert run("card", folder) == 0
    assert (folder / "README.md").read_text() == expected + "\nMine.\n"


def test_facts_of_a_folder_are_those_of_the_model(tiny_folder, tokens, tmp_path):
    config = CPTQuantConfig(dataset=tokens, quality="fast", allocation="kmeans", group_size=32, sequence_length=32)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder("gpt2"), quantization_config=config)
    model.save_pretrained(tmp_path / "conv")
    facts = describe(tmp_path / "conv")
    assert (facts.name, facts.task, facts.portable) == ("conv", "causal-lm", False)
    assert "import hf_cptquant" in facts.limits


def test_the_original_is_named_where_it_is_known(tiny_folder, texts, minilm, tmp_path, capsys):
    data = tmp_path / "data.txt"
    data.write_text(texts[0])
    settings = {"dataset": [texts[0]], "tokenizer": str(minilm), "quality": "fast", "group_size": 32, "num_samples": 2}
    model = AutoModelForMaskedLM.from_pretrained(
        tiny_folder("bert-mlm"), quantization_config=CPTQuantConfig(**settings, sequence_length=16)
    )
    save_checkpoint(model, replace(model.hf_quantizer.record, base_model="google/tiny"), tmp_path / "masked")
    options = ["--dataset", data, "--tokenizer", minilm, "--num-samples", 2, "--sequence-length", 12]
    assert run("evaluate", tmp_path / "masked", *options) == 0
    assert "--against google/tiny" in capsys.readouterr().out
    assert "pseudo-perplexity" in (tmp_path / "masked" / "README.md").read_text()


def test_a_dense_model_is_measured_and_nothing_written(folders, tiny_folder, texts, tmp_path, capsys):
    data = tmp_path / "data.txt"
    data.write_text(texts[0])
    dense = tiny_folder("bert-mlm")
    before = state_of(dense)
    options = ["--dataset", data, "--num-samples", 2, "--sequence-length", 12]
    assert run("evaluate", dense, *options) == 0
    (result,) = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert (result["metric"], result["windows"], result["tokens"]) == ("pseudo_perplexity", 2, 20)
    assert state_of(dense) == before


def test_a_model_measured_on_its_calibration_says_so(folder, tokens):
    add_results(folder, evaluate_folder(str(folder), CPTQuantConfig(dataset=tokens, **SMALL)))
    assert "The text of token tensors is also what the model was calibrated on" in (folder / "README.md").read_text()


def test_metadata_hold_our_results_beside_those_of_others(folder, tokens):
    (result,) = evaluate_folder(str(folder), CPTQuantConfig(dataset=tokens, **SMALL))
    on_hub = replace(result, dataset="wikitext2", split="test")
    theirs = {"task": {"type": "text-generation"}, "dataset": {"type": "squad", "name": "SQuAD"}}
    index = [{"name": "mine", "results": [{**theirs, "metrics": [{"type": "f1", "value": 0.5}]}]}]
    card = folder / "README.md"
    text = card.read_text()
    plain = ModelCard(text)
    plain.data.license = "mit"
    card.write_text(str(plain).replace("license: mit", f"license: mit\nmodel-index: {json.dumps(index)}"))
    for _ in range(2):
        add_results(folder, [on_hub])
        data = ModelCard(card.read_text()).data
        first, second = data.eval_results
        assert (first.metric_type, first.metric_value) == ("f1", 0.5)
        assert (second.dataset_type, second.dataset_config) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
        assert (second.dataset_split, second.metric_type) == ("test", "perplexity")
        assert second.metric_value == on_hub.value
        assert second.metric_args == {"library": "hf-cptquant", "windows": 8, "sequence_length": 32, "seed": 0}
        assert (data.license, data.model_name, data.pipeline_tag) == ("mit", "mine", "text-generation")
    rewrite_record(folder, replace(QuantizationRecord.load(folder), evaluation=()))
    assert [found.metric_type for found in ModelCard(card.read_text()).data.eval_results] == ["f1"]


def test_a_card_of_ours_alone_gets_and_loses_its_results(folder, tokens):
    card = folder / "README.md"
    before, record = card.read_text(), QuantizationRecord.load(folder)
    (result,) = evaluate_folder(str(folder), CPTQuantConfig(dataset=tokens, **SMALL))
    add_results(folder, [replace(result, dataset="imdb", split="test")])
    (found,) = ModelCard(card.read_text()).data.eval_results
    assert (found.dataset_type, found.dataset_config, found.metric_value) == ("stanfordnlp/imdb", None, result.value)
    rewrite_record(folder, record)
    assert card.read_text() == before


# What cannot be done


def test_other_folders_are_refused_before_anything_is_measured(folder, folders, tmp_path, loads, capsys):
    card = folder / "README.md"
    cases = [
        (["evaluate", tmp_path / "nowhere"], "no model at"),
        (["card", folders[0]], "cptquant_plan.json does not exist"),
        (["evaluate", folder, "--output", tmp_path / "no" / "file"], "does not exist"),
        (["evaluate", folder, "--against", tmp_path / "nowhere"], "no model at"),
        (["evaluate", folder, "--dataset", "wikitext3"], "did you mean 'wikitext2'"),
        (["evaluate", folder, "--control"], "--against with the original"),
        (["evaluate", folder, "--dataset", "nowhere.txt"], "no tokenizer at"),
    ]
    for arguments, message in cases:
        before = state_of(folder)
        assert run(*arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("Error:") == 1
        assert state_of(folder) == before
    assert loads == []
    assert "was not evaluated" in card.read_text()


def test_another_vocabulary_and_a_bare_body_are_told_before_weights_are_loaded(folders, tokens, tmp_path, loads):
    tiny_model("llama", vocab_size=600).save_pretrained(tmp_path / "other")
    tiny_model("llama").model.save_pretrained(tmp_path / "body")
    config = CPTQuantConfig(dataset=tokens, **SMALL)
    with pytest.raises(EvaluationError, match="other is not the original of quantized: the vocabulary is 600 there"):
        evaluate_folder(str(folders[1]), config, str(tmp_path / "other"))
    with pytest.raises(EvaluationError, match="body holds LlamaModel, with none of the heads that are evaluated"):
        evaluate_folder(str(tmp_path / "body"), config)
    assert loads == []


def test_what_cannot_be_kept_is_told_and_nothing_is_written(folder, tokens):
    results = evaluate_folder(str(folder), CPTQuantConfig(dataset=tokens, **SMALL))
    on_hub = [replace(results[0], dataset="c4", split="validation")]
    card, plan = folder / "README.md", folder / "cptquant_plan.json"
    card.write_text("---\nlicense: [mit\n---\n\nMine.\n")
    before = state_of(folder)
    with pytest.raises(CheckpointError, match=r"metadata at the head of README.md cannot be read"):
        add_results(folder, on_hub)
    assert state_of(folder) == before
    data = json.loads(plan.read_text())
    for damage, message in (({"perplexity": 3}, "no list of results"), ([{"metric": "perplexity"}], "incomplete")):
        plan.write_text(json.dumps({**data, "evaluation": damage}))
        with pytest.raises(PlanError, match=message):
            add_results(folder, results)
    assert sorted(path.name for path in folder.iterdir()) == sorted(before)
