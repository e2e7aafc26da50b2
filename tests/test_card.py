"""The model card: every figure is the record's, and what somebody wrote around our part is kept."""

import dataclasses
import re

import pytest
import torch
from conftest import TINY_CONFIGS, tiny_model
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_cptquant import CPTQuantConfig
from hf_cptquant.card import BEGIN, END, CardFacts, render_card
from hf_cptquant.model_view import hub_name_of, task_of
from hf_cptquant.pipeline import make_plan
from hf_cptquant.record import QuantizationRecord

FACTS = CardFacts("llama-cptquant", "causal-lm", True)
LOSSES = {"unrounded": 2.0, "tdmpq, taylor": 2.125, "pmpq": 2.25}


@pytest.fixture(scope="module")
def settings(tokens):
    data = {"dataset": tokens, "sequence_length": 32, "num_samples": 4}
    return {**data, "bits": (3, 4, 16), "group_size": 32, "target_bits": 5.0, "quality": "fast"}


@pytest.fixture(scope="module")
def record(settings):
    made = make_plan(tiny_model("llama").to(torch.bfloat16), CPTQuantConfig(**settings))
    return dataclasses.replace(made, base_model="facebook/opt-125m")


def with_losses(record):
    table = dataclasses.replace(record.table, settings={**record.table.settings, "held_out_losses": LOSSES})
    return dataclasses.replace(record, table=table)


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_metadata_are_what_the_hub_reads(record):
    data = ModelCard(render_card(record, FACTS)).data
    assert (data.base_model, data.base_model_relation) == ("facebook/opt-125m", "quantized")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    packed = {f"{module.scheme.bits}-bit" for module in record.plan.packed}
    assert set(data.tags) == {"cptquant", "mixed-precision", "compressed-tensors"} | packed
    other = ModelCard(
        render_card(dataclasses.replace(record, base_model=None), dataclasses.replace(FACTS, portable=False))
    )
    assert other.data.base_model is None
    assert "compressed-tensors" not in other.data.tags


def test_what_is_known_of_base_and_data_is_in_the_metadata(record):
    inherited = {"license": "other", "license_name": "mine", "language": ["en", "de"], "tags": ["chat"]}
    calibration = {**record.calibration, "source": "wikitext2"}
    text = render_card(dataclasses.replace(record, inherited=inherited, calibration=calibration), FACTS)
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.language) == ("other", "mine", ["en", "de"])
    assert data.datasets == ["Salesforce/wikitext"]
    assert "chat" in data.tags
    assert "CPTQuantConfig(" in text
    assert "dataset='wikitext2'" in text
    unknown = ModelCard(render_card(record, FACTS)).data.to_dict()
    assert not unknown.keys() & {"license", "language", "datasets"}


def test_the_hub_finds_no_fault_with_it(record, hub):
    card = ModelCard(render_card(dataclasses.replace(record, inherited={"license": "mit"}), FACTS))
    card.validate()
    assert hub.count("POST", "/api/validate-yaml") == 1


def test_the_run_is_told(record):
    assert "peak memory" not in render_card(record, FACTS)
    run = {
        "seconds": {"scoring": 12.4, "rounding": 3.6},
        "peak_bytes": {"cpu": 1_234_000_000, "cuda:0": 5_000_000},
        "hardware": {"cuda:0": "NVIDIA H100"},
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
    }
    text = render_card(dataclasses.replace(record, run=run), FACTS)
    rows = rows_of(text)
    assert ["cuda:0", "NVIDIA H100"] in rows
    assert ["seconds", "scoring 12, rounding 4"] in rows
    assert ["peak memory, MB", "cpu 1234, cuda:0 5"] in rows
    assert ["versions", "python 3.11.7, torch 2.15.0"] in rows
    assert "CPTQuantConfig(" in text
    by_command = render_card(dataclasses.replace(record, run={**run, "command": "cptquant quantize a -o b"}), FACTS)
    assert "```console\n$ cptquant quantize a -o b\n```" in by_command
    assert "CPTQuantConfig(" not in by_command


