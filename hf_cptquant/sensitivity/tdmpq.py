"""TDMPQ: the rise of the loss when the weights of a unit are disturbed (arXiv 2412.03599 §3.4, Algorithm 3).

W' = W + ε with ε ~ N(0, σ²) (equation 9), total variation TV = Σ loss over the batches (10), S = TV / N (11), weights
restored afterwards (12). The score of a unit is S minus the S of the undisturbed model. σ is relative to the root mean
square of each weight, so that a unit is not called sensitive for having small weights; the noise is seeded by the
unit's name, so it depends neither on the order of the units nor on the batch size nor on the device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration import CalibrationSet
from ..config import Recipe
from ..plan import BitPlan, SensitivityTable
from .engine import mean_loss, measure_variants, with_labels


def score(model: PreTrainedModel, plan: BitPlan, calibration: CalibrationSet, recipe: Recipe) -> SensitivityTable:
    """Measure every unit of a plan.

    Args:
        model: dense, in evaluation mode; its weights are the same tensors afterwards, also after an exception.
        plan: the units; its bits are not read.
        calibration: what the loss is measured on.
        recipe: `perturb`, `perturbation_scale`, `seed`.

    Returns:
        Per unit the rise of the mean loss (nats).
    """
    units: dict[str, list[str]] = {}
    variants: dict[str, dict[str, None]] = {}
    for module in plan.modules:
        units.setdefault(module.unit, []).append(module.name)
        variants.setdefault(module.block, {})[module.unit] = None

    @contextmanager
    def change(unit: str) -> Iterator[None]:
        names = units[unit] if recipe.perturb == "all" else units[unit][:1]
        with perturbed({name: model.get_submodule(name) for name in names}, recipe.perturbation_scale, recipe.seed):
            yield

    batches = with_labels(model, calibration.batches)
    base = mean_loss(model, batches, desc="Measuring the model")
    losses = dict.fromkeys(units, base)
    with logging.tqdm(total=len(units), desc="Scoring units") as bar:
        for unit, loss in measure_variants(
            model, batches, {block: list(names) for block, names in variants.items()}, change
        ):
            losses[unit] = loss
            bar.update()
    raw = {unit: loss - base for unit, loss in losses.items()}
    return SensitivityTable("tdmpq", "loss", base, raw, _fingerprint(model, plan, calibration, recipe, base))


@contextmanager
def perturbed(modules: dict[str, nn.Module], scale: float, seed: int) -> Iterator[None]:
    """Add noise to the weights of some modules, and put the very same tensors back on leaving.

    Args:
        modules: name → module with a `weight`.
        scale: standard deviation of the noise relative to the root mean square of each weight.
        seed: combined with each name.
    """
    originals = {name: module.weight.data for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.weight.data = _disturbed(originals[name], scale, f"{seed}:{name}")
        yield
    finally:
        for name, module in modules.items():
            module.weight.data = originals[name]


def _disturbed(weight: Tensor, scale: float, key: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little", signed=True)
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    full = weight.float()
    return (full + noise * (scale * full.square().mean().sqrt())).to(weight.dtype)


def _fingerprint(
    model: PreTrainedModel, plan: BitPlan, calibration: CalibrationSet, recipe: Recipe, base: float
) -> str:
    """Identifies what the figures belong to; the exact base loss stands for the weights."""
    facts = {
        "class": type(model).__name__,
        "modules": [(module.name, module.unit, module.out_features, module.in_features) for module in plan.modules],
        "base": base,
        "calibration": calibration.description["sha256"],
        "recipe": [recipe.method, recipe.perturb, recipe.perturbation_scale, recipe.seed],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
