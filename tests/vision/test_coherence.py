"""Measures of groups against values by hand, and tests whose errors are as rare as they say."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import cophenet, linkage
from scipy.spatial.distance import squareform

from thresher.errors import UsageError
from thresher.vision.coherence import (
    adjusted_rand,
    cophenetic,
    cophenetic_correlation,
    paired_permutation,
    permutation_test,
    within,
)
from thresher.vision.hierarchy import Tree, agglomerate, cut, groups_of, limit, random_tree


def alike(count, seed, planted=None):
    """Similarities of random points; those of a planted group lie together."""
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(count, 6))
    for group in planted or ():
        points[list(group)] = 0.5 * points[list(group)] + 1.5 * generator.normal(size=6)
    return np.exp(-((points[:, None] - points) ** 2).sum(2) / 6)


def groups_by(labels):
    return [tuple(np.flatnonzero(labels == k).tolist()) for k in np.unique(labels)]


def random_groups(sizes, generator):
    return groups_by(generator.permutation(np.repeat(np.arange(len(sizes)), sizes)))


PLANTED = [tuple(range(4 * k, 4 * k + 4)) for k in range(5)]


def test_within_by_hand():
    s = np.array([[1, 0.8, 0.2, 0.1], [0.8, 1, 0.3, 0.4], [0.2, 0.3, 1, 0.6], [0.1, 0.4, 0.6, 1]])
    assert within([(0, 1), (2, 3)], s) == pytest.approx(0.7)
    assert within([(0, 1, 2), (3,)], s) == pytest.approx((0.8 + 0.2 + 0.3) / 3)
    assert within([(2, 0, 1), (3,)], s) == pytest.approx((0.8 + 0.2 + 0.3) / 3)
    assert within([(0, 1, 2, 3)], s) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([(0,), (1,), (2,)], "no pairs"),
        ([(0, 1)], "share out the classes 0 to 2"),
        ([(0, 1), (1, 2)], "share out"),
        ([(0, 1), (2, 3)], "share out"),
    ],
)
def test_groups_that_are_none(groups, message):
    for measure in (within, permutation_test, lambda g, s: paired_permutation([(0, 1, 2)], g, s)):
        with pytest.raises(UsageError, match=message):
            measure(groups, np.eye(3))


def test_similarities_and_draws_that_are_none():
    for s in (np.zeros((3, 2)), np.full((3, 3), np.nan), np.triu(np.ones((3, 3)))):
        with pytest.raises(UsageError, match="similarities are"):
            within([(0, 1, 2)], s)
    with pytest.raises(UsageError, match="at least 1"):
        permutation_test([(0, 1), (2,)], np.eye(3), draws=0)


def test_all_permutations_of_few_classes():
    """The distribution over all 120, and p among them."""
    s = alike(5, 3)
    groups = [(0, 1, 2), (3, 4)]
    values = [within([p[:3], p[3:]], s) for p in itertools.permutations(range(5))]
    found = permutation_test(groups, s, draws=20_000)
    assert found.value == within(groups, s)
    assert found.mean == pytest.approx(np.mean(values), abs=0.003)
    assert (found.low, found.high) == pytest.approx(np.quantile(values, (0.025, 0.975)), abs=0.02)
    assert found.p == pytest.approx(np.mean(np.array(values) >= found.value - 1e-12), abs=0.01)


def test_the_same_in_large_and_small_steps(monkeypatch):
    s = alike(20, 0)
    whole = permutation_test(PLANTED, s, 500, seed=3)
    monkeypatch.setattr("thresher.vision.coherence._AT_ONCE", 1000)
    assert permutation_test(PLANTED, s, 500, seed=3) == whole
    assert permutation_test(PLANTED, s, 500, seed=4) != whole


def test_a_partition_equal_to_all_others_is_not_found():
    found = permutation_test(PLANTED, np.full((20, 20), 0.1) + 0.9 * np.eye(20), 200)
    assert (found.p, found.value) == (1.0, pytest.approx(0.1))


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4, 4), (1, 2, 3, 5, 9)])
def test_p_values_of_random_partitions_are_uniform(sizes):
    """300 partitions that have nothing to do with the similarities, 199 draws each: shares of p up to x within three
    standard errors of x, and no more than 1.36 / sqrt(300) = 0.079 (Kolmogorov's 5 %) from uniform anywhere."""
    generator = np.random.default_rng(1)
    p = []
    for seed in range(300):
        s = alike(20, seed, PLANTED)  # alike, but not in these groups
        p.append(permutation_test(random_groups(sizes, generator), s, 199, seed).p)
    p = np.sort(p)
    for x in (0.01, 0.05, 0.1, 0.5):
        assert np.mean(p <= x) == pytest.approx(x, abs=3 * np.sqrt(x * (1 - x) / 300))
    assert np.abs(p - np.arange(1, 301) / 300).max() < 0.079


def test_planted_groups_are_found():
    for seed in range(20):
        s = alike(20, seed, PLANTED)
        found = permutation_test(PLANTED, s, 999, seed)
        assert found.p < 0.01
        assert found.low < found.mean < found.high < found.value


def test_groups_of_random_trees_are_not():
    """Cut from random trees of the same shape, 200 of them: 5 % errors within three standard errors of 5 %."""
    s = alike(20, 0, PLANTED)
    tree = agglomerate(1 - s)
    assert permutation_test(groups_of(cut(tree, 5)), s, 999).p < 0.01
    generator = np.random.default_rng(2)
    p = [permutation_test(groups_of(cut(random_tree(tree, generator), 5)), s, 199, k).p for k in range(200)]
    assert np.mean(np.array(p) <= 0.05) == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 200))


