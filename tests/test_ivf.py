"""The inverted file: the flat index's answers to the bit where all lists are visited, and what lists and quantizer add."""

# ruff: noqa: E741 (D and I are FAISS's names)
from __future__ import annotations

import copy
import pickle
import time
from typing import Any

import faiss
import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hyperfaiss
import hyperfaiss.ivf
from hyperfaiss import (
    HyperbolicIVFPQIndex,
    HyperbolicPQIndex,
    HyperbolicProductQuantizer,
    InvalidParameterError,
    InvalidVectorsError,
    Model,
    NotTrainedError,
    Projector,
    PrototypeLevel,
    SearchParameters,
)
from tests.toys import FORKS, INTERRUPTION, Python, assert_same, random_codec, vectors


def quantizer(nlist: int, d: int = 12, kind: str = "flat") -> Any:
    """Centroids for a data set of ``vectors``; the last is where nothing is, so its list stays empty."""
    centroids = vectors(nlist, d, seed=7)
    if nlist > 1:
        centroids[-1] = 100
    coarse = {
        "flat": lambda: faiss.IndexFlatL2(d),
        "inner product": lambda: faiss.IndexFlatIP(d),
        "hnsw": lambda: faiss.IndexHNSWFlat(d, 8),
        "pq": lambda: faiss.IndexPQ(d, 3, 4),
        "transformed": lambda: faiss.IndexPreTransform(faiss.RandomRotationMatrix(d, 6), faiss.IndexFlatL2(6)),
    }[kind]()
    coarse.train(vectors(500, d, seed=8))
    coarse.add(centroids)
    return coarse


QUANTIZERS = ["flat", "inner product", "hnsw", "pq", "transformed"]


def pair(n: int, nlist: int = 9, kind: str = "flat", **options: Any) -> tuple[HyperbolicPQIndex, HyperbolicIVFPQIndex]:
    """A flat and an IVF index over the same vectors."""
    c = random_codec(**options)
    flat, ivf = HyperbolicPQIndex.from_codec(c), HyperbolicIVFPQIndex.from_codec(quantizer(nlist, c.d, kind), c, nlist)
    x = vectors(n, c.d, seed=2)
    flat.add(x)
    ivf.add(x)
    return flat, ivf


