"""The oracle of every stage of the core, in plain float64 (or mpmath) loops: short, slow, obviously right.

Nothing here imports hyperfaiss. Vectors are sequences of floats; a point is given by its space coordinates, theta >= 0 is
minus the curvature. Where a function has a twin in the library it bears its name.
"""

# ruff: noqa: E741 (D and I are FAISS's names)
from __future__ import annotations

import math
from collections.abc import Sequence

import mpmath
import numpy as np

Vector = Sequence[float]


def dot(x: Vector, y: Vector) -> float:
    return math.fsum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def norm(x: Vector) -> float:
    return math.sqrt(dot(x, x))


# ------------------------------------------------------------------------------------------------ geometry


def clip(v: Vector, radius: float | None) -> list[float]:
    if radius is None or norm(v) <= radius:
        return [float(a) for a in v]
    return [float(a) * radius / norm(v) for a in v]


def exp0(v: Vector, theta: float) -> list[float]:
    s = math.sqrt(theta) * norm(v)
    return [float(a) * (math.sinh(s) / s if s > 0 else 1.0) for a in v]


def log0(x: Vector, theta: float) -> list[float]:
    s = math.sqrt(theta) * norm(x)
    return [float(a) * (math.asinh(s) / s if s > 0 else 1.0) for a in x]


def squared_distance(x: Vector, y: Vector, theta: float) -> float:
    """Squared Lorentzian distance |x - y|² - (x₀ - y₀)², x₀ = sqrt(1/θ + |x|²)."""
    delta = [float(a) - float(b) for a, b in zip(x, y, strict=True)]
    if theta == 0:
        return dot(delta, delta)
    x0, y0 = math.sqrt(1 / theta + dot(x, x)), math.sqrt(1 / theta + dot(y, y))
    gap = dot(delta, [float(a) + float(b) for a, b in zip(x, y, strict=True)]) / (x0 + y0)
    return max(dot(delta, delta) - gap * gap, 0.0)


def distance(x: Vector, y: Vector, theta: float) -> float:
    """Geodesic distance 2/√θ · asinh(√θ/2 · |x - y|_L)."""
    chord = math.sqrt(squared_distance(x, y, theta))
    return chord if theta == 0 else 2 / math.sqrt(theta) * math.asinh(math.sqrt(theta) / 2 * chord)


def exact_squared_distance(x: Vector, y: Vector, theta: float) -> mpmath.mpf:
    """-2/θ - 2⟨x, y⟩ by its definition, with digits to spare."""
    if all(float(u) == float(v) for u, v in zip(x, y, strict=True)):
        return mpmath.mpf(0)
    with mpmath.workdps(150):
        a, b = [mpmath.mpf(float(u)) for u in x], [mpmath.mpf(float(u)) for u in y]
        if theta == 0:
            return mpmath.fsum((u - v) ** 2 for u, v in zip(a, b, strict=True))
        t = mpmath.mpf(float(theta))
        time = mpmath.sqrt(1 / t + mpmath.fdot(a, a)) * mpmath.sqrt(1 / t + mpmath.fdot(b, b))
        return 2 * (time - mpmath.fdot(a, b)) - 2 / t


def exact_distance(x: Vector, y: Vector, theta: float) -> mpmath.mpf:
    """arcosh(-θ⟨x, y⟩)/√θ by its definition (Eq. 2), with digits to spare."""
    with mpmath.workdps(150):
        squared = exact_squared_distance(x, y, theta)
        if theta == 0:
            return mpmath.sqrt(squared)
        t = mpmath.mpf(float(theta))
        return mpmath.acosh(1 + t * squared / 2) / mpmath.sqrt(t)


def midpoint(points: Sequence[Vector], weights: Vector, theta: float) -> list[float]:
    """Eq. 11, corrected: √(1/θ) · Σw x / √|⟨Σw x, Σw x⟩|; the weighted mean where θ = 0."""
    space = [math.fsum(float(w) * float(x[i]) for w, x in zip(weights, points, strict=True)) for i in range(len(points[0]))]
    if theta == 0:
        return [a / math.fsum(map(float, weights)) for a in space]
    time = math.fsum(float(w) * math.sqrt(1 / theta + dot(x, x)) for w, x in zip(weights, points, strict=True))
    return [math.sqrt(1 / theta) * a / math.sqrt(time * time - dot(space, space)) for a in space]


# ------------------------------------------------------------------------------------------------ codec


def parts(v: Vector, M: int) -> list[list[float]]:
    """The M parts of a vector."""
    dsub = len(v) // M
    return [[float(a) for a in v[m * dsub : (m + 1) * dsub]] for m in range(M)]


def points_of(x: Sequence[Vector], curvatures: Vector, clip_radius: float | None) -> np.ndarray:
    """Points (n, M, dsub) float32 of tangent vectors (n, d): the library's rounding, after float64 maps."""
    M = len(curvatures)
    return np.array(
        [
            [exp0(np.float32(clip(v, clip_radius)), float(t)) for v, t in zip(parts(row, M), curvatures, strict=True)]
            for row in x
        ],
        np.float32,
    )


def assign(points: Sequence[Vector], codewords: Sequence[Vector], theta: float) -> list[int]:
    """Index of the codeword nearest to each point, ties to the smaller."""
    codes = []
    for x in points:
        distances = [squared_distance(x, c, theta) for c in codewords]
        codes.append(distances.index(min(distances)))
    return codes


