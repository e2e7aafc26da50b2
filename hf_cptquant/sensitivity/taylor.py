"""TDMPQ by the Taylor expansion of the loss (arXiv 2412.03599 §3.4): a backward pass for each order prices all units.

Rounding changes a weight by ΔW, and the loss by ⟨g, ΔW⟩ + ½ ΔWᵀ H ΔW + …. The first-order term is measured on the
labels of the data, with its sign: a model is seldom at the minimum of the calibration text, and some rounding errors
help. It counts by the share of it that the labels at hand can tell from chance (`share_of_signal`). Rounding that looks
at the data makes other errors than those that are priced here, so the sign of their first-order term is not relied on;
then only the second-order term is measured, and for GPTQ and SignRound counts by the share of it that is left when the
weights of a layer make up for each other's errors (`compensation.py`).

For H stands the Fisher information, which for a cross-entropy is the Gauss–Newton matrix: the expectation of g gᵀ under
labels *drawn from the model*. Gradients of drawn labels are uncorrelated, so the square of their sum has the
expectation of the sum of their squares, which is what one backward pass per sequence can give. With the labels of the
data (the "empirical Fisher") that does not hold: on SmolLM2-135M the term comes out about twice too large and ranks
units worse. Rounding errors of different weights are nearly independent, so H's diagonal is enough.

Neither the gradients of the model nor the Fisher matrix are ever held. A linear layer's gradient is δᵀx, with its
inputs x and the gradient δ of its outputs, so a tap behind each layer sees both in the backward pass, turns them into a
few numbers per sequence and bit width, and lets go. The blocks are checkpointed: beyond the model and the outputs of
the blocks there are only one block's activations and one layer's gradient.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import logging

from .. import ranks
from ..arithmetic import working_dtype
from ..calibration import CalibrationSet, batches_on, in_batches, sequences_in, spread_evenly
from ..errors import CalibrationError, ModelError
from ..experts import has_linear_experts
from ..forwards import computing
from ..memory import trim
from ..model_view import task_of
from ..modules import CONVOLUTIONS, padding_of
from ..plan import BitPlan, LayerScheme, ModulePlan, scheme_for
from ..recipe import Recipe
from ..table import SensitivityTable
from ..work_folder import fingerprint
from .compensation import shares_left
from .engine import backing_off
from .metrics import Batch, field_of_rows, forward, labels_in, mean_loss, not_finite
from .rounding_errors import rounding_errors
from .scoring import facts_of, open_journal, with_labels

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

TOKENS_FOR_INPUT = 4  # for each feature of the widest input, to know how inputs depend on each other


def score(model: PreTrainedModel, plan: BitPlan, calibration: CalibrationSet, recipe: Recipe) -> SensitivityTable:
    """Predict what every bit width would cost in every unit of a plan.

    Args:
        model: dense, in evaluation mode; no weight is changed, and which of them require gradients is restored.
        plan: the units; its bits are not read.
        calibration: what the loss is measured on.
        recipe: `bits`, `bits_override`, `group_size`, `symmetric`, `rounding`, `taylor_samples`, `seed` (of the drawn
            labels), `work_dir`.

    Returns:
        Per unit and bit width the predicted rise of the mean loss (nats), which the first-order term may make negative;
        16 bits cost nothing.
        The raw measurement of a unit is the cost of the fewest bits.

    Raises:
        CalibrationError, ModelError: a loss or a gradient is not finite; the model predicts no classes.
    """
    widths = list(recipe.packed_bits)
    named = {name: getattr(recipe, name) for name in ("group_size", "symmetric", "taylor_samples", "seed")}
    orders = (1, 2) if recipe.rounds_to_nearest else (2,)
    settings = {
        "estimator": "taylor",
        **named,
        "bits": widths,
        "orders": list(orders),
        "shrunk": 1 in orders,
        "compensated": recipe.compensates,
    }
    facts = facts_of(model, plan, calibration, {"method": "tdmpq", **settings})
    journal = open_journal(recipe, facts)
    schemes = {
        module.name: [scheme_for(bits, module.in_features, recipe.group_size, recipe.symmetric) for bits in widths]
        for module in plan.modules
    }
    batches = with_labels(model, spread_evenly(calibration, recipe.taylor_samples))
    if has_linear_experts(model):  # whose rows do not tell which sequence they are from
        batches = in_batches(batches, 1)
    shares = dict.fromkeys(schemes, 1.0)
    if recipe.compensates:
        enough = TOKENS_FOR_INPUT * max(module.in_features for module in plan.modules)
        shares = shares_left(model, plan, spread_evenly(calibration, max(recipe.taylor_samples, enough)))
    ends = itertools.accumulate(sequences_in(batch) for batch in batches)
    spans = [
        (f"sequences {end - sequences_in(batch)} to {end - 1}", end - sequences_in(batch), batch)
        for end, batch in zip(ends, batches, strict=True)
    ]
    pending = [span for span in ranks.share(spans) if span[0] not in journal.results]
    total = sum(sequences_in(batch) for _, _, batch in pending)
    with logging.tqdm(total=total, desc="Scoring units", unit="sequence", disable=ranks.rank() > 0) as bar:
        for key, start, batch in pending:
            journal.add(key, _measured(model, plan, schemes, shares, orders, batch, start, recipe.seed))
            bar.update(sequences_in(batch))
            trim()
    found = {key: parts for gathered in ranks.gather(journal.results) for key, parts in gathered.items()}
    results = [part for key, _, _ in spans for part in found[key]]
    predictions = sum(part["predictions"] for part in results)
    terms = {
        unit: [
            [math.fsum(part["terms"][unit][index][order] for part in results) / predictions for order in (0, 1)]
            for index in range(len(widths))
        ]
        for unit in dict.fromkeys(module.unit for module in plan.modules)
    }
    signal = 0.0
    if 1 in orders:
        signal = share_of_signal(itertools.chain.from_iterable(terms.values()), predictions)
        logger.info(f"{signal:.0%} of the first-order terms is more than the chance of {predictions} predictions.")
    costs = {
        unit: {bits: signal * first + second for bits, (first, second) in zip(widths, found, strict=True)}
        for unit, found in terms.items()
    }
    return SensitivityTable(
        method="tdmpq",
        metric="loss",
        base=math.fsum(part["loss"] * part["predictions"] for part in results) / predictions,
        raw={unit: next(iter(prices.values()), 0.0) for unit, prices in costs.items()},
        plan=plan,
        settings=settings,
        fingerprint=fingerprint(facts),
        costs=costs,
    )


def share_of_signal(terms: Iterable[Sequence[float]], predictions: int) -> float:
    """How much of the first-order terms is not the chance of few labels: the factor, in [0, 1], by which the
    James–Stein estimator (its positive part) shrinks means that are measured with errors of known size.

    A first-order term is a mean over predictions. Of labels drawn from the model its variance is ΔWᵀ F ΔW over their
    number, and the second-order term is half of ΔWᵀ F ΔW.

    Args:
        terms: first- and second-order term of each unit and bit width.
        predictions: how many labels the loss is the mean of.
    """
    terms = list(terms)
    squares = math.fsum(first**2 for first, _ in terms)
    by_chance = math.fsum(2 * second for _, second in terms) / predictions
    return max(0.0, 1 - by_chance / squares) if squares else 0.0


def _measured(
    model: PreTrainedModel,
    plan: BitPlan,
    schemes: Mapping[str, Sequence[LayerScheme]],
    shares: Mapping[str, float],
    orders: Sequence[int],
    batch: Batch,
    start: int,
    seed: int,
) -> list[dict[str, Any]]:
    """The batch's parts, one if memory suffices: how many predictions, their mean loss, and per unit and width the sums
    over predictions of [⟨g, ΔW⟩, ½ ΔWᵀ F ΔW].

    Args:
        shares: of the terms of each module that count.
        orders: those wanted; others are 0.
        start: number of the batch's first sequence, which with the seed decides the drawn labels.
    """
    if not any(schemes.values()):  # nothing to price, only the loss to measure
        terms: dict[str, list[float]] = {module.unit: [] for module in plan.modules}
        predictions = sum(labels_in(model, batch))
        return [{"predictions": predictions, "loss": mean_loss(model, [batch]), "terms": terms}]

    def work(parts: Sequence[Batch]) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = []
        number = start
        for part in batches_on(parts, model):
            numbers = range(number, number := number + sequences_in(part))
            uniform = uniform_numbers(positions_of(model, part), seed, numbers)
            loss, terms = _expanded(model, plan, schemes, shares, orders, part, uniform)
            found = {unit: sums.tolist() for unit, sums in terms.items()}
            results.append({"predictions": sum(labels_in(model, part)), "loss": loss, "terms": found})
        return results

    return backing_off(work, [batch])


def _expanded(
    model: PreTrainedModel,
    plan: BitPlan,
    schemes: Mapping[str, Sequence[LayerScheme]],
    shares: Mapping[str, float],
    orders: Sequence[int],
    batch: Batch,
    uniform: Tensor,
) -> tuple[float, dict[str, Tensor]]:
    """One forward pass, and a backward pass for each order.

    Args:
        shares: of the terms of each module that count.
        orders: those wanted, the second among them; others are 0.
        uniform: for `gradient_of_drawn`.

    Returns:
        The mean loss, and unit → float64 `[widths, 2]`: first- and second-order terms, summed over predictions.
    """
    sequences, predictions = sequences_in(batch), sum(labels_in(model, batch))
    widths = len(next(iter(schemes.values())))
    terms = {module.unit: torch.zeros(widths, 2, dtype=torch.float64) for module in plan.modules}
    order = 1

    def observe(module: ModulePlan, inputs: Tensor, gradient: Tensor) -> None:
        layer = model.get_submodule(module.name)
        by_sequence = field_of_rows(inputs, batch) is not None if module.linear else len(inputs) == sequences
        if sequences > 1 and not by_sequence:
            raise ModelError(
                f"{module.name} sees {tuple(inputs.shape)}, not one row for each token; use another method"
            )
        changes = rounding_errors(layer, schemes[module.name])
        x, delta = (
            tensor.reshape(sequences, -1, *tensor.shape[-1 if module.linear else 1 :]) for tensor in (inputs, gradient)
        )
        if order == 1:
            of_weight = gradient_of_matrix(layer, x.flatten(0, 1), delta.flatten(0, 1))
            sums = [predictions * (of_weight * change).sum() for change in changes]
        else:
            fisher = torch.zeros(module.out_features, module.in_features, dtype=torch.float32, device=x.device)
            for rows, of_rows in zip(x, delta, strict=True):
                of_weight = gradient_of_matrix(layer, rows, of_rows)
                fisher.addcmul_(of_weight, of_weight, value=predictions**2)
            sums = [(fisher * change.square_()).sum() / 2 for change in changes]
        terms[module.unit][:, order - 1] += shares[module.name] * torch.stack(sums).cpu()

    with tapped(model, plan, observe):
        outputs = forward(model, batch)
        if not bool(torch.isfinite(outputs.loss)):
            raise not_finite(model, batch, f"the loss is {outputs.loss.item()}")
        logits = outputs.logits
        if 1 in orders:
            logits.backward(*torch.autograd.grad(outputs.loss, logits), retain_graph=True)  # frees the loss's graph
        order = 2
        logits.backward(gradient_of_drawn(model, batch["labels"], logits.detach(), uniform))
    for unit, found in terms.items():
        if not bool(torch.isfinite(found).all()):
            raise CalibrationError(f"a gradient in {unit} is not finite, though the loss is; try dtype=torch.float32")
    return outputs.loss.item(), terms


def gradient_of_matrix(layer: nn.Module, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the loss by the weight of a layer as a matrix, float32 `[out_features, in_features]`.

    Args:
        layer: linear, or a convolution.
        inputs, gradient: of its outputs: `[rows, features]`; of a convolution `[batch, channels, …]`.
    """
    if not isinstance(layer, CONVOLUTIONS):
        return gradient_of_weight(inputs, gradient)
    by_weight = conv1d_weight if isinstance(layer, nn.Conv1d) else conv2d_weight
    settings = (layer.stride, padding_of(layer), layer.dilation, layer.groups)
    return by_weight(inputs.float(), layer.weight.shape, gradient.float(), *settings).flatten(1)


