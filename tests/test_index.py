"""The flat index: exact search to the bit, the contract of its calls, errors, interruption, forks, threads."""

# ruff: noqa: E741 (D and I are FAISS's names)
from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import faiss
import naive
import numpy as np
import pytest
import torch
from faiss.contrib.evaluation import knn_intersection_measure
from hypothesis import given
from hypothesis import strategies as st

import hyperfaiss
import hyperfaiss.search
from hyperfaiss import (
    HyperbolicPQIndex,
    HyperbolicProductQuantizer,
    InvalidParameterError,
    InvalidVectorsError,
    Model,
    NotTrainedError,
    Projector,
    read_index,
    write_index,
)
from hyperfaiss.packing import pack, unpack
from tests.toys import FORKS, INTERRUPTION, Python, assert_same, codes_of, random_index, vectors

# ------------------------------------------------------------------------------------------------ exactness


def scripted(kind: str, M: int, ntotal: int, nq: int) -> tuple[HyperbolicPQIndex, np.ndarray]:
    """An index in the plane's simplest case, one dimension a subspace and flat, whose tables are |x - c|; and queries."""
    rng = np.random.default_rng(ntotal)
    codes = rng.integers(256, size=(ntotal, M)).astype(np.uint8)
    queries = rng.normal(size=(nq, M)).astype(np.float32)
    if kind == "random":
        books = rng.normal(size=(M, 256, 1))
    elif kind == "clustered":  # few codes, near each other
        books = rng.normal(size=(M, 256, 1)) * 1e-3
        codes = (codes % 3).astype(np.uint8)
    elif kind == "constant":  # all distances equal
        books = np.ones((M, 256, 1))
    elif kind == "duplicated":  # a few small integers: ties everywhere
        books = rng.integers(3, size=(M, 256, 1))
        queries = np.round(queries)
    else:  # "wide": entries from 1e-30 to beyond float32, where the order of the sum shows and inf is a distance
        books = np.exp(rng.uniform(-70, 88.6, size=(M, 256, 1)))
        books[:, ::7] = 3.4e38
        queries[::2] = -3e38
    index = HyperbolicPQIndex.from_codec(HyperbolicProductQuantizer.from_codebooks(books.astype(np.float32), 0.0))
    index.add_sa_codes(codes)
    return index, queries


@pytest.mark.parametrize("kind", ["random", "clustered", "constant", "duplicated", "wide"])
@pytest.mark.parametrize("M", [1, 2, 3, 7, 8, 16, 64])
def test_search_is_exact(kind: str, M: int) -> None:
    turn = 0
    for ntotal in (0, 1, 63, 64, 65, 255, 256, 257, 10007):
        for nq in (0, 1, 5, 64):
            if ntotal > 1000 and nq == 64 and M != 3:
                continue  # enough is enough
            index, queries = scripted(kind, M, ntotal, nq)
            assert index.ntotal == ntotal
            tables = index.codec.compute_distance_tables(queries)
            ref = naive.search(tables, codes_of(index), ntotal + 5)
            for k in {1, 10, ntotal, ntotal + 5} - {0}:
                if k > 1000 and nq > 5:
                    continue
                turn += 1
                hyperfaiss.set_num_threads((1, 2, 3, 5)[turn % 4])
                if k <= ntotal + 5:
                    assert_same(index.search(queries, k), (ref[0][:, :k], ref[1][:, :k]))
                else:
                    assert_same(index.search(queries, k), naive.search(tables, codes_of(index), k))
    assert turn > 50


def test_the_data_of_the_exactness_test_is_what_it_says() -> None:
    index, queries = scripted("wide", 8, 1000, 5)
    D, I = index.search(queries, 1000)
    assert np.isinf(D).any()
    assert (I >= 0).all()
    tables = index.codec.compute_distance_tables(queries)
    other = naive.search(tables[:, ::-1], index.codes[:, ::-1], 1000)
    assert (other[0] != D).any()  # the order of the sum shows
    index, queries = scripted("duplicated", 3, 1000, 5)
    assert len(np.unique(index.search(queries, 1000)[0])) < 20
    index, queries = scripted("constant", 3, 1000, 5)
    np.testing.assert_array_equal(index.search(queries, 7)[1], np.arange(7)[None].repeat(5, axis=0))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("metric", ["geodesic", "squared"])
