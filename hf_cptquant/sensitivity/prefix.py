"""Running a model from the middle: the blocks before a position are finished, and their outputs are carried along.

The model's own forward runs, with every finished block replaced by its carried output. So nothing about a block's
arguments has to be known, and the results are those of the full forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration import batches_on
from ..errors import ModelError
from ..forwards import computing
from .metrics import Batch, forward

Outputs = dict[str, Any]  # stack of blocks (the name of their list) → output of its last finished block
Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a block


class _BlockReached(BaseException):
    """Ends a forward pass early once the output that was wanted is there."""


class Prefix:
    """A model whose first blocks need not run.

    Args:
        model: in evaluation mode.
        batch: any one, to see in which order the blocks run.
        blocks: names of the blocks.

    Attributes:
        order: the blocks in the order in which a forward pass runs them.

    Raises:
        ModelError: a block runs never or more than once, so that its output cannot be carried.
    """

    def __init__(self, model: PreTrainedModel, batch: Batch, blocks: Sequence[str]) -> None:
        self.order = running_order(model, batch, blocks)
        self._model = model
        self._blocks = [model.get_submodule(name) for name in self.order]

    @torch.no_grad()
    def outputs(self, batch: Batch, before: Outputs, done: int, until: int) -> Outputs:
        """The outputs before block `until`, given those before block `done`."""
        outputs = dict(before)
        if done == until:
            return outputs
        last_of_stack = {_stack_of(name): index for index, name in enumerate(self.order[:until]) if index >= done}

        def keep(index: int, _module: nn.Module, _args: Any, output: Any) -> None:
            outputs[_stack_of(self.order[index])] = output
            if index == until - 1:
                raise _BlockReached

        with ExitStack() as hooks:
            for index in last_of_stack.values():
                hooks.enter_context(self._blocks[index].register_forward_hook(partial(keep, index)))
            hooks.enter_context(self.replayed(before, done))
            with suppress(_BlockReached):
                forward(self._model, batch)
        return outputs

    @contextmanager
    def replayed(self, outputs: Outputs, position: int) -> Iterator[None]:
        """Let every block before a position return the last output of its stack instead of running.

        Only the last finished block's output reaches anything that still runs, so one output a stack is enough.
        """
        finished = zip(self.order[:position], self._blocks[:position], strict=True)
        with computing({block: _returning(outputs[_stack_of(name)]) for name, block in finished}):
            yield

    @torch.no_grad()
    def call(self, batch: Batch, before: Outputs, position: int) -> Call:
        """The arguments that the block at a position is called with, given the outputs before it."""
        calls: list[Call] = []

        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((args, kwargs))
            raise _BlockReached

        with ExitStack() as hooks:
            hooks.enter_context(self._blocks[position].register_forward_pre_hook(keep, with_kwargs=True))
            hooks.enter_context(self.replayed(before, position))
            with suppress(_BlockReached):
                forward(self._model, batch)
        return calls[0]


@torch.no_grad()
def running_order(model: PreTrainedModel, batch: Batch, blocks: Sequence[str]) -> list[str]:
    """Names of the blocks in the order in which a forward pass calls them.

    Raises:
        ModelError: a block runs never or more than once, so that its output cannot be carried.
    """
    calls: list[str] = []
    first = {name: tensor[:1] for name, tensor in batch.items()}
    with ExitStack() as hooks:
        for name in blocks:
            block = model.get_submodule(name)
            hooks.enter_context(block.register_forward_hook(lambda *_, name=name: calls.append(name)))
        forward(model, next(batches_on([first], model)))
    odd = [name for name in blocks if calls.count(name) != 1]
    if odd:
        raise ModelError(
            f"{odd[0]} runs {calls.count(odd[0])} times in one forward pass; blocks that run once are supported, and"
            " modules_to_not_convert leaves others alone"
        )
    return calls


def _stack_of(block: str) -> str:
    return block.rpartition(".")[0]


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output
