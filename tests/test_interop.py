"""Both ways to FAISS: the same neighbours there and here, in another process, and on its own tools for results."""

# ruff: noqa: E741 (D and I are FAISS's names)
from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from faiss.contrib import evaluation, exhaustive_search
from faiss.contrib.inspect_tools import get_invlist
from sklearn.datasets import load_digits, load_sample_image
from sklearn.feature_extraction.image import extract_patches_2d

from hyperfaiss import (
    FileFormatError,
    HyperbolicIVFPQIndex,
    HyperbolicPQIndex,
    InvalidParameterError,
    InvalidVectorsError,
    NotTrainedError,
    Projector,
    interop,
)
from hyperfaiss.interop import faiss_query, from_faiss, projector_from_faiss, to_faiss
from tests.toys import Python, flat_quantizer, random_codec, vectors

L2, IP = faiss.METRIC_L2, faiss.METRIC_INNER_PRODUCT
SIGN = {L2: 1, IP: -1}


def faiss_pq(x: np.ndarray, M: int, nbits: int, metric: int = L2) -> Any:
    index = faiss.IndexPQ(x.shape[1], M, nbits, metric)
    index.pq.cp.niter = 3
    index.train(x[:4000])
    index.add(x)
    return index


def faiss_ivf(x: np.ndarray, nlist: int, M: int, nbits: int, metric: int = L2) -> Any:
    index = faiss.IndexIVFPQ(faiss.IndexFlat(x.shape[1], metric), x.shape[1], nlist, M, nbits, metric)
    index.by_residual = False
    index.pq.cp.niter = index.cp.niter = 3
    index.train(x[:4000])
    index.add_with_ids(x, np.random.default_rng(1).permutation(3 * len(x))[: len(x)])
    return index


def ours(n: int = 3000, M: int = 4, nbits: int = 8, dsub: int = 3, **options: Any) -> HyperbolicPQIndex:
    theta = options.pop("theta", 0.0 if options.get("metric") == "inner_product" else [0.0, 0.3, 1.0, 4.0][:M])
    index = HyperbolicPQIndex.from_codec(random_codec(M, 2**nbits, dsub, seed=3, theta=theta, **options))
    index.add(vectors(n, M * dsub, seed=4))
    return index


def our_ivf(n: int = 3000, nlist: int = 20, **options: Any) -> HyperbolicIVFPQIndex:
    codec = ours(0, **options).codec
    index = HyperbolicIVFPQIndex.from_codec(flat_quantizer(vectors(nlist, codec.d, seed=5)), codec, nlist)
    index.add_with_ids(vectors(n, codec.d, seed=4), np.random.default_rng(6).permutation(2 * n)[:n])
    return index


def assert_same_neighbours(ref: tuple[Any, Any], comp: tuple[Any, Any], rtol: float = 1e-5) -> None:
    """Equal distances to rounding, and equal ids but among draws; FAISS's padding is ours."""
    ref_D, comp_D = (np.where(I < 0, np.float32(0), D) for D, I in (ref, comp))
    np.testing.assert_array_equal(comp[1] < 0, ref[1] < 0)
    scale = max(float(np.abs(ref_D).max()), 1e-30)
    evaluation.check_ref_knn_with_draws(ref_D / scale, ref[1], comp_D / scale, comp[1], rtol=rtol, atol=rtol)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in comp[1])


def test_the_comparison_notices_a_wrong_neighbour() -> None:
    D = np.arange(10, dtype=np.float32)[None]
    I = np.arange(10)[None]
    assert_same_neighbours((D, I), (D, I))
    drawn = D.copy()
    drawn[0, 4] = drawn[0, 3]
    assert_same_neighbours((drawn, I), (drawn, I[:, [0, 1, 2, 4, 3, 5, 6, 7, 8, 9]]))
    with pytest.raises(AssertionError):
        assert_same_neighbours((D, I), (D, I[:, [0, 1, 2, 4, 3, 5, 6, 7, 8, 9]]))
    with pytest.raises(AssertionError):
        assert_same_neighbours((D, I), (drawn, I))


# ------------------------------------------------------------------------------------------------ from FAISS