def test_any_split_gives_the_same_bits(threads: int, metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    index = random_index(3000, M=4, ksub=64, theta=[0, 0.1, 1, 10], metric=metric)
    x = vectors(50, 16)
    hyperfaiss.set_num_threads(threads)
    ref = naive.search(index.codec.compute_distance_tables(x), codes_of(index), 20)
    assert_same(index.search(x, 20), ref)
    for start, stop in ((0, 1), (3, 4), (7, 40)):
        assert_same(index.search(x[start:stop], 20), (ref[0][start:stop], ref[1][start:stop]))
    # small limits: several chunks of queries and several calls of the kernel a task
    for tables, lookups in ((1, 1), (4 * 4 * 64 * 7, 4 * 64 * 7 * 5), (1 << 30, 1)):
        monkeypatch.setattr(hyperfaiss.search, "_TABLE_BYTES", tables)
        monkeypatch.setattr(hyperfaiss.search, "_LOOKUPS", lookups)
        assert_same(index.search(x, 20), ref)
        assert_same(index.search(x[:1], 20), (ref[0][:1], ref[1][:1]))


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 5]), st.integers(0, 400), st.integers(1, 450), st.integers(1, 4))
def test_search_property(seed: int, M: int, ntotal: int, k: int, threads: int) -> None:
    rng = np.random.default_rng(seed)
    books = rng.integers(rng.integers(1, 6), size=(M, 16, 1)).astype(np.float32)
    index = HyperbolicPQIndex.from_codec(HyperbolicProductQuantizer.from_codebooks(books, 0.0))
    index.add_sa_codes(pack(rng.integers(16, size=(ntotal, M)).astype(np.uint8), 4))
    hyperfaiss.set_num_threads(threads)
    x = rng.integers(4, size=(3, M)).astype(np.float32)
    assert_same(index.search(x, k), naive.search(index.codec.compute_distance_tables(x), codes_of(index), k))


def test_bits_without_the_jit(python: Python, tmp_path: Path) -> None:
    """The kernels as plain Python give the same codebooks, codes, tables, distances and ids."""
    script = """
import sys
import numpy as np
import numba
import hyperfaiss as hf
out = {"jit": not numba.config.DISABLE_JIT}
rng = np.random.default_rng(0)
x, q = rng.normal(size=(130, 6)).astype(np.float32), rng.normal(size=(3, 6)).astype(np.float32)
hf.set_num_threads(2)
for metric in ("geodesic", "squared"):
    index = hf.HyperbolicPQIndex(6, 3, 4, curvatures=[0, 0.5, 4], metric=metric)
    index.train(x[:40])
    index.add(x)
    out[metric + "books"], out[metric + "codes"] = index.codec.codebooks, index.codes
    out[metric + "tables"] = index.codec.compute_distance_tables(q)
    out[metric + "D"], out[metric + "I"] = index.search(q, 20)
np.savez(sys.argv[1], **out)
"""
    python(script, str(tmp_path / "ref.npz"))
    python(script, str(tmp_path / "comp.npz"), NUMBA_DISABLE_JIT="1")
    ref, comp = np.load(tmp_path / "ref.npz"), np.load(tmp_path / "comp.npz")
    assert (bool(ref["jit"]), bool(comp["jit"])) == (True, False)
    assert len(ref.files) == 11
    for name in set(ref.files) - {"jit"}:
        np.testing.assert_array_equal(comp[name], ref[name], err_msg=name)


# ------------------------------------------------------------------------------------------------ FAISS


