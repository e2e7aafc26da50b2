"""Measuring a model with one unit changed at a time, without running what the change cannot reach.

A unit lies in one block, and the blocks that run before it see no difference. So the blocks are visited in the order in
which they run, and the outputs of the finished ones are carried along (`prefix.py`): the results are those of the full
forward, and on average half of the work is left. The variants of one unit go through the blocks behind it together, as
one larger batch, where batches are small.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration import batches_on, sequences_in, tokens_in
from ..forwards import computing
from .metrics import Batch, Metric, labels_in, mean, not_finite
from .prefix import Outputs, Prefix

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity governs it

Change = Callable[[], AbstractContextManager[None]]
Result = TypeVar("Result")

STACKED_TOKENS = 2048  # variants of a unit share a batch up to this size; larger ones keep a processor busy anyway


class SuffixRunner:
    """A model on given batches, measured with changes to one block after the other.

    Args:
        model: in evaluation mode.
        batches: keyword arguments of `model.forward` with labels, on the CPU.
        blocks: names of the blocks that will be changed.
        metric: what is measured.

    Attributes:
        order: the blocks in the order in which a forward pass runs them.

    Raises:
        ModelError: a block runs never or more than once, so that its output cannot be carried.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], blocks: Sequence[str], metric: Metric) -> None:
        self._prefix = Prefix(model, batches[0], blocks)
        self.order = self._prefix.order
        self._model = model
        self._metric = metric
        self._batches: Sequence[Batch] = tuple(batches)
        self._carried: list[Outputs] = [{} for _ in batches]  # per batch, the outputs before block `_position`
        self._position = 0
        self._stacked_tokens = STACKED_TOKENS

    def measure(self, block: str | None = None, changes: Sequence[Change] = ()) -> list[float]:
        """The metric under each of some changes to a block (without a block, of the model as it is).

        Asking for blocks in their running order is what saves work. When memory runs out, the batches are halved and
        the measurement is repeated.

        Args:
            changes: each gives a context in which weights of the block are changed.

        Raises:
            CalibrationError, ModelError: a figure is not finite.
        """
        position = 0 if block is None else self.order.index(block)

        def on(batches: Sequence[Batch]) -> list[list[float]]:
            if batches is not self._batches:
                self._batches, self._stacked_tokens = batches, 0
                self._restart()
            self._advance(position)
            return self._values(position, changes)

        return [self._figure(values, block) for values in backing_off(on, self._batches)]

    def _loaded(self) -> Iterator[tuple[Batch, Outputs]]:
        return zip(batches_on(self._batches, self._model), self._carried, strict=True)

    def _restart(self) -> None:
        self._carried, self._position = [{} for _ in self._batches], 0

    def _advance(self, position: int) -> None:
        """Carry the outputs of all blocks before a position."""
        if position < self._position:
            self._restart()
        if position > self._position:
            for index, (batch, before) in enumerate(self._loaded()):
                self._carried[index] = self._prefix.outputs(batch, before, self._position, position)
            self._position = position

    def _values(self, position: int, changes: Sequence[Change]) -> list[list[float]]:
        """Per change (or once for the unchanged model), the metric of every batch."""
        together = self._stacked_tokens // max(tokens_in(batch) for batch in self._batches)
        if together > 1 and len(changes) > 1:
            starts = range(0, len(changes), together)
            return [row for start in starts for row in self._stacked(position, changes[start : start + together])]
        rows = []
        for change in changes or (nullcontext,):
            with change():
                rows.append([self._measured(batch, before, position) for batch, before in self._loaded()])
        return rows

    def _stacked(self, position: int, changes: Sequence[Change]) -> list[list[float]]:
        """As `_values`: the changed block runs once a change, those behind it once for all, the head once a change."""
        changed: list[list[Outputs]] = []
        for change in changes:
            with change():
                changed.append(
                    [self._prefix.outputs(batch, before, position, position + 1) for batch, before in self._loaded()]
                )
        columns = []
        for (batch, _), *variants in zip(self._loaded(), *changed, strict=True):
            size, count = sequences_in(batch), len(changes)
            repeated = {name: tensor.repeat(count, *(1,) * (tensor.dim() - 1)) for name, tensor in batch.items()}
            final = self._prefix.outputs(repeated, _stack(variants, size), position + 1, len(self.order))
            parts = (_part(final, index, size, count) for index in range(count))
            columns.append([self._measured(batch, part, len(self.order)) for part in parts])
        return [list(row) for row in zip(*columns, strict=True)]

    def _measured(self, batch: Batch, outputs: Outputs, position: int) -> float:
        with self._prefix.replayed(outputs, position):
            return self._metric.of_batch(self._model, batch)

    def _figure(self, values: Sequence[float], block: str | None) -> float:
        average = mean(values, [sum(labels_in(self._model, batch)) for batch in self._batches])
        figure = self._metric.of_mean(average)
        if not math.isfinite(figure):
            where = "the unchanged model" if block is None else f"a change to {block}"
            what = f"{where} gives a {self._metric.name} of {figure} on the calibration data"
            raise not_finite(self._model, self._batches[0], what)
        return figure