def gradient_of_weight(inputs: Tensor, gradient: Tensor) -> Tensor:
    """δᵀx in float32. Operands in bfloat16 are good enough, because their rounding errors cancel in the sums; float16
    would underflow."""
    if working_dtype(inputs.dtype, inputs.device) == torch.bfloat16:
        return (gradient.t() @ inputs).float()
    return gradient.float().t() @ inputs.float()


def gradient_of_drawn(model: PreTrainedModel, labels: Tensor, logits: Tensor, uniform: Tensor) -> Tensor:
    """Gradient of the mean negative log-likelihood of labels that are drawn from what the model predicts, in the place
    of those of the data.

    By the logits it is (p − onehot) / n, so that one softmax serves to draw and to derive.

    Args:
        labels: `[batch, length]`, or `[batch]` of a classifier; for −100 nothing is drawn.
        logits: `[batch, length, vocabulary]`, or `[batch, classes]`.
        uniform: one number in [0, 1) for each prediction, in the shape of the labels, or for each frame of CTC (what is
            more is not read); decides the draw.

    Returns:
        In the shape and dtype of the logits.

    Raises:
        ModelError: the model's outputs are no classes.
    """
    if task_of(model) == "ctc":
        return _gradient_of_drawn_text(model, logits, uniform)
    if logits.shape[-1] < 2 or logits.dim() != labels.dim() + 1:
        raise ModelError(
            f"{type(model).__name__} predicts {tuple(logits.shape)} for labels {tuple(labels.shape)}, no classes; use"
            " estimator='perturbation'"
        )
    if task_of(model) == "causal-lm":  # a position predicts the next one
        labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    wanted = (labels != -100).unsqueeze(-1).to(logits.device)
    gradient = torch.empty_like(logits)
    for index, (row, number) in enumerate(zip(logits, uniform.to(logits.device), strict=True)):
        probabilities = row.float().softmax(-1)
        drawn = draw(probabilities, number)
        probabilities.scatter_add_(-1, drawn, torch.full_like(probabilities[..., :1], -1.0))
        gradient[index] = probabilities.mul_(wanted[index] / wanted.sum())
    return gradient


