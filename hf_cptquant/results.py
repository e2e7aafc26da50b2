"""What was measured of a finished model, with confidence intervals: values that go into its record and onto its card.

A figure is a mean over windows of data, and windows are what varies: the interval says what other windows of the same
kind of text would give. It is found by the bias-corrected and accelerated bootstrap (Efron 1987) over windows, which
needs no assumption about how losses are distributed. A perplexity and its limits are the exponentials of the mean
loss and its limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from .errors import PlanError

CONFIDENCE = 0.95
RESAMPLES = 9999
RESAMPLES_AT_A_TIME = 500  # so that thousands of windows take little memory
LABELS = {
    "perplexity": "perplexity",
    "pseudo_perplexity": "pseudo-perplexity",
    "accuracy": "accuracy",
    "loss_increase": "rise of the loss (nats)",
    "kl_divergence": "KL divergence from the original (nats)",
    "top1_agreement": "top-1 agreement with the original",
}
_EXPONENTIAL = ("perplexity", "pseudo_perplexity")


@dataclass(frozen=True)
class Interval:
    """A figure with the limits between which it lies with a confidence of 95 %.

    Attributes:
        value: over all windows.
        low, high: None where a single window says nothing of others.
    """

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Provenance:
    """What figures were measured on.

    Attributes:
        dataset: name or file.
        split: of a dataset on the Hub, otherwise None.
        windows: sequences that were measured; intervals are over them.
        sequence_length: tokens in each, special ones included.
        tokens: predictions that count; for a classifier, one a text.
        seed: of the choice of windows.
        sha256: of the data.
        against: the original, by its name on the Hub or the name of its folder; None without.
    """

    dataset: str
    split: str | None
    windows: int
    sequence_length: int
    tokens: int
    seed: int
    sha256: str
    against: str | None


@dataclass(frozen=True)
class EvaluationResult(Provenance):
    """One figure of a model on data.

    Attributes:
        metric: `"perplexity"`, `"pseudo_perplexity"`, `"accuracy"`; against an original also `"loss_increase"` and
            `"kl_divergence"` (of its predictions from the original's), both in nats per token (per text for a
            classifier), and `"top1_agreement"` (share of the predictions).
        value, low, high: of the model, see `Interval`.
        base, base_low, base_high: of the original on the same data; None where it was not measured or has no such
            figure.
        control, control_low, control_high: of the control, a uniform plan of nearly the same size; None without.
        control_plan: what that is, in words.
    """

    metric: str
    value: float
    low: float | None
    high: float | None
    base: float | None = None
    base_low: float | None = None
    base_high: float | None = None
    control: float | None = None
    control_low: float | None = None
    control_high: float | None = None
    control_plan: str | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What two results have in common of which the later one counts."""
        return self.metric, self.dataset, self.split, self.windows, self.sequence_length, self.seed

    def cells(self) -> dict[str, str]:
        """A row of a table: heading → text."""
        return {
            "": LABELS[self.metric],
            "dataset": self.dataset if self.split is None else f"{self.dataset}, {self.split}",
            "original": self._text(self.base) + self._limits(self.base_low, self.base_high, " ({})"),
            "control": self._text(self.control) + self._limits(self.control_low, self.control_high, " ({})"),
            "quantized": self._text(self.value) + self._limits(self.low, self.high, " ({})"),
            "windows": f"{self.windows:,} × {self.sequence_length:,}",
            "tokens": f"{self.tokens:,}",
        }

    def _text(self, value: float | None) -> str:
        if value is None:
            return "–"
        return f"{value:.2f}" if self.metric in _EXPONENTIAL else f"{value:.4f}"

    def _limits(self, low: float | None, high: float | None, form: str) -> str:
        return "" if low is None else form.format(f"{self._text(low)} to {self._text(high)}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvaluationResult:
        """The result in its JSON values. Raises `PlanError` for anything else."""
        try:
            result = cls(**data)
        except TypeError as error:
            raise PlanError(f"a result of the evaluation in the record is incomplete: {error}") from error
        if result.metric not in LABELS:
            raise PlanError(f"the record holds a result with the metric {result.metric!r}; known: {', '.join(LABELS)}")
        required = ("windows", "sequence_length", "tokens", "value")
        limits = [f"{of}{limit}" for of in ("", "base_", "control_") for limit in ("low", "high")]
        for name in (*required, "base", "control", *limits):
            value = getattr(result, name)
            optional = name not in required
            if type(value) not in (int, float) and not (optional and value is None):
                raise PlanError(f"a result of the evaluation in the record has {name}={value!r}, which is no number")
        return result

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def figure(
    source: Provenance,
    metric: str,
    of_windows: np.ndarray,
    of_original: np.ndarray | None = None,
    of_control: np.ndarray | None = None,
    control_plan: str | None = None,
) -> EvaluationResult:
    """A result from its values in each window (losses for a perplexity), float64 `[windows]`; and from those of the
    original, where it has that figure, and of the control, where there is one."""
    found: dict[str, Any] = asdict(interval(metric, of_windows, source.seed))
    for name, others in (("base", of_original), ("control", of_control)):
        if others is not None:
            other = interval(metric, others, source.seed)
            found |= {name: other.value, f"{name}_low": other.low, f"{name}_high": other.high}
    return EvaluationResult(**asdict(source), metric=metric, **found, control_plan=control_plan)


def tabulate(results: Sequence[EvaluationResult]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Headings and rows of a table of results, without columns in which nothing stands."""
    rows = [result.cells() for result in results]
    headings = tuple(heading for heading in rows[0] if any(row[heading] != "–" for row in rows))
    return headings, tuple(tuple(row[heading] for heading in headings) for row in rows)


def interval(metric: str, of_windows: np.ndarray, seed: int) -> Interval:
    """The figure over all windows and its confidence interval.

    Args:
        metric: perplexities are exponentials of the mean, other figures are the mean.
        of_windows: float64 `[windows]`; every window counts alike.
        seed: of the resampling.
    """
    limits: tuple[float, ...] = (float(of_windows.mean()),)
    if len(of_windows) == 1:
        limits += (math.nan, math.nan)
    elif np.ptp(of_windows) == 0:  # nothing varies, and the bootstrap would divide by zero
        limits += limits * 2
    else:
        rng = np.random.default_rng(seed)
        found = bootstrap(
            (of_windows,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=RESAMPLES_AT_A_TIME,
            confidence_level=CONFIDENCE,
            method="BCa",
            rng=rng,
        ).confidence_interval
        limits += (float(found.low), float(found.high))
    with np.errstate(over="ignore"):  # infinite is what such a perplexity is
        value, low, high = (float(np.exp(limit)) if metric in _EXPONENTIAL else limit for limit in limits)
    return Interval(value, None if math.isnan(low) else low, None if math.isnan(high) else high)


def merge(old: Sequence[EvaluationResult], new: Sequence[EvaluationResult]) -> tuple[EvaluationResult, ...]:
    """All results; a new one takes the place of an old one of the same metric, dataset and settings."""
    replaced = {result.key for result in new}
    return (*(result for result in old if result.key not in replaced), *new)
