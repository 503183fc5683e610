"""The kernels behind the codec: points, squared distances, tables and codes, against mpmath and lorentz, at any scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hyperfaiss import HyperbolicProductQuantizer, InvalidParameterError, lorentz
from hyperfaiss.kernels import tables
from tests.toys import Python

THETAS = [0.0, 1e-30, 1e-4, 1.0, 10.0, 1e20]


def prepared(books: np.ndarray, theta: Any) -> tables.Prepared:
    return tables.prepare(books, np.full(len(books), theta, np.float32))


def chords(x: np.ndarray, points: np.ndarray, theta: float) -> np.ndarray:
    squared = np.empty((1, len(points)))
    tables.chords(x, *prepared(points[None], theta), float(np.float32(theta)), squared)
    return squared[0]


def table(x: np.ndarray, points: np.ndarray, theta: float, metric: int) -> np.ndarray:
    out = np.empty((1, 1, len(points)), np.float32)
    tables.distance_tables(x[None, None], *prepared(points[None], theta), np.array([theta], np.float32), metric, out)
    return out[0, 0]


def codes_of(x: np.ndarray, books: np.ndarray, theta: float) -> np.ndarray:
    codes = np.full((len(x), 1), 255, np.uint8)
    tables.assign(x[:, None], *prepared(books[None], theta), np.array([theta], np.float32), codes)
    return codes[:, 0]


def around(sinh: float, theta: float, dsub: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A point with sinh(√θ·radius) as given, and 32 others: next to it, on its ray, opposite, and far beyond."""
    radius = sinh / np.sqrt(theta) if theta else sinh
    u = rng.normal(size=dsub)
    u *= radius / np.linalg.norm(u)
    steps = 10.0 ** rng.uniform(-9, 2, (32, 1))
    others = u + steps * np.where(rng.random((32, 1)) < 0.3, u, radius * rng.normal(size=(32, dsub)))
    others[:2] = -u, u * (1 + 1e-7)
    return u.astype(np.float32), others.astype(np.float32)


# ------------------------------------------------------------------------------------------------ points


@pytest.mark.parametrize("clip_radius", [np.inf, 0.7, 1e300])
@pytest.mark.parametrize("theta", [0.0, 1e-4, 1.0, 10.0])
def test_points_are_those_of_lorentz(theta: float, clip_radius: float) -> None:
    rng = np.random.default_rng(0)
    for dsub in (1, 3, 8):
        v = (rng.normal(size=(300, 5, dsub)) * 10.0 ** rng.uniform(-9, 1.4, (300, 5, 1))).astype(np.float32)
        v[0], v[1, :, 1:] = 0, 0
        curvatures = np.array([theta, 0, 0.3, theta, 7], np.float32)
        comp = np.empty_like(v)
        tables.map_points(v, clip_radius, curvatures, comp)
        ref = lorentz.exp0(lorentz.clip(v, clip_radius), curvatures)
        finite = np.isfinite(ref)
        np.testing.assert_array_equal(np.isfinite(comp), finite)
        np.testing.assert_allclose(comp[finite], ref[finite], rtol=1.2e-7, atol=1e-45)
        assert (comp != ref).mean() < 1e-4  # both are float64 inside, so they rarely round apart
        assert finite.all() == (clip_radius < 1)


def test_points_beyond_float32_are_inf_and_zeros_stay() -> None:
    v = np.array([[[300.0, 0.0, -1e-30]], [[3e38, 0.0, 3e38]]], np.float32)
    comp = np.empty_like(v)
    tables.map_points(v, np.inf, np.ones(1, np.float32), comp)
    np.testing.assert_array_equal(comp[:, 0, :2], [[np.inf, 0], [np.inf, 0]])
    tables.map_points(v, np.inf, np.zeros(1, np.float32), comp)
    np.testing.assert_array_equal(comp, v)


# ------------------------------------------------------------------------------------------------ distances


