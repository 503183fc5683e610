"""Points of vectors, distances between points and codewords, and the nearest codeword of each point.

These are compiled twins of ``lorentz.clip``, ``exp0``, ``squared_distance`` and ``distance`` (the tests hold them together),
for uses that NumPy serves badly: no result may depend on which other vectors share the call, as a BLAS result does in its
last bits; and no array of n · ksub floats, let alone of n · ksub · dsub differences, may exist.

Codewords come as ``transposed`` (M, dsub, ksub) float32 and ``norms`` (M, 3, ksub) float64: |c|², cosh = sqrt(1 + θ|c|²), and
the height of the codeword above the origin, |c|²/(1 + cosh) = (cosh - 1)/θ; and ``reach`` (M, 2) float64, the largest |c| and
the largest height of a subspace. :func:`prepare` makes all three.

The long loops are free of branches and use nothing but + - * / and square roots, so that LLVM makes vector instructions of
them and every CPU gets the same bits. What such a loop can't settle it marks, and a plain loop goes over the few marked.
(An assignment that may leave an array's element as it was would become a masked store, which is slow: there is none.)
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..lorentz import _FAR_OUT
from .runtime import device_function, kernel

GEODESIC, SQUARED, INNER_PRODUCT = 0, 1, 2

# Relative error of one float32 operation, and of one float64 operation.
_EPS, _EPS64 = 2.0**-24, 2.0**-53
# The least normal float32 number, the largest one, and a size of scores that leaves room below it.
_TINY, _MAX, _LARGE = 2.0**-126, float(np.finfo(np.float32).max), 2.0**120

# What the quick form of a squared distance may lose, relatively; beyond that it is computed again without cancellation.
_TOLERANCE = 2e-8

# asinh(√s)/√s = 1 + s·(c₀ + c₁s + …) for 0 <= s <= _NEAR, minimax, to a relative error of 1.7e-9.
_NEAR = 1.5
_C0, _C1, _C2 = -0.1666664883964668, 0.07499375309395771, -0.04456611183099025
_C3, _C4, _C5 = 0.029905390326851498, -0.020614627272857525, 0.013121813512664513
_C6, _C7, _C8, _C9 = -0.006839507140181228, 0.0025776237447081947, -0.0006027610438393968, 6.450315091190701e-05

# Up to this s the terms of _sinhc's series are exact to float64.
_SERIES = 4.0
# Vectors mapped, and vectors encoded, at a time: what is kept of them stays in the cache.
_ROWS, LANES = 64, 256


class Prepared(NamedTuple):
    """Codebooks, or blocks of points, as the kernels take them: see the module's docstring."""

    transposed: npt.NDArray[np.float32]
    norms: npt.NDArray[np.float64]
    reach: npt.NDArray[np.float64]


def prepare(books: npt.NDArray[np.float32], curvatures: npt.NDArray[np.float32]) -> Prepared:
    """Codebooks (M, ksub, dsub) as the kernels take them."""
    transposed = np.ascontiguousarray(books.transpose(0, 2, 1))
    norm2 = np.zeros((len(books), books.shape[1]))
    for coordinates in transposed.swapaxes(0, 1):  # one after the other, as in _norm2: einsum adds as each CPU likes
        norm2 += np.square(coordinates, dtype=np.float64)
    cosh = np.sqrt(1 + curvatures[:, None].astype(np.float64) * norm2)
    height = norm2 / (1 + cosh)
    reach = np.stack([np.sqrt(norm2.max(axis=1)), height.max(axis=1)], axis=1)
    return Prepared(transposed, np.stack([norm2, cosh, height], axis=1), reach)


# ------------------------------------------------------------------------------------------------ points


@device_function
def _sinhc(s):
    """sinh(√s)/√s for 0 <= s <= _SERIES."""
    tail = 1 + s * (1 / 272) * (1 + s * (1 / 342) * (1 + s * (1 / 420) * (1 + s * (1 / 506))))
    middle = 1 + s * (1 / 72) * (1 + s * (1 / 110) * (1 + s * (1 / 156) * (1 + s * (1 / 210) * tail)))
    return 1 + s * (1 / 6) * (1 + s * (1 / 20) * (1 + s * (1 / 42) * middle))


@device_function
def _far_sinhc(s):
    """sinh(√s)/√s for any s, by sinh 2a = 2 sinh a cosh a."""
    start, doublings = s, 0
    while start > _SERIES:
        start, doublings = start / 4, doublings + 1
    value = _sinhc(start)
    for _ in range(doublings):
        value *= math.sqrt(1 + start * value * value)
        start *= 4
    return value


