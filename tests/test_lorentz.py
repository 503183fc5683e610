"""Geometry: accuracy against mpmath, properties, gradients, dtypes."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import naive
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hyperfaiss import InvalidParameterError, InvalidVectorsError, lorentz

THETAS = [0.0, 1e-4, 1e-2, 0.1, 1.0, 10.0]
# Relative tolerance of one result, by the dtype of the points.
RTOL = {np.float32: 1e-5, np.float64: 1e-9}


def random_points(rng: np.random.Generator, *shape: int, dtype: type = np.float64) -> np.ndarray:
    return rng.normal(size=shape).astype(dtype)


# ------------------------------------------------------------------------------------------------ accuracy


def at_distance(theta: float, base: float, away: float, direction: str, rng: np.random.Generator) -> tuple[Any, Any] | None:
    """Two float32 points: one at geodesic radius ``base``, the other ``away`` from it; None if they overflow float32."""
    with mpmath.workdps(80):
        root = mpmath.sqrt(mpmath.mpf(theta))

        def sinh(r: Any) -> Any:
            return mpmath.sinh(root * r) / root if theta else mpmath.mpf(r)

        def cosh(r: Any) -> Any:
            return mpmath.cosh(root * r)

        axis, side = [[mpmath.mpf(float(i == j)) for i in range(3)] for j in (0, 1)]
        if direction.startswith("slanted"):  # no coordinate of the basis is 0
            q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
            axis, side = [[mpmath.mpf(a) for a in q[j]] for j in (0, 1)]
        x = [sinh(mpmath.mpf(base)) * a for a in axis]
        kind = direction.rpartition(" ")[2]
        if kind == "outward":
            y = [sinh(mpmath.mpf(base) + away) * a for a in axis]
        elif kind == "inward":  # and through the origin, if it is nearer than that
            y = [sinh(mpmath.mpf(base) - away) * a for a in axis]
        else:  # set off at a right angle, or at 0.01 rad from outward
            angle = mpmath.pi / 2 if kind == "transverse" else mpmath.mpf("0.01")
            along = cosh(mpmath.mpf(base)) * sinh(mpmath.mpf(away)) * mpmath.cos(angle)
            y = [cosh(mpmath.mpf(away)) * a + along * b + sinh(mpmath.mpf(away)) * mpmath.sin(angle) * c
                 for a, b, c in zip(x, axis, side, strict=True)]  # fmt: skip
        with np.errstate(over="ignore"):
            points = np.array([[float(a) for a in x], [float(a) for a in y]]).astype(np.float32)
    return (points[0], points[1]) if np.isfinite(points).all() else None


DIRECTIONS = [f"{basis} {kind}" for basis in ("axis", "slanted") for kind in ("outward", "inward", "transverse", "oblique")]


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_distance_is_accurate_in_float32(theta: float, direction: str) -> None:
    rng = np.random.default_rng(0)
    pairs = [
        pair
        for base in (0, 1e-6, 1e-3, 0.1, 1, 3, 8, 12, 16, 20, 30)
        for away in (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 0.5, 1, 3, 10, 26, 30)
        if (pair := at_distance(theta, base, away, direction, rng)) is not None
    ]
    assert len(pairs) > 70
    x, y = (np.array(side) for side in zip(*pairs, strict=True))
    # The points as rounded are the input, so the reference starts from them.
    ref = np.array([float(naive.exact_distance(a, b, theta)) for a, b in pairs])
    seen = ref[ref > 0]
    assert seen.min() < 3e-6
    assert seen.max() > 25
    squared = np.array([float(naive.exact_squared_distance(a, b, theta)) for a, b in pairs])
    comp, comp_squared = lorentz.distance(x, y, theta), lorentz.squared_distance(x, y, theta)
    assert comp.dtype == comp_squared.dtype == np.float32
    np.testing.assert_allclose(comp, ref, rtol=1e-5, atol=0)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(comp_squared, squared.astype(np.float32), rtol=1e-5, atol=0)
    np.testing.assert_array_equal(lorentz.distance(y, x, theta), comp)


@pytest.mark.parametrize("theta", THETAS)
def test_naive_agrees_with_the_definition(theta: float) -> None:
    rng = np.random.default_rng(1)
    for x, y in random_points(rng, 20, 2, 5):
        assert naive.distance(x, y, theta) == pytest.approx(float(naive.exact_distance(x, y, theta)), rel=1e-12)


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("shape", [(7, 9, 1), (7, 9, 4), (5, 40, 15)])
def test_pairwise_agrees_with_elementwise(theta: float, shape: tuple[int, int, int]) -> None:
    n, k, d = shape
    rng = np.random.default_rng(2)
    x, y = random_points(rng, 3, n, d), random_points(rng, 3, k, d)
    thetas = np.array([theta, theta, 0.5])
    for pairwise, elementwise in (
        (lorentz.pairwise_distance, lorentz.distance),
        (lorentz.pairwise_squared_distance, lorentz.squared_distance),
    ):
        comp = pairwise(x, y, thetas)
        assert comp.shape == (3, n, k)
        ref = elementwise(x[:, :, None], y[:, None], thetas[:, None, None])
        np.testing.assert_allclose(comp, ref, rtol=1e-9)
        # As the docstring has it: the absolute error of the square is about 1e-16·cosh²/θ, points too near come out as 0 or so.
        assert (pairwise(x, x, thetas) >= 0).all()
        np.testing.assert_allclose(np.diagonal(pairwise(x, x, thetas), axis1=1, axis2=2), 0, atol=1e-6)


def test_pairwise_domain() -> None:
    """Relative error 1e-5 down to the separation that the docstring names, 1e-5·cosh/√θ."""
    rng = np.random.default_rng(3)
    for theta in THETAS[1:]:
        x = random_points(rng, 50, 4) / math.sqrt(theta)
        cosh = np.sqrt(1 + theta * (x * x).sum(1))
        y = (
            x
            + (u := random_points(rng, 50, 4)) / np.linalg.norm(u, axis=1)[:, None] * (2e-5 * cosh / math.sqrt(theta))[:, None]
        )
        comp = np.diagonal(lorentz.pairwise_distance(x, y, theta))
        np.testing.assert_allclose(comp, lorentz.distance(x, y, theta), rtol=1e-5)


@pytest.mark.parametrize("theta", THETAS)
def test_distance_of_exp0_is_the_radius(theta: float) -> None:
    rng = np.random.default_rng(4)
    v = random_points(rng, 50, 6)
    v *= (np.geomspace(1e-6, 30, 50) / np.linalg.norm(v, axis=1))[:, None]
    x = lorentz.exp0(v, theta)
    np.testing.assert_allclose(lorentz.distance(x, np.zeros(6), theta), np.linalg.norm(v, axis=1), rtol=1e-11)


# ------------------------------------------------------------------------------------------------ maps


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp0_and_log0(theta: float, dtype: type) -> None:
    rng = np.random.default_rng(5)
    v = random_points(rng, 60, 4)
    v = (v * (np.geomspace(1e-12, 25 / max(theta, 1) ** 0.5, 60) / np.linalg.norm(v, axis=1))[:, None]).astype(dtype)
    v[0] = 0
    x = lorentz.exp0(v, theta)
    assert x.dtype == dtype
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(x, np.array([naive.exp0(row, theta) for row in v]), rtol=100 * eps)
    np.testing.assert_allclose(lorentz.log0(x, theta), np.array([naive.log0(row, theta) for row in x]), rtol=100 * eps)
    np.testing.assert_allclose(lorentz.log0(x, theta), v, rtol=100 * eps)


def test_flat_limit_is_exact() -> None:
    rng = np.random.default_rng(6)
    x, y = random_points(rng, 20, 3), random_points(rng, 20, 3)
    np.testing.assert_array_equal(lorentz.exp0(x, 0.0), x)
    np.testing.assert_array_equal(lorentz.log0(x, 0), x)
    np.testing.assert_allclose(lorentz.distance(x, y, 0.0), np.linalg.norm(x - y, axis=1), rtol=1e-15)
    np.testing.assert_allclose(lorentz.squared_distance(x, y, 0.0), ((x - y) ** 2).sum(1), rtol=1e-15)
    np.testing.assert_allclose(lorentz.midpoint(x, np.ones(20), 0.0), x.mean(0), rtol=1e-13)
    # and it is a limit: a curvature of almost 0 gives almost the same
    np.testing.assert_allclose(lorentz.distance(x, y, 1e-14), lorentz.distance(x, y, 0.0), rtol=1e-12)
    np.testing.assert_allclose(lorentz.exp0(x, 1e-14), x, rtol=1e-12)


@pytest.mark.parametrize("theta", THETAS[1:])
def test_lift_is_on_the_manifold(theta: float) -> None:
    x = random_points(np.random.default_rng(7), 30, 5)
    full = lorentz.lift(x, theta)
    assert full.shape == (30, 6)
    np.testing.assert_array_equal(full[:, 1:], x)
    np.testing.assert_allclose((full[:, 1:] ** 2).sum(1) - full[:, 0] ** 2, -1 / theta, rtol=1e-9)
    assert (full[:, 0] > 0).all()


def test_lift_in_the_flat_limit_has_infinite_time() -> None:
    for x in (np.ones((2, 3)), torch.ones(2, 3)):
        full = lorentz.lift(x, 0.0)
        assert full[..., 0].tolist() == [math.inf] * 2
        assert full[..., 1:].tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize("theta", THETAS)
def test_midpoint_against_oracle_and_as_minimum(theta: float) -> None:
    rng = np.random.default_rng(8)
    x, w = random_points(rng, 9, 4), rng.random(9)
    comp = lorentz.midpoint(x, w, theta)
    np.testing.assert_allclose(comp, naive.midpoint(x, w, theta), rtol=1e-12)

    def cost(c: np.ndarray) -> float:
        return math.fsum(wi * naive.squared_distance(xi, c, theta) for wi, xi in zip(w, x, strict=True))

    for step in rng.normal(size=(40, 4)) * np.geomspace(1e-3, 1, 40)[:, None]:
        assert cost(comp + step) > cost(comp)


@pytest.mark.parametrize("radius", [1.0, 10.0, 17.0, 25.0])
def test_midpoint_of_one_point_is_the_point(radius: float) -> None:
    x = np.array([[0.6, 0.8]]) * math.sinh(radius)
    for points, w in ((x, np.ones(1)), (np.repeat(x, 3, axis=0), np.array([1.0, 2.0, 0.5]))):
        comp = lorentz.midpoint(points, w, 1.0)
        assert np.isfinite(comp).all()
        np.testing.assert_allclose(lorentz.log0(comp, 1.0), lorentz.log0(x[0], 1.0), rtol=1e-3)


def test_leading_axes_broadcast() -> None:
    rng = np.random.default_rng(10)
    B, M, K, d = 4, 3, 5, 2
    theta = np.array([0.0, 0.5, 3.0])
    x, w, v = random_points(rng, M, K, d), rng.random((B, M, K)), random_points(rng, B, M, d)
    mid, points = lorentz.midpoint(x, w, theta), lorentz.exp0(v, theta)
    table = lorentz.distance(points[:, :, None], x, theta[:, None])
    assert (mid.shape, points.shape, table.shape) == ((B, M, d), (B, M, d), (B, M, K))
    for b in range(B):
        for m in range(M):
            np.testing.assert_allclose(mid[b, m], naive.midpoint(x[m], w[b, m], theta[m]), rtol=1e-12)
            np.testing.assert_allclose(points[b, m], naive.exp0(v[b, m], theta[m]), rtol=1e-12)
            ref = [naive.distance(points[b, m], c, theta[m]) for c in x[m]]
            np.testing.assert_allclose(table[b, m], ref, rtol=1e-12)


def test_clip() -> None:
    rng = np.random.default_rng(11)
    v = (random_points(rng, 40, 3) * np.geomspace(1e-3, 1e18, 40)[:, None]).astype(np.float32)
    v[0] = 0
    comp = lorentz.clip(v, 1.5)
    np.testing.assert_allclose(comp, np.array([naive.clip(row, 1.5) for row in v]), rtol=1e-6)
    assert np.linalg.norm(comp, axis=1).max() <= 1.5 * (1 + 1e-6)
    inside = np.linalg.norm(v, axis=1) < 1.4
    assert 0 < inside.sum() < 40
    np.testing.assert_array_equal(comp[inside], v[inside])
    np.testing.assert_array_equal(lorentz.clip(v, None), v)


@pytest.mark.parametrize("radius", [1e-100, 1.5, 1e154, 1e155, 1e300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_clip_where_squares_overflow(dtype: type, radius: float) -> None:
    """Neither the radius nor a length may be squared naively: 1e155² is no float64."""
    rng = np.random.default_rng(12)
    largest = 38 if dtype is np.float32 else 307
    v = (random_points(rng, 60, 3) / 4 * np.logspace(-5, largest, 60)[:, None]).astype(dtype)
    norm = np.array([math.hypot(*row) for row in v.tolist()])
    ref = np.where((norm > radius)[:, None], radius * (v.astype(np.float64) / norm[:, None]), v)
    for comp in (lorentz.clip(v, radius), lorentz.clip(torch.from_numpy(v), radius).numpy()):
        assert comp.dtype == dtype
        np.testing.assert_allclose(comp, ref, rtol=4 * np.finfo(dtype).eps, atol=1e-45)
        np.testing.assert_array_equal(comp[norm <= radius], v[norm <= radius])
    assert lorentz.clip(np.ones((2, 0), dtype), radius).shape == (2, 0)
    row = v[40]
    np.testing.assert_array_equal(lorentz.clip(row, radius), lorentz.clip(v, radius)[40])


def test_clip_has_finite_gradients_of_long_vectors() -> None:
    v = torch.tensor([[1e200, -2e250, 0.0], [3.0, 4.0, 0.0]], dtype=torch.float64, requires_grad=True)
    lorentz.clip(v, 1e160).sum().backward()
    assert v.grad is not None
    assert torch.isfinite(v.grad).all()
    np.testing.assert_array_equal(v.grad[1].numpy(), 1)


def test_exp0_beyond_the_dtype_is_inf_without_a_warning() -> None:
    for x in (np.array([[1000.0, 0.0]], np.float32), torch.tensor([[1000.0, 0.0]])):
        comp = lorentz.exp0(x, 1.0)
        assert comp[0, 0] == math.inf
        assert comp[0, 1] == 0
        # beyond float32, within float64
        comp = lorentz.exp0(x / 5, 1.0)
        assert comp[0, 0] == math.inf


# ------------------------------------------------------------------------------------------------ properties


def vectors(d: int = 3) -> st.SearchStrategy[np.ndarray]:
    """Vectors whose length is log-uniform over 27 decades, the origin included."""
    unit = st.lists(st.floats(-1, 1, width=32), min_size=d, max_size=d)
    return st.builds(lambda u, e: np.array(u) * 10.0**e, unit, st.floats(-24, 3))


thetas = st.one_of(st.just(0.0), st.floats(-4, 1).map(lambda e: 10.0**e))
dtypes = st.sampled_from([np.float32, np.float64])


@given(vectors(), vectors(), vectors(), thetas, dtypes)
def test_distance_is_a_metric(x: np.ndarray, y: np.ndarray, z: np.ndarray, theta: float, dtype: type) -> None:
    x, y, z = (p.astype(dtype) for p in (x, y, z))
    xy, yx, yz, xz = (float(lorentz.distance(a, b, theta)) for a, b in ((x, y), (y, x), (y, z), (x, z)))
    assert xy >= 0
    assert xy == yx
    assert lorentz.distance(x, x, theta) == 0
    assert xz <= (xy + yz) * (1 + RTOL[dtype]) + float(np.finfo(dtype).tiny)
    if xy == 0:
        np.testing.assert_allclose(x, y, atol=1e-15)


@given(vectors(), vectors(), thetas)
def test_geodesic_and_squared_order_alike(x: np.ndarray, y: np.ndarray, theta: float) -> None:
    """d is a function of the squared Lorentzian distance s: s = 4/θ · sinh²(√θ d/2)."""
    d, s = float(lorentz.distance(x, y, theta)), float(lorentz.squared_distance(x, y, theta))
    half = math.sqrt(theta) * d / 2
    ref = d * d * (math.sinh(half) / half if half > 0 else 1) ** 2
    assert s == pytest.approx(ref, rel=1e-12, abs=1e-300)


@given(vectors(), thetas, dtypes)
def test_log0_inverts_exp0(v: np.ndarray, theta: float, dtype: type) -> None:
    v = (v / max(1.0, np.linalg.norm(v) * math.sqrt(theta) / 80)).astype(dtype)
    np.testing.assert_allclose(
        lorentz.log0(lorentz.exp0(v, theta), theta), v, rtol=RTOL[dtype], atol=float(np.finfo(dtype).tiny)
    )


# ------------------------------------------------------------------------------------------------ torch


@pytest.mark.parametrize("theta", [*THETAS, "each"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_and_torch_agree(theta: Any, dtype: type) -> None:
    rng = np.random.default_rng(12)
    M, B, K, d = 3, 8, 5, 4
    theta = np.array([0.0, 0.3, 4.0]) if theta == "each" else theta
    v, x = random_points(rng, B, M, d, dtype=dtype), random_points(rng, M, K, d, dtype=dtype)
    w = rng.random((B, M, K)).astype(dtype)
    spread = theta[:, None] if isinstance(theta, np.ndarray) else theta
    rows = np.ascontiguousarray(v.swapaxes(0, 1))
    calls = [
        (lorentz.clip, (v, 0.8)), (lorentz.exp0, (v, theta)), (lorentz.log0, (v, theta)),
        (lorentz.squared_distance, (v[:, :, None], x, spread)), (lorentz.distance, (v[:, :, None], x, spread)),
        (lorentz.pairwise_squared_distance, (rows, x, theta)), (lorentz.pairwise_distance, (rows, x, theta)),
        (lorentz.midpoint, (x, w, theta)), (lorentz.lift, (v, theta)),
    ]  # fmt: skip
    for function, args in calls:
        ref = function(*args)
        comp = function(*(torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in args))
        assert comp.dtype == torch.from_numpy(ref).dtype, function
        # atol: the matrix product of a pairwise distance is summed in an order of its own
        np.testing.assert_allclose(comp.numpy(), ref, rtol=8 * np.finfo(dtype).eps, atol=1e-14, err_msg=str(function))


def test_dtypes() -> None:
    for given_dtype, ref in [(np.float16, np.float32), (np.float32, np.float32), (np.float64, np.float64)]:
        x = np.ones((2, 3), given_dtype)
        for comp in (lorentz.exp0(x, 1.0), lorentz.distance(x, x, 1.0), lorentz.midpoint(x, np.ones(2, ref), 1.0)):
            assert comp.dtype == ref
        assert lorentz.clip(x, None).dtype == lorentz.clip(x, 1.0).dtype == ref
    for half in (torch.float16, torch.bfloat16):
        x = torch.ones(2, 3, dtype=half)
        for tensor in (lorentz.exp0(x, 1.0), lorentz.distance(x, x, 1.0), lorentz.pairwise_distance(x, x, 1.0)):
            assert tensor.dtype == torch.float32


def test_autocast_changes_nothing() -> None:
    torch.manual_seed(0)
    v, c, theta = torch.randn(3, 6, 4), torch.randn(3, 5, 4), torch.tensor([0.1, 1.0, 2.0])
    w = torch.rand(6, 3, 5)

    def everything() -> list[torch.Tensor]:
        x = lorentz.exp0(lorentz.clip(v, 1.5), theta[:, None])
        return [x, lorentz.pairwise_distance(x, c, theta), lorentz.pairwise_squared_distance(x, c, theta),
                lorentz.midpoint(c, w, theta), lorentz.distance(x, x.flip(1), theta[:, None])]  # fmt: skip

    ref = everything()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (v[0] @ c[0].T).dtype == torch.bfloat16  # it is on
        comp = everything()
    for a, b in zip(ref, comp, strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a, b)


def gradient_cases() -> dict[str, Any]:
    def each(function: Any) -> Any:
        return lambda x, y, theta: function(x[:, None], y, theta)

    return {
        "clip": lambda x, y, theta: lorentz.clip(x, 0.9) + 0 * y.sum() + 0 * theta,
        "exp0": lambda x, y, theta: lorentz.exp0(x, theta) + 0 * y.sum(),
        "log0": lambda x, y, theta: lorentz.log0(x, theta) + 0 * y.sum(),
        "squared_distance": each(lorentz.squared_distance),
        "distance": each(lorentz.distance),
        "pairwise_squared_distance": lorentz.pairwise_squared_distance,
        "pairwise_distance": lorentz.pairwise_distance,
        "midpoint": lambda x, y, theta: lorentz.midpoint(y, (x @ y.mT) ** 2 + 0.1, theta),
    }


@pytest.mark.parametrize("theta", THETAS)
@pytest.mark.parametrize("name", gradient_cases())
def test_gradients_against_finite_differences(name: str, theta: float) -> None:
    """θ = 0 included, from both sides: the forms go on analytically to small negative θ."""
    torch.manual_seed(1)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    args = tuple(t.requires_grad_() for t in (x, y, torch.tensor(theta, dtype=torch.float64)))
    assert torch.autograd.gradcheck(gradient_cases()[name], args, eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["exp0", "log0", "squared_distance", "clip"])
def test_gradients_at_the_origin_against_finite_differences(name: str) -> None:
    for theta in (0.0, 1.0):
        args = tuple(torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in ([[0.0] * 3], [[0.0, 0.2, 0.1]], theta))
        assert torch.autograd.gradcheck(gradient_cases()[name], args, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", gradient_cases())
def test_gradients_are_finite_everywhere(name: str, dtype: torch.dtype) -> None:
    specimens = torch.tensor(
        [[0, 0, 0], [1, 2, 3], [1, 2, 3.0001], [-1, -2, -3], [2, 4, 6], [1e-30, 0, 0], [0, 1e-30, 0], [1e-4, 0, 0],
         [0.0316, 0, 0], [300, 0, 0], [0, -300, 0], [1e4, 1e4, 0]], dtype=dtype,
    )  # fmt: skip
    if name == "exp0":
        specimens = specimens[:-3]
    for theta in (*THETAS, 1e-30):
        x, y = specimens.clone().requires_grad_(), specimens.clone().requires_grad_()
        curvature = torch.tensor(theta, dtype=dtype, requires_grad=True)
        out = gradient_cases()[name](x, y, curvature)
        assert torch.isfinite(out).all()
        for gradient in torch.autograd.grad(out.sum(), (x, y, curvature)):
            assert torch.isfinite(gradient).all(), (theta, gradient)


def test_gradient_at_coincident_points_is_zero() -> None:
    x = torch.tensor([[0.3, -0.4]], requires_grad=True)
    (gradient,) = torch.autograd.grad(lorentz.distance(x, x.detach().clone(), 1.0).sum(), x)
    assert gradient.tolist() == [[0.0, 0.0]]


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("theta", [-1.0, math.nan, math.inf, np.array([1.0, -1e-9]), "flat", None])
def test_bad_theta(theta: Any) -> None:
    for call in (
        lambda: lorentz.exp0(np.ones((2, 3)), theta),
        lambda: lorentz.distance(np.ones((2, 3)), np.ones((2, 3)), theta),
        lambda: lorentz.midpoint(np.ones((2, 2, 3)), np.ones((2, 2)), theta),
        lambda: lorentz.exp0(torch.ones(2, 3), theta),
    ):
        with pytest.raises(InvalidParameterError, match="theta"):
            call()


@pytest.mark.parametrize("radius", [0, -1.0, math.nan])
def test_bad_radius(radius: float) -> None:
    with pytest.raises(InvalidParameterError, match="radius"):
        lorentz.clip(np.ones((2, 3)), radius)


@pytest.mark.parametrize("scalar", [1.0, np.float32(1), np.array(1.0), torch.tensor(1.0)])
def test_scalars_are_no_vectors(scalar: Any) -> None:
    for call in (
        lambda: lorentz.exp0(scalar, 1.0),
        lambda: lorentz.distance(scalar, scalar, 1.0),
        lambda: lorentz.clip(scalar, 1.0),
    ):
        with pytest.raises(InvalidVectorsError, match="vectors"):
            call()
