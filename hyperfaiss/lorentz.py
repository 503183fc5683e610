"""Geometry of the Lorentz model, written once for NumPy arrays and torch tensors.

Conventions, used everywhere in this project:

- A manifold has curvature ``-theta``. ``theta >= 0``; ``theta = 0`` is the flat (Euclidean) limit and is legal.
- Only space coordinates are stored: a point is ``x`` with ``d`` floats, and its time coordinate is ``sqrt(1/theta + |x|²)``,
  so that a stored point can't leave the manifold. ``lift`` shows the full point.
- The last axis holds the coordinates. ``theta`` is a scalar or an array that broadcasts against the *leading* axes: shape
  ``(M,)`` gives each of the M subspaces of an ``(..., M, dsub)`` array a curvature of its own.
- ``squared_distance`` and ``distance`` compare element by element, broadcasting, at full accuracy; the ``pairwise_`` forms
  compare all with all through one matrix product.
- Results have the dtype of the vectors (float32 at least). Inside, everything is float64: the differences that make up a
  distance cancel by a factor of up to ``cosh²(sqrt(theta)·r)``, more than float32 has digits for, and the same function
  serves training (inside autocast or not) and serving. Every function is differentiable in all its array arguments, with
  finite gradients at the origin and at coincident points.

Equation numbers are those of HiHPQ (Qiu et al., AAAI 2024).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np

from .errors import InvalidParameterError, InvalidVectorsError

__all__ = [
    "clip",
    "distance",
    "exp0",
    "lift",
    "log0",
    "midpoint",
    "pairwise_distance",
    "pairwise_squared_distance",
    "squared_distance",
]

# sinh a · sinh b beyond which neither products nor differences of coordinates keep enough digits of a small distance.
_FAR_OUT = 1e4

# An ndarray or a torch.Tensor; the core installs without torch, so the type can't be spelt.
Array = Any


def clip(v: Array, radius: float | None) -> Array:
    """Scale tangent vectors that are longer than ``radius`` back to that length.

    ``v`` is (..., d); ``radius`` is None (nothing is clipped) or positive. Returns (..., d).
    """
    xp, out, v = _wide(v)
    if radius is None:
        return _narrow(v, out)
    if not radius > 0:
        raise InvalidParameterError(f"clip radius must be positive or None, got {radius!r}")
    radius, measured, unit = float(radius), v, 1.0
    if out == xp.float64:  # whose squares may leave it: long vectors are measured in another unit, a power of two
        long = (abs(v) > 1e150).any(-1)
        one = xp.ones_like(long, dtype=xp.float64)
        unit = xp.where(long, 2.0**-600 * one, one)
        measured = v * unit[..., None]
    norm2 = _dot(xp, measured, measured)
    with np.errstate(over="ignore"):
        outside = norm2 > (radius * unit) * (radius * unit)
    # The root is only taken of lengths outside the ball, where its derivative is bounded.
    scale = xp.where(outside, radius * unit / xp.sqrt(xp.where(outside, norm2, _one(xp, norm2))), _one(xp, norm2))
    return _narrow(v * scale[..., None], out)


def exp0(v: Array, theta: Array) -> Array:
    """Exponential map at the origin (Eq. 5, space part): ``sinh(√θ|v|) / (√θ|v|) · v``.

    ``v`` (..., d) are tangent vectors, the result (..., d) holds the space coordinates of points; ``theta = 0`` is the
    identity. Coordinates beyond the range of the dtype come out as inf.
    """
    xp, out, v = _wide(v)
    theta = _curvature(xp, theta, v)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = _sinhc(xp, theta * _dot(xp, v, v))[..., None]
        x = xp.where(xp.isinf(scale) & (v == 0), xp.zeros_like(v), v * scale)  # not 0 · inf
    return _narrow(x, out)


def log0(x: Array, theta: Array) -> Array:
    """Logarithm at the origin, the inverse of :func:`exp0`: ``asinh(√θ|x|) / (√θ|x|) · x``, shape (..., d)."""
    xp, out, x = _wide(x)
    theta = _curvature(xp, theta, x)
    return _narrow(x * _asinhc(xp, theta * _dot(xp, x, x))[..., None], out)


def lift(x: Array, theta: Array) -> Array:
    """Full coordinates (time first) of points given by their space coordinates: (..., d) to (..., d + 1), Eq. 1.

    ``theta`` must be positive: the flat limit has no time coordinate (it comes out as inf).
    """
    xp, out, x = _wide(x)
    theta = _curvature(xp, theta, x)
    with np.errstate(divide="ignore"):
        time = xp.sqrt(1 / theta + _dot(xp, x, x))
    time = xp.broadcast_to(time, x.shape[:-1])
    return _narrow(xp.concatenate([time[..., None], x], -1), out)


def squared_distance(x: Array, y: Array, theta: Array) -> Array:
    """Squared Lorentzian distance ``-2/θ - 2⟨x, y⟩`` between points (Eq. 10, corrected), without its cancellation.

    ``x`` (..., d) and ``y`` (..., d) are space coordinates and broadcast against each other; the result has the shape of
    their broadcast leading axes. ``theta = 0`` gives the squared Euclidean distance.

    Near points: ``|x-y|² - (x₀-y₀)²`` with ``x₀-y₀ = (x-y)·(x+y) / (x₀+y₀)``, smooth everywhere. Points that are far apart
    for their radius, or both far out, lose digits in that difference; theirs is the sum of a radial and an angular part,
    ``4/θ · sinh²((a-b)/2) + 2(|x||y| - x·y)`` with ``sinh a = √θ|x|``, neither of which is negative.
    """
    xp, out, x, y = _wide(x, y)
    return _narrow(_squared_distance(xp, x, y, _curvature(xp, theta, x)), out)


def distance(x: Array, y: Array, theta: Array) -> Array:
    """Geodesic distance ``2/√θ · asinh(√θ/2 · |x-y|_L)`` between points (Eq. 2 in its stable form).

    Shapes as in :func:`squared_distance`. ``theta = 0`` gives the Euclidean distance. Where x = y the gradient is 0.
    """
    xp, out, x, y = _wide(x, y)
    theta = _curvature(xp, theta, x)
    return _narrow(_geodesic(xp, _squared_distance(xp, x, y, theta), theta), out)


def pairwise_squared_distance(x: Array, y: Array, theta: Array) -> Array:
    """Squared Lorentzian distances between all rows of ``x`` (..., n, d) and of ``y`` (..., k, d): (..., n, k).

    ``theta`` broadcasts against the axes before n and k, so ``(M,)`` goes with ``(M, n, d)``. One matrix product, no array of
    n·k·d differences: ``2 · (h_x + h_y + θ·h_x·h_y - x·y)``, where ``h_x = |x|² / (1 + sqrt(1 + θ|x|²))`` is the height
    ``(sqrt(1 + θ|x|²) - 1)/θ`` of a point above the origin. Its absolute error is about 1e-16·cosh²/θ, so it agrees with
    :func:`squared_distance` except for points nearer than about 1e-5·cosh/√θ: made for training and clustering.
    """
    xp, out, x, y = _wide(x, y)
    return _narrow(_pairwise_squared_distance(xp, x, y, _curvature(xp, theta, x)[..., None, None]), out)


def pairwise_distance(x: Array, y: Array, theta: Array) -> Array:
    """Geodesic distances between all rows of ``x`` (..., n, d) and of ``y`` (..., k, d): (..., n, k).

    Shapes, cost and accuracy are those of :func:`pairwise_squared_distance`.
    """
    xp, out, x, y = _wide(x, y)
    theta = _curvature(xp, theta, x)[..., None, None]
    squared = _pairwise_squared_distance(xp, x, y, theta)
    # Past the cancellation nothing needs float64 any more, and n·k values are many.
    return _narrow(_geodesic(xp, _narrow(squared, out), _narrow(theta, out)), out)


def midpoint(x: Array, w: Array, theta: Array) -> Array:
    """Weighted Lorentzian midpoint (Eq. 11, corrected): ``Σ w x`` scaled back onto the manifold.

    ``x`` (..., K, d) are points, ``w`` (..., K) are non-negative weights, not all 0; their leading axes broadcast. Returns
    (..., d). It minimises the weighted sum of squared Lorentzian distances; ``theta = 0`` gives the weighted mean.
    """
    xp, out, x, w = _wide(x, w)
    theta = _curvature(xp, theta, x)
    # √θ·time of each point, so that θ = 0 needs no case of its own: the sum of the weights comes out.
    time = xp.sqrt(1 + theta[..., None] * _dot(xp, x, x))
    space = xp.einsum("...k,...kd->...d", w, x)
    total, weight = _dot(xp, w, time), w.sum(-1)
    # -θ⟨Σ,Σ⟩. By the reversed triangle inequality at least the square of the weights' sum, which is what the difference
    # falls below when points far out, all in one place, leave it no digits.
    norm2 = xp.maximum(total * total - theta * _dot(xp, space, space), weight * weight)
    return _narrow(space / xp.sqrt(norm2)[..., None], out)


def _squared_distance(xp: ModuleType, x: Array, y: Array, theta: Array) -> Array:
    xx, yy = _dot(xp, x, x), _dot(xp, y, y)
    cosh_x, cosh_y = xp.sqrt(1 + theta * xx), xp.sqrt(1 + theta * yy)
    delta = x - y
    euclid = _dot(xp, delta, delta)
    gap = _dot(xp, delta, x + y)  # |x|² - |y|², to full precision when the two are close
    near = euclid - theta * (gap / (cosh_x + cosh_y)) ** 2

    radius_x, radius_y = _sqrt(xp, xx), _sqrt(xp, yy)
    below = radius_x * cosh_y + radius_y * cosh_x
    slope = gap / xp.where(below > 0, below, _one(xp, below))  # sinh(a - b) / √θ
    radial = 2 * slope * slope / (1 + xp.sqrt(1 + theta * slope * slope))
    radii = radius_x * radius_y
    both_out = theta * radii > _FAR_OUT
    # Of two points far out, the directions are compared first: the two products would cancel.
    apart = x / xp.where(xx > 0, radius_x, _one(xp, xx))[..., None] - y / xp.where(yy > 0, radius_y, _one(xp, yy))[..., None]
    angular = xp.where(both_out, radii * _dot(xp, apart, apart), 2 * (radii - _dot(xp, x, y)))
    far = ((radii < euclid) & (theta > 0)) | both_out
    squared = xp.where(far, radial + angular, near)
    return xp.where(squared > 0, squared, xp.zeros_like(squared))


def _pairwise_squared_distance(xp: ModuleType, x: Array, y: Array, theta: Array) -> Array:
    xx, yy = _dot(xp, x, x)[..., None], _dot(xp, y, y)[..., None]
    h_x, h_y = xx / (1 + xp.sqrt(1 + theta * xx)), yy / (1 + xp.sqrt(1 + theta * yy))
    one_x, one_y = _one(xp, h_x), _one(xp, h_y)
    left = xp.concatenate([-x, h_x, one_x, theta * h_x], -1)
    right = xp.concatenate([y, one_y, h_y, h_y], -1)
    return (2 * xp.matmul(left, xp.swapaxes(right, -1, -2))).clip(min=0)


def _geodesic(xp: ModuleType, squared: Array, theta: Array) -> Array:
    return _sqrt(xp, squared) * _asinhc(xp, theta * squared / 4)


def _sinhc(xp: ModuleType, s: Array) -> Array:
    """``sinh(√s)/√s`` for s ≥ 0, analytic at 0."""
    small = s < 1e-3
    root = xp.sqrt(xp.where(small, _one(xp, s), s))
    series = 1 + s / 6 * (1 + s / 20 * (1 + s / 42))
    return xp.where(small, series, xp.sinh(root) / root)


def _asinhc(xp: ModuleType, s: Array) -> Array:
    """``asinh(√s)/√s`` for s ≥ 0, analytic at 0."""
    small = s < 1e-3
    # Each branch sees values of its own range only: the other's overflow would be 0 · inf = nan in the gradient.
    t, s = xp.where(small, s, xp.zeros_like(s)), xp.where(small, _one(xp, s), s)
    series = 1 - t * (1 / 6 - t * (3 / 40 - t * (5 / 112 - t * (35 / 1152))))
    # asinh written out, as accurate as torch's own, which is a scalar loop on CPUs.
    root = xp.sqrt(s)
    return xp.where(small, series, xp.log1p(root + s / (1 + xp.sqrt(1 + s))) / root)


def _sqrt(xp: ModuleType, s: Array) -> Array:
    """Square root whose gradient at 0 is 0."""
    positive = s > 0
    return xp.where(positive, xp.sqrt(xp.where(positive, s, _one(xp, s))), xp.zeros_like(s))


def _dot(xp: ModuleType, x: Array, y: Array) -> Array:
    if xp is np:
        return np.einsum("...d,...d->...", x, y)
    return (x * y).sum(-1)


def _one(xp: ModuleType, like: Array) -> Array:
    return xp.ones_like(like)


def _is_tensor(x: object) -> bool:
    torch = sys.modules.get("torch")  # a tensor can only exist once torch is imported
    return torch is not None and isinstance(x, torch.Tensor)


def _wide(*arrays: Array) -> Any:
    """The arrays' namespace, the dtype to return, and the arrays themselves in float64."""
    for a in arrays:
        if not (a.ndim if _is_tensor(a) else np.ndim(a)):
            raise InvalidVectorsError(f"expected an array of vectors (..., d), got the scalar {a!r}")
    if any(_is_tensor(a) for a in arrays):
        torch = sys.modules["torch"]
        tensors = [torch.as_tensor(a) for a in arrays]
        out = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        return torch, out, *(t.to(torch.float64) for t in tensors)
    arrays = tuple(np.asarray(a) for a in arrays)
    dtype = np.result_type(np.float32, *(a.dtype for a in arrays))
    return np, dtype, *(a.astype(np.float64, copy=False) for a in arrays)


def _narrow(x: Array, out: Any) -> Array:
    if _is_tensor(x):
        return x.to(out)
    with np.errstate(over="ignore"):
        return x.astype(out, copy=False) if isinstance(x, np.ndarray) else out.type(x)


def _curvature(xp: ModuleType, theta: Array, like: Array) -> Array:
    if xp is not np and _is_tensor(theta):
        return theta.to(dtype=xp.float64, device=like.device)  # not checked: a look at its values would stall a GPU
    try:
        values = np.asarray(theta, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.asarray(np.nan)
    if not (values >= 0).all() or not np.isfinite(values).all():
        raise InvalidParameterError(f"theta (curvature is -theta) must be finite and >= 0, got {theta!r}")
    return values if xp is np else xp.as_tensor(values, device=like.device)
