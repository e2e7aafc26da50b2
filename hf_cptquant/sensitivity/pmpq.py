"""PMPQ: how much worse a model gets when a unit is pruned (arXiv 2412.03599 §3.3, Algorithm 2).

For each sparsity level s, the weights of a unit with |w| ≤ quantile(|w|, s) of all its weights are masked out
(equations 6 and 7) and the loss is measured. The paper takes base accuracy minus accuracy; for a loss it is the
measured loss minus the base. The score is the mean over the levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..calibration import CalibrationSet
from ..plan import BitPlan
from ..recipe import Recipe
from ..table import SensitivityTable
from .engine import changed_weights
from .scoring import Disturbance, score_by_changes


def score(model: PreTrainedModel, plan: BitPlan, calibration: CalibrationSet, recipe: Recipe) -> SensitivityTable:
    """Measure every unit of a plan by pruning it.

    Args:
        model: dense, in evaluation mode; its weights are the same tensors afterwards, also after an exception.
        plan: the units; its bits are not read.
        calibration: what the metric is measured on.
        recipe: `sparsity_levels`, `metric`, `work_dir`.

    Returns:
        Per unit how much worse the metric gets, averaged over the levels.
    """
    (table,) = score_by_changes(model, plan, calibration, recipe, [disturbance(recipe)])
    return table


def disturbance(recipe: Recipe) -> Disturbance:
    """Pruning to the recipe's `sparsity_levels`."""
    return Disturbance("pmpq", recipe.sparsity_levels, pruned, {"sparsity_levels": list(recipe.sparsity_levels)})


def pruned(modules: Mapping[str, nn.Module], sparsity: float) -> AbstractContextManager[None]:
    """Context in which the smallest weights of some modules together are zero.

    Args:
        modules: name → module with a `weight`.
        sparsity: share of all their weights that is masked out.
    """
    with ExitStack() as loaded:
        for module in modules.values():
            loaded.enter_context(align_module_device(module))
        threshold = magnitude_quantile([module.weight.data for module in modules.values()], sparsity)
    return changed_weights(modules, lambda _, weight: torch.where(weight.abs() > threshold, weight, 0))


def magnitude_quantile(weights: list[Tensor], share: float) -> Tensor:
    """The largest magnitude that a mask `|w| > quantile(|w|, share)` removes, exact at any size (equation 7).

    `torch.quantile` interpolates between two neighbours in the sorted magnitudes, and older versions refuse more
    than 16 million of them. No weight lies between neighbours, so the lower one makes the same mask.

    Args:
        weights: tensors of any shape and one dtype, taken together.
        share: between 0 and 1.
    """
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    return magnitudes.kthvalue(math.floor(share * (len(magnitudes) - 1)) + 1).values