@pytest.mark.parametrize("metric", [L2, IP])
@pytest.mark.parametrize(("M", "nbits"), [(8, 8), (3, 4), (5, 5), (6, 6), (3, 7), (1, 8)])
def test_flat_neighbours_are_faiss_own(metric: int, M: int, nbits: int) -> None:
    x = vectors(20_000 if nbits == 8 else 3000, M * 4)
    theirs = faiss_pq(x, M, nbits, metric)
    index = from_faiss(theirs)
    assert isinstance(index, HyperbolicPQIndex)
    assert (index.d, index.M, index.nbits, index.ntotal) == (x.shape[1], M, nbits, len(x))
    assert index.codec.metric == {L2: "squared", IP: "inner_product"}[metric]
    assert not index.codec.curvatures.any()
    xq = vectors(50, x.shape[1], seed=9)
    D, I = theirs.search(xq, 20)
    assert_same_neighbours((SIGN[metric] * D, I), index.search(xq, 20))
    np.testing.assert_array_equal(index.reconstruct_n(0, 100), theirs.reconstruct_n(0, 100))
    np.testing.assert_array_equal(index.sa_encode(xq), theirs.sa_encode(xq))
    index.add(xq)
    theirs.add(xq)
    D, I = theirs.search(xq, 20)
    assert_same_neighbours((SIGN[metric] * D, I), index.search(xq, 20))


@pytest.mark.parametrize("metric", [L2, IP])
@pytest.mark.parametrize(("M", "nbits"), [(4, 8), (3, 5)])
def test_ivf_neighbours_are_faiss_own(metric: int, M: int, nbits: int) -> None:
    x = vectors(10_000, M * 4)
    theirs = faiss_ivf(x, 30, M, nbits, metric)
    index = from_faiss(theirs)
    assert isinstance(index, HyperbolicIVFPQIndex)
    assert (index.d, index.M, index.nbits, index.nlist, index.ntotal) == (x.shape[1], M, nbits, 30, len(x))
    assert [index.get_list_size(i) for i in range(30)] == [theirs.invlists.list_size(i) for i in range(30)]
    xq = vectors(50, x.shape[1], seed=9)
    for nprobe in (1, 4, 30):
        index.nprobe = theirs.nprobe = nprobe
        D, I = theirs.search(xq, 20)
        assert_same_neighbours((SIGN[metric] * D, I), index.search(xq, 20))
    theirs.nprobe = 7
    assert from_faiss(theirs).nprobe == 7
    index.add_with_ids(xq, np.arange(10**6, 10**6 + 50))
    theirs.add_with_ids(xq, np.arange(10**6, 10**6 + 50))
    D, I = theirs.search(xq, 20)
    index.nprobe = 7
    assert_same_neighbours((SIGN[metric] * D, I), index.search(xq, 20))


@pytest.mark.parametrize("kind", ["digits", "patches"])
@pytest.mark.parametrize("metric", [L2, IP])
def test_real_vectors(kind: str, metric: int) -> None:
    """Handwritten digits, many of whose codes are equal, and patches of a photograph."""
    if kind == "digits":
        x = load_digits().data.astype(np.float32)
    else:
        x = extract_patches_2d(load_sample_image("china.jpg"), (4, 4), max_patches=20_000, random_state=0)
        x = x.reshape(len(x), -1).astype(np.float32)
    x, xq = x[:-50], x[-50:]
    theirs = faiss_pq(x, 8, 8, metric)
    D, I = theirs.search(xq, 10)
    assert_same_neighbours((SIGN[metric] * D, I), from_faiss(theirs).search(xq, 10))
    lists = faiss_ivf(x, 16, 8, 6, metric)
    lists.nprobe = 4
    D, I = lists.search(xq, 10)
    assert_same_neighbours((SIGN[metric] * D, I), from_faiss(lists).search(xq, 10))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_a_million(kind: str) -> None:
    x = vectors(1_000_000, 32)
    theirs = faiss_pq(x, 8, 8) if kind == "flat" else faiss_ivf(x, 64, 8, 8)
    if kind == "ivf":
        theirs.nprobe = 8
    index = from_faiss(theirs)
    xq = vectors(100, 32, seed=9)
    assert_same_neighbours(theirs.search(xq, 10), index.search(xq, 10), rtol=1e-6)


