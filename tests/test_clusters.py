"""Bits by clusters of the scores: optimal against every partition, and the rules that a plan relies on."""

import itertools
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cptquant.allocation import ALLOCATIONS
from hf_cptquant.allocation.clusters import kmeans

WIDTHS = (2, 4, 8, 16)

few_scores = st.lists(st.integers(-12, 12), min_size=1, max_size=9)
cluster_counts = st.integers(1, 4)
# Groups of units with gaps of 100 between the groups and of at most 1 within.
separated = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=4), min_size=1, max_size=4)


def named(scores):
    return {f"unit{index}": score for index, score in enumerate(scores)}


def squared_error(cluster):
    centre = sum(cluster) / len(cluster)
    return sum((value - centre) ** 2 for value in cluster)


def error_of(scores, bits_of_unit):
    clusters = defaultdict(list)
    for unit, score in scores.items():
        clusters[bits_of_unit[unit]].append(Fraction(score))
    return sum(map(squared_error, clusters.values()))


def least_error(scores, clusters):
    """Over all ways to cut the sorted scores into so many intervals, in exact arithmetic."""
    values = sorted(map(Fraction, scores))
    ends = itertools.combinations(range(1, len(values)), clusters - 1)
    return min(
        sum(squared_error(values[start:end]) for start, end in itertools.pairwise((0, *cut, len(values))))
        for cut in ends
    )


@settings(deadline=None)
@given(few_scores, cluster_counts)
def test_no_partition_is_better(scores, clusters):
    result = kmeans(named(scores), WIDTHS[:clusters])
    used = min(clusters, len(set(scores)))
    assert error_of(named(scores), result) == least_error(scores, used)


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8), cluster_counts)
def test_no_partition_is_better_for_floats(scores, clusters):
    result = kmeans(named(scores), WIDTHS[:clusters])
    used = min(clusters, len(set(scores)))
    # sums of at most 8 squares of at most 4 in float64
    assert float(error_of(named(scores), result) - least_error(scores, used)) <= 32 * 8 * np.finfo(float).eps


@settings(deadline=None)
@given(few_scores, cluster_counts)
def test_higher_scores_never_get_fewer_bits(scores, clusters):
    units = named(scores)
    result = kmeans(units, WIDTHS[:clusters])
    ranked = sorted(units, key=units.get)
    assert list(result) == list(units)
    for lower, higher in itertools.pairwise(ranked):
        assert result[lower] <= result[higher]
        if units[lower] == units[higher]:
            assert result[lower] == result[higher]


@settings(deadline=None)
@given(few_scores, cluster_counts)
def test_every_width_is_used_that_the_scores_can_tell_apart(scores, clusters):
    result = kmeans(named(scores), WIDTHS[:clusters])
    assert set(result.values()) == set(WIDTHS[: min(clusters, len(set(scores)))])


@pytest.mark.parametrize(
    ("scores", "bits", "expected"),
    [
        ({"a": 0.1, "b": 0.9, "c": 0.12, "d": 0.5}, (4, 8, 16), {"a": 4, "b": 16, "c": 4, "d": 8}),
        ({"a": -1.0, "b": -0.9, "c": 0.0}, (4, 8), {"a": 4, "b": 4, "c": 8}),
        # greedy splitting would cut at the widest gap, 4 to 7; the sums of squares are 10 there and 9.5 between 3 and 4
        ({"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 7}, (4, 8), {"a": 4, "b": 4, "c": 4, "d": 4, "e": 8, "f": 8}),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, (4, 8, 16), {"a": 4, "b": 4, "c": 4}),
        ({"a": 1.0, "b": 2.0, "c": 2.0}, (4, 8, 16), {"a": 4, "b": 8, "c": 8}),
        ({"a": 0.0, "b": 1e-3}, (4, 8), {"a": 4, "b": 8}),
        ({"only": 0.7}, (4, 8, 16), {"only": 4}),
        ({"a": 3.0, "b": 1.0}, (6,), {"a": 6, "b": 6}),
    ],
    ids=[
        "three-clusters",
        "negative",
        "not-the-widest-gap",
        "all-equal",
        "two-values-three-widths",
        "as-many-as-widths",
        "single-unit",
        "single-width",
    ],
)
def test_by_hand(scores, bits, expected):
    assert kmeans(scores, bits) == expected


@settings(deadline=None)
@given(few_scores, cluster_counts, st.randoms(use_true_random=False))
def test_order_does_not_matter(scores, clusters, random):
    units, bits = list(named(scores).items()), list(WIDTHS[:clusters])
    expected = kmeans(dict(units), bits)
    random.shuffle(units)
    random.shuffle(bits)
    assert kmeans(dict(units), bits) == expected


@settings(deadline=None)
@given(separated, st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_separated_groups_are_found_at_any_scale_and_shift(groups, scale, shift):
    scores = {f"{group}.{unit}": 100 * group + score for group, x in enumerate(groups) for unit, score in enumerate(x)}
    expected = {name: WIDTHS[int(name.split(".")[0])] for name in scores}
    widths = WIDTHS[: len(groups)]
    assert kmeans(scores, widths) == expected
    assert kmeans({name: scale * score + shift for name, score in scores.items()}, widths) == expected


def test_is_the_allocation_named_kmeans():
    assert ALLOCATIONS["kmeans"] is kmeans