# ------------------------------------------------------------------------------------------------ search


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("n", [0, 1, 64, 1000])
def test_all_lists_are_the_flat_index(kind: str, n: int) -> None:
    flat, ivf = pair(n, kind=kind)
    x = vectors(70, 12)
    lists = np.random.default_rng(3).permuted(np.tile(np.arange(9), (70, 1)), axis=1)
    for nprobe in (9, 10, 1 << 40):
        ivf.nprobe = nprobe
        for k in (1, 7, n + 5):
            assert_same(ivf.search(x, k), flat.search(x, k))
            assert_same(ivf.search_preassigned(x, k, lists), flat.search(x, k))
        for radius in (0.0, 4.0, np.inf):
            assert_same(ivf.range_search(x, radius), flat.range_search(x, radius))
            assert_same(ivf.range_search_preassigned(x, radius, lists), flat.range_search(x, radius))


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(0, 300), st.integers(1, 40), st.sampled_from([4, 5, 8]))
def test_all_lists_property(seed: int, nlist: int, n: int, k: int, nbits: int) -> None:
    """Ties everywhere, ids at random."""
    rng = np.random.default_rng(seed)
    books = rng.integers(4, size=(2, 1 << nbits, 1)).astype(np.float32)
    c = HyperbolicProductQuantizer.from_codebooks(books, 0.0)
    coarse = faiss.IndexFlatL2(2)
    coarse.add(rng.normal(size=(nlist, 2)).astype(np.float32))
    flat, ivf = HyperbolicPQIndex.from_codec(c), HyperbolicIVFPQIndex.from_codec(coarse, c, nlist)
    x, ids = rng.integers(4, size=(n, 2)), rng.permutation(2 * n)[:n]
    half = n // 2
    for index in (flat, ivf):
        index.add_with_ids(x[:half], ids[:half])
        index.add_with_ids(x[half:], ids[half:])
    ivf.nprobe = nlist
    q = rng.integers(4, size=(3, 2))
    assert_same(ivf.search(q, k), flat.search(q, k))
    lists = np.tile(np.arange(nlist), (3, 1))
    assert_same(ivf.search_preassigned(q, k, lists), flat.search(q, k))


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("nprobe", [1, 2, 5, 8])
def test_some_lists(kind: str, nprobe: int) -> None:
    """Exactly the vectors of the lists that the quantizer names."""
    flat, ivf = pair(2000, kind=kind)
    x = vectors(30, 12)
    lists = np.concatenate([ivf.quantizer.search(x[i : i + 1], nprobe)[1] for i in range(30)])
    home = np.concatenate([ivf.quantizer.search(row[None], 1)[1] for row in vectors(2000, 12, seed=2)])[:, 0]
    ivf.nprobe = nprobe
    for q in range(30):
        admitted = SearchParameters(np.isin(home, lists[q]))
        ref = flat.search(x[q : q + 1], 10, params=admitted)
        assert_same(ivf.search(x[q : q + 1], 10), ref)
        assert_same(ivf.range_search(x[q : q + 1], 4.5), flat.range_search(x[q : q + 1], 4.5, params=admitted))
    rows = [ivf.search(x[q : q + 1], 10) for q in range(30)]
    ref = tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))  # type: ignore[assignment]
    assert_same(ivf.search(x, 10), ref)
    assert_same(ivf.search_preassigned(x, 10, lists), ref)
    assert_same(ivf.search_preassigned(x, 10, lists, np.zeros(lists.shape)), ref)
    ivf.nprobe = 9
    assert_same(ivf.search(x, 10, params=faiss.SearchParametersIVF(nprobe=nprobe)), ref)
    assert_same(ivf.search(x, 10, params=SearchParameters(nprobe=nprobe)), ref)
    assert ivf.nprobe == 9