def test_ids_of_wrappers_come_along() -> None:
    x = vectors(2000, 8)
    xq = vectors(20, 8, seed=9)
    ids = np.random.default_rng(0).permutation(10**12 + np.arange(2000))
    for wrapper in (faiss.IndexIDMap, faiss.IndexIDMap2):
        theirs = wrapper(faiss.IndexPQ(8, 2, 4))
        theirs.train(x)
        theirs.add_with_ids(x, ids)
        assert_same_neighbours(theirs.search(xq, 10), from_faiss(theirs).search(xq, 10))

    ivf = faiss.IndexIVFPQ(faiss.IndexFlatL2(8), 8, 5, 2, 4)
    ivf.by_residual = False
    around = faiss.IndexIDMap(ivf)  # maps the numbers that the lists hold
    around.train(x)
    around.add_with_ids(x, ids)
    ivf.nprobe = 3
    assert_same_neighbours(around.search(xq, 10), from_faiss(around).search(xq, 10))

    inner = faiss.IndexIDMap(faiss.IndexPQ(8, 2, 4))
    outer = faiss.IndexIDMap(inner)
    outer.train(x)
    inner.add_with_ids(x, np.random.default_rng(1).permutation(2000))
    outer.ntotal = inner.ntotal
    faiss.copy_array_to_vector(ids, outer.id_map)
    assert_same_neighbours(outer.search(xq, 10), from_faiss(outer).search(xq, 10))


def test_large_indexes_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = vectors(2000, 8)
    xq = vectors(20, 8, seed=9)
    mapped = faiss.IndexIDMap(faiss.IndexPQ(8, 2, 4))
    mapped.train(x)
    mapped.add_with_ids(x, np.arange(2000) * 3)
    monkeypatch.setattr(interop, "_PIECE", 150)
    for theirs in (faiss_pq(x, 2, 4), mapped, faiss_ivf(x, 40, 2, 4)):
        index = from_faiss(theirs)
        assert index.ntotal == 2000
        assert_same_neighbours(theirs.search(xq, 10), index.search(xq, 10))


