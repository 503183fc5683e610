"""The running k nearest of a search that compares queries with the vectors themselves.

The heap of a query is a row of D and I whose first place holds its largest (distance, id).
"""

# mypy: ignore-errors
# (compiled functions have Numba's types, in their signatures)
from __future__ import annotations

import numpy as np

from .runtime import device_function, kernel

__all__ = ["keep_nearest", "sort_heaps"]


@device_function
def _after(a, i, b, j):
    """Whether (a, i) comes after (b, j)."""
    return a > b or (a == b and i > j)


@device_function
def _sift(D, I, size, distance, number):  # noqa: E741
    """Put (distance, number) in the place of the largest of the heap's first ``size`` entries."""
    place, child = 0, 1
    while child < size:
        if child + 1 < size and _after(D[child + 1], I[child + 1], D[child], I[child]):
            child += 1
        if not _after(D[child], I[child], distance, number):
            break
        D[place], I[place] = D[child], I[child]
        place, child = child, 2 * child + 1
    D[place], I[place] = distance, number


@kernel("void(Array(float32, 3, 'C', readonly=True), int64, int64, float32[:,::1], int64[:,::1])")
def keep_nearest(tables, n, first, D, I):  # noqa: E741
    """Let the first ``n`` columns of ``tables`` (nq, M, width) into the heaps D and I (nq, k), as vectors ``first`` and on.

    The distance of a vector is the float32 sum of its column over m = 0 … M − 1 in that order, as in the scan of codes. The
    heaps begin as (+inf, the largest int64), and vectors come in the order of their numbers.
    """
    nq, M, width = tables.shape
    k = D.shape[1]
    total = np.empty(width, np.float32)
    for q in range(nq):
        total[:] = tables[q, 0]
        for m in range(1, M):
            for j in range(width):
                total[j] += tables[q, m, j]
        for j in range(n):
            # Of equal distances the smaller number stays, which came first; only an empty place gives way to inf.
            if _after(D[q, 0], I[q, 0], total[j], first + j):
                _sift(D[q], I[q], k, total[j], first + j)


@kernel("void(float32[:,::1], int64[:,::1])")
def sort_heaps(D, I):  # noqa: E741
    """Sort each heap by (distance, id)."""
    nq, k = D.shape
    for q in range(nq):
        for last in range(k - 1, 0, -1):
            distance, number = D[q, last], I[q, last]
            D[q, last], I[q, last] = D[q, 0], I[q, 0]
            _sift(D[q], I[q], last, distance, number)
