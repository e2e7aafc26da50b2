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

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import ranks
from ..calibration import CalibrationSet, batches_on, seen_or_heard, sequences_in
from ..errors import ModelError
from ..experts import LinearExperts
from ..model_view import task_of
from ..modules import CONVOLUTIONS
from ..plan import BitPlan
from ..recipe import Recipe
from ..table import SensitivityTable
from ..work_folder import fingerprint
from .engine import backing_off
from .metrics import Batch, field_of_rows, not_finite
from .scoring import facts_of, open_journal

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

POSITIONS = "positions"  # of a model that sees or hears, after their number
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
        Per unit 1 minus its mean correlation with the other units that run over the same tokens (the encoder's or the
        decoder's), and the correlations of all pairs.

    Raises:
        ModelError: as `units_by_tokens`; or an output that is not finite.
    """
    settings = {name: getattr(recipe, name) for name in ("cca_components", "cca_samples", "seed")}
    facts = facts_of(model, plan, calibration, {"method": "cmpq", **settings})
    journal = open_journal(recipe, facts)
    groups = units_by_tokens(model, plan, calibration.batches[0])
    for field, units in groups.items():
        key = f"correlations over {field}"
        if ranks.rank() == 0 and key not in journal.results:  # a single pass: the other processes wait for it
            samples = sample_outputs(model, units, field, calibration, recipe.cca_samples, recipe.seed)
            journal.add(key, correlations(samples, recipe.cca_components).tolist())
    results = ranks.gather(journal.results)[0]
    found = {
        unit: dict(zip(units, row, strict=True))
        for field, units in groups.items()
        for unit, row in zip(units, results[f"correlations over {field}"], strict=True)
    }
    order = list(dict.fromkeys(module.unit for module in plan.modules))
    return SensitivityTable(
        method="cmpq",
        metric="correlation",
        base=1.0,
        raw={unit: 1 - (math.fsum(found[unit].values()) - 1) / (len(found[unit]) - 1) for unit in order},
        plan=plan,
        settings=settings,
        fingerprint=fingerprint(facts),
        correlations={unit: found[unit] for unit in order},
    )


@torch.no_grad()
def units_by_tokens(model: PreTrainedModel, plan: BitPlan, batch: Batch) -> dict[str, dict[str, tuple[str, ...]]]:
    """The input over whose tokens outputs run → unit → the modules whose outputs are the unit's.

    A unit's outputs are those of its block, of all experts of a layer together, or of its projections side by side. In
    an encoder–decoder the decoder's run over the labels, except the keys and values of its attention to the encoder:
    where these are part of a larger unit, they are left out. Outputs over different tokens cannot be compared, nor can
    those of models that see or hear over different numbers of positions: these inputs are called `"17 positions"`.

    Raises:
        ModelError: outputs that are not one row for each token, or fewer than two units over the same tokens.
    """
    experts = {name for name, module in model.named_modules() if isinstance(module, LinearExperts)}
    members: dict[str, tuple[str, ...]] = {}
    for module in plan.modules:
        if module.unit == module.block or module.unit in experts:
            members[module.unit] = (module.unit,)
        else:
            members[module.unit] = (*members.get(module.unit, ()), module.name)
    one = {name: tensor[:1] for name, tensor in batch.items()}
    if task_of(model) == "seq2seq-lm":
        one["labels"] = one["labels"][:, : one["input_ids"].shape[1] - 1]  # another length than the inputs'
    field_of: dict[str, str] = {}

    def look(name: str, output: Any) -> None:
        field = field_of_rows(_first(output), one)
        if field is not None and field == seen_or_heard(one):
            field = _positions(model.get_submodule(name), _first(output))
        if field is None:
            raise ModelError(
                f"{name} gives {tuple(_first(output).shape)}, not one row for each token; use a coarser granularity"
            )
        field_of[name] = field

    with ExitStack() as hooks:
        for name in itertools.chain.from_iterable(members.values()):
            hook = partial(lambda name, *seen: look(name, seen[2]), name)
            hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))
        model(**next(batches_on([one], model)))
    groups: dict[str, dict[str, tuple[str, ...]]] = {}
    for unit, names in members.items():
        fields = [field_of[name] for name in names]
        field = "labels" if "labels" in fields else fields[0]
        groups.setdefault(field, {})[unit] = tuple(name for name in names if field_of[name] == field)
    for field, units in groups.items():
        if len(units) < 2:
            raise ModelError(
                f"cmpq compares units with one another, and {next(iter(units))} is the only one over the {field}; use"
                " another method or a finer granularity"
            )
    return groups


@torch.no_grad()
def sample_outputs(
    model: PreTrainedModel,
    units: Mapping[str, Sequence[str]],
    field: str,
    calibration: CalibrationSet,
    count: int,
    seed: int,
) -> dict[str, Tensor]:
    """Outputs of units at the same random positions of the calibration data, padding left out.

    Args:
        units: unit → the modules whose outputs, side by side, are its output.
        field: the input over whose tokens they run.
        count: positions, at most as many as there are.
        seed: of the choice, which does not depend on the batch size.

    Returns:
        Unit → `[positions, features]` in the model's dtype, on the CPU.
    """
    names = list(itertools.chain.from_iterable(units.values()))

    def collect(batches: Sequence[Batch]) -> dict[str, list[Tensor]]:
        rows: dict[str, list[Tensor]] = {name: [] for name in names}
        chosen = _draw(batches, field, count, seed)

        def keep(name: str, positions: Tensor, *seen: Any) -> None:
            output = _first(seen[2])
            rows[name].append(output.flatten(0, -2)[positions.to(output.device)].cpu())

        bar = logging.tqdm(chosen, desc="Collecting outputs", disable=ranks.rank() > 0)
        for batch, positions in zip(batches_on(batches, model), bar, strict=True):
            with ExitStack() as hooks:
                for name in names:
                    hook = partial(keep, name, positions)
                    hooks.enter_context(model.get_submodule(name).register_forward_hook(hook))
                model(**batch)
        return rows

    rows = {name: torch.cat(parts) for name, parts in backing_off(collect, calibration.batches).items()}
    for name in names:
        if not bool(torch.isfinite(rows[name]).all()):
            raise not_finite(model, calibration.batches[0], f"{name} gives NaN or infinity on the calibration data")
    return {unit: torch.cat([rows[name] for name in members], 1) for unit, members in units.items()}


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _positions(module: nn.Module, output: Tensor) -> str | None:
    """What to call the positions for which a module of a model that sees or hears gives a row each, `[1, …, features]`;
    None if its output for one image or clip is something else: channels first, or windows as a batch of their own, in
    another order."""
    matrices = [
        layer for layer in module.modules() if getattr(layer, "weight", None) is not None and layer.weight.dim() > 1
    ]
    channels_first = all(isinstance(layer, CONVOLUTIONS) for layer in matrices)
    has_rows = len(output) == 1 and (isinstance(module, nn.Linear) or (output.dim() <= 3 and not channels_first))
    return f"{output[0, ..., 0].numel()} {POSITIONS}" if has_rows else None


def _mask(batch: Batch, field: str) -> Tensor:
    """Which of the positions of a field count, `[sequences, positions]`."""
    if field.endswith(POSITIONS):
        return torch.ones(sequences_in(batch), int(field.split()[0]), dtype=torch.long)
    return batch["attention_mask"] if field == "input_ids" else torch.ones_like(batch[field])


def _draw(batches: Sequence[Batch], field: str, count: int, seed: int) -> list[Tensor]:
    """Per batch, the flat positions of the sample."""
    masks = [_mask(batch, field) for batch in batches]
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
    standard = rows.to(torch.float64, copy=True).numpy()  # changed in place: a sample may be large
    size = np.einsum("ij,ij->j", standard, standard)
    standard -= standard.mean(0)
    spread = np.einsum("ij,ij->j", standard, standard)
    varying = spread > CONSTANT**2 * size
    standard = standard if varying.all() else standard[:, varying]
    standard /= np.sqrt(spread[varying] / len(rows))
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
