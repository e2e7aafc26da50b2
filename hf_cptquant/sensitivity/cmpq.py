"""CMPQ: how little the outputs of a unit have in common with those of the others (arXiv 2412.03599 §3.2, Algorithm 1).

One forward pass collects the outputs of every unit at a random sample of positions. Canonical correlation analysis of
each pair gives the singular values of C_XX^{-1/2} C_XY C_YY^{-1/2} (appendix A); the correlation of a pair is their
mean, and the score of a unit is 1 minus its mean correlation with the others: what no other carries needs more bits.

With more features than samples any two units correlate perfectly, so each is first projected to its leading principal
components. In that basis C_XX is diagonal, which makes the whitening a division, the ridge an addition, and a pair no
more than one small product. Features are scaled to unit variance before: canonical correlations don't depend on it, but
without it the few huge activations of a language model's first token would be the only component of many blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import ranks
from ..calibration import CalibrationSet, batches_on
from ..config import Recipe
from ..errors import ModelError
from ..plan import BitPlan, SensitivityTable
from ..work_folder import fingerprint
from .engine import backing_off
from .metrics import Batch, field_of_rows, not_finite
from .scoring import facts_of, open_journal

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

KEPT_VARIANCE = 0.99
CONSTANT = 1e-9  # a feature varies if its standard deviation is above this share of its root mean square
RIDGE = 1e-6  # relative to a unit's largest variance


def score(model: PreTrainedModel, plan: BitPlan, calibration: CalibrationSet, recipe: Recipe) -> SensitivityTable:
    """Correlate the outputs of all units of a plan.

    Args:
        model: dense, in evaluation mode.
        plan: the units; its bits are not read.
        calibration: what flows through the model.
        recipe: `cca_components`, `cca_samples`, `seed`, `work_dir`.

    Returns:
        Per unit 1 minus its mean correlation with the other units of its stack of blocks (the encoder's and the
        decoder's positions are different tokens), and the correlations of all pairs.

    Raises:
        ModelError: fewer than two units in a stack, or outputs that are not `[batch, length, features]`.
    """
    settings = {name: getattr(recipe, name) for name in ("cca_components", "cca_samples", "seed")}
    facts = facts_of(model, plan, calibration, {"method": recipe.method, **settings})
    stacks = units_by_stack(plan)
    journal = open_journal(recipe, facts)
    for stack, units in stacks.items():
        if ranks.rank() == 0 and stack not in journal.results:  # a single pass: the other processes wait for it
            samples = sample_outputs(model, units, calibration, recipe.cca_samples, recipe.seed)
            journal.add(stack, correlations(samples, recipe.cca_components).tolist())
    found = {stack: np.array(matrix) for stack, matrix in ranks.gather(journal.results)[0].items()}
    lacking = {
        unit: 1 - (row.sum() - 1) / (len(row) - 1)
        for stack, units in stacks.items()
        for unit, row in zip(units, found[stack], strict=True)
    }
    order = list(dict.fromkeys(module.unit for module in plan.modules))
    return SensitivityTable(
        method=recipe.method,
        metric="correlation",
        base=1.0,
        raw={unit: float(lacking[unit]) for unit in order},
        blocks={module.unit: module.block for module in plan.modules},
        settings=settings,
        fingerprint=fingerprint(facts),
        correlations={
            unit: dict(zip(units, map(float, row), strict=True))
            for stack, units in stacks.items()
            for unit, row in zip(units, found[stack], strict=True)
        },
    )


def units_by_stack(plan: BitPlan) -> dict[str, dict[str, tuple[str, ...]]]:
    """Stack of blocks → unit → the modules whose outputs are the unit's: the block itself, or its projections.

    Raises:
        ModelError: a stack has fewer than two units.
    """
    stacks: dict[str, dict[str, tuple[str, ...]]] = {}
    for module in plan.modules:
        units = stacks.setdefault(module.block.rpartition(".")[0], {})
        if module.unit == module.block:
            units[module.unit] = (module.block,)
        else:
            units[module.unit] = (*units.get(module.unit, ()), module.name)
    for stack, units in stacks.items():
        if len(units) < 2:
            raise ModelError(
                f"cmpq compares units with one another, and {stack} has only one; use another method or a finer"
                " granularity"
            )
    return stacks


@torch.no_grad()
def sample_outputs(
    model: PreTrainedModel, units: Mapping[str, Sequence[str]], calibration: CalibrationSet, count: int, seed: int
) -> dict[str, Tensor]:
    """Outputs of units at the same random positions of the calibration data, padding left out.

    Args:
        units: unit → the modules whose outputs, side by side, are its output.
        count: positions, at most as many as there are.
        seed: of the choice, which does not depend on the batch size.

    Returns:
        Unit → `[positions, features]` in the model's dtype, on the CPU.
    """
    names = [name for members in units.values() for name in members]

    def collect(batches: Sequence[Batch]) -> dict[str, list[Tensor]]:
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        chosen: dict[str, list[Tensor]] = {}

        def keep(name: str, batch: int, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            field = field_of_rows(first, batches[batch])
            if field is None:
                raise ModelError(
                    f"{name} gives {tuple(first.shape)}, not one row for each token; use granularity='block'"
                )
            if field not in chosen:
                chosen[field] = _draw(batches, field, count, seed)
            rows[name].append(first.flatten(0, -2)[chosen[field][batch].to(first.device)].cpu())

        for index, batch in enumerate(logging.tqdm(batches, desc="Collecting outputs", disable=ranks.rank() > 0)):
            with ExitStack() as hooks:
                for name in names:
                    module = model.get_submodule(name)
                    hooks.enter_context(
                        module.register_forward_hook(lambda *seen, name=name, index=index: keep(name, index, seen[2]))
                    )
                model(**next(batches_on([batch], model.device)))
        return rows

    rows = {name: torch.cat(parts) for name, parts in backing_off(collect, calibration.batches).items()}
    for name in names:
        if not bool(torch.isfinite(rows[name]).all()):
            raise not_finite(model, calibration.batches[0], f"{name} gives NaN or infinity on the calibration data")
    return {unit: torch.cat([rows[name] for name in members], 1) for unit, members in units.items()}


def _draw(batches: Sequence[Batch], field: str, count: int, seed: int) -> list[Tensor]:
    """Per batch, the flat positions of the sample."""
    masks = [batch["attention_mask"] if field == "input_ids" else torch.ones_like(batch[field]) for batch in batches]
    valid = torch.cat([mask.flatten() for mask in masks]).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    chosen = valid[torch.randperm(len(valid), generator=generator)[:count]].sort().values
    sizes = [mask.numel() for mask in masks]
    ends = np.cumsum(sizes)
    return [
        chosen[(chosen >= end - size) & (chosen < end)] - (end - size) for size, end in zip(sizes, ends, strict=True)
    ]


def correlations(samples: Mapping[str, Tensor], components: int) -> np.ndarray:
    """Mean canonical correlation of each pair of units, `[units, units]`, symmetric with a diagonal of ones.

    Args:
        samples: unit → `[samples, features]`.
        components: at most so many principal components of each.
    """
    whitened = []
    for unit, rows in logging.tqdm(samples.items(), desc="Principal components", disable=ranks.rank() > 0):
        whitened.append(whiten(rows, components))
        if whitened[-1].shape[1] == 0:
            logger.warning(f"{unit} gives the same output for every token: it counts as uncorrelated with all others.")
    matrix = np.eye(len(whitened))
    for i, first in enumerate(whitened):
        for j, second in enumerate(whitened[:i]):
            if min(first.shape[1], second.shape[1]):
                canonical = np.linalg.svd(first.T @ second, compute_uv=False).clip(0, 1)
                matrix[i, j] = matrix[j, i] = canonical.mean()
    return matrix


def whiten(rows: Tensor, components: int) -> np.ndarray:
    """The leading principal components of a sample as uncorrelated columns of unit length (ridge aside).

    Args:
        rows: `[samples, features]`, any float dtype.
        components: at most so many; fewer if they hold 99 % of the variance.

    Returns:
        float64 `[samples, kept]`; none are kept of rows that are all equal.
    """
    values = rows.double().numpy()
    centred = values - values.mean(0)
    spread, size = (np.sqrt(np.square(array).mean(0)) for array in (centred, values))
    varying = spread > CONSTANT * size
    standard = centred[:, varying] / spread[varying]
    samples, features = standard.shape
    if not features:
        return standard
    wide = features > samples
    gram = standard @ standard.T if wide else standard.T @ standard
    order = len(gram)
    variances, vectors = scipy.linalg.eigh(gram, subset_by_index=[max(0, order - components), order - 1])
    variances, vectors = variances[::-1].clip(0), vectors[:, ::-1]
    kept = int(np.searchsorted(np.cumsum(variances) / np.trace(gram), KEPT_VARIANCE)) + 1
    variances, vectors = variances[:kept], vectors[:, :kept]
    scores = vectors * np.sqrt(variances) if wide else standard @ vectors
    return scores / np.sqrt(variances + RIDGE * variances[0])
