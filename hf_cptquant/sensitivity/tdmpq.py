"""TDMPQ: how much worse a model gets when the weights of a unit are disturbed (arXiv 2412.03599 §3.4).

Two estimators. `"perturbation"` is Algorithm 3: W' = W + ε with ε ~ N(0, σ²) (equation 9), total variation TV = Σ loss
over the batches (10), S = TV / N (11), weights restored afterwards (12); the score of a unit is S minus the S of the
undisturbed model. σ is relative to the root mean square of each weight, so that a unit is not called sensitive for
having small weights; the noise is seeded by the module's name, so it depends neither on the order of the units nor on
the batch size nor on the device. `"taylor"` (see `taylor.py`) is the decomposition itself, from gradients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration import CalibrationSet
from ..plan import BitPlan
from ..recipe import Recipe
from ..table import SensitivityTable
from . import taylor
from .engine import changed_weights
from .scoring import Disturbance, score_by_changes


def score(model: PreTrainedModel, plan: BitPlan, calibration: CalibrationSet, recipe: Recipe) -> SensitivityTable:
    """Measure every unit of a plan by noise on its weights, or by the Taylor expansion of the loss.

    Args:
        model: dense, in evaluation mode; its weights are the same tensors afterwards, also after an exception.
        plan: the units; its bits are not read.
        calibration: what the metric is measured on.
        recipe: `estimator`; `perturb`, `perturbation_scale`, `metric`, `seed`, `work_dir`; those of `taylor.score`.

    Returns:
        Per unit how much worse the metric gets.
    """
    if recipe.estimator == "taylor":
        return taylor.score(model, plan, calibration, recipe)

    (table,) = score_by_changes(model, plan, calibration, recipe, [disturbance(recipe)])
    return table


def disturbance(recipe: Recipe) -> Disturbance:
    """Noise of the recipe's `perturbation_scale` on `perturb`."""

    def change(modules: Mapping[str, nn.Module], scale: float) -> AbstractContextManager[None]:
        chosen = modules if recipe.perturb == "all" else dict(islice(modules.items(), 1))
        return perturbed(chosen, scale, recipe.seed)

    names = ("perturb", "perturbation_scale", "seed")
    settings = {"estimator": "perturbation", **{name: getattr(recipe, name) for name in names}}
    return Disturbance("tdmpq", (recipe.perturbation_scale,), change, settings)


def perturbed(modules: Mapping[str, nn.Module], scale: float, seed: int) -> AbstractContextManager[None]:
    """Context with noise on the weights of some modules (equation 9).

    Args:
        modules: name → module with a `weight`.
        scale: standard deviation of the noise relative to the root mean square of each weight.
        seed: combined with each name.
    """
    return changed_weights(modules, lambda name, weight: _disturbed(weight, scale, f"{seed}:{name}"))


def _disturbed(weight: Tensor, scale: float, key: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    full = weight.float()
    return (full + noise * (scale * full.square().mean().sqrt())).to(weight.dtype)
