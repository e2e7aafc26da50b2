"""Bits by clusters of the scores (arXiv 2412.03599 §3.2): highest centre → most bits.

**k-means** has an exact solution in one dimension: optimal clusters are intervals of the sorted scores, and dynamic
programming over the cut points finds the best ones (Wang & Song, "Ckmeans.1d.dp", The R Journal 3/2, 2011). So there is
no start to choose, no seed and no restart, and the same scores always give the same plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import PlanError

POWER = 3.5  # Zhang's recommendation
ITERATIONS = 1000
CLOSEST = 1e-9  # distances below this share of the span of the scores count as this much


def kmeans(scores: Mapping[str, float], bits: Sequence[int]) -> dict[str, int]:
    """Cluster the scores and give each cluster a bit width.

    Args:
        scores: unit → score, higher = more sensitive.
        bits: one bit width per cluster.

    Returns:
        Unit → bits. Equal scores always get equal bits; with fewer different scores than bit widths, the highest
        widths stay unused.

    Raises:
        PlanError: no scores, or one that is not finite.
    """
    values, positions, counts = _distinct(scores)
    widths = sorted(bits)[: len(values)]
    starts = optimal_intervals(values, counts, len(widths))
    cluster_of_value = np.searchsorted(starts, np.arange(len(values)), side="right") - 1
    return {unit: widths[cluster_of_value[position]] for unit, position in zip(scores, positions, strict=True)}


def k_harmonic_means(scores: Mapping[str, float], bits: Sequence[int], power: float = POWER) -> dict[str, int]:
    """As `kmeans`, with the clusters of k-harmonic means: each score goes to its nearest centre.

    Args:
        power: the exponent p ≥ 2 of the distances.

    Raises:
        PlanError: no scores, or one that is not finite.
    """
    values, positions, counts = _distinct(scores)
    widths = sorted(bits)[: len(values)]
    centres = np.sort(harmonic_centres(values, counts, len(widths), power))
    cluster_of_value = np.abs(values[:, None] - centres).argmin(1)
    return {unit: widths[cluster_of_value[position]] for unit, position in zip(scores, positions, strict=True)}


def harmonic_centres(values: np.ndarray, counts: np.ndarray, clusters: int, power: float = POWER) -> np.ndarray:
    """Centres of a (local) minimum of the performance function of k-harmonic means.

    Args:
        values: float64 `[n]`, distinct.
        counts: int `[n]`, how often each occurs.
        clusters: between 1 and n.
        power: p ≥ 2.

    Returns:
        float64 `[clusters]`.
    """
    least, span = values.min(), np.ptp(values) or 1.0
    values = (values - least) / span  # in units of the span, since squares of tiny distances would be 0
    repeated = np.repeat(values, counts)
    centres = np.quantile(repeated, (np.arange(clusters) + 0.5) / clusters)
    for _ in range(ITERATIONS):
        distances = np.maximum(np.abs(values[:, None] - centres), CLOSEST)
        nearest = distances.min(1, keepdims=True)
        ratios = (nearest / distances) ** power  # so that no power overflows
        # q_ik = d_ik^−(p+2) / (Σ_j d_ij^−p)², the derivative of the performance function
        pull = ratios / distances**2 * nearest**power / ratios.sum(1, keepdims=True) ** 2 * counts[:, None]
        target = (pull * values[:, None]).sum(0) / pull.sum(0)
        moved = centres + (target - centres) / (power - 1)  # Zhang's step for p = 2; the whole step overshoots beyond
        if np.abs(moved - centres).max() <= CLOSEST:
            break
        centres = moved
    return least + span * centres


def _distinct(scores: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different scores in ascending order, the position of each unit's among them, and how often each occurs."""
    if not scores or not np.isfinite(list(scores.values())).all():
        raise PlanError("scores to cluster must be finite numbers, at least one")
    values, positions = np.unique(np.fromiter(scores.values(), float, len(scores)), return_inverse=True)
    return values, positions, np.bincount(positions)


def optimal_intervals(values: np.ndarray, counts: np.ndarray, clusters: int) -> np.ndarray:
    """Exact weighted k-means of sorted distinct numbers.

    Args:
        values: float64 `[n]`, ascending, distinct.
        counts: int `[n]`, how often each occurs.
        clusters: between 1 and n.

    Returns:
        int `[clusters]`: index at which each cluster starts, the first being 0. Of equally good solutions, the one with
        the earliest cuts.
    """
    centred = values - np.average(values, weights=counts)
    weight = np.concatenate([[0.0], np.cumsum(counts, dtype=float)])
    total = np.concatenate([[0.0], np.cumsum(counts * centred)])
    square = np.concatenate([[0.0], np.cumsum(counts * centred**2)])

    def costs(starts: np.ndarray, end: int) -> np.ndarray:
        """Sum of squared distances to the centre of values[start:end] for each start."""
        spread = square[end] - square[starts]
        return np.maximum(spread - (total[end] - total[starts]) ** 2 / (weight[end] - weight[starts]), 0.0)

    size = len(values)
    best = np.array([np.inf] + [costs(np.array([0]), end)[0] for end in range(1, size + 1)])
    cuts = []
    for cluster in range(1, clusters):
        improved, cut = np.full(size + 1, np.inf), np.zeros(size + 1, int)
        for end in range(cluster + 1, size + 1):
            starts = np.arange(cluster, end)
            candidates = best[starts] + costs(starts, end)
            cut[end] = starts[np.argmin(candidates)]
            improved[end] = candidates.min()
        best = improved
        cuts.append(cut)
    intervals, end = [0], size
    for cut in reversed(cuts):
        end = int(cut[end])
        intervals.insert(1, end)
    return np.array(intervals)
