"""The hierarchy of clusters that training learns from: k-means sub-clusters, merged bottom-up by Ward's method.

Ward's method over all n items needs their n²/2 distances. Here FAISS's k-means finds at most ``subclusters`` clusters
first (Eq. 16), and Ward's method merges these, each weighted by the number of its items, into the levels that were asked
for. Memory is O((n + subclusters) · d), time O(n · subclusters · d + subclusters² · d).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import faiss
import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError
from hyperfaiss.model import PrototypeLevel

__all__ = ["Hierarchy", "build_hierarchy", "fitting_sizes", "ward_linkage"]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# Items of a cluster of the finest level, on average, below which a training set is too small for the levels asked for.
_ITEMS_PER_CLUSTER = 25
_KMEANS_ITERATIONS = 10


@dataclass(frozen=True)
class Hierarchy:
    """Clusters of the training items at L levels, the finest first.

    assignments : int64 (L, n), the cluster of each item at each level.
    levels : L levels of prototypes: tangent vectors, the mean of each cluster's items, and the links to the next coarser
        level, in which a cluster's parent holds all its items.
    """

    assignments: IntArray
    levels: list[PrototypeLevel]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Clusters of each level."""
        return tuple(len(level.centroids) for level in self.levels)


def build_hierarchy(vectors: npt.ArrayLike, levels: Sequence[int], *, subclusters: int = 1000, seed: int = 0) -> Hierarchy:
    """Cluster tangent vectors (n, d) into nested levels of ``levels`` clusters each (strictly decreasing).

    With n > ``subclusters`` the items are first clustered by k-means; otherwise each distinct vector starts alone. Every
    level has exactly the number asked for, or the number of distinct starting clusters if that is smaller (levels
    that would come out equal are merged into one). The same input and seed give the same result.

    Raises InvalidVectorsError for vectors of another shape, empty or not finite; InvalidParameterError for levels that
    do not decrease or exceed ``subclusters``.
    """
    x = np.ascontiguousarray(vectors, dtype=np.float32)
    if x.ndim != 2 or 0 in x.shape or not np.isfinite(x).all():
        raise InvalidVectorsError(f"vectors must be finite, of shape (n, d), got shape {x.shape}")
    sizes = [int(k) for k in levels]
    if not sizes or sizes[-1] < 1 or any(a <= b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise InvalidParameterError(f"levels must be positive and strictly decreasing, got {list(levels)}")
    if sizes[0] > subclusters:
        raise InvalidParameterError(f"subclusters = {subclusters} can't be merged into {sizes[0]} clusters")

    start, counts, centroids = _subclusters(x, subclusters, seed)
    sizes = list(dict.fromkeys(min(k, len(counts)) for k in sizes))
    linkage = ward_linkage(centroids, counts)
    cuts = np.stack([_cut(linkage, k) for k in sizes])  # (L, number of starting clusters)
    assignments = cuts[:, start]
    prototypes = []
    for i, k in enumerate(sizes):
        parents = np.full(k, -1, np.int64)
        if i + 1 < len(sizes):
            parents[cuts[i]] = cuts[i + 1]
        sums = _sum_by(cuts[i], centroids * counts[:, None], k)
        means = (sums / np.bincount(cuts[i], counts, minlength=k)[:, None]).astype(np.float32)
        prototypes.append(PrototypeLevel(means, parents))
    return Hierarchy(assignments, prototypes)


def fitting_sizes(levels: Sequence[int], subclusters: int, n: int) -> tuple[tuple[int, ...], int]:
    """``levels`` and ``subclusters``, scaled down together when n items are too few: the finest gets 25 items a cluster."""
    scale = min(1.0, n / (_ITEMS_PER_CLUSTER * levels[0]))
    scaled, start = [max(2, round(k * scale)) for k in levels], max(2, round(subclusters * scale))
    return tuple(dict.fromkeys(scaled)), start


def ward_linkage(centroids: npt.ArrayLike, sizes: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Ward's linkage of clusters that hold ``sizes`` (k,) items each, in scipy's format: (k - 1, 4).

    ``scipy.cluster.hierarchy.ward`` lets every row count once, which is wrong for centroids of unequal clusters. The cost
    of merging A and B is the rise of the sum of squares,
    ``|A||B|/(|A|+|B|) · |c_A - c_B|²``; heights are ``sqrt(2 · cost)``, as scipy's. By nearest-neighbour chains: O(k²·d)
    time, O(k·d) memory.
    """
    means = np.array(centroids, dtype=np.float64)
    weights = np.array(sizes, dtype=np.float64)
    k = len(means)
    norms = np.einsum("ij,ij->i", means, means)
    alive = np.ones(k, dtype=bool)
    pairs = np.empty((k - 1, 2), np.int64)
    heights = np.empty(k - 1)
    chain: list[int] = []
    for step in range(k - 1):
        if not chain:
            chain.append(int(np.argmax(alive)))
        while True:
            a = chain[-1]
            gaps = np.maximum(norms + norms[a] - 2 * (means @ means[a]), 0)
            costs = np.where(alive, gaps * weights * (weights[a] / (weights + weights[a])), np.inf)
            costs[a] = np.inf
            b = int(np.argmin(costs))
            if len(chain) > 1 and costs[chain[-2]] <= costs[b]:  # on a draw the predecessor, or the chain would circle
                b = chain[-2]
                break
            chain.append(b)
        del chain[-2:]
        pairs[step] = a, b
        heights[step] = np.sqrt(2 * costs[b])
        # b becomes the union.
        total = weights[a] + weights[b]
        means[b] = (weights[a] * means[a] + weights[b] * means[b]) / total
        weights[b], norms[b], alive[a] = total, means[b] @ means[b], False
    return _in_order(pairs, heights)


def _in_order(pairs: IntArray, heights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Merges found in any order, as rows (cluster, cluster, height, leaves) by rising height with scipy's numbering."""
    k = len(pairs) + 1
    linkage = np.empty((k - 1, 4))
    parent = np.arange(k)  # of each starting cluster, towards the root of what it is merged into
    label, leaves = np.arange(k), np.ones(k)

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for row, step in enumerate(np.argsort(heights, kind="stable")):
        a, b = root(int(pairs[step, 0])), root(int(pairs[step, 1]))
        parent[a] = b
        leaves[b] += leaves[a]
        linkage[row] = min(label[a], label[b]), max(label[a], label[b]), heights[step], leaves[b]
        label[b] = k + row
    return linkage


def _cut(linkage: npt.NDArray[np.float64], k: int) -> IntArray:
    """The starting clusters' labels (n,) where exactly k of the n clusters are left, ties or not."""
    n = len(linkage) + 1
    # Each of the first n - k merges joins two nodes in a new one; clusters are what hangs together.
    merged = linkage[: n - k, :2].astype(np.int64).ravel()
    unions = np.arange(n, 2 * n - k).repeat(2)
    graph = coo_array((np.ones(len(merged), np.int8), (merged, unions)), shape=(2 * n - k, 2 * n - k))
    return np.asarray(connected_components(graph, directed=False)[1][:n], dtype=np.int64)


def _subclusters(x: FloatArray, k: int, seed: int) -> tuple[IntArray, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """At most k starting clusters of x (n, d): the cluster of each item, the clusters' sizes (float64) and their means."""
    if len(x) > k:
        kmeans = faiss.Kmeans(x.shape[1], k, niter=_KMEANS_ITERATIONS, seed=seed % 2**31, min_points_per_centroid=1)
        kmeans.train(x)
        found = kmeans.assign(x)[1]
        # k-means may leave a centroid without items.
        _, labels = np.unique(found, return_inverse=True)
    else:
        _, labels = np.unique(x, axis=0, return_inverse=True)
    labels = labels.reshape(-1).astype(np.int64)
    counts = np.bincount(labels).astype(np.float64)
    return labels, counts, _sum_by(labels, x, len(counts)) / counts[:, None]


def _sum_by(labels: IntArray, x: npt.NDArray[np.floating], k: int) -> npt.NDArray[np.float64]:
    """Sums (k, d) of the rows of x (n, d) by label."""
    sums = np.zeros((k, x.shape[1]))
    np.add.at(sums, labels, x)
    return sums
