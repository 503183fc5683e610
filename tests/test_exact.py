"""Exact search over vectors: against plain float64, and against the codec's own tables to the bit."""

from __future__ import annotations

from pathlib import Path

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hyperfaiss
from hyperfaiss import HyperbolicPQIndex, HyperbolicProductQuantizer, exact, lorentz
from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError
from hyperfaiss.exact import exact_search
from hyperfaiss.kernels import tables
from hyperfaiss.model import Projector

M, DSUB = 3, 4
THETA = (0.0, 1.0, 2.5)


def codec(metric: str = "geodesic", curvatures: object = THETA, clip: float | None = 1.2) -> HyperbolicProductQuantizer:
    books = np.random.default_rng(9).normal(size=(M, 16, DSUB)).astype(np.float32)
    return HyperbolicProductQuantizer.from_codebooks(books, curvatures, metric=metric, clip_radius=clip)


def vectors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, M * DSUB)).astype(np.float32)


@pytest.mark.parametrize(("metric", "power"), [("geodesic", 1), ("squared", 2)])
def test_against_naive(metric: str, power: int) -> None:
    quantizer, xb, xq = codec(metric), vectors(150), vectors(7, 1)
    maps = [naive.points_of(x, quantizer.curvatures, 1.2) for x in (xb, xq)]
    ref_D, ref_I = naive.exact_search(*maps, quantizer.curvatures, power, 20)
    D, I = exact_search(quantizer, xb, xq, 20)  # noqa: E741
    assert (D.dtype, I.dtype) == (np.float32, np.int64)
    np.testing.assert_allclose(D, ref_D, rtol=1e-6)
    np.testing.assert_array_equal(I, ref_I)