def test_figures_are_those_of_the_record(record):
    text, plan = render_card(record, FACTS), record.plan
    rows = rows_of(text)
    assert ["checkpoint, MB", f"{plan.original_bytes / 1e6:.1f}", f"{plan.nbytes / 1e6:.1f}"] in rows
    assert ["bits per quantizable weight, with scales", "16", f"{plan.bits_per_weight:.3f}"] in rows
    assert f"Compression ratio {plan.compression_ratio:.2f}" in text
    assert (
        f"Predicted rise of the loss on the calibration data: {record.measured['predicted_loss_increase']:.4f}" in text
    )
    assert (
        f"Sensitivity by `tdmpq` (taylor), loss {record.table.base:.4f} before, on 4 × 32 tokens of token tensors"
        in text
    )
    assert "was not evaluated" in text
    assert re.findall(r"!\[.*?\]\((.*?)\)", text) == ["cptquant_plan.png", "cptquant_sensitivity.png"]
    units = {module.unit: str(module.scheme.bits) for module in plan.modules}
    for index in range(3):
        leaves = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
        assert [str(index), *(units[f"model.layers.{index}.{leaf}"] for leaf in leaves)] in rows
    assert "judged on calibration data" not in text
    assert "KL divergence" not in text
    measured = {**record.measured, "kl_before_recovery": 0.25, "kl_after_recovery": 0.125}
    recovered = render_card(dataclasses.replace(record, measured=measured), FACTS)
    assert "its KL divergence went from 0.2500 to 0.1250 nats" in recovered
    measured = {**record.measured, "kl_before_refinement": 0.5, "kl_after_refinement": 0.375}
    refined = dataclasses.replace(record, measured=measured, settings={**record.settings, "refine": 7})
    text = render_card(refined, FACTS)
    assert "7 swaps of bits between units were tried" in text
    assert "went from 0.5000 to 0.3750 nats" in text


def test_the_code_gives_the_settings_again(record, settings):
    (call,) = re.findall(r"^CPTQuantConfig\(.*\)$", render_card(record, FACTS), re.MULTILINE)
    again = eval(call, {"CPTQuantConfig": CPTQuantConfig})
    assert again.recipe() == CPTQuantConfig(**{**settings, "dataset": None}).recipe()


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({}, "CPTQuantConfig()"),
        ({"allocation": "kmeans", "granularity": "group"}, "CPTQuantConfig(allocation='kmeans', granularity='group')"),
        ({"allocation": "kmeans", "granularity": "block"}, "CPTQuantConfig(allocation='kmeans')"),
        ({"quality": "fast"}, "CPTQuantConfig(quality='fast')"),
        ({"quality": "fast", "iters": 5}, "CPTQuantConfig(quality='fast', iters=5)"),
        ({"rounding": "gptq", "iters": 100}, "CPTQuantConfig(rounding='gptq')"),
        ({"bits": [3, 8], "seed": 3}, "CPTQuantConfig(bits=[3, 8], seed=3)"),
    ],
    ids=str,
)
def test_the_code_says_no_more_than_is_needed(given, code, record):
    settings = CPTQuantConfig(**given).recipe().to_dict()
    text = render_card(dataclasses.replace(record, settings=settings), FACTS)
    (call,) = re.findall(r"^CPTQuantConfig\(.*\)$", text, re.MULTILINE)
    assert call == code


def test_losses_of_all_methods_are_told(record):
    rows = rows_of(render_card(with_losses(record), FACTS))
    assert ["unrounded", "2.0000", "0.0000"] in rows
    assert ["tdmpq, taylor", "2.1250", "0.1250"] in rows
    assert ["pmpq", "2.2500", "0.2500"] in rows


def test_a_plan_without_scores_has_a_card(record):
    text = render_card(QuantizationRecord(record.plan, None, record.settings, {}), FACTS)
    assert "with no scores that it came from" in text
    assert "Predicted" not in text