@pytest.mark.parametrize("threads", [1, 3])
def test_any_split_gives_the_same_bits(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ivf = pair(3000, nlist=50)
    x = vectors(100, 12)
    ivf.nprobe = 7
    hyperfaiss.set_num_threads(threads)
    ref, ref_range = ivf.search(x, 20), ivf.range_search(x, 4.0)
    for start, stop in ((0, 1), (3, 4), (7, 40), (20, 100)):
        assert_same(ivf.search(x[start:stop], 20), (ref[0][start:stop], ref[1][start:stop]))
    for name, value in (("_PROBES", 1), ("_PROBES", 100), ("_TASK", 16)):
        monkeypatch.setattr(hyperfaiss.ivf, name, value)
        assert_same(ivf.search(x, 20), ref)
        assert_same(ivf.range_search(x, 4.0), ref_range)
        assert_same(ivf.search_preassigned(x, 20, ivf._closest(x, 7)), ref)


@pytest.mark.parametrize("kind", ["random", "far from the origin", "twins", "huge", "equal"])
@pytest.mark.parametrize("metric", [faiss.IndexFlatL2, faiss.IndexFlatIP, lambda d: faiss.IndexFlat(d, faiss.METRIC_L2)])
def test_many_vectors_go_where_each_goes_alone(metric: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products, where there is no doubt; the bits of one by one, where there is."""
    d, nlist = 64, 50
    coarse, x = vectors(nlist, d, seed=7), vectors(5000, d)
    if kind == "far from the origin":  # products lose the distances in their rounding
        coarse, x = coarse + 300, x + 300
    elif kind == "twins":  # pairs of centroids that are equal but for the last bits
        coarse[1::2] = coarse[::2] * np.float32(1 + 1e-6)
    elif kind == "huge":
        coarse, x = coarse * np.float32(1e19), x * np.float32(1e19)
    elif kind == "equal":
        coarse[:] = coarse[0]
    index = HyperbolicIVFPQIndex(metric(d), d, nlist, 2)
    index.quantizer.add(coarse)
    asked: list[int] = []
    ask = index._ask

    def counted(x: np.ndarray, *args: Any) -> Any:
        asked.append(len(x))
        return ask(x, *args)

    monkeypatch.setattr(index, "_ask", counted)
    for nprobe in (1, 7, 49):
        asked.clear()
        comp = index._closest(x, nprobe)
        again = sum(asked) - len(x)
        ref = np.concatenate([ask(x[i : i + 1], nprobe)[1] for i in range(len(x))])
        np.testing.assert_array_equal(np.sort(comp, axis=1), np.sort(ref, axis=1))
        assert max(asked) >= 2000
        assert again < len(x) / 4 or kind != "random"
        if metric is faiss.IndexFlatL2 and kind == "far from the origin":
            assert again > 0
            products = index.quantizer.search(x, nprobe)[1]
            assert (np.sort(products, axis=1) != np.sort(ref, axis=1)).any()


def test_the_quantizer_is_asked_about_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that FAISS compares them one by one: the bits of its matrix products depend on the other rows."""
    assert faiss.cvar.distance_compute_blas_threshold > hyperfaiss.ivf._TOGETHER
    _, ivf = pair(10)
    asked: list[int] = []
    search = faiss.IndexFlatL2.search
    monkeypatch.setattr(
        faiss.IndexFlatL2,
        "search",
        lambda index, x, *args, **options: asked.append(len(x)) or search(index, x, *args, **options),
    )
    ivf.add(vectors(1000, 12))
    ivf.search(vectors(1000, 12), 3)
    assert max(asked) == hyperfaiss.ivf._TOGETHER
    assert sum(asked) == 2000


def test_quantizer_parameters_are_passed_on() -> None:
    """A wider search of the HNSW graph finds the nearest lists that a narrow one misses."""
    flat, ivf = pair(3000, nlist=300, kind="hnsw")
    x = vectors(200, 12)
    nearest = faiss.IndexFlatL2(12)
    nearest.add(ivf.quantizer.reconstruct_n(0, 300))
    ref = ivf.search_preassigned(x, 10, nearest.search(x, 3)[1])
    hits = []
    for width in (1, 300):
        wide = faiss.SearchParametersHNSW()
        wide.efSearch = width
        I = ivf.search(x, 10, params=faiss.SearchParametersIVF(nprobe=3, quantizer_params=wide))[1]
        hits.append(np.mean(ref[1] == I))
    assert hits[0] < 0.99
    assert hits[1] == 1.0
    assert flat.ntotal == 3000


def test_missing_lists_and_neighbours() -> None:
    _, ivf = pair(500)
    x = vectors(3, 12)
    lists = np.array([[2, -1, 3], [-1, -1, -1], [8, 2, -1]])
    D, I = ivf.search_preassigned(x, 400, lists)
    sizes = [ivf.get_list_size(number) for number in range(9)]
    assert [(row >= 0).sum() for row in I] == [sizes[2] + sizes[3], 0, sizes[8] + sizes[2]]
    assert sizes[8] == 0
    assert (D[I < 0] == np.inf).all()


# ------------------------------------------------------------------------------------------------ lists


@pytest.mark.parametrize("nbits", [4, 6, 8])
def test_lists(nbits: int) -> None:
    flat, ivf = pair(1000, ksub=1 << nbits)
    home = ivf.quantizer.search(vectors(1000, 12, seed=2), 1)[1][:, 0]
    seen = []
    for number in range(9):
        ids, codes = ivf.get_list(number)
        assert ivf.get_list_size(number) == len(ids) == (home == number).sum()
        np.testing.assert_array_equal(ids, np.flatnonzero(home == number))
        np.testing.assert_array_equal(codes, flat.codes[ids])
        seen.append(ids)
    np.testing.assert_array_equal(ivf.ids, np.concatenate(seen))
    np.testing.assert_array_equal(ivf.codes, flat.codes[ivf.ids])
    assert (ivf.codes.dtype, ivf.ids.dtype) == (np.uint8, np.int64)
    twin = HyperbolicIVFPQIndex.from_codec(ivf.quantizer, ivf.codec, 9)
    for number in range(9):
        twin.add_to_list(number, *reversed(ivf.get_list(number)))
    assert_same(twin.search(vectors(5, 12), 20), ivf.search(vectors(5, 12), 20))
    assert twin.next_id == 1000


@pytest.mark.parametrize(("nlist", "size"), [(1, 0), (2, 1), (256, 1), (257, 2), (65536, 2), (65537, 3)])
def test_standalone_codes(nlist: int, size: int) -> None:
    """The list's number, lowest byte first, then the codes: as faiss.IndexIVFPQ."""
    c = random_codec(ksub=64)
    coarse = faiss.IndexFlatL2(12)
    coarse.add(vectors(nlist, 12, seed=7))
    ivf = HyperbolicIVFPQIndex.from_codec(coarse, c, nlist)
    theirs = faiss.IndexIVFPQ(coarse, 12, nlist, 3, 6)
    assert ivf.coarse_code_size == theirs.coarse_code_size() == size
    assert ivf.sa_code_size == size + 3 == theirs.sa_code_size()
    x = vectors(100, 12)
    codes = ivf.sa_encode(x)
    assert codes.shape == (100, ivf.sa_code_size)
    lists = coarse.search(x, 1)[1][:, 0]
    np.testing.assert_array_equal(sum(codes[:, i].astype(np.int64) << (8 * i) for i in range(size)), lists if size else 0)
    np.testing.assert_array_equal(ivf.sa_decode(codes), c.decode(c.compute_codes(x)))
    twin = HyperbolicIVFPQIndex.from_codec(coarse, c, nlist)
    ivf.add(x)
    twin.add_sa_codes(codes)
    ivf.nprobe = twin.nprobe = 2
    assert_same(twin.search(x, 5), ivf.search(x, 5))
    twin.reset()
    twin.add_sa_codes(codes, np.arange(100) * 3)
    D, I = ivf.search(x, 5)
    assert_same(twin.search(x, 5), (D, np.where(I >= 0, 3 * I, -1)))


def test_adding_in_pieces_is_adding_at_once() -> None:
    _, whole = pair(500)
    _, index = pair(0)
    x = vectors(500, 12, seed=2)
    for start, stop in ((0, 1), (1, 200), (200, 200), (200, 201), (201, 500)):
        index.add(x[start:stop])
    np.testing.assert_array_equal(index.ids, whole.ids)
    np.testing.assert_array_equal(index.codes, whole.codes)
    whole.nprobe = index.nprobe = 3
    assert_same(index.search(x[:9], 30), whole.search(x[:9], 30))


def test_adding_one_by_one_is_not_quadratic() -> None:
    """To a thousand lists: the last thousand take about as long as the first (the median of ten times a hundred)."""
    c = random_codec(M=8, ksub=256, dsub=1)
    coarse = faiss.IndexFlatL2(8)
    coarse.add(vectors(1000, 8, seed=7))
    index = HyperbolicIVFPQIndex.from_codec(coarse, c, 1000)
    rng = np.random.default_rng(0)
    lists = rng.integers(1000, size=20_000).astype("<u2").view(np.uint8).reshape(-1, 2)
    codes = np.concatenate([lists, rng.integers(256, size=(20_000, 8), dtype=np.uint8)], axis=1)
    costs, capacities = [], set()
    for start in range(0, 20_000, 100):
        begin = time.perf_counter()
        for row in range(start, start + 100):
            index.add_sa_codes(codes[row : row + 1])
        costs.append(time.perf_counter() - begin)
        capacities.add(len(index._store._state.arena.blocks))
    assert index.ntotal == 20_000
    assert len(capacities) < 40
    assert np.median(costs[-20:]) < 4 * np.median(costs[10:30])
    assert index._store.nbytes < 20_000 * 16 + 1000 * 64 * 17 + (4 << 16)


def test_a_view_is_made_once_until_the_next_change() -> None:
    _, ivf = pair(500)
    assert ivf._store.view() is ivf._store.view()
    before = ivf._store.view()
    ivf.add(vectors(1, 12))
    assert ivf._store.view() is not before
    assert before.masks.sum() != ivf._store.view().masks.sum()


# ------------------------------------------------------------------------------------------------ training and models


@pytest.mark.parametrize("kind", [faiss.IndexFlatL2, faiss.IndexFlatIP, lambda d: faiss.IndexHNSWFlat(d, 8), None])
def test_training(kind: Any) -> None:
    x = vectors(2000, 12)
    index = HyperbolicIVFPQIndex(None if kind is None else kind(12), 12, 16, 3, 4, seed=5)
    assert not index.is_trained
    with pytest.raises(NotTrainedError):
        index.add(x)
    index.train(x)
    assert index.is_trained
    assert index.quantizer.ntotal == 16
    alone = HyperbolicProductQuantizer(12, 3, 4, seed=5)
    alone.train(x)
    np.testing.assert_array_equal(index.codec.codebooks, alone.codebooks)
    # centroids as k-means would have them: each is about the mean of its vectors, and they fit better than a sample does
    centroids = index.quantizer.reconstruct_n(0, 16)
    nearest = faiss.IndexFlatL2(12)
    nearest.add(centroids)
    error, home = nearest.search(x, 1)
    means = np.stack([x[home[:, 0] == number].mean(axis=0) for number in range(16)])
    assert np.abs(means - centroids).max() < 0.5
    sample = faiss.IndexFlatL2(12)
    sample.add(x[:16])
    assert error.mean() < 0.9 * sample.search(x, 1)[0].mean()
    twin = HyperbolicIVFPQIndex(None if kind is None else kind(12), 12, 16, 3, 4, seed=5)
    twin.train(x)
    np.testing.assert_array_equal(twin.quantizer.reconstruct_n(0, 16), centroids)
    with pytest.raises(InvalidParameterError, match="new index"):
        index.train(x)


def test_kmeans_of_the_lists_is_faiss() -> None:
    """Iteration by iteration, which is what the progress bar needs, it is what FAISS does at once."""
    x = vectors(1000, 12)
    index = HyperbolicIVFPQIndex(None, 12, 10, 3, 4, seed=3)
    clustering = faiss.Clustering(12, 10)
    clustering.niter, clustering.seed = 10, 3
    clustering.train(x, faiss.IndexFlatL2(12))
    ref = faiss.vector_to_array(clustering.centroids).reshape(10, 12)
    np.testing.assert_allclose(index._centroids(x), ref, rtol=1e-4, atol=1e-5)


def test_training_takes_what_is_there() -> None:
    """Centroids that the quantizer holds and codebooks of a codec stay."""
    x, c, coarse = vectors(500, 12), random_codec(), quantizer(9)
    books = c.codebooks.copy()  # type: ignore[union-attr]
    lists_to_train = HyperbolicIVFPQIndex.from_codec(None, c, 7)
    lists_to_train.train(x)
    np.testing.assert_array_equal(c.codebooks, books)
    assert lists_to_train.is_trained
    codes_to_train = HyperbolicIVFPQIndex(coarse, 12, 9, 3, 4)
    centroids = coarse.reconstruct_n(0, 9)
    codes_to_train.train(x)
    np.testing.assert_array_equal(coarse.reconstruct_n(0, 9), centroids)
    assert codes_to_train.is_trained
    codes_to_train.add(x)
    assert codes_to_train.ntotal == 500


@pytest.mark.parametrize("n", [5, 20])
def test_failed_training_leaves_nothing_behind(n: int) -> None:
    """Too few vectors for the lists, or enough for these but not for the codebooks."""
    index = HyperbolicIVFPQIndex(None, 12, 10, 3, 8)
    with pytest.raises(InvalidVectorsError, match=f"got {n}"):
        index.train(vectors(n, 12))
    assert not index.is_trained
    assert index.quantizer.ntotal == 0
    index.train(vectors(300, 12))
    assert index.is_trained


def model() -> Model:
    rng = np.random.default_rng(4)
    projector = Projector([(rng.normal(size=(12, 6)), rng.normal(size=12))])
    levels = [
        PrototypeLevel(rng.normal(size=(20, 12)).astype(np.float32), np.arange(20) % 5),
        PrototypeLevel(rng.normal(size=(5, 12)).astype(np.float32), np.full(5, -1)),
    ]
    return Model(projector, random_codec(), levels)


def test_from_model(tmp_path: Any) -> None:
    m, x = model(), vectors(300, 6)
    m.save(tmp_path / "model")
    for source in (m, tmp_path / "model", str(tmp_path / "model")):
        for level, n in ((0, 20), (1, 5)):
            index = HyperbolicIVFPQIndex.from_model(source, level=level)
            assert (index.d, index.nlist, index.is_trained) == (6, n, True)
            np.testing.assert_array_equal(index.quantizer.reconstruct_n(0, n), m.prototypes[level].centroids)
            index.add(x)
            index.nprobe = n
            flat = HyperbolicPQIndex.from_model(source)
            flat.add(x)
            assert_same(index.search(x[:5], 7), flat.search(x[:5], 7))
    index = HyperbolicIVFPQIndex.from_model(m, 8, quantizer=faiss.IndexHNSWFlat(12, 4))
    assert not index.is_trained
    index.train(x)
    index.add(x)
    assert index.ntotal == 300
    assert isinstance(index.quantizer, faiss.IndexHNSWFlat)
    bare = Model(m.projector, m.codec)
    for source, options, words in (
        (m, {}, "nlist = None and level = None"), (m, {"nlist": 3, "level": 0}, "nlist = 3 and level = 0"),
        (m, {"level": 2}, "level must be an integer from 0 to 1, got 2"), (m, {"level": -1}, "got -1"),
        (bare, {"level": 0}, "no hierarchy"), (m, {"level": 0, "quantizer": quantizer(20)}, "must be empty, it holds 20"),
    ):  # fmt: skip
        with pytest.raises(InvalidParameterError, match=words):
            HyperbolicIVFPQIndex.from_model(source, **options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((None, 12, 0, 3), "nlist must be an integer from 1"),
        ((None, 12, 2.0, 3), r"nlist .*got 2\.0"),
        ((None, 12, True, 3), "nlist .*got True"),
        ((None, 12, 2**31, 3), "nlist .*got 2147483648"),
        ((None, 12, 4, 5), "d = 12 and M = 5"),
        ((faiss.IndexFlatL2(8), 12, 4, 3), "quantizer takes 8 dimensions, the codec 12"),
        ((quantizer(9), 12, 4, 3), "nlist = 4, it holds 9"),
        ((12, 4, 3, 4), r"quantizer must be a faiss\.Index or None, got int"),
        ((faiss.IndexBinaryFlat(16), 16, 4, 4), "got IndexBinaryFlat"),
    ],
)
def test_construction(arguments: Any, words: str) -> None:
    with pytest.raises(InvalidParameterError, match=words):
        HyperbolicIVFPQIndex(*arguments)


def test_what_is_no_codec() -> None:
    with pytest.raises(InvalidParameterError, match="codec must be a HyperbolicProductQuantizer, got ndarray"):
        HyperbolicIVFPQIndex.from_codec(None, np.ones(3), 4)  # type: ignore[arg-type]
    with pytest.raises(InvalidParameterError, match="codec must be a HyperbolicProductQuantizer, got NoneType"):
        HyperbolicPQIndex.from_codec(None)  # type: ignore[arg-type]


def test_a_quantizer_that_fails_is_named() -> None:
    """One that finds no list for a vector: nothing is added."""
    _, ivf = pair(50)
    ivf.quantizer.reset()
    with pytest.raises(NotTrainedError):
        ivf.add(vectors(3, 12))

    class Blind:
        is_trained, ntotal, d = True, 9, 12

        def search(self, x: np.ndarray, k: int, **_: Any) -> tuple[np.ndarray, np.ndarray]:
            return np.zeros((len(x), k)), np.where(np.arange(len(x))[:, None] == 1, -1, 0)

    ivf.quantizer = Blind()
    with pytest.raises(InvalidVectorsError, match="row 1: the quantizer Blind finds no list"):
        ivf.add(vectors(3, 12))
    assert ivf.ntotal == 50


# ------------------------------------------------------------------------------------------------ the rest of the contract


def test_attributes() -> None:
    index = HyperbolicIVFPQIndex(None, d=np.int64(24), nlist=np.int32(7), M=6, nbits=5, metric="squared", clip_radius=2)
    ref = {"d": 24, "M": 6, "nbits": 5, "ksub": 32, "dsub": 4, "code_size": 4, "sa_code_size": 5, "ntotal": 0, "nlist": 7,
           "nprobe": 1, "is_trained": False, "metric": "squared", "metric_type": faiss.METRIC_L2}  # fmt: skip
    assert {name: getattr(index, name) for name in ref} == ref
    index.nprobe = np.int64(3)
    assert index.nprobe == 3
    for word in ("nlist=7", "nprobe=3", "IndexFlatL2", "ntotal=0", "is_trained=False"):
        assert word in repr(index)


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda i: pickle.loads(pickle.dumps(i))])
def test_copies(how: Any, kind: str) -> None:
    _, index = pair(100, kind=kind)
    index.nprobe = 4
    x = vectors(30, 12)
    ref = index.search(x, 10)
    twin = how(index)
    assert_same(twin.search(x, 10), ref)
    twin.add(x)
    index.remove_ids([1])
    assert (index.ntotal, twin.ntotal) == (99, 130)
    assert (twin.quantizer is index.quantizer) == (how is copy.copy)


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On stderr: the lists' k-means, the codebooks', and a long add; nothing of it unless it is asked for."""
    monkeypatch.setattr(hyperfaiss.ivf, "_TASK", 16)
    x = vectors(3000, 12)
    for verbose in (False, True):
        index = HyperbolicIVFPQIndex(None, 12, 9, 3, 4)
        index.verbose = verbose
        index.train(x)
        index.add(x)
        out = capsys.readouterr()
        assert out.out == ""
        for words in ("k-means of the lists", "hyperbolic k-means", "assigning to lists"):
            assert (words in out.err) == verbose


LONG_CALLS = """
import os, signal, sys, threading, time
import faiss
import numpy as np
import hyperfaiss as hf
rng = np.random.default_rng(0)
hf.set_num_threads(int(sys.argv[1]))
codec = hf.HyperbolicProductQuantizer.from_codebooks(rng.normal(size=(8, 256, 4)).astype(np.float32), 1.0)
coarse = faiss.IndexFlatL2(32)
coarse.add(rng.normal(size=(4096, 32)).astype(np.float32))
index = hf.HyperbolicIVFPQIndex.from_codec(coarse, codec, 4096)
x = rng.normal(size=(200_000, 32)).astype(np.float32)
index.add(x[:1000])
index.nprobe = 64
if sys.argv[2] == "search":
    work = lambda: index.search(np.tile(x, (10, 1)), 10)
