"""The hierarchy: Ward's method against a naive one and scipy's, exact level sizes, nested parents."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.cluster.hierarchy import cut_tree, ward

from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError
from tests import naive_training as naive
from training.hierarchy import _cut, build_hierarchy, fitting_sizes, ward_linkage


def partition(labels):
    return {frozenset(np.flatnonzero(labels == c).tolist()) for c in np.unique(labels)}


def blobs(n, d=5, seed=0, centres=12):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(centres, d))[rng.integers(centres, size=n)] * 3 + rng.normal(size=(n, d))).astype(np.float32)


def test_ward_without_kmeans_equals_the_naive_method():
    x = blobs(30, seed=1)
    levels = [9, 4, 2]
    comp = build_hierarchy(x, levels, subclusters=30)
    ref = naive.ward_partitions(x.tolist(), levels)
    assert [partition(a) for a in comp.assignments] == ref


def test_linkage_of_points_is_scipys():
    x = blobs(200, seed=2)
    ref, comp = ward(x.astype(np.float64)), ward_linkage(x, np.ones(len(x)))
    np.testing.assert_array_equal(comp[:, [0, 1, 3]], np.c_[np.sort(ref[:, :2], axis=1), ref[:, 3]])
    np.testing.assert_allclose(comp[:, 2], ref[:, 2], rtol=1e-9)


def test_sizes_weigh_as_that_many_points_at_the_centroid():
    rng = np.random.default_rng(3)
    centroids, sizes = rng.normal(size=(40, 4)), rng.integers(1, 9, size=40)
    expanded = np.repeat(centroids, sizes, axis=0)
    ref = ward(expanded)[len(expanded) - len(centroids) :]  # before these, only equal points are merged
    comp = ward_linkage(centroids, sizes)
    np.testing.assert_allclose(comp[:, 2], ref[:, 2], rtol=1e-8)
    for k in (20, 7, 3):
        expanded_labels = cut_tree(ward(expanded), n_clusters=k)[:, 0]
        assert partition(cut_tree(comp, n_clusters=k)[:, 0].repeat(sizes)) == partition(expanded_labels)
    unweighted = ward_linkage(centroids, np.ones(40))
    assert not np.allclose(unweighted[:, 2], comp[:, 2])  # the sizes took effect


@pytest.mark.parametrize("n", [150, 3000])
def test_levels_have_the_numbers_asked_for_and_are_nested(n):
    x = blobs(n)
    comp = build_hierarchy(x, [40, 12, 5], subclusters=150, seed=1)
    assert comp.sizes == (40, 12, 5)
    assert comp.assignments.shape == (3, n)
    assert [len(np.unique(a)) for a in comp.assignments] == [40, 12, 5]
    assert naive.all_nested(comp.assignments.tolist())
    for i, level in enumerate(comp.levels):
        assert (level.centroids.dtype, level.parents.dtype) == (np.float32, np.int64)
        means = [x[comp.assignments[i] == c].mean(0) for c in range(comp.sizes[i])]
        np.testing.assert_allclose(level.centroids, means, atol=1e-5)
        if i < 2:
            np.testing.assert_array_equal(level.parents[comp.assignments[i]], comp.assignments[i + 1])
        else:
            assert (level.parents == -1).all()


def test_kmeans_then_ward_finds_well_separated_clusters():
    rng = np.random.default_rng(4)
    truth = rng.integers(6, size=2000)
    x = (rng.normal(size=(6, 8))[truth] * 20 + rng.normal(size=(2000, 8))).astype(np.float32)
    comp = build_hierarchy(x, [6], subclusters=100)
    assert partition(comp.assignments[0]) == partition(truth)


def test_same_input_and_seed_give_the_same_result():
    x = blobs(2000)
    one, two, other = (build_hierarchy(x, [30, 10], subclusters=100, seed=s) for s in (5, 5, 6))
    np.testing.assert_array_equal(one.assignments, two.assignments)
    np.testing.assert_array_equal(one.levels[0].centroids, two.levels[0].centroids)
    assert partition(one.assignments[0]) != partition(other.assignments[0])


def test_duplicates_leave_fewer_clusters():
    x = np.repeat(np.eye(4, dtype=np.float32), 10, axis=0)
    comp = build_hierarchy(x, [8, 6, 2], subclusters=40)
    assert comp.sizes == (4, 2)
    assert build_hierarchy(np.ones((50, 3), np.float32), [8, 2], subclusters=20).sizes == (1,)


@pytest.mark.parametrize(
    ("n", "levels", "expected"),
    [
        (5000, (200, 100, 50), ((200, 100, 50), 1000)),
        (1250, (200, 100, 50), ((50, 25, 12), 250)),
        (20, (200, 100, 50), ((2,), 4)),
        (800, (30,), ((30,), 1000)),
    ],
)
def test_sizes_shrink_with_the_training_set(n, levels, expected):
    assert fitting_sizes(levels, 1000, n) == expected


@pytest.mark.parametrize("k", [1, 7, 100, 199, 200])
def test_cuts_are_scipys(k):
    linkage = ward_linkage(blobs(200, seed=2), np.ones(200))
    comp = _cut(linkage, k)
    assert len(np.unique(comp)) == comp.max() + 1 == k
    assert partition(comp) == partition(cut_tree(linkage, n_clusters=k)[:, 0])


@pytest.mark.parametrize("levels", [[], [5, 5], [3, 4], [5, 0]])
def test_levels_must_decrease(levels):
    with pytest.raises(InvalidParameterError, match="strictly decreasing"):
        build_hierarchy(blobs(50), levels)


def test_more_levels_than_subclusters_are_refused():
    with pytest.raises(InvalidParameterError, match="subclusters = 10 can't be merged into 20"):
        build_hierarchy(blobs(50), [20], subclusters=10)


@pytest.mark.parametrize("x", [np.zeros((0, 3)), np.zeros(3), np.full((4, 2), np.nan)])
def test_unusable_vectors_are_refused(x):
    with pytest.raises(InvalidVectorsError, match=r"finite, of shape \(n, d\)"):
        build_hierarchy(x, [2])