def lloyd_step(points: Sequence[Vector], codewords: Sequence[Vector], theta: float) -> list[list[float]]:
    """Each codeword's midpoint of the points nearest to it; a codeword without points stays."""
    codes = assign(points, codewords, theta)
    moved = []
    for j, codeword in enumerate(codewords):
        mine = [x for x, code in zip(points, codes, strict=True) if code == j]
        moved.append(midpoint(mine, [1.0] * len(mine), theta) if mine else [float(a) for a in codeword])
    return moved


def loss(points: Sequence[Vector], codewords: Sequence[Vector], theta: float) -> float:
    """Sum of squared Lorentzian distances of the points to their nearest codewords."""
    return math.fsum(min(squared_distance(x, c, theta) for c in codewords) for x in points)


def distance_tables(points: np.ndarray, codebooks: np.ndarray, curvatures: Vector, metric: str) -> np.ndarray:
    """Distances (nq, M, ksub) of points (nq, M, dsub) to codewords (M, ksub, dsub), exact, rounded to float64."""
    power = {"geodesic": 1, "squared": 2}[metric]
    return np.array(
        [
            [
                [float(exact_distance(x, c, float(t)) ** power) for c in book]
                for x, book, t in zip(row, codebooks, curvatures, strict=True)
            ]
            for row in points
        ]
    )


# ------------------------------------------------------------------------------------------------ search


def search(tables: np.ndarray, codes: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The exact top k: float32 sums over m = 0 … M-1 in that order, ties to the smaller id, padded with +inf and -1."""
    nq, M, _ = tables.shape
    D, I = np.full((nq, k), np.inf, np.float32), np.full((nq, k), -1, np.int64)
    for q in range(nq):
        total = tables[q, 0, codes[:, 0]]
        with np.errstate(over="ignore"):
            for m in range(1, M):
                total = total + tables[q, m, codes[:, m]]
        assert total.dtype == np.float32
        order = np.argsort(total, kind="stable")[:k]
        D[q, : len(order)], I[q, : len(order)] = total[order], order
    return D, I


def exact_search(points: np.ndarray, queries: np.ndarray, curvatures: Vector, power: int, k: int) -> tuple[list, list]:
    """D and I of the k points (n, M, dsub) nearest to each query (nq, M, dsub) by Σ_m d_m**power, ties to the smaller row."""
    D, I = [], []
    for q in queries:
        found = sorted(
            (math.fsum(distance(a, b, float(t)) ** power for a, b, t in zip(q, x, curvatures, strict=True)), i)
            for i, x in enumerate(points)
        )[:k]
        D.append([d for d, _ in found])
        I.append([i for _, i in found])
    return D, I


# ------------------------------------------------------------------------------------------------ evaluation


def relevant(a: Sequence[bool] | int, b: Sequence[bool] | int) -> bool:
    """Whether two labels are the same, or two sets of labels share one."""
    if np.ndim(a):
        return any(x and y for x, y in zip(a, b, strict=True))
    return a == b


def mean_average_precision(I: np.ndarray, query_labels: Sequence, labels: Sequence, N: int) -> float:
    """Mean over the queries of AP@N = Σ_i precision(i) · rel(i) / (hits within N); a query without hits counts 0."""
    values = []
    for row, label in zip(I, query_labels, strict=True):
        hits, total = 0, 0.0
        for rank, i in enumerate(row[:N], start=1):
            if i >= 0 and relevant(labels[i], label):
                hits += 1
                total += hits / rank
        values.append(total / hits if hits else 0.0)
    return math.fsum(values) / len(values)


def precision(I: np.ndarray, query_labels: Sequence, labels: Sequence, k: int) -> list[float]:
    """Of each query, the share of its first k results that is relevant."""
    return [sum(i >= 0 and relevant(labels[i], label) for i in row[:k]) / k for row, label in zip(I, query_labels, strict=True)]


def recall(I: Sequence[Sequence[int]], true: Sequence[Sequence[int]]) -> list[float]:
    """Of each query, the share of its true neighbours (−1 is none) that its results have."""
    shares = []
    for found, wanted in zip(I, true, strict=True):
        there = {i for i in wanted if i >= 0}
        shares.append(len(there & set(found)) / len(there) if there else 0.0)
    return shares


def subspace(points: Sequence[Vector], codewords: Sequence[Vector], theta: float) -> dict[str, float]:
    """Usage of a codebook and errors of the points that it codes."""
    codes = assign(points, codewords, theta)
    shares = [codes.count(c) / len(codes) for c in set(codes)]
    entropy = -math.fsum(p * math.log2(p) for p in shares)
    squared = math.fsum(squared_distance(x, codewords[c], theta) for x, c in zip(points, codes, strict=True)) / len(points)
    geodesic = math.fsum(distance(x, codewords[c], theta) for x, c in zip(points, codes, strict=True)) / len(points)
    middle = midpoint(points, [1.0] * len(points), theta)
    spread = math.fsum(squared_distance(x, middle, theta) for x in points) / len(points)
    return {
        "ksub": len(codewords),
        "used": len(set(codes)),
        "entropy": entropy,
        "perplexity": 2**entropy,
        "squared_error": squared,
        "geodesic_error": geodesic,
        "spread": spread,
        "relative_error": squared / spread if spread > 0 else 0.0,
    }
