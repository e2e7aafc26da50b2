"""Scores of a model that accelerate offloaded: those of the model in memory, and nothing is loaded for good."""

import pytest
import torch
from conftest import SMALL_SETTINGS, tiny_model
from transformers import AutoModelForCausalLM

from hf_cptquant import CPTQuantConfig
from hf_cptquant.pipeline import measure_sensitivity

METHODS = {
    "pmpq": {"method": "pmpq"},
    "tdmpq": {"method": "tdmpq", "estimator": "perturbation"},
    "taylor": {"method": "tdmpq", "estimator": "taylor"},
    "cmpq": {"method": "cmpq"},
}
SOME = {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
ALL = dict.fromkeys(SOME, "disk")
OUTSIDE = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
WHOLE = {**dict.fromkeys(OUTSIDE, "disk"), **ALL, "model.norm": "cpu"}
MAPS = {"some blocks": {**OUTSIDE, **SOME}, "all blocks": {**OUTSIDE, **ALL}, "nearly everything": WHOLE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture(params=MAPS)
def offloaded(request, folder, tmp_path):
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=MAPS[request.param], offload_folder=tmp_path / "disk"
    )


def config_for(method, tokens, **settings):
    return CPTQuantConfig(
        **{
            "dataset": tokens,
            **SMALL_SETTINGS,
            **METHODS[method],
            **settings,
        }
    )


def assert_same(found, expected):
    assert list(found.raw) == list(expected.raw)
    assert found.raw == pytest.approx(expected.raw, abs=1e-6)
    assert max(map(abs, expected.raw.values())) > 1e-3  # there is something to compare
    assert found.base == pytest.approx(expected.base, abs=1e-6)
    assert {unit: dict(costs) for unit, costs in found.costs.items()} == {
        unit: pytest.approx(costs, abs=1e-6) for unit, costs in expected.costs.items()
    }
    assert {unit: dict(row) for unit, row in found.correlations.items()} == {
        unit: pytest.approx(row, abs=1e-6) for unit, row in expected.correlations.items()
    }
    assert found.fingerprint == expected.fingerprint
    assert (found.method, found.metric, found.settings, found.blocks) == (
        expected.method,
        expected.metric,
        expected.settings,
        expected.blocks,
    )


def on_meta(model):
    return {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}


@pytest.mark.parametrize("granularity", ["group", "block"])
@pytest.mark.parametrize("method", METHODS)
def test_scores_equal_those_of_the_model_in_memory(method, granularity, offloaded, folder, tokens, tmp_path):
    config = config_for(method, tokens, granularity=granularity)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    expected = measure_sensitivity(dense, config)
    on_disk = {path.name: path.read_bytes() for path in (tmp_path / "disk").rglob("*") if path.is_file()}
    before = on_meta(offloaded)
    assert {f"model.layers.{index}.self_attn.q_proj.weight" for index in (1, 2)} <= before
    logits = offloaded(tokens[:2]).logits

    assert_same(measure_sensitivity(offloaded, config), expected)

    assert on_meta(offloaded) == before
    assert {path.name: path.read_bytes() for path in (tmp_path / "disk").rglob("*") if path.is_file()} == on_disk
    assert torch.equal(offloaded(tokens[:2]).logits, logits)
    assert torch.allclose(logits, dense(tokens[:2]).logits, atol=1e-6)
    assert all(parameter.requires_grad for parameter in offloaded.parameters())
    assert_same(measure_sensitivity(offloaded, config), expected)  # and once more: no change was left behind


@pytest.mark.parametrize("method", ["pmpq", "tdmpq"])
@pytest.mark.parametrize("metric", ["perplexity", "accuracy"])
def test_other_metrics_too(method, metric, folder, tokens, tmp_path):
    config = config_for(method, tokens, metric=metric, granularity="block")
    offloaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map=MAPS["some blocks"], offload_folder=tmp_path / "disk"
    )
    expected = measure_sensitivity(AutoModelForCausalLM.from_pretrained(folder), config)
    found = measure_sensitivity(offloaded, config)
    assert found.raw == pytest.approx(expected.raw, rel=1e-5)
    assert found.fingerprint == expected.fingerprint


@pytest.mark.parametrize("method", METHODS)
def test_an_interruption_leaves_an_offloaded_model_as_it_was(method, folder, tokens, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map=MAPS["some blocks"], offload_folder=tmp_path / "disk"
    )
    before, logits, calls = on_meta(model), model(tokens[:2]).logits, []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(model, config_for(method, tokens))
    handle.remove()
    assert on_meta(model) == before
    assert torch.equal(model(tokens[:2]).logits, logits)


@pytest.mark.parametrize("method", ["pmpq", "cmpq"])
def test_a_run_in_memory_is_resumed_offloaded(method, folder, tokens, tmp_path):
    config = config_for(method, tokens, work_dir=tmp_path / "work")
    expected = measure_sensitivity(AutoModelForCausalLM.from_pretrained(folder), config)
    offloaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map=MAPS["all blocks"], offload_folder=tmp_path / "disk"
    )
    assert measure_sensitivity(offloaded, config) == expected