def test_flat_squared_finds_the_neighbours_of_faiss() -> None:
    d, M, k = 32, 8, 50
    ref_index = faiss.IndexPQ(d, M, 8)
    x, q = vectors(5000, d), vectors(40, d, seed=9)
    ref_index.train(x[:2600])
    ref_index.add(x)
    books = faiss.vector_to_array(ref_index.pq.centroids).reshape(M, 256, d // M)
    index = HyperbolicPQIndex.from_codec(HyperbolicProductQuantizer.from_codebooks(books, 0.0, metric="squared"))
    index.add(x)
    assert (index.codes == faiss.vector_to_array(ref_index.codes).reshape(-1, M)).mean() > 0.999
    index.reset()
    index.add_sa_codes(faiss.vector_to_array(ref_index.codes).reshape(-1, M))  # so that only the search is compared
    ref_D, ref_I = ref_index.search(q, k + 1)
    D, I = index.search(q, k)
    np.testing.assert_allclose(D, ref_D[:, :k], rtol=1e-5)
    for row in range(len(q)):  # the same set, up to draws at the border that FAISS's rounding can't see
        border = D[row, -1] * (1 - 1e-5)
        assert set(I[row][D[row] < border]) <= set(ref_I[row])
        assert set(ref_I[row][ref_D[row] < border]) <= set(I[row])
    assert knn_intersection_measure(I, ref_I[:, :k]) > 0.99
    np.testing.assert_allclose(index.reconstruct_n(0, 100), ref_index.reconstruct_n(0, 100), rtol=1e-6)


def test_faiss_metric_names_the_difference() -> None:
    """The two metrics rank differently, so a test that passes with either would say nothing."""
    x = vectors(20, 12)
    assert (random_index(metric="squared").search(x, 10)[1] != random_index(metric="geodesic").search(x, 10)[1]).any()


# ------------------------------------------------------------------------------------------------ the contract


def test_attributes() -> None:
    index = HyperbolicPQIndex(d=np.int64(24), M=6, nbits=5, metric="squared", clip_radius=2, curvatures=0.5, seed=3)
    ref = {"d": 24, "M": 6, "nbits": 5, "ksub": 32, "dsub": 4, "code_size": 4, "sa_code_size": 4, "ntotal": 0,
           "next_id": 0, "is_trained": False, "metric": "squared", "metric_type": faiss.METRIC_L2, "verbose": False,
           "projector": None}  # fmt: skip
    assert {name: getattr(index, name) for name in ref} == ref
    assert (index.codec.clip_radius, index.codec.seed) == (2, 3)
    assert index.codes.shape == (0, 4)
    assert index.codes.dtype == np.uint8
    index.verbose = True
    assert index.codec.verbose
    index.verbose = False
    index.train(vectors(100, 24))
    index.add(vectors(10, 24))
    assert index.is_trained
    assert index.ntotal == len(index) == 10
    for word in ("d=24", "ntotal=10", "nbits=5", "squared"):
        assert word in repr(index)


def test_padding() -> None:
    index = random_index(3)
    D, I = index.search(vectors(2, 12), 5)
    assert (I[:, 3:] == -1).all()
    assert (D[:, 3:] == np.inf).all()
    assert np.isfinite(D[:, :3]).all()
    index.reset()
    D, I = index.search(vectors(2, 12), 5)
    assert D.tolist() == [[np.inf] * 5] * 2
    assert I.tolist() == [[-1] * 5] * 2


def test_vectors_find_themselves() -> None:
    index = random_index(0, M=3, ksub=256)
    index.add_sa_codes(np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1))
    D, I = index.search(index.reconstruct_n(), 1)
    np.testing.assert_array_equal(I[:, 0], np.arange(256))
    assert D.max() < 1e-5


@pytest.mark.parametrize("k", [1, 10, 300, 305])
def test_output_arrays(k: int) -> None:
    index, x = random_index(), vectors(7, 12)
    ref = index.search(x, k)
    D, I = np.full((7, k), -5, np.float32), np.full((7, k), -5, np.int64)
    comp = index.search(x, k, D=D, I=I)
    assert comp[0] is D
    assert comp[1] is I
    assert_same(comp, ref)
    assert_same(index.search(x, k, D=D), ref)
    assert_same(index.search(x, k, I=I), ref)