elif sys.argv[2] == "add":
    work = lambda: index.add(np.tile(x, (10, 1)))
else:
    new = hf.HyperbolicIVFPQIndex(None, 32, 16384, 8)
    work = lambda: new.train(x)
limit = float(sys.argv[3])
def intact():
    return sys.argv[2] != "train" or not (new.is_trained or new.codec.is_trained or new.quantizer.ntotal)
"""


@pytest.mark.parametrize("work", ["search", "add", "train"])
def test_ctrl_c(work: str, python: Python) -> None:
    assert "intact" in python(LONG_CALLS + INTERRUPTION, "3", work, "10" if work == "train" else "1.5").stdout


def test_fork_after_use(python: Python) -> None:
    """A child forked after training, adding and searching does all of it as its parent does, FAISS's OpenMP or not."""
    script = """
import multiprocessing
import numpy as np
import hyperfaiss as hf
rng = np.random.default_rng(0)
x = rng.normal(size=(20_000, 8)).astype(np.float32)
hf.set_num_threads(3)
index = hf.HyperbolicIVFPQIndex(None, 8, 100, 2, 4)
index.nprobe = 10
index.train(x)
index.add(x)
def more():
    other = hf.HyperbolicIVFPQIndex(None, 8, 100, 2, 4)
    other.train(x)
    assert other.is_trained
"""
    assert "same" in python(script + FORKS).stdout