def swapped(*swaps):
    labels = np.repeat(np.arange(5), 4)
    for i, j in swaps:
        labels[[i, j]] = labels[[j, i]]
    return groups_by(labels)


def test_paired_p_values_where_meaning_is_in_neither_are_uniform():
    generator = np.random.default_rng(3)
    p = []
    for seed in range(300):
        a = random_groups((4, 4, 4, 4, 4), generator)
        b = random_groups((2, 3, 4, 5, 6), generator)
        p.append(paired_permutation(a, b, alike(20, seed, PLANTED), 199, seed).p)
    p = np.sort(p)
    assert np.abs(p - np.arange(1, 301) / 300).max() < 0.079
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 300))


def test_paired_p_values_where_both_follow_meaning_alike_are_safe():
    """The planted groups with a swap each, in other places: equally close, on average over similarities."""
    a, b = swapped((0, 4)), swapped((8, 12))
    p = np.array([paired_permutation(a, b, alike(20, seed, PLANTED), 199, seed).p for seed in range(300)])
    assert np.mean(p <= 0.05) <= 0.05 + 0.02
    assert np.mean(p <= 0.5) == pytest.approx(0.5, abs=0.1)


def test_the_closer_of_two_is_found():
    far = swapped((0, 4), (8, 12), (16, 1), (5, 9))
    for seed in range(10):
        s = alike(20, seed, PLANTED)
        found = paired_permutation(PLANTED, far, s, 999, seed)
        assert found.value == pytest.approx(within(PLANTED, s) - within(far, s))
        assert found.p < 0.01
        assert paired_permutation(far, PLANTED, s, 999, seed).p > 0.95
        assert abs(found.mean) < 0.01
    assert paired_permutation(PLANTED, PLANTED, s, 99).p == 1


@settings(max_examples=40)
@given(st.integers(3, 25), st.integers(0, 999))
def test_cophenetic_is_scipys(count, seed):
    distance = 1 - alike(count, seed)
    np.fill_diagonal(distance, 0)
    tree = agglomerate(distance)
    flat = squareform(distance, checks=False)
    correlation, theirs = cophenet(linkage(flat, "average"), flat)
    assert np.abs(cophenetic(tree) - squareform(theirs)).max() < 1e-9
    assert cophenetic_correlation(tree, distance) == pytest.approx(correlation, abs=1e-9)


def test_classes_of_one_leaf_join_at_its_distance():
    whole = agglomerate(1 - alike(12, 0))
    short = cophenetic(limit(whole, 4))
    assert (short >= cophenetic(whole) - 1e-12).all()
    assert (np.diag(short) == 0).all()
    for leaf in limit(whole, 4).leaves():
        for i, j in itertools.combinations(leaf.classes, 2):
            assert short[i, j] == leaf.distance > 0


def test_correlations_that_are_none():
    flat = Tree((0, 1, 2), tuple(Tree((i,)) for i in range(3)), 1.0)
    with pytest.raises(UsageError, match="all the same"):
        cophenetic_correlation(flat, 1 - alike(3, 0))
    with pytest.raises(UsageError, match="classes and distances of"):
        cophenetic_correlation(flat, 1 - alike(4, 0))
    with pytest.raises(UsageError, match="from 0 on"):
        cophenetic(Tree((1,)))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        # pairs in both, in a, in b of all: 2, 6, 3 of 15: (2 - 6 * 3 / 15) / ((6 + 3) / 2 - 6 * 3 / 15) = 8 / 33
        ([(0, 1, 2), (3, 4, 5)], [(0, 1), (2, 3), (4, 5)], 8 / 33),
        # 0, 2, 2 of 6: (0 - 4 / 6) / (2 - 4 / 6) = -1 / 2
        ([(0, 1), (2, 3)], [(0, 2), (1, 3)], -0.5),
        # 4, 7, 6 of 15: (4 - 42 / 15) / (6.5 - 42 / 15) = 12 / 37
        ([(0, 1, 2, 3), (4, 5)], [(0, 1, 2), (3, 4, 5)], 12 / 37),
        ([(0, 1, 2), (3,)], [(3,), (2, 1, 0)], 1.0),
        ([(0,), (1,), (2,)], [(0, 1, 2)], 0.0),
        ([(0, 1, 2)], [(0, 1, 2)], 1.0),
        ([(0,), (1,)], [(0,), (1,)], 1.0),
    ],
)
def test_adjusted_rand_by_hand(a, b, expected):
    count = sum(map(len, a))
    assert adjusted_rand(a, b, count) == pytest.approx(expected)
    assert adjusted_rand(b, a, count) == pytest.approx(expected)


def test_adjusted_rand_of_random_partitions_is_0_on_average():
    generator = np.random.default_rng(0)
    values = [adjusted_rand(random_groups((3, 7), generator), [*PLANTED[:2], (8, 9)], 10) for _ in range(2000)]
    assert np.mean(values) == pytest.approx(0, abs=4 * np.std(values) / np.sqrt(2000))
    with pytest.raises(UsageError, match="share out"):
        adjusted_rand(PLANTED, PLANTED, 21)