@kernel("void(Array(float32, 3, 'C', readonly=True), float64, Array(float32, 1, 'C', readonly=True), float32[:,:,::1])")
def map_points(v, clip_radius, curvatures, points):
    """``points`` = ``lorentz.exp0(lorentz.clip(v, clip_radius), curvatures)`` of vectors' parts v (n, M, dsub).

    A clip_radius of inf clips nothing. A coordinate beyond float32 comes out as inf.
    """
    n, M, dsub = v.shape
    norm2, scale = np.empty(_ROWS), np.empty(_ROWS)
    for first in range(0, n, _ROWS):
        rows = min(_ROWS, n - first)
        for m in range(M):
            for i in range(rows):
                total = 0.0
                for k in range(dsub):
                    total += np.float64(v[first + i, m, k]) * np.float64(v[first + i, m, k])
                outside = total > clip_radius * clip_radius
                factor = clip_radius / math.sqrt(total) if outside else 1.0
                if outside:
                    total = 0.0
                for k in range(dsub):
                    value = np.float32(np.float64(v[first + i, m, k]) * factor)
                    points[first + i, m, k] = value
                    if outside:
                        total += np.float64(value) * np.float64(value)
                norm2[i] = total * curvatures[m]
            for i in range(rows):
                scale[i] = _sinhc(norm2[i])
            for i in range(rows):
                factor = scale[i] if norm2[i] <= _SERIES else _far_sinhc(norm2[i])
                for k in range(dsub):
                    value = points[first + i, m, k]
                    points[first + i, m, k] = value * factor if value != 0 else value  # not 0 · inf


# ------------------------------------------------------------------------------------------------ distances


@device_function
def _norm2(x):
    total = 0.0
    for i in range(x.shape[0]):
        total += np.float64(x[i]) * np.float64(x[i])
    return total


@device_function
def _asinhc(s):
    """asinh(√s)/√s for 0 <= s <= _NEAR."""
    t = s * s
    even = 1 + t * (_C1 + t * (_C3 + t * (_C5 + t * (_C7 + t * _C9))))
    return even + s * (_C0 + t * (_C2 + t * (_C4 + t * (_C6 + t * _C8))))


@device_function
def _angular(x, transposed, j, radius_x, radius_y):
    """``2(|x||y| - x·y)`` from the difference of the two directions."""
    total = 0.0
    for i in range(x.shape[0]):
        apart = np.float64(x[i]) / radius_x - np.float64(transposed[i, j]) / radius_y
        total += apart * apart
    return radius_x * radius_y * total


@device_function
def _squared_distance(euclid, gap, dot, xx, yy, cosh_x, cosh_y, theta, x, transposed, j):
    """``lorentz.squared_distance`` of x and codeword j from |x-y|², (x-y)·(x+y), x·y, |x|², |y|² and the two cosh."""
    radius_x, radius_y = math.sqrt(xx), math.sqrt(yy)
    radii = radius_x * radius_y
    both_out = theta * radii > _FAR_OUT
    if both_out or (radii < euclid and theta > 0):
        slope = gap / (radius_x * cosh_y + radius_y * cosh_x)
        squared = 2 * slope * slope / (1 + math.sqrt(1 + theta * slope * slope))
        squared += _angular(x, transposed, j, radius_x, radius_y) if both_out else 2 * (radii - dot)
    else:
        difference = gap / (cosh_x + cosh_y)
        squared = euclid - theta * difference * difference
    return squared if squared > 0 else 0.0


@device_function
def _compare(x, transposed, j, xx, yy, cosh_x, cosh_y, theta):
    """Squared distance between one point and codeword ``j`` of one subspace, in float64."""
    euclid = gap = dot = 0.0
    for i in range(x.shape[0]):
        a, b = np.float64(x[i]), np.float64(transposed[i, j])
        euclid += (a - b) * (a - b)
        gap += (a - b) * (a + b)
        dot += a * b
    return _squared_distance(euclid, gap, dot, xx, yy, cosh_x, cosh_y, theta, x, transposed, j)


