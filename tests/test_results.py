"""Intervals and results: the bootstrap is scipy's, covers what it should, and results replace only their like."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import bootstrap

from hf_cptquant.errors import PlanError
from hf_cptquant.results import EvaluationResult, Provenance, figure, interval, merge, tabulate

SOURCE = Provenance("data.txt", None, 40, 32, 1240, 3, "0" * 64, "original")


@pytest.fixture(scope="module")
def losses() -> np.ndarray:
    return np.random.default_rng(5).gamma(4.0, 0.5, 40)  # skewed, as losses of windows are


def reference(losses, statistic):
    options = {"n_resamples": 9999, "confidence_level": 0.95, "method": "BCa", "rng": np.random.default_rng(3)}
    return bootstrap((losses,), statistic, **options).confidence_interval


def test_the_interval_is_that_of_scipy(losses):
    expected = reference(losses, np.mean)
    found = interval("kl_divergence", losses, 3)
    assert (found.value, found.low, found.high) == pytest.approx((losses.mean(), *expected), rel=1e-12)
    assert found == interval("kl_divergence", losses, 3)
    assert found != interval("kl_divergence", losses, 4)


def test_limits_of_a_perplexity_are_those_of_the_loss(losses):
    found = interval("perplexity", losses, 3)
    assert found.value == pytest.approx(np.exp(losses.mean()))
    assert (found.low, found.high) == pytest.approx(tuple(np.exp(reference(losses, np.mean))), rel=1e-12)
    own = reference(losses, lambda x, axis: np.exp(x.mean(axis)))
    assert (found.low, found.high) == pytest.approx(tuple(own), rel=0.02)


def test_intervals_cover_the_true_mean_as_often_as_they_say():
    rng = np.random.default_rng(0)
    found = [interval("loss_increase", rng.exponential(2.0, 60), seed) for seed in range(150)]
    covered = np.mean([each.low <= 2.0 <= each.high for each in found])
    assert 0.90 <= covered <= 0.985


def test_one_window_has_no_interval_and_equal_windows_one_of_no_width():
    alone = interval("perplexity", np.array([1.5]), 0)
    assert (alone.value, alone.low, alone.high) == (pytest.approx(np.exp(1.5)), None, None)
    equal = interval("accuracy", np.ones(5), 0)
    assert (equal.value, equal.low, equal.high) == (1.0, 1.0, 1.0)
    headings, rows = tabulate([figure(SOURCE, "accuracy", np.array([0.5]))])
    assert headings == ("", "dataset", "quantized", "windows", "tokens")
    assert rows == (("accuracy", "data.txt", "0.5000", "40 × 32", "1,240"),)


def test_a_control_is_told_beside_the_model(losses):
    result = figure(SOURCE, "perplexity", losses, losses - 0.1, losses + 0.1, "4 bits in groups of 64")
    assert result.control == pytest.approx(result.value * np.exp(0.1))
    assert result.control_low < result.control < result.control_high
    alone = figure(SOURCE, "kl_divergence", losses)
    headings, (first, second) = tabulate([result, alone])
    assert headings == ("", "dataset", "original", "control", "quantized", "windows", "tokens")
    assert first[2:5] == tuple(
        f"{value:.2f} ({low:.2f} to {high:.2f})"
        for value, low, high in (
            (result.base, result.base_low, result.base_high),
            (result.control, result.control_low, result.control_high),
            (result.value, result.low, result.high),
        )
    )
    assert second[2:4] == ("–", "–")


def test_results_come_back_from_json(losses):
    result = figure(SOURCE, "perplexity", losses, losses - 0.1, losses + 0.1, "4 bits in groups of 64")
    assert EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert result.base == pytest.approx(result.value * np.exp(-0.1))
    assert result.base_low < result.base < result.base_high


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("value"), "incomplete.*value"),
        (lambda r: r.update(score=1.0), "incomplete.*score"),
        (lambda r: r.update(metric="bleu"), "'bleu'; known: perplexity"),
        (lambda r: r.update(low="0.5"), "low='0.5', which is no number"),
        (lambda r: r.update(value=None), "value=None"),
    ],
)
def test_damaged_results_are_told(change, message, losses):
    damaged = figure(SOURCE, "perplexity", losses).to_dict()
    change(damaged)
    with pytest.raises(PlanError, match=message):
        EvaluationResult.from_dict(damaged)


def test_new_results_replace_those_of_the_same_data_and_keep_others(losses):
    def run(shift, **source):
        provenance = dataclasses.replace(SOURCE, **source)
        return [figure(provenance, metric, losses + shift) for metric in ("perplexity", "kl_divergence")]

    first, again = run(0.0), run(0.5, sha256="1" * 64)
    others = [run(0.0, **change) for change in ({"windows": 9}, {"dataset": "b.txt"}, {"seed": 4}, {"split": "test"})]
    everything = merge((), first)
    for other in others:
        everything = merge(everything, other)
    assert len(everything) == 10
    merged = merge(everything, again)
    assert merged == (*(result for other in others for result in other), *again)
    assert merge(merged, again) == merged
    assert merge(merged, first[:1])[-2:] == (again[1], first[0])  # one metric alone leaves the other
