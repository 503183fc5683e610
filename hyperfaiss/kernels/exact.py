"""The running k nearest of a search that compares queries with the vectors themselves.

Most vectors are too far to matter: :func:`find_candidates` tells them by a lower bound in float32, and only the distances of
the others are computed. The heap of a query is a row of D and I whose first place holds its largest (distance, id).
"""

# mypy: ignore-errors
# (compiled functions have Numba's types, in their signatures)
from __future__ import annotations

import math

import numpy as np

from . import tables
from .runtime import device_function, kernel

__all__ = ["find_candidates", "keep_nearest", "sort_heaps"]

_EPS = tables._EPS
# Vectors that are compared with a query at a time: they stay in the cache while all queries pass.
_LANES = 1024
_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)
# Below any squared distance that matters, and above the errors of squares that float32 can't hold to full precision.
_TINY = np.float32(1e-36)
# A squared distance that is known to be at least this needs no better bound, and no arithmetic that could overflow.
_FAR = np.float32(1e36)
# How often a geodesic is halved to bound it: enough for √θ times 16.
_ROUNDS = 3
_C0, _C1, _C2, _C3, _C4 = (np.float32(c) for c in (tables._C0, tables._C1, tables._C2, tables._C3, tables._C4))
_C5, _C6, _C7, _C8, _C9 = (np.float32(c) for c in (tables._C5, tables._C6, tables._C7, tables._C8, tables._C9))


@device_function
def _squares(x, transposed, first, squared):
    """``squared[j]`` = |x - c|² for the vectors c from ``first`` on, in float32."""
    dsub, width = x.shape[0], squared.shape[0]
    squared[:] = _ZERO
    whole = dsub - dsub % 4
    for i in range(0, whole, 4):
        c0, c1 = transposed[i, first : first + width], transposed[i + 1, first : first + width]
        c2, c3 = transposed[i + 2, first : first + width], transposed[i + 3, first : first + width]
        for j in range(width):
            d0, d1, d2, d3 = x[i] - c0[j], x[i + 1] - c1[j], x[i + 2] - c2[j], x[i + 3] - c3[j]
            squared[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
    for i in range(whole, dsub):
        c0 = transposed[i, first : first + width]
        for j in range(width):
            d0 = x[i] - c0[j]
            squared[j] += d0 * d0


@device_function
def _add_bounds(squared, times, heights, height, theta, slack, shrink, is_geodesic, total):
    """Add to ``total[j]`` what a subspace's distance is at least, given |x - c|² in float32 and the heights."""
    quarter, near = theta / np.float32(4), np.float32(tables._NEAR)
    most = near / quarter if theta > _ZERO else _FAR
    far = np.int32(0)
    for j in range(squared.shape[0]):
        drop = height - heights[j]
        value = squared[j] * shrink - (theta * drop * drop + slack)
        value = value if value > _ZERO else _ZERO  # nan, too
        value = value if value < _FAR else _FAR
        squared[j] = value
        far = np.int32(far + np.int32(quarter * value > near))  # as wide as a float32
    # asinh(√s)/√s is known up to s = _NEAR: of what is farther, half the geodesic, as in tables._halve.
    times[:] = _ONE
    rounds = 0
    while far and rounds < _ROUNDS:
        far = np.int32(0)
        for j in range(squared.shape[0]):
            value = squared[j]
            s = quarter * value
            parts = _TWO + _TWO * math.sqrt(_ONE + s)
            squared[j] = value / (parts if s > near else _ONE)
            times[j] *= _TWO if s > near else _ONE
            far = np.int32(far + np.int32(quarter * squared[j] > near))
        rounds += 1
    for j in range(squared.shape[0]):
        value = squared[j]
        s = quarter * value
        # What is still beyond is at least as far as there.
        value = most if s > near else value
        s = near if s > near else s
        t = s * s
        even = _ONE + t * (_C1 + t * (_C3 + t * (_C5 + t * (_C7 + t * _C9))))
        stretch = (even + s * (_C0 + t * (_C2 + t * (_C4 + t * (_C6 + t * _C8))))) * times[j]
        total[j] += math.sqrt(value) * stretch if is_geodesic else value * stretch * stretch


@kernel(
    "void(Array(float32, 3, 'C', readonly=True), Array(float32, 3, 'C', readonly=True), Array(float32, 2, 'C', readonly=True),"
    "Array(float32, 1, 'C', readonly=True), boolean, Array(float32, 1, 'A', readonly=True), boolean[:,::1])"
)
def find_candidates(x, transposed, heights, curvatures, is_geodesic, limits, candidates):
    """``candidates[q, j]``: False if the distance of query x[q] (M, dsub) to vector j is surely greater than ``limits[q]``.

    The vectors are ``transposed`` (M, dsub, n); ``heights`` (M, n) are theirs above the origin. Distances are sums of geodesic
    distances or of their squares. All is float32. With s = |x-c|², h the heights and H their greatest sum, s is off by
    (dsub + 4)·ε·s, and θ(h_x - h_c)² by less than 8·ε·θH²; what follows is relative, and as small. The bound allows for
    twice that.
    """
    nq, M, dsub = x.shape
    n = transposed.shape[2]
    shrink = np.float32(1 - 2 * (dsub + 8) * _EPS)
    safe = np.float32(1 - 4 * (M + 16) * _EPS)
    highest = np.zeros(M)
    for m in range(M):
        for j in range(n):
            highest[m] = max(highest[m], heights[m, j])
    squared, times, total = np.empty(_LANES, np.float32), np.empty(_LANES, np.float32), np.empty(_LANES, np.float32)
    for first in range(0, n, _LANES):
        width = min(_LANES, n - first)
        for q in range(nq):
            total[:] = _ZERO
            for m in range(M):
                theta = np.float64(curvatures[m])
                xx = tables._norm2(x[q, m])
                height = xx / (1 + math.sqrt(1 + theta * xx))
                others = heights[m, first : first + width]
                slack = np.float32(16 * _EPS * theta * (height + highest[m]) ** 2) + _TINY
                _squares(x[q, m], transposed[m], first, squared[:width])
                _add_bounds(
                    squared[:width], times[:width], others, np.float32(height), curvatures[m], slack, shrink, is_geodesic,
                    total[:width],
                )  # fmt: skip
            for j in range(width):
                candidates[q, first + j] = total[j] * safe <= limits[q]


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


@kernel("void(Array(float32, 2, 'C', readonly=True), Array(int64, 1, 'C', readonly=True), float32[::1], int64[::1])")
def keep_nearest(table, ids, D, I):  # noqa: E741
    """Let vectors ``ids`` (n,) into a query's heap D and I (k,), which begins as (+inf, the largest int64).

    Their distances are the sums of the columns of ``table`` (M, n), in float32 over m = 0 … M − 1 in that order, as in the
    scan of codes.
    """
    M, n = table.shape
    total = table[0].copy()
    for m in range(1, M):
        for j in range(n):
            total[j] += table[m, j]
    for j in range(n):
        if _after(D[0], I[0], total[j], ids[j]):
            _sift(D, I, len(D), total[j], ids[j])


@kernel("void(float32[:,::1], int64[:,::1])")
def sort_heaps(D, I):  # noqa: E741
    """Sort each heap by (distance, id)."""
    nq, k = D.shape
    for q in range(nq):
        for last in range(k - 1, 0, -1):
            distance, number = D[q, last], I[q, last]
            D[q, last], I[q, last] = D[q, 0], I[q, 0]
            _sift(D[q], I[q], last, distance, number)