def _gradient_of_drawn_text(model: PreTrainedModel, logits: Tensor, uniform: Tensor) -> Tensor:
    """As `gradient_of_drawn`, for CTC: a path that is drawn frame by frame spells a text, which has just the
    probability that CTC gives it. All frames count."""
    with torch.enable_grad():
        scores = logits.float().requires_grad_()
        log_probabilities = scores.log_softmax(-1)
        paths = draw(log_probabilities.detach().exp(), uniform[:, : logits.shape[1]].to(logits.device)).squeeze(-1)
        blank = model.config.pad_token_id
        texts = [text[text != blank] for text in map(torch.unique_consecutive, paths)]
        lengths = torch.full((len(texts),), logits.shape[1]), torch.tensor([len(text) for text in texts])
        given = log_probabilities.transpose(0, 1), torch.cat(texts), *lengths
        loss = F.ctc_loss(*given, blank=blank, reduction="sum") / len(texts)
    return torch.autograd.grad(loss, scores)[0].to(logits.dtype)


def positions_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    """A tensor `[sequences, …]` with a place for each label that is drawn, or for CTC at least one for each frame."""
    return batch[model.main_input_name].flatten(1) if task_of(model) == "ctc" else batch["labels"]


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Classes by inverse transform sampling.

    Args:
        probabilities: `[…, classes]`.
        uniform: `[…]`, in [0, 1).

    Returns:
        int64 `[…, 1]`; never a class of probability 0.
    """
    cumulative = probabilities.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform.unsqueeze(-1) * cumulative[..., -1:], right=True)
    return drawn.clamp(max=probabilities.shape[-1] - 1)


def uniform_numbers(labels: Tensor, seed: int, numbers: Iterable[int]) -> Tensor:
    """For `gradient_of_drawn`, in the shape of the labels of the sequences with these numbers: for each sequence the
    same whatever its batch and device."""

    def of_sequence(number: int) -> Tensor:
        digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.rand(labels.shape[1:], generator=generator)

    return torch.stack([of_sequence(number) for number in numbers])


class _Tap(torch.autograd.Function):
    """Passes a layer's outputs on, and in the backward pass shows its inputs and the gradient of its outputs.

    The inputs are saved as any other function saves them, so checkpointing drops and recomputes them. The outputs share
    their memory with the layer's, but are no view of them, so that what follows may write into them.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, outputs: Tensor, observe: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.observe = observe
        return outputs.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        with torch.no_grad():
            ctx.observe(*ctx.saved_tensors, gradient)
        return None, gradient, None


