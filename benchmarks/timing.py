"""Times of functions that are called in turn, so that what else a machine does falls on all of them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median


def median_seconds(calls: Mapping[str, Sequence[Callable[[], object]]], budget: float) -> dict[str, float]:
    """Median time of each kind of call.

    Args:
        calls: kind → calls that do the same with other copies of the data, so that none is left in the cache.
        budget: seconds for all together; every kind is called five times at least, the first not counted.
    """
    taken: dict[str, list[float]] = {kind: [] for kind in calls}
    order, shuffled = list(calls), random.Random(0)  # each kind leaves the caches to another one every time
    end, turn = time.perf_counter() + budget, 0
    while turn < 5 or time.perf_counter() < end:
        shuffled.shuffle(order)
        for kind in order:
            copies = calls[kind]
            start = time.perf_counter()
            copies[turn % len(copies)]()
            taken[kind].append(time.perf_counter() - start)
        turn += 1
    return {kind: median(seconds[1:]) for kind, seconds in taken.items()}