@pytest.mark.parametrize("k", [np.int64(7), np.uint8(7), np.array(7)])
def test_integers_of_numpy_are_integers(k: Any) -> None:
    index, x = random_index(), vectors(4, 12)
    assert_same(index.search(x, k), index.search(x, 7))
    np.testing.assert_array_equal(index.reconstruct(k), index.reconstruct(7))


def test_input_types() -> None:
    index = random_index()
    x = np.round(vectors(10, 12) * 8) / 8  # the same in every dtype
    ref = index.search(x, 5)
    wide = np.zeros((20, 24), np.float32)
    wide[::2, ::2] = x
    for same in (
        x.astype(np.float64), x.astype(np.float16), np.asfortranarray(x), wide[::2, ::2], x[::-1][::-1], x.tolist(),
        torch.from_numpy(x), torch.from_numpy(x).double().requires_grad_(), torch.from_numpy(x.T.copy()).T,
    ):  # fmt: skip
        assert_same(index.search(same, 5), ref)
        before = index.ntotal
        index.add(same)
        np.testing.assert_array_equal(codes_of(index)[before:], index.codec.compute_codes(x))
        index = random_index()


@pytest.mark.parametrize("pieces", [[1] * 130, [63, 1, 66], [64, 66], [0, 65, 0, 65], [129, 1]])
def test_add_in_pieces(pieces: list[int]) -> None:
    x, whole, index = vectors(130, 12), random_index(0), random_index(0)
    whole.add(x)
    for start, n in zip(np.cumsum([0, *pieces]), pieces, strict=False):
        index.add(x[start : start + n])
    assert index.ntotal == 130
    np.testing.assert_array_equal(index.codes, whole.codes)
    np.testing.assert_array_equal(index.codes, whole.sa_encode(x))
    assert_same(index.search(x[:3], 130), whole.search(x[:3], 130))


def test_many_small_adds_keep_what_was_there() -> None:
    index = random_index(0, M=64, ksub=16, dsub=1)
    codes = np.random.default_rng(0).integers(256, size=(40000, 32)).astype(np.uint8)
    for piece in np.array_split(codes, 57):
        index.add_sa_codes(piece)
    np.testing.assert_array_equal(index.codes, codes)


def test_codes_is_a_copy() -> None:
    index = random_index(100)
    before = index.codes
    index.codes[:] = 0
    np.testing.assert_array_equal(index.codes, before)
    index.add(vectors(100, 12))
    assert len(before) == 100


def test_reset() -> None:
    index, x = random_index(), vectors(20, 12)
    index.reset()
    assert index.ntotal == 0
    assert index.is_trained
    index.add(x)
    np.testing.assert_array_equal(index.codes, index.sa_encode(x))


def test_sa_codec() -> None:
    index, x = random_index(10), vectors(20, 12)
    codes = index.sa_encode(x)
    assert codes.dtype == np.uint8
    assert codes.shape == (20, index.sa_code_size)
    assert index.ntotal == 10
    np.testing.assert_array_equal(index.sa_decode(codes), index.codec.decode(unpack(codes, 3, 4)))
    index.add_sa_codes(codes)
    np.testing.assert_array_equal(index.codes[10:], codes)
    np.testing.assert_array_equal(index.reconstruct_n(10, 20), index.sa_decode(codes))


def test_reconstruct() -> None:
    index = random_index(200)
    every = index.reconstruct_n()
    assert every.dtype == np.float32
    np.testing.assert_array_equal(every, index.sa_decode(index.codes))
    for start, n in ((0, 0), (0, 1), (63, 2), (64, 64), (199, 1), (200, 0), (100, -1), (200, -1)):
        np.testing.assert_array_equal(
            index.reconstruct_n(start, n), every[start : 200 if n == -1 else start + n], err_msg=f"{start} {n}"
        )
    np.testing.assert_array_equal(index.reconstruct(77), every[77])


def test_from_codec_shares_the_codec() -> None:
    codec = random_index().codec
    index = HyperbolicPQIndex.from_codec(codec)
    assert index.codec is codec
    assert index.ntotal == 0