def test_what_somebody_wrote_is_kept(record):
    mine = "---\nlicense: mit\n---\n\n# My model\n\nHello.\n"
    first = render_card(record, FACTS, mine)
    assert first.startswith(mine.rstrip())
    assert first.count(BEGIN) == first.count(END) == 1
    assert ModelCard(first).data.license == "mit"
    second = render_card(with_losses(record), FACTS, first + "\nThe end.\n")
    assert second.startswith(mine.rstrip())
    assert second.endswith("\nThe end.\n")
    assert second.count(BEGIN) == second.count(END) == 1
    assert "2.1250" in second
    assert render_card(record, FACTS, second) == first + "\nThe end.\n"


def test_metadata_that_nobody_has_touched_follow_the_record(record):
    known = dataclasses.replace(record, base_model="you/base", inherited={"license": "mit"})
    card = render_card(record, FACTS) + "\nMine.\n"
    assert render_card(known, FACTS, card, record) == render_card(known, FACTS) + "\nMine.\n"
    touched = card.replace("- cptquant\n", "- cptquant\n- mine\n")
    after = ModelCard(render_card(known, FACTS, touched, record)).data
    assert (after.base_model, after.license) == ("facebook/opt-125m", None)
    assert "mine" in after.tags


def test_a_tag_that_is_no_longer_true_goes(record):
    served = dataclasses.replace(FACTS, vllm=True)
    card = render_card(record, served)
    assert "vllm" in ModelCard(card).data.tags
    assert "It keeps the rules of vLLM" in card
    assert render_card(record, served, card) == card
    mine = card.replace("\n- vllm\n", "\n- mine\n- vllm\n") + "\n- vllm\n"
    after = render_card(record, FACTS, mine)
    assert set(ModelCard(card).data.tags) - {"vllm"} | {"mine"} == set(ModelCard(after).data.tags)
    assert after.endswith("\n- vllm\n")
    assert "It keeps the rules" not in after


@pytest.mark.parametrize("kind", TINY_CONFIGS)
def test_every_task_has_its_card(kind, record):
    task = task_of(tiny_model(kind))
    text = render_card(record, dataclasses.replace(FACTS, task=task, limits="It needs more."))
    assert f"AutoModelFor{text.partition('AutoModelFor')[2].partition(chr(10))[0]}" in text
    assert "It needs more." in text
    assert "import hf_cptquant  # registers itself" in text


def test_saving_writes_the_card_and_keeps_what_is_there(tiny_folder, settings, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_folder("llama", torch.bfloat16), quantization_config=CPTQuantConfig(**settings)
    )
    assert model.hf_quantizer.record.base_model is None  # a folder, which nobody else has
    target = tmp_path / "llama-cptquant"
    model.save_pretrained(target)
    assert (target / "cptquant_plan.png").read_bytes().startswith(b"\x89PNG")
    card = target / "README.md"
    assert card.read_text() == render_card(model.hf_quantizer.record, FACTS)
    card.write_text(card.read_text().replace(BEGIN, f"Read this first.\n\n{BEGIN}"))
    model.save_pretrained(target)
    assert "Read this first." in card.read_text()
    reloaded = AutoModelForCausalLM.from_pretrained(target)
    reloaded.save_pretrained(tmp_path / "again" / "llama-cptquant")
    assert (tmp_path / "again" / "llama-cptquant" / "README.md").read_text() == render_card(
        model.hf_quantizer.record, FACTS
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [("facebook/opt-125m", "facebook/opt-125m"), ("/some/folder", None), ("folder", None), ("", None), ("a/b/c", None)],
)
def test_names_on_the_hub_are_told_from_folders(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("llama")
    model.name_or_path = name
    assert hub_name_of(model) == expected
    if expected:
        (tmp_path / name).mkdir(parents=True)
        assert hub_name_of(model) is None