@pytest.mark.parametrize("metric", ["geodesic", "squared", "inner_product"])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 33, 100])
def test_is_the_search_of_codes_whose_codewords_are_the_vectors(metric: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit: tables over all points, summed as the scan does; at the edges of blocks, and for more than there are."""
    monkeypatch.setattr(exact, "_FIRST", 8)
    monkeypatch.setattr(exact, "_MOST", 16)
    monkeypatch.setattr(exact, "_QUERIES", 2)
    quantizer = codec(metric, 0.0 if metric == "inner_product" else THETA)
    xb, xq = vectors(n), vectors(5, 1)
    xb[n // 2 :] = xb[: n - n // 2]  # every distance twice
    points = np.zeros((M, 256, DSUB), np.float32)
    points[:, :n] = quantizer._points(xb).swapaxes(0, 1)
    tables = HyperbolicProductQuantizer.from_codebooks(
        points, quantizer.curvatures, metric=metric, clip_radius=1.2
    ).compute_distance_tables(xq)
    codes = np.repeat(np.arange(n, dtype=np.uint8)[:, None], M, axis=1)
    for k in (1, 10, n, n + 3):
        ref = naive.search(tables, codes, k)
        for threads in (1, 2):
            hyperfaiss.set_num_threads(threads)
            comp = exact_search(quantizer, xb, xq, k)
            np.testing.assert_array_equal(comp[0], ref[0])
            np.testing.assert_array_equal(comp[1], ref[1])


@given(st.data())
def test_the_bound_drops_nothing_that_is_as_near_as_the_limit(data: st.DataObject) -> None:
    """Points near and far, close together and apart, flat and curved; the limit is the distance itself."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    theta = np.array(data.draw(st.lists(st.sampled_from([0, 1e-4, 0.01, 1, 10]), min_size=2, max_size=2)), np.float32)
    metric = data.draw(st.sampled_from(["geodesic", "squared"]))
    dsub = data.draw(st.integers(1, 9))
    radius = np.minimum(10.0 ** data.draw(st.floats(-25, 2)), 30 / np.sqrt(np.maximum(theta, 1e-4)))
    apart = 10.0 ** data.draw(st.floats(-8, 0.5))
    centre = rng.normal(size=(2, dsub)) * (radius / np.sqrt(dsub))[:, None]
    near = rng.normal(size=(1030, 2, dsub)) * (apart * radius / np.sqrt(dsub))[:, None]
    tangents = (centre + near * rng.choice([0, 0.1, 1], (1030, 1, 1))).astype(np.float32).reshape(1030, -1)
    quantizer = HyperbolicProductQuantizer.from_codebooks(np.zeros((2, 16, dsub), np.float32), theta, metric=metric)
    points = quantizer._points(tangents)
    queries = points[:3]
    prepared = tables.prepare(points.swapaxes(0, 1), theta)
    ref = np.empty((3, 2, 1030), np.float32)
    tables.distance_tables(queries, *prepared, theta, {"geodesic": 0, "squared": 1}[metric], ref)
    distances = ref[:, 0] + ref[:, 1]
    part = exact._Part(quantizer, points, 0)
    for rank in (0, 1, 100, 1029):
        limits = np.sort(distances, axis=1)[:, rank].copy()
        assert part.candidates(queries, limits)[distances <= limits[:, None]].all()


def test_the_bound_drops_most_of_the_rest() -> None:
    points, queries = (codec()._points(vectors(n, seed)) for n, seed in ((3000, 0), (5, 1)))
    for metric, power in (("geodesic", 1), ("squared", 2)):
        part = exact._Part(codec(metric), points, 0)
        distances = (lorentz.distance(points[None], queries[:, None], np.array(THETA)) ** power).sum(axis=2)
        limits = np.sort(distances, axis=1)[:, 50].astype(np.float32)
        for q, kept in enumerate(part.candidates(queries, limits)):
            assert (distances[q, kept] < limits[q] * 1.001).all()


def test_agrees_with_an_index_of_codewords() -> None:
    """Vectors that are codewords lose nothing by quantisation."""
    quantizer = codec(clip=None)
    codes = np.random.default_rng(1).integers(0, 16, (80, M)).astype(np.uint8)
    xb, xq = quantizer.decode(codes), vectors(6, 1)
    index = HyperbolicPQIndex.from_codec(quantizer)
    index.add(xb)
    D, I = index.search(xq, 10)  # noqa: E741
    exact_D, exact_I = exact_search(quantizer, xb, xq, 10)
    np.testing.assert_allclose(exact_D, D, rtol=1e-5)
    assert (exact_I == I).mean() > 0.9  # decoded codewords are rounded, and ties come


def test_what_overflows_is_found_last() -> None:
    """Distances of inf have ids, as in the scan; places beyond the database have none."""
    quantizer = codec("squared", 0.0, clip=None)
    xb = np.zeros((4, M * DSUB), np.float32)
    xb[[0, 2]] = 3e19
    D, I = exact_search(quantizer, xb, np.zeros((1, M * DSUB), np.float32), 6)  # noqa: E741
    np.testing.assert_array_equal(D[0], [0, 0, np.inf, np.inf, np.inf, np.inf])
    np.testing.assert_array_equal(I[0], [1, 3, 0, 2, -1, -1])


def test_mapped_files_projectors_and_other_dtypes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    projector = Projector([(rng.normal(size=(M * DSUB, 5)), rng.normal(size=M * DSUB))])
    raw, asked = rng.normal(size=(50, 5)).astype(np.float32), rng.normal(size=(4, 5)).astype(np.float32)
    ref = exact_search(codec(), projector.transform(raw), projector.transform(asked), 9)
    np.save(tmp_path / "x.npy", raw)
    for same in (
        raw,
        raw.astype(np.float64),
        raw.tolist(),
        np.asfortranarray(raw),
        np.load(tmp_path / "x.npy", mmap_mode="r"),
    ):
        comp = exact_search(codec(), same, asked, 9, projector=projector)
        np.testing.assert_array_equal(comp[0], ref[0])
        np.testing.assert_array_equal(comp[1], ref[1])


def test_nothing_to_search_or_to_search_with() -> None:
    D, I = exact_search(codec(), vectors(0), vectors(2), 3)  # noqa: E741
    assert (I == -1).all()
    assert np.isposinf(D).all()
    assert exact_search(codec(), vectors(2), vectors(0), 3)[1].shape == (0, 3)


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_FIRST", 8)
    monkeypatch.setattr(exact, "_MOST", 8)
    x = vectors(20)
    bad = x.copy()
    bad[17, 2] = np.nan
    np.save(tmp_path / "bad.npy", bad)
    for xb, xq, k, error, message in (
        (x[:, :-1], x, 3, InvalidVectorsError, r"xb must have shape \(n, 12\)"),
        (x, x[:, :-1], 3, InvalidVectorsError, r"xq must have shape \(n, 12\)"),
        (bad, x, 3, InvalidVectorsError, "xb must be finite.* first row 17"),
        (np.load(tmp_path / "bad.npy", mmap_mode="r"), x, 3, InvalidVectorsError, r"xb\[16:20\] must be finite.* first row 1"),
        (x, x, 0, InvalidParameterError, "k must be"),
    ):
        with pytest.raises(error, match=message):
            exact_search(codec(), xb, xq, k)
    far = x.copy()
    far[11] = 100
    with pytest.raises(InvalidVectorsError, match="row 11: a tangent vector of norm"):
        exact_search(codec(clip=None), far, x, 3)
