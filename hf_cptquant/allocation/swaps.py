"""Swaps of bits between two units within a number of bytes: what a refinement of a plan tries (`refinement.py`).

A plan of the integer program has the least sum of predicted costs, so every swap is predicted to make it worse. The
predictions differ from what the model really loses, most of all where units act together; swaps that are predicted to
cost least are the likeliest to be worth trying. Of those that are alike, most do alike: after a move has been part of a
swap that did not help, swaps with other moves come first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .integer import Option

MOVES = 512  # in each direction that are paired: those of the least cost for each byte

Move = tuple[str, int]


@dataclass(frozen=True)
class Swap:
    """Fewer bits for one unit, more for another.

    Attributes:
        fewer, more: the units, and the bits that they get.
    """

    fewer: Move
    more: Move

    def applied_to(self, bits: Mapping[str, int]) -> dict[str, int]:
        """Unit → bits after the swap."""
        return {**bits, **dict((self.fewer, self.more))}

    def __str__(self) -> str:
        return f"{self.fewer[0]} → {self.fewer[1]}, {self.more[0]} → {self.more[1]}"


def next_swap(
    choices: Mapping[str, Sequence[Option]], bits: Mapping[str, int], largest_bytes: int, rejected: Collection[Swap]
) -> Swap | None:
    """The most promising swap that has not been tried, or None.

    Args:
        choices: unit → what it may be.
        bits: unit → what it is.
        largest_bytes: that the plan may have after the swap.
        rejected: swaps that did not help. Those that share a move with few of them come first, and among equals those
            whose predicted cost is least.
    """
    now = {unit: next(option for option in of_unit if option.bits == bits[unit]) for unit, of_unit in choices.items()}
    room = largest_bytes - sum(option.nbytes for option in now.values())
    moves = [
        ((unit, option.bits), option.cost - now[unit].cost, option.nbytes - now[unit].nbytes)
        for unit, of_unit in choices.items()
        for option in of_unit
        if option.bits != bits[unit]
    ]
    fewer, more = (
        sorted((move for move in moves if move[2] * sign > 0), key=lambda move: move[1] / abs(move[2]))[:MOVES]
        for sign in (-1, 1)
    )
    if not fewer or not more:
        return None
    failures = Counter(move for swap in rejected for move in (swap.fewer, swap.more))
    tried = {(swap.fewer, swap.more) for swap in rejected}
    units = [[move[0] for move, _, _ in side] for side in (fewer, more)]
    fits = np.add.outer([size for _, _, size in fewer], [size for _, _, size in more]) <= room
    fits &= np.not_equal.outer(*(np.array(side, object) for side in units))
    costs = np.add.outer([cost for _, cost, _ in fewer], [cost for _, cost, _ in more])
    failed = np.add.outer([failures[move] for move, _, _ in fewer], [failures[move] for move, _, _ in more])
    places = np.argwhere(fits)
    for row, column in places[np.lexsort((costs[fits], failed[fits]))]:
        if (fewer[row][0], more[column][0]) not in tried:
            return Swap(fewer[row][0], more[column][0])
    return None
