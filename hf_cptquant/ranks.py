"""Several processes as one: which of them this is, its share of the work, and one answer for all.

`accelerate launch` and `torchrun` start the same program several times. The processes deal the work out by position, so
nobody has to be asked, and exchange what they found once at the end. With a single process all of it does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from .errors import CPTQuantError

Item = TypeVar("Item")

PATIENCE = timedelta(days=7)  # a share of the work may take longer than any default; who dies is noticed at once


def join() -> None:
    """Enter the process group that a launcher describes in the environment; without a launcher, nothing happens."""
    PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def share(items: Sequence[Item]) -> Sequence[Item]:
    """The items that fall to this process: every n-th of n processes."""
    return items[rank() :: dist.get_world_size()] if dist.is_initialized() else items


def gather(found: Item) -> list[Item]:
    """What each process found, in the order of their numbers; the same list in all of them.

    Raises:
        CPTQuantError: another process has ended.
    """
    if not dist.is_initialized():
        return [found]
    everything: list[Item | None] = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(everything, found)
    except RuntimeError as error:
        raise CPTQuantError(
            f"another of the {len(everything)} processes ended before its share was done (see its own error); what is"
            f" finished stays in work_dir, if one is set: run the same command again to go on ({error})"
        ) from error
    return everything  # type: ignore[return-value]