@pytest.mark.parametrize("dsub", [1, 3, 8, 13])
@pytest.mark.parametrize("theta", THETAS)
def test_distances_against_mpmath(theta: float, dsub: int) -> None:
    """From 1e-30 of a radian to e^34 out: nothing cancels, nothing over- or underflows."""
    rng = np.random.default_rng(dsub)
    exact_theta = float(np.float32(theta))
    for sinh in (1e-18, 1e-8, 1e-3, 0.3, 1.0, 3.0, 30.0, 1e3, 1e5, 1e9, 1e15):
        x, points = around(sinh, theta, dsub, rng)
        squared = chords(x, points, theta)
        geodesic, square = (table(x, points, theta, metric) for metric in (tables.GEODESIC, tables.SQUARED))
        for j in range(len(points)):
            ref = float(naive.exact_squared_distance(x, points[j], exact_theta))
            assert abs(squared[j] - ref) <= 4e-7 * ref
            ref = float(naive.exact_distance(x, points[j], exact_theta))
            assert abs(geodesic[j] - ref) <= 2e-7 * ref + 1e-45
            if 1e-19 < ref < 1e19:
                assert abs(square[j] - ref**2) <= 4e-7 * ref**2


@pytest.mark.parametrize("theta", [1e-4, 1.0, 10.0])
def test_near_the_origin_a_table_is_off_by_one_rounding(theta: float) -> None:
    """Points as training makes them, at most 3/√θ from the origin."""
    rng = np.random.default_rng(1)
    v = rng.normal(size=(64, 8)) * rng.uniform(0.01, 1, (64, 1)) / np.sqrt(theta)
    points = lorentz.exp0(lorentz.clip(v, 3 / np.sqrt(theta)), theta).astype(np.float32)
    for x in points[:20]:
        ref = np.array([float(naive.exact_distance(x, y, float(np.float32(theta)))) for y in points])
        comp = table(x, points, theta, tables.GEODESIC)
        np.testing.assert_allclose(comp, ref, rtol=6.5e-8)
        assert (comp == ref.astype(np.float32)).mean() > 0.9


@pytest.mark.parametrize("theta", THETAS)
def test_a_point_is_at_distance_0_from_itself(theta: float) -> None:
    rng = np.random.default_rng(2)
    for dsub in (1, 5, 8):
        points = (rng.normal(size=(64, dsub)) * 10.0 ** rng.uniform(-20, 12, (64, 1))).astype(np.float32)
        points[0] = 0
        for j, x in enumerate(points):
            for metric in (tables.GEODESIC, tables.SQUARED):
                assert table(x, points, theta, metric)[j] == 0


def test_flat_distances_are_exact() -> None:
    """Coordinates whose squares and sums float64 holds exactly: the table is the rounded true value."""
    rng = np.random.default_rng(3)
    x, points = rng.integers(-999, 999, 7).astype(np.float32), rng.integers(-999, 999, (64, 7)).astype(np.float32)
    ref = ((x.astype(np.int64) - points.astype(np.int64)) ** 2).sum(axis=1)
    np.testing.assert_array_equal(table(x, points, 0.0, tables.SQUARED), ref.astype(np.float32))
    np.testing.assert_array_equal(table(x, points, 0.0, tables.GEODESIC), np.sqrt(ref).astype(np.float32))
    ref = -(x.astype(np.int64) * points.astype(np.int64)).sum(axis=1)
    np.testing.assert_array_equal(table(x, points, 0.0, tables.INNER_PRODUCT), ref.astype(np.float32))


finite_floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(
    arrays(np.float32, (17, 3), elements=finite_floats | st.sampled_from([0.0, 1.0, -1.0])),
    st.floats(0, 2.0**127, width=32),
)
def test_no_table_holds_nan(points: np.ndarray, theta: float) -> None:
    for metric in (tables.GEODESIC, tables.SQUARED):
        comp = table(points[0], points, theta, metric)
        assert (comp >= 0).all()
        assert comp[0] == 0
    comp = table(points[0], points, 0.0, tables.INNER_PRODUCT)
    assert np.isfinite(comp).all()
    codes = codes_of(points, points[1:], theta)
    assert (codes < 16).all()


