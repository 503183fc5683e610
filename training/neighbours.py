"""Neighbours of the training items: whom the second view of an item may show."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError

__all__ = ["checked_neighbours", "diffusion_map", "nearest_neighbours"]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# Up to so many items all pairs are compared; beyond, lists of about √n items, of which an item looks at so many.
_ALL_PAIRS, _LISTS_SEEN = 20_000, 24
# Neighbours of an item in the graph that diffusion walks on.
_GRAPH_NEIGHBOURS = 20


def nearest_neighbours(features: FloatArray, k: int, *, power: float = 1.0, diffusion: int = 0) -> IntArray:
    """(n, k) int64: the k items with the largest cosine to each item, itself left out, nearest first.

    The cosine is that of ``sign(x) |x|**power`` after centring; with ``diffusion``, that of :func:`diffusion_map` after so many
    steps, where items are near that many short paths over neighbours join. Up to 20,000 items all pairs are compared; of
    more, each item is compared with those of its own list and the 23 nearest of √n lists (k-means), so that time grows as
    n^1.5 and a few neighbours at the edges of lists are missed.

    Raises:
        InvalidParameterError: k is not in 1..n-1, power not in (0, 1], or diffusion below 0.
    """
    import faiss

    n = len(features)
    if not 1 <= k < n:
        raise InvalidParameterError(f"k must be in 1..{n - 1} for {n} items, got {k}")
    if not 0 < power <= 1:
        raise InvalidParameterError(f"power must be in (0, 1], got {power}")
    if diffusion < 0:
        raise InvalidParameterError(f"diffusion must be at least 0, got {diffusion}")
    x = np.array(features, dtype=np.float32, order="C")
    if power != 1:
        x = np.sign(x) * np.abs(x) ** np.float32(power)
    x -= x.mean(axis=0, dtype=np.float64).astype(np.float32)
    faiss.normalize_L2(x)
    if diffusion:
        x = diffusion_map(_nearest(x, min(_GRAPH_NEIGHBOURS, n - 1)), diffusion)
        faiss.normalize_L2(x)
    return _nearest(x, k)


def diffusion_map(neighbours: IntArray, steps: int, *, dimensions: int = 128) -> FloatArray:
    """(n, dimensions) float32: coordinates of a graph's nodes after ``steps`` of a random walk (Coifman and Lafon, 2006).

    Nodes i and j are joined by weight 1 if one is among the other's ``neighbours`` (n, k), 2 if each is the other's.
    Distances of these coordinates are those between the distributions of where walks from i and j are after so many
    steps. Coordinates are the eigenvectors of the walk's matrix, each times its eigenvalue to the power ``steps``; there
    are fewer where the graph has no more than ``dimensions`` + 1 nodes.
    """
    from scipy.sparse import coo_array, diags_array
    from scipy.sparse.linalg import eigsh

    n, k = neighbours.shape
    directed = coo_array((np.ones(n * k), (np.arange(n).repeat(k), neighbours.ravel())), shape=(n, n)).tocsr()
    weights = directed + directed.T
    degrees = np.asarray(weights.sum(axis=1)).ravel()
    scale = diags_array(degrees**-0.5)
    start = np.random.default_rng(0).standard_normal(n)  # a fixed one: the same result each time
    # The symmetric matrix has the walk's eigenvalues.
    values, vectors = eigsh(scale @ weights @ scale, k=min(dimensions, n - 1), which="LA", v0=start)
    coordinates = vectors * np.maximum(values / values.max(), 0) ** steps / np.sqrt(degrees)[:, None]
    return np.ascontiguousarray(coordinates / np.abs(coordinates).max(), dtype=np.float32)


def _nearest(x: FloatArray, k: int) -> IntArray:
    """(n, k): the rows of unit norm with the largest inner products to each, itself left out."""
    import faiss

    n = len(x)
    found = faiss.knn(x, x, k + 1, metric=faiss.METRIC_INNER_PRODUCT)[1] if n <= _ALL_PAIRS else _by_lists(x, k + 1)
    own = found == np.arange(n)[:, None]
    own[~own.any(axis=1), -1] = True  # behind k + 1 equal ones: drop the last instead
    return np.ascontiguousarray(found[~own].reshape(n, k), dtype=np.int64)


def _by_lists(x: FloatArray, k: int) -> IntArray:
    """(n, k): the rows with the largest inner products to each, among those of the nearest lists.

    All items of a list look at the same lists, those nearest to its centre: matrix products, ten times faster than scans.
    """
    import faiss

    n = len(x)
    kmeans = faiss.Kmeans(x.shape[1], math.isqrt(n), niter=10, spherical=True, max_points_per_centroid=64, seed=1)
    kmeans.train(x)
    centroids = np.asarray(kmeans.centroids)
    home = kmeans.assign(x)[1]
    sizes = np.bincount(home, minlength=kmeans.k)
    by_list = np.split(np.argsort(home, kind="stable"), np.cumsum(sizes)[:-1])
    found = np.empty((n, k), np.int64)
    for centre, members in zip(centroids, by_list, strict=True):
        near = np.argsort(-(centroids @ centre), kind="stable")
        enough = int(np.searchsorted(np.cumsum(sizes[near]), k)) + 1
        others = np.concatenate([by_list[number] for number in near[: max(_LISTS_SEEN, enough)]])
        for start in range(0, len(members), 1024):  # bounds the products
            rows = members[start : start + 1024]
            found[rows] = others[faiss.knn(x[rows], x[others], k, metric=faiss.METRIC_INNER_PRODUCT)[1]]
    return found


def checked_neighbours(table: npt.ArrayLike, n: int) -> IntArray:
    """A table of neighbours as int64 (n, k), k >= 1.

    Raises InvalidVectorsError for another shape, no integers, or numbers that are no items.
    """
    found = np.asarray(table)
    if found.ndim != 2 or len(found) != n or not found.shape[1] or found.dtype.kind not in "iu":
        raise InvalidVectorsError(f"neighbours must be integers ({n}, k), got {found.dtype} {found.shape}")
    if found.min() < 0 or found.max() >= n:
        raise InvalidVectorsError(f"neighbours must be in 0..{n - 1}, got {found.min()}..{found.max()}")
    return np.ascontiguousarray(found, dtype=np.int64)
