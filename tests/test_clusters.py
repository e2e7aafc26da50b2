"""Bits by clusters of the scores: optimal against every partition, and the rules that a plan relies on."""

import itertools
from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from hf_cptquant.allocation.clusters import harmonic_centres, k_harmonic_means, kmeans
from hf_cptquant.errors import PlanError

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


# k-harmonic means


def performance(centres, values, counts, power) -> float:
    """Zhang's objective: Σ_i K / Σ_k 1/|x_i − m_k|^p."""
    distances = np.abs(np.repeat(values, counts)[:, None] - centres).clip(1e-12)
    return float((len(centres) / (distances**-power).sum(1)).sum())


@pytest.mark.parametrize("power", [2.0, 2.5, 3.5, 5.0])
@pytest.mark.parametrize("seed", range(10))
def test_centres_are_a_minimum_of_the_objective(seed, power):
    random = np.random.default_rng(seed)
    values = np.unique(random.normal(size=random.integers(4, 12)).round(2))
    counts = random.integers(1, 4, len(values))
    centres = harmonic_centres(values, counts, int(random.integers(1, 4)), power)
    found = minimize(performance, centres, (values, counts, power), method="Nelder-Mead", options={"fatol": 1e-13})
    assert performance(centres, values, counts, power) <= found.fun * (1 + 1e-5)


def test_one_centre_and_power_2_is_the_mean():
    assert harmonic_centres(np.array([0.0, 1.0, 5.0]), np.array([1, 2, 1]), 1, 2.0) == pytest.approx([1.75])


@settings(deadline=None)
@given(separated, st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
def test_harmonic_clusters_keep_the_order_of_the_scores(groups, scale, shift):
    scores = named([scale * (100 * group + score) + shift for group, x in enumerate(groups) for score in x])
    bits = k_harmonic_means(scores, WIDTHS[: len(groups)])
    ranked = sorted(scores, key=scores.get)
    assert [bits[unit] for unit in ranked] == sorted(bits.values())
    assert k_harmonic_means(scores, WIDTHS[: len(groups)]) == bits


def test_harmonic_clusters_of_scores_whose_squared_distance_is_0():
    assert k_harmonic_means({"a": 0.0, "b": 2.4e-236}, (4,)) == {"a": 4, "b": 4}
    assert k_harmonic_means({"a": 0.0, "b": 2.4e-236}, (4, 8)) == {"a": 4, "b": 8}


def test_harmonic_clusters_of_separated_groups():
    scores = named([0.0, 0.1, 0.2, 5.0, 5.1, 9.8, 10.0, 10.1])
    assert list(k_harmonic_means(scores, (4, 8, 16)).values()) == [4, 4, 4, 8, 8, 16, 16, 16]


@pytest.mark.parametrize("allocation", [kmeans, k_harmonic_means])
def test_equal_and_few_scores(allocation):
    assert set(allocation(named([1.0] * 5), (4, 8, 16)).values()) == {4}
    assert list(allocation(named([2.0, 1.0]), (4, 8, 16)).values()) == [8, 4]
    assert allocation(named([3.0]), (16, 4)) == {"unit0": 4}


@pytest.mark.parametrize("scores", [{}, {"a": float("nan")}, {"a": float("inf"), "b": 1.0}])
def test_scores_that_are_no_numbers_are_refused_by_both(scores):
    for allocation in (kmeans, k_harmonic_means):
        with pytest.raises(PlanError, match="finite numbers"):
            allocation(scores, (4, 8))
