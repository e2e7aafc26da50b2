"""Sensitivity methods: (model, plan, calibration set, recipe) → `SensitivityTable`, by name."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..calibration import CalibrationSet
from ..plan import BitPlan
from ..recipe import Recipe
from ..table import SensitivityTable
from . import cmpq, pmpq, taylor, tdmpq
from .scoring import score_by_changes

METHODS = {"cmpq": cmpq.score, "pmpq": pmpq.score, "tdmpq": tdmpq.score}


def score_by_all(
    model: PreTrainedModel, plan: BitPlan, calibration: CalibrationSet, recipe: Recipe
) -> dict[str, SensitivityTable]:
    """The tables of all methods, by name; PMPQ and TDMPQ's perturbation in one walk through the model.

    The settings are those of each method, `method` and `estimator` of the recipe are not read.
    """
    disturbances = [pmpq.disturbance(recipe), tdmpq.disturbance(recipe)]
    pruning, noise = score_by_changes(model, plan, calibration, recipe, disturbances)
    return {
        "tdmpq, taylor": taylor.score(model, plan, calibration, recipe),
        "tdmpq, perturbation": noise,
        "pmpq": pruning,
        "cmpq": cmpq.score(model, plan, calibration, recipe),
    }
