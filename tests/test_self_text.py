"""Calibration text that the model writes itself: drawn from its own predictions, and enough without other data."""

import pytest
import torch
from conftest import tiny_model
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from hf_cptquant import CPTQuantConfig
from hf_cptquant.errors import CalibrationError
from hf_cptquant.modules import packed_modules
from hf_cptquant.self_text import sample_text


def test_tokens_have_the_probabilities_that_the_model_predicts():
    model = tiny_model("llama", vocab_size=12, bos_token_id=1, eos_token_id=2)
    model.generation_config.update(temperature=0.1, top_k=2, do_sample=True, repetition_penalty=1.5)  # has no effect
    rows = sample_text(model, 4000, 3, seed=0)
    assert rows.shape == (4000, 3)
    assert bool((rows[:, 0] == 1).all())
    with torch.no_grad():
        probabilities = model(rows[:1, :1]).logits[0, 0].double()
        probabilities[2] = -torch.inf  # the end, which does not come before the sequence is full
        expected = 4000 * probabilities.softmax(0)
    observed = torch.bincount(rows[:, 1], minlength=12)
    assert observed[2] == 0
    kept = torch.arange(12) != 2
    assert chisquare(observed[kept], expected[kept]).pvalue > 0.001


def test_the_seed_decides_and_generators_are_left_alone():
    model = tiny_model("gpt2", bos_token_id=None)
    before = torch.get_rng_state()
    first, again, other = (sample_text(model, 40, 8, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first[:, 0].unique()) > 20  # without a token to begin with, any begins
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_is_quantized_without_any_data(tiny_folder, logged):
    folder = tiny_folder("llama")
    settings = {"group_size": 32, "iters": 2, "num_samples": 4, "sequence_length": 32}
    models = [
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=CPTQuantConfig(**settings, **named))
        for named in ({}, {"dataset": "self"})
    ]
    assert logged.text.count("calibrating on 4 sequences of 32 tokens that the model itself writes") == 1
    calibrations = [model.hf_quantizer.record.calibration for model in models]
    assert calibrations[0] == calibrations[1]
    assert calibrations[0]["source"] == "text written by the model itself"
    assert calibrations[0]["tokens"] == 128
    for name, module in packed_modules(models[0]).items():
        assert torch.equal(module.weight_packed, models[1].get_submodule(name).weight_packed)


def test_other_models_need_data(tiny_folder):
    folder = tiny_folder("bert-mlm")
    for dataset, reason in ((None, "no calibration data"), ("self", "only causal language models write their own")):
        config = CPTQuantConfig(dataset=dataset, group_size=32)
        with pytest.raises(CalibrationError, match=f"{reason}.*: pass dataset="):
            AutoModelForMaskedLM.from_pretrained(folder, quantization_config=config)