@device_function
def _chords(x, transposed, norms, reach, theta, squared):
    """``squared[j]`` = squared Lorentzian distance of point x to codeword j of one subspace, for all j.

    It is |x-c|² - θ(h_x-h_c)², h the heights. Those are off by ε·h, and what that makes of the
    difference is at most ``ε·|x-c|·(|x|+|c|)`` with ε = (3·dsub + 10)·2⁻⁵³, however small or large the points are. Where that
    is more than _TOLERANCE, which is close to x, the distance is computed anew.
    """
    dsub, ksub = transposed.shape
    squared[:] = 0.0
    whole = dsub - dsub % 4
    for i in range(0, whole, 4):
        a0, a1, a2, a3 = np.float64(x[i]), np.float64(x[i + 1]), np.float64(x[i + 2]), np.float64(x[i + 3])
        for j in range(ksub):
            d0, d1 = a0 - transposed[i, j], a1 - transposed[i + 1, j]
            d2, d3 = a2 - transposed[i + 2, j], a3 - transposed[i + 3, j]
            squared[j] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
    for i in range(whole, dsub):
        a0 = np.float64(x[i])
        for j in range(ksub):
            d0 = a0 - transposed[i, j]
            squared[j] += d0 * d0
    if theta == 0:
        return
    xx = _norm2(x)
    cosh_x = math.sqrt(1 + theta * xx)
    height = xx / (1 + cosh_x)
    lost = (3 * dsub + 10) * _EPS64 / _TOLERANCE * (math.sqrt(xx) + reach[0])
    doubtful = 0
    for j in range(ksub):
        drop = height - norms[2, j]
        near = squared[j] - theta * drop * drop
        near = near if near > 0 else 0.0
        unsure = squared[j] * lost * lost > near * near
        doubtful += unsure
        squared[j] = -1.0 if unsure else near
    if doubtful:
        for j in range(ksub):
            if squared[j] < 0:
                squared[j] = _compare(x, transposed, j, xx, norms[0, j], cosh_x, norms[1, j], theta)


@device_function
def _halve(squared, times, quarter):
    """Replace far chords by those of half their geodesics, again and again, until ``_asinhc`` takes them all.

    ``times`` are the numbers of halves. ``sinh(a)² = 4 sinh(a/2)² · (1 + sinh(a/2)²)``, where ``sinh(a)² = quarter · squared``.
    """
    ksub = len(squared)
    times[:] = 1.0
    while True:
        far = 0
        for j in range(ksub):
            far += quarter * squared[j] > _NEAR
        if not far:
            return
        for j in range(ksub):
            s = quarter * squared[j]
            parts = 2 + 2 * math.sqrt(1 + s)
            squared[j] /= parts if s > _NEAR else 1.0
            times[j] *= 2.0 if s > _NEAR else 1.0


@device_function
def _inner_products(x, transposed, products):
    """Minus the inner products of x with all codewords, within the range of float32, so that no sum of them is inf - inf."""
    dsub, ksub = transposed.shape
    products[:] = 0.0
    for i in range(dsub):
        a = np.float64(x[i])
        for j in range(ksub):
            products[j] -= a * transposed[i, j]
    for j in range(ksub):
        value = products[j] if products[j] < _MAX else _MAX
        products[j] = value if value > -_MAX else -_MAX


@kernel(
    "void(Array(float32, 3, 'C', readonly=True), Array(float32, 3, 'C', readonly=True), Array(float64, 3, 'C', readonly=True),"
    "Array(float64, 2, 'C', readonly=True), Array(float32, 1, 'C', readonly=True), int64, float32[:,:,::1])"
)
def distance_tables(x, transposed, norms, reach, curvatures, metric, tables):
    """``tables[q, m, j]`` = distance of query q's point x[q, m] (dsub floats) to codeword j of subspace m.

    metric: GEODESIC distances, these SQUARED, or minus the INNER_PRODUCT. Computed in float64, one query after the other, and
    rounded once.
    """
    M, _, ksub = transposed.shape
    squared, times = np.empty(ksub), np.empty(ksub)
    for m in range(M):
        theta = np.float64(curvatures[m])
        quarter = theta / 4
        for q in range(x.shape[0]):
            if metric == INNER_PRODUCT:
                _inner_products(x[q, m], transposed[m], squared)
            else:
                _chords(x[q, m], transposed[m], norms[m], reach[m], theta, squared)
            if theta == 0:
                for j in range(ksub):
                    tables[q, m, j] = math.sqrt(squared[j]) if metric == GEODESIC else squared[j]
                continue
            _halve(squared, times, quarter)
            if metric == SQUARED:
                for j in range(ksub):
                    stretch = times[j] * _asinhc(quarter * squared[j])
                    tables[q, m, j] = squared[j] * stretch * stretch
            else:
                for j in range(ksub):
                    stretch = times[j] * _asinhc(quarter * squared[j])
                    tables[q, m, j] = math.sqrt(squared[j]) * stretch


