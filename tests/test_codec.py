"""The codec: training, codes, tables, files, errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import naive
import numpy as np
import pytest
import torch

import hyperfaiss
import hyperfaiss.codec
from hyperfaiss import (
    HyperbolicProductQuantizer,
    HyperfaissError,
    InvalidParameterError,
    InvalidVectorsError,
    NotTrainedError,
    lorentz,
)
from tests.toys import random_codec, vectors

CURVATURES = [0.0, 1e-4, 0.1, 1.0, 10.0]


def points(codec: HyperbolicProductQuantizer, x: np.ndarray) -> np.ndarray:
    """The float32 points (n, M, dsub) that vectors stand for; the maps have tests of their own."""
    return lorentz.exp0(lorentz.clip(x.reshape(len(x), codec.M, codec.dsub), codec.clip_radius), codec.curvatures)


def naive_codes(codec: HyperbolicProductQuantizer, x: np.ndarray) -> np.ndarray:
    p = points(codec, x)
    columns = [naive.assign(p[:, m], codec.codebooks[m], float(codec.curvatures[m])) for m in range(codec.M)]
    return np.array(columns, np.uint8).T


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("theta", CURVATURES)
def test_training_lowers_the_loss_to_a_fixed_point(theta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x = vectors(120, 4)
    losses = []
    for iterations in (0, 1, 2, 4, 25):
        monkeypatch.setattr(hyperfaiss.codec, "_TRAIN_ITERATIONS", iterations)
        codec = HyperbolicProductQuantizer(4, 2, 4, curvatures=theta)
        codec.train(x)
        p = points(codec, x)
        losses.append(sum(naive.loss(p[:, m], codec.codebooks[m], theta) for m in range(2)))
    assert all(after <= before * (1 + 1e-6) for before, after in zip(losses, losses[1:], strict=False))
    assert losses[-1] < 0.8 * losses[0]
    for m in range(2):
        ref = naive.lloyd_step(p[:, m], codec.codebooks[m], theta)
        np.testing.assert_allclose(codec.codebooks[m], ref, rtol=1e-5, atol=1e-6)


def test_one_training_iteration_is_a_lloyd_step(monkeypatch: pytest.MonkeyPatch) -> None:
    x, books = vectors(100, 3), []
    for iterations in (0, 1):
        monkeypatch.setattr(hyperfaiss.codec, "_TRAIN_ITERATIONS", iterations)
        codec = HyperbolicProductQuantizer(3, 1, 4, curvatures=0.7)
        codec.train(x)
        books.append(codec.codebooks[0])
    theta = float(codec.curvatures[0])
    ref = naive.lloyd_step(points(codec, x)[:, 0], books[0], theta)
    np.testing.assert_allclose(books[1], ref, rtol=1e-6, atol=1e-7)


def test_training_depends_on_data_and_seed_only() -> None:
    x = vectors(9000, 4)
    ref = HyperbolicProductQuantizer(4, 2, 5, curvatures=[0.5, 2.0], seed=7)
    hyperfaiss.set_num_threads(1)
    ref.train(x)
    for threads in (2, 3, 5):
        comp = HyperbolicProductQuantizer(4, 2, 5, curvatures=[0.5, 2.0], seed=7)
        hyperfaiss.set_num_threads(threads)
        comp.train(x.astype(np.float64))
        np.testing.assert_array_equal(comp.codebooks, ref.codebooks)
        np.testing.assert_array_equal(comp.compute_codes(x), ref.compute_codes(x))
    other = HyperbolicProductQuantizer(4, 2, 5, curvatures=[0.5, 2.0], seed=8)
    other.train(x)
    assert (other.codebooks != ref.codebooks).any()


def test_training_takes_a_sample_of_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hyperfaiss.codec, "_MAX_POINTS_PER_CENTROID", 10)
    x = vectors(1000, 4)
    whole, part = (HyperbolicProductQuantizer(4, 2, 4) for _ in range(2))
    whole.train(x)
    part.train(x[:160])
    assert (whole.codebooks != part.codebooks).any()
    seen: list[int] = []
    kmeans = hyperfaiss.codec._kmeans
    monkeypatch.setattr(hyperfaiss.codec, "_kmeans", lambda p, *rest: (seen.append(len(p)), kmeans(p, *rest))[1])
    whole.train(x)
    assert seen == [160, 160]


def test_empty_clusters_are_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    """All centres start at one point, so 15 of 16 clusters are empty: these take the farthest points, no point twice."""
    monkeypatch.setattr(hyperfaiss.codec, "_seed_centers", lambda *args: np.zeros(args[2], np.int64))
    monkeypatch.setattr(hyperfaiss.codec, "_TRAIN_ITERATIONS", 1)
    x = np.repeat(vectors(60, 2), 3, axis=0)
    codec = HyperbolicProductQuantizer(2, 1, 4)
    codec.train(x)
    p = points(codec, x)[::3, 0]
    order = np.argsort([-naive.distance(point, p[0], 1.0) for point in p])
    ref = {tuple(point) for point in p[order[:15]].tolist()}
    assert {tuple(center) for center in codec.codebooks[0, 1:].tolist()} == ref
    np.testing.assert_allclose(codec.codebooks[0, 0], naive.midpoint(p, [1.0] * 60, 1.0), rtol=1e-5)


def test_fewer_distinct_points_than_codewords() -> None:
    x = vectors(5, 4)[np.arange(100) % 5]
    for theta in CURVATURES:
        codec = HyperbolicProductQuantizer(4, 2, 4, curvatures=theta)
        codec.train(x)
        assert np.isfinite(codec.codebooks).all()
        np.testing.assert_allclose(codec.decode(codec.compute_codes(x)), x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("radius", [1.0, 10.0, 20.0, 30.0, 60.0])
def test_training_on_long_vectors(radius: float) -> None:
    """Up to where points leave float32 (88/√θ) the codebooks come out finite and the codes right."""
    x = vectors(40, 8)
    x *= radius / np.linalg.norm(x.reshape(-1, 2, 4), axis=2).repeat(4, axis=1).reshape(x.shape)
    x = np.repeat(x[:16], 20, axis=0)
    codec = HyperbolicProductQuantizer(8, 2, 4)
    codec.train(x)
    assert np.isfinite(codec.codebooks).all()
    np.testing.assert_array_equal(codec.compute_codes(x), naive_exact_codes(codec, x))
    if radius < 36:  # beyond that a float64 direction is off by more than the space between codewords
        np.testing.assert_allclose(codec.decode(codec.compute_codes(x)), x, rtol=1e-3, atol=1e-3 * radius)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_failed_training_keeps_the_old_codebooks(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    x = vectors(100, 4)
    codec = HyperbolicProductQuantizer(4, 2, 4)
    kmeans, calls = hyperfaiss.codec._kmeans, iter([False, True, False, False, False, True])

    def failing(*args: Any) -> np.ndarray:
        if next(calls):
            raise error
        return kmeans(*args)

    monkeypatch.setattr(hyperfaiss.codec, "_kmeans", failing)
    with pytest.raises(error):
        codec.train(x)
    assert not codec.is_trained
    codec.train(x)
    books, codes = codec.codebooks.copy(), codec.compute_codes(x)
    with pytest.raises(error):
        codec.train(x[::-1] * 2)
    for bad in (x[:5], np.full((100, 4), np.nan), x[:, :3]):
        with pytest.raises(InvalidVectorsError):
            codec.train(bad)
    np.testing.assert_array_equal(codec.codebooks, books)
    np.testing.assert_array_equal(codec.compute_codes(x), codes)


def test_verbose_shows_progress(capfd: pytest.CaptureFixture[str]) -> None:
    x = vectors(100, 4)
    for verbose in (False, True):
        codec = HyperbolicProductQuantizer(4, 2, 4)
        codec.verbose = verbose
        codec.train(x)
        assert ("k-means" in capfd.readouterr().err) == verbose


# ------------------------------------------------------------------------------------------------ codes


def naive_exact_codes(codec: HyperbolicProductQuantizer, x: np.ndarray) -> np.ndarray:
    """As ``naive_codes``, through mpmath: for points so far out that float64 has no digits left for the formula."""
    p, codes = points(codec, x), np.zeros((len(x), codec.M), np.uint8)
    cache: dict[bytes, int] = {}
    for i, m in np.ndindex(codes.shape):
        key = bytes([m]) + p[i, m].tobytes()
        if key not in cache:
            distances = [naive.exact_squared_distance(p[i, m], c, float(codec.curvatures[m])) for c in codec.codebooks[m]]
            cache[key] = distances.index(min(distances))
        codes[i, m] = cache[key]
    return codes


@pytest.mark.parametrize("theta", CURVATURES)
@pytest.mark.parametrize("nbits", [4, 5, 6, 7, 8])
def test_codewords_encode_to_their_own_index(theta: float, nbits: int) -> None:
    codec = random_codec(M=3, ksub=1 << nbits, dsub=5, theta=theta)
    own = np.repeat(np.arange(codec.ksub, dtype=np.uint8)[:, None], 3, axis=1)
    vectors = codec.decode(own)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(codec.compute_codes(vectors), own)
    np.testing.assert_allclose(codec.decode(codec.compute_codes(vectors)), vectors, rtol=1e-6)


@pytest.mark.parametrize("clip_radius", [None, 0.7])
@pytest.mark.parametrize("theta", CURVATURES)
def test_codes_against_oracle(theta: float, clip_radius: float | None) -> None:
    for nbits, M, dsub in ((4, 3, 4), (8, 2, 7), (6, 4, 1)):
        codec = random_codec(M, 1 << nbits, dsub, theta=theta, clip_radius=clip_radius)
        x = vectors(4000 >> nbits, codec.d)[:60]
        np.testing.assert_array_equal(points(codec, x), naive.points_of(x, codec.curvatures, clip_radius))
        np.testing.assert_array_equal(codec.compute_codes(x), naive_codes(codec, x))


@pytest.mark.parametrize("theta", [0.0, 1.0, 10.0])
def test_near_ties_and_duplicates(theta: float) -> None:
    """Codewords a rounding error apart are told apart, equal ones give the smaller index."""
    rng = np.random.default_rng(3)
    books = rng.normal(size=(1, 16, 6)).astype(np.float32)
    books[0, 8:] = books[0, :8]  # twins: never 8 or more
    codec = HyperbolicProductQuantizer.from_codebooks(books, theta)
    x = vectors(200, 6)
    codes = codec.compute_codes(x)
    assert codes.max() < 8
    np.testing.assert_array_equal(codes, naive_codes(codec, x))
    # each twin one ulp off in each coordinate: far below what a float32 inner product resolves
    books[0, 8:] = np.nextafter(books[0, :8], rng.choice([-9, 9], (8, 6)).astype(np.float32))
    codec = HyperbolicProductQuantizer.from_codebooks(books, theta)
    comp, p = codec.compute_codes(x)[:, 0], points(codec, x)[:, 0]
    assert 50 < (comp >= 8).sum() < 150
    for i in range(len(x)):
        exact = [naive.exact_squared_distance(p[i], c, theta) for c in books[0]]
        ref = exact.index(min(exact))
        # float64 may stop short of a tie at its own precision
        assert comp[i] == ref or exact[comp[i]] - exact[ref] < 1e-13 * (1 + exact[ref])


@pytest.mark.parametrize("exponent", [-37, -30, -22, -18, -10, 0, 10, 17, 19, 25, 35])
@pytest.mark.parametrize("theta", [0.0, 1e-4])
def test_codes_at_any_scale(exponent: int, theta: float) -> None:
    """Products of coordinates may leave float32 at either end; the codes must not notice."""
    scale = 10.0**exponent
    spread = np.repeat([0.1, 1.0, 3.0, 8.0], 4)[:, None]
    books = (np.random.default_rng(0).normal(size=(2, 16, 4)) * spread * scale).astype(np.float32)
    codec = HyperbolicProductQuantizer.from_codebooks(books, theta)
    wanted = np.random.default_rng(1).normal(size=(60, 2, 4)) * scale
    x = lorentz.log0(wanted, theta).astype(np.float32).reshape(60, 8)
    np.testing.assert_array_equal(codec.compute_codes(x), naive_exact_codes(codec, x))


def test_codes_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    codec = random_codec(M=4, ksub=64, dsub=8)
    x = vectors(500, 32)
    ref = codec.compute_codes(x)
    np.testing.assert_array_equal(np.vstack([codec.compute_codes(row[None]) for row in x]), ref)
    monkeypatch.setattr(hyperfaiss.codec, "_ENCODE_ROWS", 17)
    for threads in (1, 4):
        hyperfaiss.set_num_threads(threads)
        np.testing.assert_array_equal(codec.compute_codes(x), ref)
    codec.verbose = True
    np.testing.assert_array_equal(codec.compute_codes(x), ref)
    assert codec.compute_codes(x[:0]).shape == (0, 4)


def test_flat_codes_are_those_of_faiss() -> None:
    codec = random_codec(M=8, ksub=256, dsub=4, theta=0.0)
    pq = faiss.ProductQuantizer(32, 8, 8)
    faiss.copy_array_to_vector(codec.codebooks.ravel(), pq.centroids)
    x = vectors(2000, 32)
    ref, comp = pq.compute_codes(x), codec.compute_codes(x)
    p = points(codec, x)
    for i, m in np.argwhere(ref != comp):  # FAISS's float32 can't tell these two apart
        a, b = (naive.distance(p[i, m], codec.codebooks[m, codes[i, m]], 0.0) for codes in (ref, comp))
        assert b <= a < b * (1 + 1e-6)
    assert (ref != comp).mean() < 1e-3
    np.testing.assert_array_equal(codec.decode(ref), pq.decode(ref))


def test_decode_gives_tangent_vectors() -> None:
    codec = random_codec(theta=[0.0, 0.5, 4.0])
    codes = np.random.default_rng(2).integers(16, size=(20, 3)).astype(np.uint8)
    comp = codec.decode(codes)
    for row, code in zip(comp, codes, strict=True):
        for m, part in enumerate(naive.parts(row, 3)):
            ref = naive.log0(codec.codebooks[m, code[m]], float(codec.curvatures[m]))
            np.testing.assert_allclose(part, ref, rtol=1e-6)
    assert codec.decode(codes[:0]).shape == (0, 12)


def test_clip_radius_takes_effect() -> None:
    x = vectors(20, 12) * 10
    free, clipped = random_codec(), random_codec(clip_radius=0.5)
    assert (free.compute_distance_tables(x) != clipped.compute_distance_tables(x)).any()
    shorter = lorentz.clip(x.reshape(-1, 3, 4), 0.5).reshape(x.shape)
    np.testing.assert_array_equal(clipped.compute_distance_tables(x), free.compute_distance_tables(shorter))


# ------------------------------------------------------------------------------------------------ tables


@pytest.mark.parametrize("metric", ["geodesic", "squared"])
@pytest.mark.parametrize("theta", CURVATURES)
@pytest.mark.parametrize("nbits", [4, 6])
def test_tables_against_oracle(theta: float, metric: Any, nbits: int) -> None:
    codec = random_codec(M=2, ksub=1 << nbits, dsub=4, theta=[theta, 0.3], metric=metric)
    x = vectors(6, 8) * np.float32([[0], [1e-6], [1e-3], [0.5], [1], [3]])
    own = codec.decode(np.full((1, 2), 5, np.uint8))  # a codeword: distance 0, or next to it
    near = own * np.float32(1 + 1e-4)
    x = np.vstack([x, near])
    ref = naive.distance_tables(points(codec, x), codec.codebooks, codec.curvatures, metric)
    comp = codec.compute_distance_tables(x)
    assert comp.dtype == np.float32
    assert comp.shape == ref.shape == (7, 2, 1 << nbits)
    np.testing.assert_allclose(comp, ref, rtol=1e-5, atol=1e-20)


@pytest.mark.parametrize("dsub", [1, 3])
@pytest.mark.parametrize("radius", [8.0, 16.0, 30.0])
def test_tables_of_far_points(radius: float, dsub: int) -> None:
    """Queries and codewords along the same and along other rays, at radii where e^(2r) is all that float64 can hold."""
    rng = np.random.default_rng(5)
    rays = np.vstack([np.eye(dsub), rng.normal(size=(3, dsub))])
    rays /= np.linalg.norm(rays, axis=1)[:, None]
    lengths = radius + rng.uniform(-3, 3, 16)
    books = (np.sinh(lengths)[:, None] * rays[rng.integers(len(rays), size=16)]).astype(np.float32)[None]
    codec = HyperbolicProductQuantizer.from_codebooks(books, 1.0)
    x = (rays * radius).astype(np.float32)
    p = points(codec, x)
    ref = naive.distance_tables(p, books, [1.0], "geodesic")
    np.testing.assert_allclose(codec.compute_distance_tables(x), ref, rtol=1e-5)
    np.testing.assert_allclose(lorentz.distance(p, books, 1.0)[:, None], ref, rtol=1e-5)
    np.testing.assert_array_equal(codec.compute_codes(x), naive_exact_codes(codec, x))


@pytest.mark.parametrize("theta", CURVATURES)
def test_tables_are_those_of_lorentz(theta: float) -> None:
    """The compiled twins agree with the module that training uses, in both metrics."""
    x = vectors(30, 8)
    for metric in ("geodesic", "squared"):
        codec = random_codec(M=2, ksub=32, dsub=4, theta=theta, metric=metric)
        distance = lorentz.distance(points(codec, x)[:, :, None], codec.codebooks, codec.curvatures[:, None])
        ref = distance.astype(np.float64) ** (2 if metric == "squared" else 1)
        np.testing.assert_allclose(codec.compute_distance_tables(x), ref, rtol=1e-6)


@pytest.mark.parametrize("metric", ["geodesic", "squared"])
def test_a_querys_table_does_not_depend_on_the_batch(metric: Any) -> None:
    codec = random_codec(M=5, ksub=256, dsub=7, metric=metric)
    x = vectors(37, 35)
    ref = codec.compute_distance_tables(x)
    for rows in (slice(0, 1), slice(3, 4), slice(1, 36), slice(36, 0, -1)):
        np.testing.assert_array_equal(codec.compute_distance_tables(x[rows]).view(np.uint32), ref[rows].view(np.uint32))
    assert codec.compute_distance_tables(x[:0]).shape == (0, 5, 256)


def test_tables_beyond_float32_are_inf() -> None:
    books = np.full((1, 16, 2), 3e38, np.float32)
    for metric in ("geodesic", "squared"):
        codec = HyperbolicProductQuantizer.from_codebooks(books, 0.0, metric=metric)
        assert (codec.compute_distance_tables(np.full((1, 2), -3e38, np.float32)) == np.inf).all()


# ------------------------------------------------------------------------------------------------ attributes and files


def test_attributes() -> None:
    codec = HyperbolicProductQuantizer(np.int64(24), M=np.int32(6), nbits=np.uint8(5), curvatures=[0, 0.5, 1, 2, 3, 4])
    assert (codec.d, codec.M, codec.nbits, codec.ksub, codec.dsub, codec.code_size) == (24, 6, 5, 32, 4, 6)
    assert not codec.is_trained
    assert codec.codebooks is None
    assert codec.curvatures.dtype == np.float32
    assert "nbits=5" in repr(codec)
    assert "is_trained=False" in repr(codec)


def test_from_codebooks_copies() -> None:
    books = np.random.default_rng(0).normal(size=(2, 16, 3)).astype(np.float32)
    codec = HyperbolicProductQuantizer.from_codebooks(books, 1.0)
    before = codec.compute_distance_tables(np.ones((1, 6)))
    books[:] = 7
    np.testing.assert_array_equal(codec.compute_distance_tables(np.ones((1, 6))), before)
    for given in (codec.codebooks.astype(np.float64), codec.codebooks.tolist(), np.asfortranarray(codec.codebooks)):
        comp = HyperbolicProductQuantizer.from_codebooks(given, 1.0)
        np.testing.assert_array_equal(comp.codebooks, codec.codebooks)


@pytest.mark.parametrize("trained_by", ["train", "codebooks"])
def test_save_and_load(trained_by: str, tmp_path: Path) -> None:
    if trained_by == "train":
        codec = HyperbolicProductQuantizer(12, 3, 5, curvatures=[0, 1.5, 1e-4], metric="squared", clip_radius=0.3, seed=5)
        codec.train(vectors(100, 12))
    else:
        codec = random_codec()
    codec.save(tmp_path / "codec")
    comp = HyperbolicProductQuantizer.load(str(tmp_path / "codec"))
    for name in ("d", "M", "nbits", "metric", "clip_radius", "seed"):
        assert getattr(comp, name) == getattr(codec, name)
        assert type(getattr(comp, name)) is type(getattr(codec, name))
    for name in ("curvatures", "codebooks"):
        np.testing.assert_array_equal(getattr(comp, name), getattr(codec, name))
    x = vectors(50, 12)
    np.testing.assert_array_equal(comp.compute_distance_tables(x), codec.compute_distance_tables(x))
    np.testing.assert_array_equal(comp.compute_codes(x), codec.compute_codes(x))


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d": 0}, "d must be an integer >= 1, got 0"),
        ({"d": 8.0}, "d must be an integer >= 1, got 8.0"),
        ({"d": True}, "d must be .* got True"),
        ({"d": 10, "M": 4}, "multiple of M, got d = 10 and M = 4"),
        ({"M": 0}, "M must be an integer >= 1, got 0"),
        ({"M": "2"}, "M must be .* got '2'"),
        ({"nbits": 3}, "nbits must be an integer from 4 to 8, got 3"),
        ({"nbits": 9}, "from 4 to 8, got 9"),
        ({"nbits": True}, "nbits"),
        ({"metric": "l2"}, "metric must be one of .*geodesic.* got 'l2'"),
        ({"metric": ["squared"]}, "metric"),
        ({"curvatures": -1.0}, "curvatures .* got -1"),
        ({"curvatures": [1.0, np.nan]}, "curvatures"),
        ({"curvatures": [1.0, 2.0, 3.0]}, "2 numbers"),
        ({"curvatures": "flat"}, "curvatures"),
        ({"curvatures": None}, "curvatures"),
        ({"curvatures": 1e300}, "curvatures"),
        ({"clip_radius": 0}, "clip_radius must be a positive number, got 0"),
        ({"clip_radius": np.inf}, "clip_radius"),
        ({"clip_radius": "1m"}, "clip_radius"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_bad_parameters(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidParameterError, match=words):
        HyperbolicProductQuantizer(**{"d": 8, "M": 2, **options})


@pytest.mark.parametrize(
    ("books", "words"),
    [
        (np.zeros((2, 15, 3)), r"got \(2, 15, 3\)"),
        (np.zeros((2, 512, 3)), r"got \(2, 512, 3\)"),
        (np.zeros((16, 3)), r"got \(16, 3\)"),
        (np.zeros((0, 16, 3)), r"got \(0, 16, 3\)"),
        (np.zeros((2, 16, 0)), r"got \(2, 16, 0\)"),
        (np.full((2, 16, 3), np.nan), "finite"),
        (np.full((2, 16, 3), 1e300), "finite"),
        ([[1, 2], [3]], "codebooks"),
        ("books", "codebooks"),
    ],
)
def test_bad_codebooks(books: Any, words: str) -> None:
    with pytest.raises(InvalidVectorsError, match=words):
        HyperbolicProductQuantizer.from_codebooks(books, 1.0)


def bad_vectors() -> Iterator[tuple[str, Any, str]]:
    x = np.ones((3, 12), np.float32)
    yield "too narrow", x[:, :11], r"\(n, 12\), got \(3, 11\)"
    yield "one vector", x[0], r"got \(12,\).*x\[None, :\]"
    yield "no axes", np.float32(1), r"got \(\)"
    yield "three axes", x[None], r"got \(1, 3, 12\)"
    for name, value in (("nan", np.nan), ("inf", np.inf), ("-inf", -np.inf)):
        bad = x.copy()
        bad[1, 4] = value
        yield name, bad, "1 of 3 rows are not, first row 1"
    bad = x.copy()
    bad[2, :2] = np.inf, -np.inf
    yield "both infs", bad, "first row 2"
    yield "float64 beyond float32", x.astype(np.float64) * 1e39, "3 of 3"
    yield "complex", x.astype(complex), "complex"
    yield "bool", x > 0, "bool"
    yield "text", np.array([["a"] * 12]), "dtype"
    yield "objects", np.array([[None] * 12], object), "object"
    yield "ragged", [[1.0] * 12, [1.0]], "x can't be read"
    yield "None", None, "x"
    yield "a meta tensor", torch.empty(3, 12, device="meta"), "x can't be read"


@pytest.mark.parametrize(("x", "words"), [pytest.param(*rest, id=name) for name, *rest in bad_vectors()])
def test_bad_vectors(x: Any, words: str) -> None:
    codec = random_codec()
    for call in (codec.train, codec.compute_codes, codec.compute_distance_tables):
        with pytest.raises(InvalidVectorsError, match=words):
            call(x)
    assert codec.is_trained


def test_vectors_whose_points_leave_float32() -> None:
    codec = random_codec()
    x = np.ones((5000, 12), np.float32)
    x[4500, 5] = 1000  # far into the second chunk
    for call in (codec.compute_codes, codec.train, codec.compute_distance_tables):
        with pytest.raises(InvalidVectorsError, match=r"row 4500: .* norm 1000.* curvature -1; .*clip_radius"):
            call(x)
    assert random_codec(clip_radius=2.0).compute_codes(x).shape == (5000, 3)
    assert random_codec(theta=0.0).compute_codes(x).shape == (5000, 3)


@pytest.mark.parametrize(
    "codes",
    [
        np.zeros((2, 3), np.int64),
        np.zeros((2, 3), np.int8),
        np.zeros((2, 4), np.uint8),
        np.zeros(3, np.uint8),
        np.full((2, 3), 16, np.uint8),
        [[0, 0, 0]],
        None,
    ],
)
def test_bad_codes(codes: Any) -> None:
    with pytest.raises(InvalidVectorsError, match="codes must be"):
        random_codec().decode(codes)


def test_untrained(tmp_path: Path) -> None:
    codec = HyperbolicProductQuantizer(8, 2)
    for call in (
        lambda: codec.compute_codes(np.ones((1, 8))),
        lambda: codec.decode(np.zeros((1, 2), np.uint8)),
        lambda: codec.compute_distance_tables(np.ones((1, 8))),
        lambda: codec.save(tmp_path / "codec"),
    ):
        with pytest.raises(NotTrainedError, match="train"):
            call()
    assert not list(tmp_path.iterdir())
    with pytest.raises(InvalidVectorsError, match="at least ksub = 256 vectors, got 255"):
        codec.train(vectors(255, 8))


def test_every_error_is_in_the_tree() -> None:
    """``except HyperfaissError`` and ``except ValueError`` both work."""
    for base in (HyperfaissError, ValueError):
        with pytest.raises(base):
            HyperbolicProductQuantizer(8, 3)
        with pytest.raises(base):
            random_codec().compute_codes(np.ones((1, 1)))
    with pytest.raises(RuntimeError):
        HyperbolicProductQuantizer(8, 2).compute_codes(np.ones((1, 8)))


def test_input_types() -> None:
    codec = random_codec()
    x = np.round(vectors(10, 12) * 8) / 8  # the same in every dtype
    ref = codec.compute_codes(x)
    wide = np.zeros((20, 24), np.float32)
    wide[::2, ::2] = x
    for same in (
        x.astype(np.float64), x.astype(np.float16), np.asfortranarray(x), wide[::2, ::2], x[::-1][::-1], x.tolist(),
        torch.from_numpy(x), torch.from_numpy(x).double().requires_grad_(), torch.from_numpy(x).half(),
        x.astype(">f4"),
    ):  # fmt: skip
        np.testing.assert_array_equal(codec.compute_codes(same), ref)
    np.testing.assert_array_equal(
        codec.compute_codes(np.arange(24).reshape(2, 12)), codec.compute_codes(np.arange(24.0).reshape(2, 12))
    )


def test_clip_is_that_of_the_geometry() -> None:
    x = np.random.default_rng(0).normal(size=(300, 12)).astype(np.float32)
    for radius in (None, 0.5, 1.7, 100.0):
        codec = HyperbolicProductQuantizer(12, 3, curvatures=2.0, clip_radius=radius)
        ref = lorentz.clip(x.reshape(300, 3, 4), radius).reshape(300, 12)
        np.testing.assert_allclose(codec.clip(x), ref, rtol=3e-7)
        assert radius == 100.0 or (radius is None) == np.array_equal(codec.clip(x), x)
