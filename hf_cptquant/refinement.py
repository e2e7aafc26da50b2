"""Refining a plan: swaps of bits between units, judged by what they do to the model.

The integer program adds up what each unit is predicted to cost by itself. Here the swaps of equal size that it would
sooner make than others (`allocation/swaps.py`) are tried one after the other: the model runs with its weights rounded
as the plan says, and a swap is kept if the predictions come nearer to the original's, by the Kullback–Leibler
divergence on calibration data.

Where rounding is to be tuned, the plan is judged before it is: of the error of rounding to nearest as much is left as
the other weights of the layer cannot make up for (`sensitivity/compensation.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from . import ranks
from .allocation import Swap, largest_bytes, next_swap, options
from .arithmetic import linears_in_working_dtype
from .calibration import CalibrationSet, batches_on, in_batches, spread_evenly
from .evaluate import rounded_as
from .plan import BitPlan
from .recipe import Recipe
from .recovery import Example, divergence, remember
from .sensitivity.compensation import shares_left
from .sensitivity.metrics import forward
from .sensitivity.scoring import open_journal
from .table import SensitivityTable
from .work_folder import fingerprint

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

TOKENS = 8192  # that a plan is judged by


@torch.no_grad()
def refine(
    model: PreTrainedModel, plan: BitPlan, table: SensitivityTable, calibration: CalibrationSet, recipe: Recipe
) -> tuple[BitPlan, dict[str, float]]:
    """Try the most promising swaps of a plan by the integer program, and keep those that help.

    Args:
        model: dense, in evaluation mode; left as it was, whatever happens. While a plan is judged, its weights are in
            memory twice.
        plan: the decisions.
        table: what they were made from.
        calibration: of which up to 8,192 tokens, spread evenly, judge; several processes divide them among themselves.
        recipe: `refine`, the number of swaps; the budget and what else `allocate` reads; `rounding`, `work_dir`.

    Returns:
        The refined plan, which is no larger than the budget, and the divergence before and after (nats).

    Raises:
        ConfigError: `work_dir` belongs to another run.
        ModelError, CalibrationError: as `remember`.
    """
    choices = options(table, recipe)
    size = sum(module.nbytes for module in plan.modules)
    limit = size if recipe.max_loss_increase is not None else largest_bytes(plan, recipe)
    batches = spread_evenly(calibration, TOKENS)
    left = shares_left(model, plan.inside, batches) if recipe.compensates else {}
    examples = remember(model, ranks.share(in_batches(batches, 1)))
    bits = {module.unit: module.scheme.bits for module in plan.modules}
    journal = open_journal(recipe, _facts(table, calibration, recipe, bits))

    def judged(key: str, bits: Mapping[str, int]) -> float:
        if key not in journal.results:
            wanted = plan.with_bits(bits, recipe.group_size, recipe.symmetric)
            journal.add(key, _divergence(model, wanted, left, examples))
        return journal.results[key]

    first = least = judged("the plan", bits)
    rejected: list[Swap] = []
    for step in logging.tqdm(range(recipe.refine), desc="Refining", unit="swap", disable=ranks.rank() > 0):
        if (swap := next_swap(choices, bits, limit, rejected)) is None:
            break
        found = judged(f"{step}: {swap}", swap.applied_to(bits))
        if found < least:
            logger.info(f"{swap} bits: divergence {found:.5f} nats, before {least:.5f}.")
            least, bits = found, swap.applied_to(bits)
        else:
            rejected.append(swap)
    refined = plan.with_bits(bits, recipe.group_size, recipe.symmetric)
    return refined, {"kl_before_refinement": first, "kl_after_refinement": least}


def _divergence(model: PreTrainedModel, plan: BitPlan, left: Mapping[str, float], examples: Sequence[Example]) -> float:
    """Mean divergence (nats) of all processes' examples, with the weights rounded as a plan says."""
    with rounded_as(model, plan, left), linears_in_working_dtype(model):
        batches = batches_on([example.batch for example in examples], model)
        own = [
            divergence(forward(model, batch).logits, example)[0]
            for batch, example in zip(batches, examples, strict=True)
        ]
    found = [value for values in ranks.gather(own) for value in values]
    return math.fsum(found) / len(found)


def _facts(
    table: SensitivityTable, calibration: CalibrationSet, recipe: Recipe, bits: Mapping[str, int]
) -> dict[str, Any]:
    """What decides the results, as JSON values."""
    settings = {name: getattr(recipe, name) for name in ("group_size", "symmetric", "compensates")}
    data = {"scores": table.fingerprint, "calibration": calibration.description["sha256"]}
    return {"method": "refinement", **data, **settings, "plan": fingerprint(bits)}