def test_lists_of_many_queries_are_found_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nq · nprobe numbers never exist at once."""
    _, index = pair(100)
    x = vectors(77, 12)
    monkeypatch.setattr(hyperfaiss.ivf, "_PROBES", 40)
    asked = []
    closest = index._closest
    monkeypatch.setattr(index, "_closest", lambda coarse, *args: asked.append(len(coarse)) or closest(coarse, *args))
    index.nprobe = 8
    index.search(x, 3)
    assert asked == [5] * 15 + [2]


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda i: setattr(i, "nprobe", 0), InvalidParameterError, "nprobe must be an integer >= 1, got 0"),
        (lambda i: setattr(i, "nprobe", 1.5), InvalidParameterError, "got 1.5"),
        (lambda i: setattr(i, "nprobe", "3"), InvalidParameterError, "got '3'"),
        (lambda i: setattr(i, "projector", Projector([(np.ones((5, 3)), np.ones(5))])), InvalidParameterError, "makes 5 .* 12"),
        (lambda i: i.get_list_size(9), InvalidParameterError, "list_no must be an integer from 0 to 8, got 9"),
        (lambda i: i.get_list_size(-1), InvalidParameterError, "got -1"),
        (lambda i: i.get_list(9), InvalidParameterError, "got 9"),
        (lambda i: i.add_to_list(9, np.zeros((1, 2), np.uint8), [5000]), InvalidParameterError, "got 9"),
        (lambda i: i.add_to_list(0, np.zeros((1, 3), np.uint8), [5000]), InvalidVectorsError, r"\(n, 2\)"),
        (lambda i: i.add_to_list(0, np.zeros((2, 2), np.uint8), [5000]), InvalidVectorsError, "2 vectors need 2 ids, got 1"),
        (lambda i: i.add_sa_codes(np.full((1, 3), 9, np.uint8)), InvalidVectorsError, "0 to 8, got 9"),
        (lambda i: i.search_preassigned(vectors(2, 12), 3, [[0]]), InvalidVectorsError, r"\(2, nprobe\), .* shape \(1, 1\)"),
        (lambda i: i.search_preassigned(vectors(1, 12), 3, np.empty((1, 0), "i8")), InvalidVectorsError, r"shape \(1, 0\)"),
        (lambda i: i.search_preassigned(vectors(2, 12), 3, [0, 1]), InvalidVectorsError, r"got int64 of shape \(2,\)"),
        (lambda i: i.search_preassigned(vectors(1, 12), 3, [[0.0]]), InvalidVectorsError, "got float64"),
        (lambda i: i.search_preassigned(vectors(1, 12), 3, [[9]]), InvalidVectorsError, "from 0 to 8, or -1, got 9 to 9"),
        (lambda i: i.search_preassigned(vectors(1, 12), 3, [[-2]]), InvalidVectorsError, "got -2 to -2"),
        (lambda i: i.search_preassigned(vectors(1, 12), 3, [[4, 2, 4]]), InvalidVectorsError, "row 0 has list 4 twice"),
        (lambda i: i.range_search_preassigned(vectors(1, 12), 3, [[4, 2, 4]]), InvalidVectorsError, "row 0 has list 4 twice"),
    ],
)  # fmt: skip
def test_errors_leave_the_index_as_it_was(call: Any, error: type[Exception], words: str) -> None:
    _, index = pair(300)
    index.nprobe = 3
    ref = index.search(vectors(5, 12), 5)
    with pytest.raises(error, match=words):
        call(index)
    assert (index.ntotal, index.nprobe, index.projector) == (300, 3, None)
    assert_same(index.search(vectors(5, 12), 5), ref)


def test_distances_are_the_naive_ones() -> None:
    flat, ivf = pair(200)
    x = vectors(4, 12)
    ivf.nprobe = 9
    tables = ivf.codec.compute_distance_tables(x)
    assert_same(ivf.search(x, 20), naive.search(tables, flat.codec.compute_codes(vectors(200, 12, seed=2)), 20))
