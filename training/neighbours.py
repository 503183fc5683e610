"""Neighbours of the training items: whom the second view of an item may show."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError

__all__ = ["checked_neighbours", "nearest_neighbours"]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# Up to so many items all pairs are compared; beyond, lists of about √n items, of which an item looks at so many.
_ALL_PAIRS, _LISTS_SEEN = 20_000, 24


def nearest_neighbours(features: FloatArray, k: int, *, power: float = 1.0) -> IntArray:
    """(n, k) int64: the k items with the largest cosine to each item, itself left out, nearest first.

    The cosine is that of ``sign(x) |x|**power`` after centring. Up to 20,000 items all pairs are compared; of more, each item
    is compared with those of its own list and the 23 nearest of √n lists (k-means), so that time grows as n^1.5 and a few
    neighbours at the edges of lists are missed.

    Raises:
        InvalidParameterError: k is not in 1..n-1, or power not in (0, 1].
    """
    import faiss

    n = len(features)
    if not 1 <= k < n:
        raise InvalidParameterError(f"k must be in 1..{n - 1} for {n} items, got {k}")
    if not 0 < power <= 1:
        raise InvalidParameterError(f"power must be in (0, 1], got {power}")
    x = np.array(features, dtype=np.float32, order="C")
    if power != 1:
        x = np.sign(x) * np.abs(x) ** np.float32(power)
    x -= x.mean(axis=0, dtype=np.float64).astype(np.float32)
    faiss.normalize_L2(x)
    found = faiss.knn(x, x, k + 1, metric=faiss.METRIC_INNER_PRODUCT)[1] if n <= _ALL_PAIRS else _by_lists(x, k + 1)
    own = found == np.arange(n)[:, None]
    own[~own.any(axis=1), -1] = True  # behind k + 1 equal ones: drop the last instead
    return np.ascontiguousarray(found[~own].reshape(n, k), dtype=np.int64)


def _by_lists(x: FloatArray, k: int) -> IntArray:
    """(n, k): the rows with the largest inner products, found list by list; a row with too few others is filled with itself.

    All items of a list look at the same lists, those nearest to its centre: matrix products, ten times faster than scans.
    """
    import faiss

    n = len(x)
    kmeans = faiss.Kmeans(x.shape[1], math.isqrt(n), niter=10, spherical=True, max_points_per_centroid=64, seed=1)
    kmeans.train(x)
    home = kmeans.assign(x)[1]
    by_list = np.split(np.argsort(home, kind="stable"), np.cumsum(np.bincount(home, minlength=kmeans.k))[:-1])
    near = np.argsort(-(kmeans.centroids @ kmeans.centroids.T), axis=1, kind="stable")[:, :_LISTS_SEEN]
    found = np.repeat(np.arange(n)[:, None], k, axis=1)
    for members, lists in zip(by_list, near, strict=True):
        others = np.concatenate([by_list[number] for number in lists])
        for start in range(0, len(members), 1024):  # bounds the products
            rows = members[start : start + 1024]
            nearest = faiss.knn(x[rows], x[others], min(k, len(others)), metric=faiss.METRIC_INNER_PRODUCT)[1]
            found[rows, : nearest.shape[1]] = others[nearest]
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