@kernel(
    "void(Array(float32, 1, 'C', readonly=True), Array(float32, 3, 'C', readonly=True), Array(float64, 3, 'C', readonly=True),"
    "Array(float64, 2, 'C', readonly=True), float64, float64[:,::1])"
)
def chords(x, transposed, norms, reach, theta, squared):
    """``squared[b, i]`` = squared Lorentzian distance of x to point i of block b; blocks are prepared as codebooks are."""
    for b in range(len(transposed)):
        _chords(x, transposed[b], norms[b], reach[b], theta, squared[b])


# ------------------------------------------------------------------------------------------------ codes


@device_function
def _nearest(x, transposed, norms, reach, theta):
    """The codeword nearest to x, in float64: by score, and the closest by distance, ties to the smaller."""
    xx = _norm2(x)
    cosh_x = math.sqrt(1 + theta * xx)
    ksub = transposed.shape[1]
    score = np.empty(ksub)
    for j in range(ksub):
        score[j] = cosh_x * norms[2, j]
    for i in range(len(x)):
        a = np.float64(x[i])
        for j in range(ksub):
            score[j] -= a * transposed[i, j]
    best = np.inf
    for j in range(ksub):
        best = score[j] if score[j] < best else best
    # As in assign, but that the heights are known no better than the sum of dsub squares.
    limit = best + 4 * (len(x) + 6) * _EPS64 * (cosh_x * reach[1] + math.sqrt(xx) * reach[0])
    code, least = 0, np.inf
    for j in range(ksub):
        if score[j] <= limit:
            squared = _compare(x, transposed, j, xx, norms[0, j], cosh_x, norms[1, j], theta)
            if squared < least:
                code, least = j, squared
    return code


@device_function
def _two_best(block, cosh, lanes, book, norms, score, best, second, code):
    """The two least scores of each lane's point over all codewords, and the number of the first.

    The score is ``cosh(x)·h - x·c``, half the squared distance but for a term of x alone: see
    ``lorentz.pairwise_squared_distance``. The rows of ``block`` and the columns of ``book`` are coordinates, a multiple of 4.
    """
    ksub, padded = book.shape
    best[:], second[:] = np.inf, np.inf
    for j in range(0, ksub, 2):  # two codewords at a time: half as many loads
        k = j + 1
        height_j, height_k = np.float32(norms[2, j]), np.float32(norms[2, k])
        a0, a1, a2, a3 = book[j, 0], book[j, 1], book[j, 2], book[j, 3]
        b0, b1, b2, b3 = book[k, 0], book[k, 1], book[k, 2], book[k, 3]
        for lane in range(lanes):
            x0, x1, x2, x3 = block[0, lane], block[1, lane], block[2, lane], block[3, lane]
            score[0, lane] = cosh[lane] * height_j - a0 * x0 - a1 * x1 - a2 * x2 - a3 * x3
            score[1, lane] = cosh[lane] * height_k - b0 * x0 - b1 * x1 - b2 * x2 - b3 * x3
        for i in range(4, padded, 4):
            a0, a1, a2, a3 = book[j, i], book[j, i + 1], book[j, i + 2], book[j, i + 3]
            b0, b1, b2, b3 = book[k, i], book[k, i + 1], book[k, i + 2], book[k, i + 3]
            for lane in range(lanes):
                x0, x1, x2, x3 = block[i, lane], block[i + 1, lane], block[i + 2, lane], block[i + 3, lane]
                score[0, lane] = score[0, lane] - a0 * x0 - a1 * x1 - a2 * x2 - a3 * x3
                score[1, lane] = score[1, lane] - b0 * x0 - b1 * x1 - b2 * x2 - b3 * x3
        for lane in range(lanes):
            left, right, number = score[0, lane], score[1, lane], np.int32(j)
            least, next_least, was = best[lane], second[lane], code[lane]
            low, high = (right, left) if right < left else (left, right)
            number += np.int32(right < left)
            runner_up = low if low > least else least
            high = high if high < next_least else next_least
            second[lane] = runner_up if runner_up < high else high
            code[lane] = number if low < least else was
            best[lane] = low if low < least else least