def test_training() -> None:
    x = vectors(200, 12)
    index = HyperbolicPQIndex(12, 3, 4)
    index.train(x)
    codec = HyperbolicProductQuantizer(12, 3, 4)
    codec.train(x)
    np.testing.assert_array_equal(index.codec.codebooks, codec.codebooks)
    index.add(x)
    with pytest.raises(InvalidParameterError, match=r"200 codes .* reset\(\) first"):
        index.train(x)
    np.testing.assert_array_equal(index.codec.codebooks, codec.codebooks)
    index.reset()
    index.train(x[:100])
    assert (index.codec.codebooks != codec.codebooks).any()


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda i: pickle.loads(pickle.dumps(i))])
def test_copies(how: Any) -> None:
    index, x = random_index(100), vectors(30, 12)
    ref = index.search(x, 10)
    twin = how(index)
    assert_same(twin.search(x, 10), ref)
    if how is not copy.copy:  # a deep copy lives its own life
        twin.add(x)
        assert (index.ntotal, twin.ntotal) == (100, 130)
        assert_same(index.search(x, 10), ref)


# ------------------------------------------------------------------------------------------------ models and files


def model(d_in: int = 6, d: int = 12) -> Model:
    rng = np.random.default_rng(4)
    layers = [(rng.normal(size=(9, d_in)), rng.normal(size=9)), (rng.normal(size=(d, 9)), rng.normal(size=d))]
    projector = Projector(layers, power=0.5, mean=rng.normal(size=d_in), normalize=True)
    return Model(projector, random_index(theta=[0.1, 1, 2], clip_radius=1.5).codec)


def test_from_model_projects() -> None:
    m = model()
    x = vectors(100, 6)
    index, ref = HyperbolicPQIndex.from_model(m), HyperbolicPQIndex.from_codec(m.codec)
    assert (index.d, index.codec.d) == (6, 12)
    index.add(x)
    ref.add(m.projector.transform(x))
    np.testing.assert_array_equal(index.codes, ref.codes)
    assert_same(index.search(x[:9], 5), ref.search(m.projector.transform(x[:9]), 5))
    assert index.reconstruct(0).shape == (12,)
    assert "6->9->12" in repr(index)
    with pytest.raises(InvalidVectorsError, match=r"\(n, 6\), got \(2, 12\)"):
        index.search(vectors(2, 12), 5)


def test_from_model_needs_no_torch(python: Python, tmp_path: Path) -> None:
    m, x = model(), vectors(50, 6)
    m.save(tmp_path / "model")
    np.save(tmp_path / "x.npy", x)
    script = """
import sys
import numpy as np
import hyperfaiss as hf
folder = sys.argv[1]
x = np.load(folder + "/x.npy")
index = hf.HyperbolicPQIndex.from_model(folder + "/model")
index.add(x)
D, I = index.search(x, 5)
hf.write_index(index, folder + "/index")
hf.read_index(folder + "/index")
np.savez(folder + "/out.npz", D=D, I=I)
for name in ("torch", "sklearn", "scipy.cluster", "matplotlib", "rich", "typer", "pandas"):
    assert name not in sys.modules, name
"""
    python(script, str(tmp_path))
    index = HyperbolicPQIndex.from_model(tmp_path / "model")
    index.add(x)
    comp = np.load(tmp_path / "out.npz")
    assert_same((comp["D"], comp["I"]), index.search(x, 5))


@pytest.mark.parametrize("ntotal", [0, 1, 64, 200])
@pytest.mark.parametrize("projected", [False, True])
def test_write_and_read(ntotal: int, projected: bool, tmp_path: Path) -> None:
    index = HyperbolicPQIndex.from_model(model()) if projected else random_index(0, ksub=32, metric="squared")
    x = vectors(max(ntotal, 5), index.d)
    index.add(x[:ntotal])
    write_index(index, tmp_path / "index")
    comp = read_index(str(tmp_path / "index"))
    assert repr(comp) == repr(index)
    np.testing.assert_array_equal(comp.codes, index.codes)
    assert_same(comp.search(x[:5], 7), index.search(x[:5], 7))
    for i in (comp, index):  # what was read can grow
        i.add(x[:5])
        i.add(x)
    assert_same(comp.search(x[:5], 300), index.search(x[:5], 300))
    assert sorted(tmp_path.iterdir()) == [tmp_path / "index"]


