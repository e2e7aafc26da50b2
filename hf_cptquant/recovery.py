"""Recovery after rounding: scales and norms are distilled from the original model, while the integers stay.

The fine-tuning after quantization that the paper leaves to future work (arXiv 2412.03599, Limitations), in the form of
PEQA (arXiv 2305.14152): what is trained is a factor for each scale and for each feature of a norm, so that the result
has the same plan, size and speed. It learns to predict what the original predicted on the calibration data, by the
Kullback–Leibler divergence. Of the original's predictions the most probable classes are remembered, and all others
count as one class; what is minimized is then a lower bound of the divergence. With q for the probabilities of the
quantized model its gradient by the logits is q − p̂, where p̂ is p on the classes that are remembered, and on the others
what is left of p, spread as q is spread over them.

A part of the data is kept to judge by, and the best state that it has seen is taken, which may be the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import psutil
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .arithmetic import linears_in_working_dtype
from .calibration import batches_on, sequences_in, tokens_in
from .errors import CalibrationError, ModelError
from .forwards import computing
from .grid import dequantize
from .modules import PackedLayer, packed_modules
from .plan import BitPlan
from .sensitivity.metrics import Batch, forward, mean
from .sensitivity.scoring import with_labels
from .sensitivity.taylor import differentiable
from .tied import TiedLayer, tied_layers

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

CLASSES = 128  # remembered for each prediction: on SmolLM2 they hold 85 % of the divergence
BYTES_OF_CLASS = 8  # its number and its probability
STEPS = 64
RATE, BETAS = 1e-3, (0.9, 0.99)  # of Adam; the rate falls linearly to 0
WARM_UP = 4  # steps
JUDGE_EVERY = 16  # steps
LEAST_SHARE = 1e-6  # of the classes that are not remembered, below which float32 cannot tell it from 0


@dataclass(frozen=True)
class Example:
    """A batch, and what the original model predicts for it.

    Attributes:
        batch: keyword arguments for `model.forward`, with labels.
        classes: int32 `[…, kept]`, the most probable ones of each prediction.
        log_probabilities: float32 in the same shape, theirs.
    """

    batch: Batch
    classes: Tensor
    log_probabilities: Tensor


@torch.no_grad()
def remember(model: PreTrainedModel, batches: Sequence[Batch]) -> list[Example]:
    """What a model predicts, as far as recovery will need it: about 1 KiB for each token, in main memory.

    Args:
        model: the original, in evaluation mode.
        batches: calibration data, a step of training each.

    Raises:
        CalibrationError: the predictions would not fit into what is free of the main memory.
        ModelError: its outputs are no classes.
    """
    examples = []
    predictions = sum(tokens_in(batch) for batch in batches)
    needed, free = predictions * CLASSES * BYTES_OF_CLASS, psutil.virtual_memory().available
    if needed > free:
        raise CalibrationError(
            f"recover='scales' remembers what the original predicts for {predictions} tokens, up to"
            f" {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free; lower num_samples or sequence_length"
        )
    labelled = with_labels(model, batches)
    with linears_in_working_dtype(model):
        for batch, on_device in zip(labelled, batches_on(labelled, model), strict=True):
            logits = forward(model, on_device).logits
            if logits.shape[-1] < 2:
                raise ModelError(
                    f"{type(model).__name__} predicts {tuple(logits.shape)}, no classes that recover='scales' could"
                    " learn from; leave recover out"
                )
            found = [row.float().log_softmax(-1).topk(min(CLASSES, row.shape[-1]), -1) for row in logits]
            values, classes = (torch.stack(parts).cpu() for parts in zip(*found, strict=True))
            examples.append(Example(batch, classes.int(), values))
    return examples


def divergence(logits: Tensor, example: Example) -> tuple[float, Tensor]:
    """How far predictions are from those that are remembered.

    Args:
        logits: `[batch, …, classes]` of the quantized model.
        example: what the original predicted.

    Returns:
        The mean over all predictions of KL(p ‖ q) (nats), with the classes that are not remembered as one; and the
        gradient of its sum by the logits (of the mean it would underflow in float16, and Adam does not mind).
    """
    total, gradient = 0.0, torch.empty_like(logits)
    for index, row in enumerate(logits):  # one at a time: float32 of all would be large
        log_q = row.float().log_softmax(-1)
        classes = example.classes[index].long().to(row.device)
        log_p = example.log_probabilities[index].to(row.device)
        of_classes, p = log_q.gather(-1, classes), log_p.exp()
        rest, rest_q = ((1 - each.sum(-1)).clamp(min=LEAST_SHARE) for each in (p, of_classes.exp()))
        total += float((p * (log_p - of_classes)).sum() + (rest * (rest.log() - rest_q.log())).sum())
        q = log_q.exp()
        aim = (q * (rest / rest_q).unsqueeze(-1)).scatter_(-1, classes, p)
        gradient[index] = q - aim
    return total / logits.shape[:-1].numel(), gradient


def recover(
    model: PreTrainedModel, plan: BitPlan, training: Sequence[Example], judging: Sequence[Example], seed: int
) -> dict[str, float]:
    """Train the scales and norms of a packed model, in place.

    With groups of 64 or more it takes no more memory for weights than the model did in 16 bits: beside the packed
    weights there are a byte for each integer, and 20 bytes for each factor.

    Args:
        model: packed by `plan`, in evaluation mode, in memory.
        plan: whose blocks are recomputed in the backward pass, so that the activations of one are held at a time.
        training: what is learnt, an example a step.
        judging: what decides which state is taken.
        seed: of the order of the examples.

    Returns:
        `"kl_before_recovery"` and `"kl_after_recovery"`: divergence on the examples that judge (nats). The second is
        never larger.
    """
    student = _Student(model)
    optimizer = torch.optim.Adam(student.factors.values(), lr=RATE, betas=BETAS)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / STEPS))
    generator = torch.Generator().manual_seed(seed)
    epochs = range(math.ceil(STEPS / len(training)))
    order = [index for _ in epochs for index in torch.randperm(len(training), generator=generator).tolist()]
    with student.in_use(), linears_in_working_dtype(model):
        least = first = _judged(model, judging)
        best = student.state()
        for step, index in enumerate(logging.tqdm(order[:STEPS], desc="Recovering", unit="step"), start=1):
            student.learn(plan, training[index])
            optimizer.step()
            rate.step()
            student.scale_norms()
            if step % JUDGE_EVERY == 0:
                found = _judged(model, judging)
                logger.info(f"Recovery after {step} steps: divergence {found:.5f} nats, at first {first:.5f}.")
                if found < least:
                    least, best = found, student.state()
        student.restore(best)
    student.keep()
    return {"kl_before_recovery": first, "kl_after_recovery": least}


@torch.no_grad()
def _judged(model: PreTrainedModel, examples: Sequence[Example]) -> float:
    found = [divergence(forward(model, _on(model, example)).logits, example)[0] for example in examples]
    return mean(found, [sequences_in(example.batch) for example in examples])


def _on(model: PreTrainedModel, example: Example) -> Batch:
    return next(batches_on([example.batch], model))


class _Student:
    """A packed model whose scales and norms are multiplied by factors.

    Attributes:
        factors: module → float32, 1 at first, in the shape of its scale, or of the weight of a norm.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._weights = {name: module.quantized() for name, module in packed_modules(model).items()}
        self._norms = {name: module.weight for name, module in model.named_modules() if _is_norm(module)}
        self._own = {name: weight.detach().to(torch.float32, copy=True) for name, weight in self._norms.items()}
        shapes = {name: weight.scale for name, weight in self._weights.items()} | self._own
        self.factors = {name: nn.Parameter(torch.ones_like(one, dtype=torch.float32)) for name, one in shapes.items()}

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the packed modules compute with their factors."""
        modules: dict[nn.Module, str] = {self._model.get_submodule(name): name for name in self._weights}
        modules |= {layer: modules[layer.embedding] for layer in tied_layers(self._model).values()}
        with computing({module: partial(self._forward, name, module) for module, name in modules.items()}):
            yield

    def _forward(self, name: str, module: PackedLayer | TiedLayer, inputs: Tensor) -> Tensor:
        weight = self._weights[name]
        return module.product(inputs, dequantize(weight.integers, self._scale(name), weight.zero_point))

    def _scale(self, name: str) -> Tensor:
        """As it will be stored; rounding to its dtype counts as the identity in the backward pass."""
        own = self._weights[name].scale
        return (own.float() * self.factors[name]).to(own.dtype)

    def learn(self, plan: BitPlan, example: Example) -> None:
        """Set the gradients of the factors to those of one example."""
        for factor in self.factors.values():
            factor.grad = None
        asked = {name: weight.requires_grad for name, weight in self._norms.items()}
        with differentiable(self._model, dict.fromkeys(module.block for module in plan.inside.modules)):
            for weight in self._norms.values():
                weight.requires_grad_(True)
            logits = forward(self._model, _on(self._model, example)).logits
            logits.backward(divergence(logits.detach(), example)[1])
        for name, weight in self._norms.items():
            if weight.grad is not None:
                self.factors[name].grad = weight.grad.float() * self._own[name]
            weight.grad = None
            weight.requires_grad_(asked[name])

    @torch.no_grad()
    def scale_norms(self) -> None:
        """Let the norms follow their factors."""
        for name, weight in self._norms.items():
            weight.copy_(self._own[name] * self.factors[name])

    def state(self) -> dict[str, Tensor]:
        """The factors as they are now."""
        return {name: factor.detach().clone() for name, factor in self.factors.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Return to a state."""
        for name, values in state.items():
            self.factors[name].copy_(values)
        self.scale_norms()

    @torch.no_grad()
    def keep(self) -> None:
        """Pack the integers with their new scales."""
        for name, weight in self._weights.items():
            self._model.get_submodule(name).take(replace(weight, scale=self._scale(name)))


def _is_norm(module: nn.Module) -> bool:
    """By the name of its class, as transformers tells norms too."""
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, nn.Parameter)