@contextmanager
def tapped(
    model: PreTrainedModel, plan: BitPlan, observe: Callable[[ModulePlan, Tensor, Tensor], None]
) -> Iterator[None]:
    """Let gradients flow past taps behind the modules of a plan, as `differentiable` does."""
    with ExitStack() as hooks:
        for module in plan.modules:
            shown = partial(tap, partial(observe, module))
            hooks.enter_context(model.get_submodule(module.name).register_forward_hook(shown))
        hooks.enter_context(differentiable(model, dict.fromkeys(module.block for module in plan.modules)))
        yield


@contextmanager
def differentiable(model: PreTrainedModel, names: Iterable[str]) -> Iterator[None]:
    """Let gradients flow from the embeddings, or from pixel values, on through checkpointed blocks; no parameter gets
    one."""
    wanted = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    blocks = [model.get_submodule(name) for name in names]
    forwards = {block: partial(checkpoint, block.forward, use_reentrant=False) for block in blocks}
    with ExitStack() as hooks:
        for embedding in (module for module in model.modules() if isinstance(module, nn.Embedding)):
            hooks.enter_context(embedding.register_forward_hook(lambda *seen: seen[2].requires_grad_()))
        hooks.enter_context(model.register_forward_pre_hook(_with_gradients, with_kwargs=True))
        hooks.enter_context(computing(forwards))
        try:
            for name in wanted:
                model.get_parameter(name).requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for name in wanted:  # by name: accelerate makes new parameters of offloaded ones
                model.get_parameter(name).requires_grad_(True)


def _with_gradients(
    _model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a model with such numbers as have gradients getting them."""

    def leaf(value: Any) -> Any:
        return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value

    return args, {name: leaf(value) for name, value in inputs.items()}


def tap(
    observe: Callable[[Tensor, Tensor], None], _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """A forward hook that lets a function see a layer's inputs and the gradient of its outputs."""
    return _Tap.apply(inputs[0], output, observe)