@pytest.mark.parametrize("piece", [1, 70, 1 << 20])
def test_lists_are_copied_whole_wherever_pieces_end(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against FAISS's own way of reading a list; most are empty, the last among them, and one is longer than a piece."""
    nlist = 500
    theirs = faiss_ivf(vectors(600, 8), 3, 2, 8)
    wide = faiss.IndexIVFPQ(flat_quantizer(vectors(nlist, 8, seed=3)), 8, nlist, 2, 8)
    wide.by_residual, wide.pq, wide.is_trained = False, theirs.pq, True
    rng = np.random.default_rng(4)
    sizes = np.where(rng.random(nlist - 1) < 0.9, 0, rng.integers(1, 9, nlist - 1))
    sizes[123] = 300
    for number in np.flatnonzero(sizes).tolist():
        codes, ids = rng.integers(256, size=(sizes[number], 2)).astype(np.uint8), rng.integers(10**15, size=sizes[number])
        wide.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    wide.ntotal = int(sizes.sum())
    monkeypatch.setattr(interop, "_PIECE", piece)
    index = from_faiss(wide)
    assert isinstance(index, HyperbolicIVFPQIndex)
    assert index.ntotal == wide.ntotal
    for number in range(nlist):
        for comp, ref in zip(index.get_list(number), get_invlist(wide.invlists, number), strict=True):
            np.testing.assert_array_equal(comp, ref)


def test_an_id_of_several_vectors_stays_theirs() -> None:
    """FAISS allows it, and some give all vectors of one image its number."""
    x = vectors(2000, 8)
    xq = vectors(20, 8, seed=9)
    theirs = faiss.IndexIDMap(faiss.IndexPQ(8, 2, 8))
    lists = faiss_ivf(x, 5, 2, 8)
    lists.reset()
    theirs.train(x)
    for stock in (theirs, lists):
        stock.add_with_ids(x, np.arange(2000) // 3)
        index = from_faiss(stock)
        assert index.ntotal == 2000
        for ref, comp in zip(stock.search(xq, 50), index.search(xq, 50), strict=True):
            np.testing.assert_allclose(np.sort(comp[:, :40], axis=1), np.sort(ref[:, :40], axis=1), rtol=1e-5)


def trained(transform: Any, x: np.ndarray) -> Any:
    transform.train(x)
    return transform


def chains(x: np.ndarray) -> dict[str, list[Any]]:
    d = x.shape[1]
    remap = faiss.RemapDimensionsTransform(d, 16, True)
    shuffled = faiss.RemapDimensionsTransform(d, 16, False)
    faiss.copy_array_to_vector(np.array([3, -1, 0, 5, 5, 11, 2, 1, 4, 6, 7, 8, 9, 10, -1, 3], np.int32), shuffled.map)
    centred = trained(faiss.CenteringTransform(d), x)
    small = faiss.CenteringTransform(8)
    small.train(vectors(50, 8))
    opq = faiss.OPQMatrix(d, 2, 8)
    opq.niter = 3
    return {
        "opq": [trained(opq, x)],
        "pca": [trained(faiss.PCAMatrix(d, 8), x)],
        "pca, whitened and rotated": [trained(faiss.PCAMatrix(d, 8, -0.5, True), x)],
        "rotation": [trained(faiss.RandomRotationMatrix(d, 16), x)],
        "itq": [trained(faiss.ITQTransform(d, 8, True), x)],
        "linear twice": [trained(faiss.PCAMatrix(d, 10), x), trained(faiss.RandomRotationMatrix(10, 8), x[:, :10].copy())],
        "rotated twice": [trained(faiss.RandomRotationMatrix(d, d), x), opq],
        "remap": [remap],
        "shuffle": [shuffled],
        "centre": [centred],
        "normalise": [faiss.NormalizationTransform(d)],
        "centre, normalise": [centred, faiss.NormalizationTransform(d)],
        "normalise, centre": [faiss.NormalizationTransform(d), centred],
        "centre twice": [centred, centred],
        "centre, normalise, centre, linear, centre": [
            centred, faiss.NormalizationTransform(d), centred, trained(faiss.PCAMatrix(d, 8), x), small,
        ],
    }  # fmt: skip


X = vectors(3000, 12, seed=7) * np.linspace(0.2, 3, 12, dtype=np.float32) + 1
CHAINS = chains(X)


@pytest.mark.parametrize("name", CHAINS)
def test_transforms_become_the_projector(name: str) -> None:
    chain = CHAINS[name]
    index = faiss.IndexPQ(chain[-1].d_out, 4, 5)
    for transform in reversed(chain):
        index = faiss.IndexPreTransform(transform, index)  # one in the other
    index.train(X)
    index.add(X)
    converted = from_faiss(index)
    assert (converted.d, converted.codec.d) == (12, chain[-1].d_out)
    assert converted.projector is not None
    ref = X
    for transform in chain:
        ref = transform.apply(ref)
    comp = converted.projector.transform(X)
    np.testing.assert_allclose(comp, ref, rtol=2e-6, atol=2e-6 * np.abs(ref).max())
    if name in ("remap", "shuffle", "centre"):  # nothing to round
        np.testing.assert_array_equal(comp, ref)
    # FAISS's rounding of the transform is not ours, so a query may stand elsewhere by as much
    assert_same_neighbours(index.search(X[:30], 10), converted.search(X[:30], 10), rtol=2e-5)


def test_a_chain_in_one_wrapper_around_an_ivf_index_with_ids() -> None:
    ivf = faiss.IndexIVFPQ(faiss.IndexFlatL2(8), 8, 6, 4, 8)
    ivf.by_residual = False
    index = faiss.IndexPreTransform(ivf)
    index.prepend_transform(faiss.PCAMatrix(12, 8))
    index.prepend_transform(faiss.NormalizationTransform(12))
    index.train(X)
    index.add_with_ids(X, np.arange(3000) * 7)
    ivf.nprobe = 2
    converted = from_faiss(index)
    assert isinstance(converted, HyperbolicIVFPQIndex)
    assert converted.projector is not None
    assert converted.projector.normalize
    assert_same_neighbours(index.search(X[:30], 10), converted.search(X[:30], 10), rtol=2e-5)


def test_a_file_is_as_good_as_an_index(tmp_path: Path) -> None:
    x = vectors(1000, 8)
    theirs = faiss_pq(x, 2, 4)
    path = tmp_path / "theirs.faiss"
    faiss.write_index(theirs, str(path))
    ref = theirs.search(x[:5], 10)
    assert_same_neighbours(ref, from_faiss(path).search(x[:5], 10))
    assert_same_neighbours(ref, from_faiss(str(path)).search(x[:5], 10))
    with pytest.raises(FileNotFoundError):
        from_faiss(tmp_path / "nothing.faiss")
    with pytest.raises(FileNotFoundError):
        from_faiss(tmp_path)
    for content in (b"", b"nothing that faiss wrote"):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=r"theirs\.faiss can't be read as a faiss index"):
            from_faiss(path)


def test_nothing_is_shared() -> None:
    x = vectors(1000, 8)
    for theirs in (faiss_pq(x, 2, 4), faiss_ivf(x, 4, 2, 4)):
        index = from_faiss(theirs)
        ref = index.search(x[:5], 10)
        theirs.reset()
        faiss.copy_array_to_vector(np.zeros(2 * 16 * 4, np.float32), theirs.pq.centroids)
        if isinstance(theirs, faiss.IndexIVFPQ):
            theirs.quantizer.reset()
        del theirs
        gc.collect()
        comp = index.search(x[:5], 10)
        np.testing.assert_array_equal(comp[0], ref[0])
        np.testing.assert_array_equal(comp[1], ref[1])


def test_an_empty_index_is_taken() -> None:
    x = vectors(500, 8)
    for theirs in (faiss_pq(x, 2, 4), faiss_ivf(x, 4, 2, 4)):
        theirs.reset()
        index = from_faiss(theirs)
        assert index.ntotal == 0
        assert (index.search(x[:2], 3)[1] == -1).all()
        index.add(x)
        assert index.ntotal == 500


def residual() -> Any:
    return faiss.IndexIVFPQ(faiss.IndexFlatL2(8), 8, 4, 2, 4)


def untrained_ivf() -> Any:
    index = residual()
    index.by_residual = False
    return index


def with_metric(index: Any, metric: int) -> Any:
    index.metric_type = metric
    return index


def pretransform(*chain: Any) -> Any:
    index = faiss_pq(vectors(500, chain[-1].d_out), 2, 4)
    for transform in reversed(chain):
        index = faiss.IndexPreTransform(transform, index)
    return index


Refusal = tuple[Callable[[], Any], type[Exception], str]
BAD = InvalidParameterError
REFUSED: dict[str, Refusal] = {
    "residual": (residual, BAD, "by_residual = True.*Set by_residual = False before training"),
    "IVFPQR": (lambda: faiss.IndexIVFPQR(faiss.IndexFlatL2(8), 8, 4, 2, 4, 2, 4), BAD, "IndexIVFPQR .*by_resid"),
    "fast scan": (lambda: faiss.IndexPQFastScan(8, 2, 4), BAD, "IndexPQFastScan .*IndexPQ that it was made"),
    "IVF fast scan": (
        lambda: faiss.IndexIVFPQFastScan(faiss.IndexFlatL2(8), 8, 4, 2, 4), BAD, "IndexIVFPQFastScan .*IndexIVFPQ",
    ),
    "refine": (lambda: faiss.IndexRefineFlat(faiss.IndexPQ(8, 2, 4)), BAD, "IndexRefineFlat .*convert its base_index"),
    "flat": (lambda: faiss.IndexFlatL2(8), BAD, "IndexFlatL2 can't be taken, only IndexPQ and .*index_factory"),
    "flat, mapped": (lambda: faiss.IndexIDMap(faiss.IndexFlatL2(8)), BAD, "IndexFlatL2 can't be taken"),
    "scalar": (lambda: faiss.IndexScalarQuantizer(8, faiss.ScalarQuantizer.QT_8bit), BAD, "IndexScalarQuantizer"),
    "binary": (lambda: faiss.IndexBinaryFlat(8), BAD, "got IndexBinaryFlat"),
    "L1": (lambda: with_metric(faiss_pq(vectors(500, 8), 2, 4), faiss.METRIC_L1), BAD, "has metric_type 2, only"),
    "3 bits": (lambda: faiss.IndexPQ(8, 2, 3), BAD, "nbits = 3, 4 to 8 can be taken"),
    "12 bits": (lambda: faiss.IndexPQ(8, 2, 12), BAD, "nbits = 12, 4 to 8 can be taken"),
    "untrained": (lambda: faiss.IndexPQ(8, 2, 8), NotTrainedError, "IndexPQ is not trained"),
    "untrained IVF": (untrained_ivf, NotTrainedError, "IndexIVFPQ is not trained"),
    "untrained transform": (lambda: pretransform(faiss.PCAMatrix(12, 8)), NotTrainedError, "PCAMatrix is not trained"),
    "L1 normalisation": (lambda: pretransform(faiss.NormalizationTransform(8, 1.0)), BAD, r"\(norm = 1\) can't be"),
    "normalised late": (
        lambda: pretransform(trained(faiss.RandomRotationMatrix(8, 8), vectors(9, 8)), faiss.NormalizationTransform(8)),
        BAD, "NormalizationTransform follows a linear",
    ),
    "normalised after normalised and centred": (
        lambda: pretransform(faiss.NormalizationTransform(12), CHAINS["centre"][0], faiss.NormalizationTransform(12)),
        BAD, "NormalizationTransform follows a linear",
    ),
    "None": (lambda: None, BAD, "got NoneType"),
    "ours": (lambda: ours(0), BAD, "got HyperbolicPQIndex"),
    "vectors": (lambda: vectors(3, 8), BAD, "got ndarray"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_refused_with_a_reason(name: str) -> None:
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        from_faiss(make())


def test_ids_that_no_index_of_ours_holds_are_refused() -> None:
    x = vectors(500, 8)
    theirs = faiss.IndexIDMap(faiss.IndexPQ(8, 2, 4))
    theirs.train(x)
    theirs.add_with_ids(x, np.arange(500) - 1)
    with pytest.raises(InvalidVectorsError, match=r"ids must be from 0 .* has -1 to 498"):
        from_faiss(theirs)
    lists = faiss_ivf(x, 4, 2, 4)
    lists.add_with_ids(x, np.arange(500) - 10)
    with pytest.raises(InvalidVectorsError, match=r"ids must be from 0 .* has -10 to"):
        from_faiss(lists)
    lists.reset()
    theirs = faiss.IndexIDMap(lists)
    lists.add_with_ids(x, np.arange(500) * 2)
    theirs.ntotal = 500
    faiss.copy_array_to_vector(np.arange(500), theirs.id_map)
    with pytest.raises(InvalidVectorsError, match="IndexIDMap of 500 ids wraps an index with ids 0 to 998"):
        from_faiss(theirs)


def test_projector_from_faiss_wants_transforms() -> None:
    single = projector_from_faiss(CHAINS["opq"][0])
    assert isinstance(single, Projector)
    np.testing.assert_array_equal(single.transform(X), projector_from_faiss(CHAINS["opq"]).transform(X))
    for bad, got in (([], "none"), ([None], "NoneType"), ([faiss.IndexFlatL2(3)], "IndexFlatL2")):
        with pytest.raises(InvalidParameterError, match=f"got {got}"):
            projector_from_faiss(bad)


# ------------------------------------------------------------------------------------------------ to FAISS


def assert_ranks_alike(index: Any, stock: Any, xq: np.ndarray, k: int = 20) -> None:
    D, I = stock.search(faiss_query(index, xq), k)
    assert_same_neighbours(index.search(xq, k), (-D, I))


@pytest.mark.parametrize("metric", ["geodesic", "squared", "inner_product"])
@pytest.mark.parametrize(("M", "nbits"), [(4, 8), (3, 4), (3, 7), (1, 5)])
def test_stock_flat_index_ranks_as_ours(metric: Any, M: int, nbits: int) -> None:
    index = ours(M=M, nbits=nbits, metric=metric)
    stock = to_faiss(index)
    assert type(stock) is faiss.IndexPQ
    assert (stock.ntotal, stock.code_size, stock.is_trained) == (3000, index.code_size, True)
    np.testing.assert_array_equal(faiss.vector_to_array(stock.codes), index.codes.ravel())
    assert_ranks_alike(index, stock, vectors(40, index.d, seed=9))


@pytest.mark.parametrize("metric", ["geodesic", "squared", "inner_product"])
@pytest.mark.parametrize("nbits", [8, 5])
def test_stock_ivf_index_ranks_as_ours(metric: Any, nbits: int) -> None:
    index = our_ivf(metric=metric, nbits=nbits)
    index.nprobe = 3
    stock = to_faiss(index)
    assert type(stock) is faiss.IndexIVFPQ
    assert (stock.ntotal, stock.nlist, stock.nprobe, stock.by_residual) == (3000, 20, 3, False)
    xq = vectors(40, index.d, seed=9)
    some = index.search(xq, 20)[1]
    assert_ranks_alike(index, stock, xq)
    index.nprobe = stock.nprobe = 20
    assert_ranks_alike(index, stock, xq)
    assert (index.search(xq, 20)[1] != some).any()  # nprobe took effect


def test_any_quantizer_goes_along() -> None:
    x = vectors(3000, 12)
    coarse = faiss.IndexHNSWFlat(12, 8)
    index = HyperbolicIVFPQIndex(coarse, 12, 32, 4, 5, clip_radius=1.0)
    index.train(x)
    index.add(x)
    index.nprobe = 4
    assert_ranks_alike(index, to_faiss(index), x[:30])


def test_explicit_ids_and_removals() -> None:
    xq = vectors(30, 12, seed=9)
    index = ours()
    index.remove_ids(np.arange(0, 3000, 3))
    stock = to_faiss(index)
    assert type(stock) is faiss.IndexIDMap2
    assert stock.ntotal == index.ntotal == 2000
    assert_ranks_alike(index, stock, xq)
    assert (index.search(xq, 20)[1] % 3 != 0).all()
    stock.reconstruct(1)  # the reverse map is there
    with pytest.raises(RuntimeError):
        stock.reconstruct(3)

    index = HyperbolicPQIndex.from_codec(index.codec)
    index.add_with_ids(vectors(500, 12, seed=4), np.random.default_rng(0).permutation(10**15 + np.arange(500)))
    assert_ranks_alike(index, to_faiss(index), xq)

    lists = our_ivf()
    removed = lists.search(xq, 1)[1].ravel()
    lists.remove_ids(np.unique(removed))
    lists.nprobe = 20
    assert not np.isin(lists.search(xq, 20)[1], removed).any()
    assert_ranks_alike(lists, to_faiss(lists), xq)


def test_an_empty_index_and_one_smaller_than_k() -> None:
    xq = vectors(3, 12, seed=9)
    for n in (0, 1, 7):
        for index in (ours(n), our_ivf(n)):
            stock = to_faiss(index)
            assert stock.ntotal == n
            assert_ranks_alike(index, stock, xq, 10)


def test_a_projector_is_part_of_the_query() -> None:
    index = ours()
    index.reset()
    index.projector = Projector([(vectors(12, 30), vectors(1, 12)[0])], normalize=True)
    x = vectors(2000, 30, seed=2)
    index.add(x)
    assert faiss_query(index, x[:7]).shape == (7, 4 * 256)
    assert_ranks_alike(index, to_faiss(index), x[:20])


@pytest.mark.parametrize("kind", ["flat", "flat with ids", "ivf"])
def test_there_and_back_gives_the_same_bits(kind: str) -> None:
    index: Any = our_ivf() if kind == "ivf" else ours()
    if kind == "flat with ids":
        index.remove_ids([0, 5])
    back = from_faiss(to_faiss(index))
    assert back.codec.metric == "inner_product"
    xq = vectors(20, 12, seed=9)
    D, I = index.search(xq, 30)
    back_D, back_I = back.search(faiss_query(index, xq), 30)
    np.testing.assert_array_equal(back_I, I)
    np.testing.assert_array_equal(back_D, D)


@pytest.mark.parametrize("kind", ["flat", "flat with ids", "ivf"])
def test_another_process_needs_faiss_and_the_queries_only(kind: str, python: Python, tmp_path: Path) -> None:
    index: Any = our_ivf() if kind == "ivf" else ours()
    if kind == "ivf":
        index.nprobe = 5
    elif kind == "flat with ids":
        index.remove_ids(np.arange(100))
    xq = vectors(20, 12, seed=9)
    faiss.write_index(to_faiss(index), str(tmp_path / "stock.faiss"))
    np.save(tmp_path / "queries.npy", faiss_query(index, xq))
    script = """
import sys
import numpy as np
import faiss
folder = sys.argv[1]
D, I = faiss.read_index(folder + "/stock.faiss").search(np.load(folder + "/queries.npy"), 10)
np.savez(folder + "/found.npz", D=D, I=I)
print(sorted(name for name in sys.modules if name.split(".")[0] in ("hyperfaiss", "numba", "training")))
"""
    assert python(script, str(tmp_path), PYTHONPATH="").stdout.strip() == "[]"
    found = np.load(tmp_path / "found.npz")
    assert_same_neighbours(index.search(xq, 10), (-found["D"], found["I"]))


def test_nothing_of_ours_is_shared() -> None:
    xq = vectors(10, 12, seed=9)
    index = our_ivf()
    index.nprobe = 5
    stock, queries = to_faiss(index), faiss_query(index, xq)
    ref = stock.search(queries, 10)
    index.quantizer.reset()
    index.reset()
    del index
    gc.collect()
    comp = stock.search(queries, 10)
    np.testing.assert_array_equal(comp[0], ref[0])
    np.testing.assert_array_equal(comp[1], ref[1])


def test_bad_arguments_of_to_faiss_and_faiss_query() -> None:
    for bad in (None, faiss.IndexFlatL2(3), ours(0).codec):
        with pytest.raises(InvalidParameterError, match=f"got {type(bad).__name__}"):
            to_faiss(bad)  # type: ignore[arg-type]
        with pytest.raises(InvalidParameterError, match=f"got {type(bad).__name__}"):
            faiss_query(bad, vectors(2, 3))  # type: ignore[arg-type]
    with pytest.raises(NotTrainedError):
        to_faiss(HyperbolicPQIndex(12, 4))
    with pytest.raises(NotTrainedError):
        faiss_query(HyperbolicPQIndex(12, 4), vectors(2, 12))
    index = ours(10)
    with pytest.raises(InvalidVectorsError, match=r"\(n, 12\), got \(2, 11\)"):
        faiss_query(index, vectors(2, 11))
    flat = ours(10, metric="squared", theta=0.0)
    queries = vectors(3, 12)
    queries[1, 4] = 3e38
    with pytest.raises(InvalidVectorsError, match="row 1: a distance to a codeword is beyond float32"):
        faiss_query(flat, queries)
    assert faiss_query(flat, queries[:0]).shape == (0, 1024)


# ------------------------------------------------------------------------------------------------ FAISS's tools


@pytest.mark.parametrize("make", [ours, our_ivf])
def test_result_heap_merges_our_shards(make: Callable[..., Any]) -> None:
    """Three shards searched apart and merged by faiss.ResultHeap are the whole index, ids past the end included."""
    whole = make()
    whole.nprobe = 20
    xq = vectors(20, 12, seed=9)
    ids = np.sort(whole.ids)
    heap = faiss.ResultHeap(len(xq), 50)
    for shard_ids in (ids[:5], ids[5:1800], ids[1800:]):
        shard = make()
        shard.nprobe = 20
        shard.remove_ids(np.setdiff1d(ids, shard_ids))
        heap.add_result(*shard.search(xq, 50))
    heap.finalize()
    assert_same_neighbours(whole.search(xq, 50), (heap.D, heap.I), rtol=0)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FAISS's evaluation leaves its thread pools open, of which Python would warn."""
    made: list[ThreadPool] = []

    def make(processes: int) -> ThreadPool:
        made.append(ThreadPool(min(processes, 2)))
        return made[-1]

    monkeypatch.setattr(evaluation, "ThreadPool", make)
    yield
    assert made
    for pool in made:
        pool.close()
        pool.join()


@pytest.mark.parametrize("make", [ours, our_ivf])
def test_contrib_evaluation_reads_our_results(make: Callable[..., Any], pools: None) -> None:
    index = make()
    index.nprobe = 20
    xq = vectors(20, 12, seed=9)
    D, I = index.search(xq, 30)
    assert evaluation.knn_intersection_measure(I, I) == 1
    assert evaluation.knn_intersection_measure(I[:, :15].copy(), I[:, 15:].copy()) == 0
    radius = float(np.median(D))
    lims, range_D, range_I = index.range_search(xq, radius)
    evaluation.check_ref_range_results(lims, range_D, range_I, *index.range_search(xq, radius))
    assert evaluation.range_PR(lims, range_I, lims, range_I) == (1, 1)
    half = evaluation.filter_range_results(lims, range_D, range_I, radius / 2)
    evaluation.check_ref_range_results(*index.range_search(xq, radius / 2), *half)
    precision, recall = evaluation.range_PR(lims, range_I, half[0], half[2])
    assert precision == 1
    assert recall == len(half[1]) / len(range_D)
    precisions, recalls = evaluation.range_PR_multiple_thresholds(
        lims, range_I, lims, range_D, range_I, np.array([radius / 2, radius], np.float32)
    )
    np.testing.assert_allclose(precisions, 1)
    np.testing.assert_allclose(recalls, [recall, 1])


@pytest.mark.parametrize("make", [ours, our_ivf])
def test_contrib_exhaustive_search_drives_our_range_search(make: Callable[..., Any]) -> None:
    """FAISS's range search under a budget of results, which lowers the radius as it goes, runs on our index."""
    index = make()
    index.nprobe = 20
    xq = vectors(300, 12, seed=9)
    start = float(np.median(index.search(xq, 30)[0][:, -1]))
    batches = exhaustive_search.exponential_query_iterator(xq, start_bs=16)
    radius, lims, D, I = exhaustive_search.range_search_max_results(index, batches, start, max_results=3000, clip_to_min=True)
    assert radius < start  # the budget took effect
    assert 2000 < len(D) <= 3000
    ref = index.range_search(xq, radius)
    np.testing.assert_array_equal(lims, ref[0])
    np.testing.assert_array_equal(I, ref[2])
    np.testing.assert_array_equal(D, ref[1])
    lims, D, I = exhaustive_search.threshold_radius(*ref, radius / 2)
    evaluation.check_ref_range_results(*index.range_search(xq, radius / 2), lims, D, I)