@kernel(
    "void(Array(float32, 3, 'C', readonly=True), Array(float32, 3, 'C', readonly=True), Array(float64, 3, 'C', readonly=True),"
    "Array(float64, 2, 'C', readonly=True), Array(float32, 1, 'C', readonly=True), uint8[:,::1])"
)
def assign(x, transposed, norms, reach, curvatures, codes):
    """``codes[i, m]`` = codeword of subspace m that is nearest to point x[i, m] (dsub floats), ties to the smaller.

    Scores in float32 settle all points but those whose two best lie within their rounding errors; these are looked at in
    float64. So the code is that of the exact distances, whatever else is in the call.
    """
    n, M, dsub = x.shape
    ksub = transposed.shape[2]
    padded = dsub + -dsub % 4  # zeros cost less than a loop over the rest
    block, book = np.empty((padded, LANES), np.float32), np.empty((ksub, padded), np.float32)
    cosh, size, code = np.empty(LANES, np.float32), np.empty(LANES), np.empty(LANES, np.int32)
    score, best, second = np.empty((2, LANES), np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    block[:], book[:], cosh[:] = 0.0, 0.0, 0.0
    for m in range(M):
        theta = np.float64(curvatures[m])
        for j in range(ksub):
            for i in range(dsub):
                book[j, i] = transposed[m, i, j]
        for start in range(0, n, LANES):
            rows = min(LANES, n - start)
            for lane in range(rows):
                xx = 0.0
                for i in range(dsub):
                    a = x[start + lane, m, i]
                    block[i, lane] = a
                    xx += np.float64(a) * np.float64(a)
                cosh_x = math.sqrt(1 + theta * xx)
                cosh[lane] = cosh_x
                size[lane] = cosh_x * reach[m, 1] + math.sqrt(xx) * reach[m, 0]
            # Whole vectors: what the block before left in the last lanes does no harm.
            _two_best(block, cosh, rows + -rows % 16, book, norms[m], score, best, second, code)
            # A score is a sum of dsub + 1 terms whose sizes add up to at most ``size``, the first of them of three rounded
            # factors: off by at most (dsub + 4)·eps·size. Terms and heights may also lose what is too small for float32.
            for lane in range(rows):
                margin = 2 * (dsub + 6) * (_EPS * size[lane] + _TINY * cosh[lane])
                if second[lane] - best[lane] > margin and size[lane] < _LARGE:
                    codes[start + lane, m] = code[lane]
                else:
                    codes[start + lane, m] = _nearest(x[start + lane, m], transposed[m], norms[m], reach[m], theta)


@kernel("void(Array(float32, 2, 'C', readonly=True), float64, Array(uint8, 1, 'C', readonly=True), float32[:,::1])")
def move_centers(x, theta, codes, centers):
    """k-means step: ``centers[j]`` = Lorentzian midpoint of the points x[i] with codes[i] = j; left alone if there are none.

    The midpoint is ``S/√N`` with S = Σ x and N = T² - θ|S|², T = Σ cosh aᵢ, sinh aᵢ = √θ|xᵢ|. N is taken as
    ``(T + √θ|S|) · Σ (cosh aᵢ - √θ xᵢ·s)``, s = S/|S|, whose terms ``exp(-aᵢ) + sinh aᵢ · |xᵢ/|xᵢ| - s|²/2`` do not cancel: far
    out, T² and θ|S|² agree in all their digits.
    """
    ksub, dsub = centers.shape
    space, direction = np.empty((ksub, dsub)), np.empty((ksub, dsub))
    time, gap, length = np.empty(ksub), np.empty(ksub), np.empty(ksub)
    space[:], direction[:], time[:], gap[:] = 0.0, 0.0, 0.0, 0.0
    for i in range(x.shape[0]):
        time[codes[i]] += math.sqrt(1 + theta * _norm2(x[i]))
        for k in range(dsub):
            space[codes[i], k] += x[i, k]
    for j in range(ksub):
        length[j] = math.sqrt(_norm2(space[j]))
        direction[j, 0] = 1.0  # where the points balance, any direction will do
        for k in range(dsub):
            if length[j] > 0:
                direction[j, k] = space[j, k] / length[j]
    for i in range(x.shape[0]):
        j = codes[i]
        radius = math.sqrt(_norm2(x[i]))
        sinh = math.sqrt(theta) * radius
        gap[j] += 1 / (math.sqrt(1 + sinh * sinh) + sinh)
        if sinh > 0:
            apart = 0.0
            for k in range(dsub):
                apart += (np.float64(x[i, k]) / radius - direction[j, k]) ** 2
            gap[j] += sinh * apart / 2
    for j in range(ksub):
        if time[j] > 0:
            norm = math.sqrt((time[j] + math.sqrt(theta) * length[j]) * gap[j])
            for k in range(dsub):
                centers[j, k] = space[j, k] / norm