# ------------------------------------------------------------------------------------------------ codes


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 255, 256, 257, 512, 700])
def test_codes_at_the_edges_of_blocks(n: int) -> None:
    """What an earlier, longer block left behind is not seen."""
    rng = np.random.default_rng(4)
    books, x = rng.normal(size=(32, 6)).astype(np.float32), rng.normal(size=(n, 6)).astype(np.float32)
    x[: n // 2] *= 100
    ref = np.argmin([[np.float64(naive.squared_distance(p, c, 0.5)) for c in books] for p in x], axis=1)
    np.testing.assert_array_equal(codes_of(x, books, 0.5), ref)


@pytest.mark.parametrize("theta", [0.0, 1.0])
@pytest.mark.parametrize("dsub", [1, 4, 9])
def test_codes_of_points_between_codewords(theta: float, dsub: int) -> None:
    """Midpoints of codewords, moved by an ulp or not at all: float32 scores can't tell which codeword is the nearest."""
    rng = np.random.default_rng(dsub)
    books = rng.normal(size=(16, dsub)).astype(np.float32)
    books[5] = books[2]
    pairs = rng.integers(16, size=(150, 2))
    x = np.array([naive.midpoint(books[pair], [1, 1], theta) for pair in pairs], np.float32)
    comp = codes_of(x, books, theta)
    assert 5 not in comp
    settled = 0
    for point, code in zip(x, comp, strict=True):
        exact = [naive.exact_squared_distance(point, c, theta) for c in books]
        best = exact.index(min(exact))
        assert code == best or exact[code] - exact[best] < 1e-14
        settled += code == best
    assert settled > 120


@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_codes_among_codewords_of_all_sizes(theta: float) -> None:
    """One codeword far out blurs the scores of all; small codewords and points are still told apart."""
    rng = np.random.default_rng(6)
    books = (rng.normal(size=(64, 4)) * 10.0 ** rng.uniform(-6, 3, (64, 1))).astype(np.float32)
    x = (rng.normal(size=(60, 4)) * 10.0 ** rng.uniform(-6, 3, (60, 1))).astype(np.float32)
    for point, code in zip(x, codes_of(x, books, theta), strict=True):
        exact = [naive.exact_squared_distance(point, c, theta) for c in books]
        assert exact[code] - min(exact) <= 1e-12 * min(exact)


def test_codes_where_float32_overflows_half_way() -> None:
    """x·c is 0, but its first term is beyond float32: -inf would look like the best score of all."""
    books = np.full((16, 4), -1e18, np.float32)
    books[3], books[7] = 1e17, [1.7e18, -6e17, -6e17, -5e17]
    x = np.full((1, 4), 3e20, np.float32)
    assert codes_of(x, books, 0.0) == 3


# ------------------------------------------------------------------------------------------------ inner products


def test_inner_product_tables() -> None:
    rng = np.random.default_rng(8)
    books, x = rng.normal(size=(3, 32, 5)).astype(np.float32), rng.normal(size=(9, 15)).astype(np.float32)
    codec, flat = (
        HyperbolicProductQuantizer.from_codebooks(books, 0.0, metric=metric) for metric in ("inner_product", "squared")
    )
    comp = codec.compute_distance_tables(x)
    ref = -np.einsum("qmd,mkd->qmk", x.reshape(9, 3, 5).astype(np.float64), books.astype(np.float64))
    assert comp.dtype == np.float32
    np.testing.assert_allclose(comp, ref, rtol=6.5e-8, atol=1e-15)
    assert (comp < 0).any()
    for row in range(9):
        np.testing.assert_array_equal(codec.compute_distance_tables(x[row : row + 1])[0], comp[row])
    np.testing.assert_array_equal(codec.compute_codes(x), flat.compute_codes(x))  # the nearest codeword, as FAISS does


def test_inner_products_beyond_float32_add_up() -> None:
    books = np.full((2, 16, 2), 3e38, np.float32)
    books[1] *= -1
    codec = HyperbolicProductQuantizer.from_codebooks(books, 0.0, metric="inner_product")
    comp = codec.compute_distance_tables(np.full((1, 4), 3e38, np.float32))
    np.testing.assert_array_equal(np.unique(comp), [-tables._MAX, tables._MAX])
    assert comp[0, :, 0].sum() == 0


def test_inner_product_trains_saves_and_loads(tmp_path: Path) -> None:
    x = np.random.default_rng(9).normal(size=(100, 6)).astype(np.float32)
    codec, flat = (HyperbolicProductQuantizer(6, 2, 4, curvatures=0, metric=metric) for metric in ("inner_product", "squared"))
    for each in (codec, flat):
        each.train(x)
    np.testing.assert_array_equal(codec.codebooks, flat.codebooks)
    codec.save(tmp_path / "codec")
    comp = HyperbolicProductQuantizer.load(tmp_path / "codec")
    assert comp.metric == "inner_product"
    np.testing.assert_array_equal(comp.compute_distance_tables(x), codec.compute_distance_tables(x))


@pytest.mark.parametrize("curvatures", [1.0, [0.0, 1e-6]])
def test_inner_product_is_flat_only(curvatures: Any) -> None:
    with pytest.raises(InvalidParameterError, match=r"inner_product.*curvatures = 0.*got"):
        HyperbolicProductQuantizer(8, 2, curvatures=curvatures, metric="inner_product")
    with pytest.raises(InvalidParameterError, match="inner_product"):
        HyperbolicProductQuantizer.from_codebooks(np.ones((2, 16, 4)), curvatures, metric="inner_product")


# ------------------------------------------------------------------------------------------------ the same bits everywhere

SCRIPT = """
import sys
import numpy as np
import numba
import hyperfaiss as hf
out = {"jit": not numba.config.DISABLE_JIT, "cpu": numba.config.CPU_NAME or ""}
rng = np.random.default_rng(0)
x = rng.normal(size=(300, 18)).astype(np.float32)
q = np.float32([[0.2], [1], [6]]) * rng.normal(size=(3, 18)).astype(np.float32)
for metric in ("geodesic", "squared", "inner_product"):
    for radius in (None, 1.0):
        name, curvatures = f"{metric} {radius} ", 0 if metric == "inner_product" else [0, 0.5, 4]
        codec = hf.HyperbolicProductQuantizer(18, 3, 4, curvatures=curvatures, metric=metric, clip_radius=radius)
        codec.train(x[:60])
        out[name + "books"], out[name + "codes"] = codec.codebooks, codec.compute_codes(x)
        near = codec.decode(codec.compute_codes(x[:5])) * np.float32(1 + 1e-6)
        out[name + "tables"] = codec.compute_distance_tables(np.vstack([q, near]))
np.savez(sys.argv[1], **out)
"""


@pytest.mark.parametrize(
    "settings", [{"NUMBA_DISABLE_JIT": "1"}, {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""}], ids=["no JIT", "old CPU"]
)
def test_bits_do_not_depend_on_the_compiler(settings: dict[str, str], python: Python, tmp_path: Path) -> None:
    """As plain Python, and for a CPU with neither wide vectors nor fused multiply-adds."""
    if "NUMBA_CPU_NAME" in settings:
        import llvmlite.binding as llvm

        if not llvm.get_process_triple().startswith("x86_64"):
            pytest.skip("needs an x86-64 CPU")
    python(SCRIPT, str(tmp_path / "ref.npz"))
    python(SCRIPT, str(tmp_path / "comp.npz"), **settings)
    ref, comp = np.load(tmp_path / "ref.npz"), np.load(tmp_path / "comp.npz")
    assert bool(ref["jit"])
    assert bool(comp["jit"]) == ("NUMBA_DISABLE_JIT" not in settings)
    assert str(comp["cpu"]) == settings.get("NUMBA_CPU_NAME", "")
    names = set(ref.files) - {"jit", "cpu"}
    assert len(names) == 18
    for name in names:
        np.testing.assert_array_equal(comp[name], ref[name], err_msg=name)