def test_write_untrained(tmp_path: Path) -> None:
    with pytest.raises(NotTrainedError):
        write_index(HyperbolicPQIndex(8, 2), tmp_path / "index")
    assert not list(tmp_path.iterdir())


def test_a_failed_add_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    index = random_index()
    monkeypatch.setattr(hyperfaiss.codec, "_ENCODE_ROWS", 10)
    x = np.ones((100, 12), np.float32)
    x[95] = 1e6
    codes = index.codes
    with pytest.raises(InvalidVectorsError, match="row 95"):
        index.add(x)
    np.testing.assert_array_equal(index.codes, codes)


def test_a_query_that_leaves_float32_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hyperfaiss.search, "_TABLE_BYTES", 1)
    index, x = random_index(), vectors(50, 12)
    x[37] = 1e6
    for threads in (1, 3):
        hyperfaiss.set_num_threads(threads)
        with pytest.raises(InvalidVectorsError, match="row 37"):
            index.search(x, 3)


# ------------------------------------------------------------------------------------------------ processes and threads


LONG_CALLS = """
import os, signal, sys, threading, time
import numpy as np
import hyperfaiss as hf
rng = np.random.default_rng(0)
M = 8
books = rng.normal(size=(M, 256, 4)).astype(np.float32)
hf.set_num_threads(int(sys.argv[1]))
index = hf.HyperbolicPQIndex.from_codec(hf.HyperbolicProductQuantizer.from_codebooks(books, 1.0))
x = rng.normal(size=(200_000, 4 * M)).astype(np.float32)
index.add(x[:100])
index.search(x[:3], 5)  # compiled by now
if sys.argv[2] == "search":
    index.add_sa_codes(rng.integers(256, size=(1_000_000, M)).astype(np.uint8))
    work = lambda: index.search(x, 10)
else:
    work = lambda: index.add(np.tile(x, (10, 1)))
limit, intact = 1.5, lambda: True
"""


@pytest.mark.parametrize("work", ["search", "add"])
@pytest.mark.parametrize("threads", ["1", "3"])
def test_ctrl_c(work: str, threads: str, python: Python) -> None:
    assert "intact" in python(LONG_CALLS + INTERRUPTION, threads, work).stdout


def test_fork_after_use(python: Python) -> None:
    """A child forked after a search that used the pool searches and adds as its parent does."""
    script = """
import multiprocessing
import numpy as np
import hyperfaiss as hf
rng = np.random.default_rng(0)
x = rng.normal(size=(20_000, 8)).astype(np.float32)
hf.set_num_threads(3)
index = hf.HyperbolicPQIndex(8, 2, 4)
index.train(x[:1000])
index.add(x)
more = lambda: None
"""
    assert "same" in python(script + FORKS).stdout


def test_searches_of_several_python_threads_at_once() -> None:
    index, x = random_index(20_000), vectors(200, 12)
    hyperfaiss.set_num_threads(3)
    ref = index.search(x, 10)
    failures: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(15):
            rows = np.sort(rng.choice(len(x), rng.integers(1, 50), replace=False))
            try:
                assert_same(index.search(x[rows], 10), (ref[0][rows], ref[1][rows]))
            except BaseException as error:  # brought back to the test's thread
                failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures


def test_memory_of_a_search_is_bounded(python: Python) -> None:
    """12,000 queries at M = 16 would need 200 MB of tables at once."""
    script = """
import resource
import numpy as np
import hyperfaiss as hf
rng = np.random.default_rng(0)
books = rng.normal(size=(16, 256, 1)).astype(np.float32)
index = hf.HyperbolicPQIndex.from_codec(hf.HyperbolicProductQuantizer.from_codebooks(books, 0.0, metric="squared"))
x = rng.normal(size=(12_000, 16)).astype(np.float32)
index.add(x[:100])
index.search(x[:10], 1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
index.search(x, 1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    assert int(python(script).stdout) < 80