def backing_off(work: Callable[[Sequence[Batch]], Result], batches: Sequence[Batch]) -> Result:
    """`work(batches)`; when memory runs out, again with the same sequences in batches of half the size.

    Raises:
        RuntimeError: memory ran out with single sequences.
    """
    while True:
        try:
            return work(batches)
        except RuntimeError as error:
            largest = max(sequences_in(batch) for batch in batches)
            if not should_reduce_batch_size(error) or largest == 1:
                raise
        size = largest // 2
        logger.warning(f"Out of memory with {largest} sequences at a time; going on with {size}, on the same data.")
        batches = tuple(part for batch in batches for part in _split(batch, size))
        clear_device_cache(garbage_collection=True)


def _split(batch: Batch, size: int) -> list[Batch]:
    parts = {name: tensor.split(size) for name, tensor in batch.items()}
    return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]


@contextmanager
def changed_weights(modules: Mapping[str, nn.Module], new: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Give modules other weights, and put the very same tensors back on leaving.

    A module whose weight is offloaded runs with a copy that has the new weight.

    Args:
        modules: name → module with a `weight`.
        new: (name, weight) → another weight of the same shape and dtype; the given one stays as it is.
    """
    with ExitStack() as changes:
        for name, module in modules.items():
            changed = partial(new, name)
            changes.enter_context(
                _other_forward(module, changed) if has_offloaded_params(module) else _other_weight(module, changed)
            )
        yield


@contextmanager
def _other_weight(module: nn.Module, new: Callable[[Tensor], Tensor]) -> Iterator[None]:
    original = module.weight.data
    try:
        module.weight.data = new(original)
        yield
    finally:
        module.weight.data = original


@contextmanager
def _other_forward(module: nn.Module, new: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """For an offloaded weight, which accelerate's hook loads before each forward pass, over whatever was put there."""
    changed = copy.copy(module)
    del changed.forward  # accelerate's, which loads
    with align_module_device(module):
        changed._parameters = dict(module._parameters)
    changed.weight = nn.Parameter(new(changed.weight.data), requires_grad=False)
    with computing({module: changed.forward}):
        yield


def _stack(variants: Sequence[Outputs], size: int) -> Outputs:
    """Outputs for batches of `size` sequences as those of one batch. What has no batch dimension is shared."""

    def joined(*tensors: Any) -> Any:
        first = tensors[0]
        batched = isinstance(first, Tensor) and first.dim() > 0 and len(first) == size
        return torch.cat(tensors) if batched else first

    return pytree.tree_map(joined, variants[0], *variants[1:])


def _part(outputs: Outputs, index: int, size: int, count: int) -> Outputs:
    """One of the `count` batches that `_stack` put together."""

    def cut(tensor: Any) -> Any:
        batched = isinstance(tensor, Tensor) and tensor.dim() > 0 and len(tensor) == size * count
        return tensor[index * size : (index + 1) * size] if batched else tensor

    return pytree.tree_map(cut, outputs)
