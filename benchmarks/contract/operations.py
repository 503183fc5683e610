"""What an index should do: each operation tries it, and checks the answer."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

import hyperfaiss

from .subjects import NLIST, XB, XQ, D, M, N, Subject

Operation = Callable[[Subject], None]
OPERATIONS: dict[str, Operation] = {}


def operation(name: str) -> Callable[[Operation], Operation]:
    """Register what an index should do."""

    def register(function: Operation) -> Operation:
        OPERATIONS[name] = function
        return function

    return register


class WrongAnswerError(Exception):
    """The call returned, and what it returned or left behind is not right."""


def check(right: Any, what: str) -> None:
    """Fail the operation unless ``right``."""
    if not right:
        raise WrongAnswerError(what)


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Equal to the bit, array by array."""
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@contextlib.contextmanager
def file_of(subject: Subject, index: Any) -> Iterator[str]:
    """The name of a file that holds ``index``."""
    with tempfile.TemporaryDirectory() as folder:
        name = str(Path(folder) / "index")
        subject.write(index, name)
        yield name


def filtered(index: Any, admitted: npt.NDArray[np.bool_], k: int) -> npt.NDArray[np.int64]:
    """The ids of a search among ``admitted`` by searching everything and dropping the rest."""
    everything = index.search(XQ, N)[1]
    return np.stack([row[admitted[row]][:k] for row in everything])


# --------------------------------------------------------------------------------------------- build


@operation("construct with NumPy integers")
def _(subject: Subject) -> None:
    check(subject.new(np.int64(D), np.int64(M), np.int32(8)).d == D, "d")


@operation("train gives the same codebooks with 1 and 2 threads")
def _(subject: Subject) -> None:
    codes = []
    for threads in (1, 2):
        faiss.omp_set_num_threads(threads)
        hyperfaiss.set_num_threads(threads)
        index = subject.new()
        index.train(XB)
        codes.append(index.sa_encode(XB[:1000]))
    check(np.array_equal(*codes), "codes differ")


@operation("add, search: sorted, and no worse than the vector itself")
def _(subject: Subject) -> None:
    index = subject.full()
    distances, ids = index.search(XB[:50], N)
    check((np.diff(distances, axis=1) >= 0).all(), "not sorted")
    ranks = np.array([np.flatnonzero(ids[i] == i)[0] for i in range(50)])
    check((np.sort(ids, axis=1) == np.arange(N)).all(), "ids")
    check(np.median(ranks) < 20, f"a vector is its own neighbour number {np.median(ranks):.0f}")


@operation("add_with_ids")
def _(subject: Subject) -> None:
    index = subject.trained()
    index.add_with_ids(XB[:100], np.arange(100) * 10**12)
    check(set(index.search(XQ, 100)[1].ravel()) == set(np.arange(100) * 10**12), "ids")


@operation("add float64, float16 and strided arrays")
def _(subject: Subject) -> None:
    index = subject.trained()
    index.add(XB[:100].astype(np.float64))
    index.add(XB[100:200].astype(np.float16))
    index.add(np.asfortranarray(XB[200:600:2]))
    check(index.ntotal == 400, "ntotal")


@operation("add and search torch tensors")
def _(subject: Subject) -> None:
    import torch

    index = subject.trained()
    index.add(torch.from_numpy(XB))
    distances, ids = index.search(torch.from_numpy(XQ), 5)
    check(same((np.asarray(distances), np.asarray(ids)), subject.full().search(XQ, 5)), "other result")


@operation("merge_from")
def _(subject: Subject) -> None:
    index = subject.full()
    other = copy.deepcopy(index) if subject.ours else faiss.clone_index(index)
    index.merge_from(other, N if subject.ivf else 0)  # IndexPQ takes no other, and numbers on
    check(index.ntotal == 2 * N, "ntotal")
    check((np.sort(index.search(XQ, 2)[1] % N, axis=1) == index.search(XQ, 2)[1].min(axis=1, keepdims=True)).all(), "ids")


@operation("reset")
def _(subject: Subject) -> None:
    index = subject.full()
    index.reset()
    index.add(XB[:10])
    check(index.ntotal == 10, "ntotal")
    check(index.search(XQ, 1)[1].max() < 10, "ids")


@operation("add one vector at a time, 1,000 times")
def _(subject: Subject) -> None:
    index = subject.full()
    for i in range(1000):
        index.add(XB[i : i + 1])
    check(index.ntotal == N + 1000, "ntotal")


# --------------------------------------------------------------------------------------------- search


@operation("search: k and nprobe as NumPy integers")
def _(subject: Subject) -> None:
    index = subject.full()
    if subject.ivf:
        index.nprobe = np.int64(4)
    index.search(XQ, np.int64(5))


@operation("search: beyond ntotal come -1 and +inf")
def _(subject: Subject) -> None:
    index = subject.trained()
    index.add(XB[:3])
    distances, ids = index.search(XQ, 5)
    check((ids[:, 3:] == -1).all(), "ids")
    check(np.isposinf(distances[:, 3:]).all(), f"distance {distances[0, 4]:g}")


@operation("search: an empty index, an empty batch")
def _(subject: Subject) -> None:
    check((subject.trained().search(XQ, 3)[1] == -1).all(), "ids")
    check(subject.full().search(XQ[:0], 3)[1].shape == (0, 3), "shape")


@operation("search into given D and I")
def _(subject: Subject) -> None:
    index = subject.full()
    distances, ids = np.empty((len(XQ), 5), np.float32), np.empty((len(XQ), 5), np.int64)
    index.search(XQ, 5, D=distances, I=ids)
    check(same((distances, ids), index.search(XQ, 5)), "other result")


@operation("search: same bits for one query as for many")
def _(subject: Subject) -> None:
    index = subject.full()
    whole = index.search(XQ, 50)
    parts = [index.search(XQ[i : i + 1], 50) for i in range(len(XQ))]
    check(same(whole, tuple(np.concatenate(side) for side in zip(*parts, strict=True))), "other result")


@operation("search: draws go to the smaller id")
def _(subject: Subject) -> None:
    index = subject.trained()
    index.add(np.repeat(XB[:1], 50, axis=0))
    index.add(XB[:500])
    check((index.search(XB[:1], 51)[1] == np.arange(51)).all(), "order")


@operation("search from several threads at once")
def _(subject: Subject) -> None:
    index = subject.full()
    ref, found = index.search(XQ, 10), []
    threads = [threading.Thread(target=lambda: found.append(index.search(XQ, 10))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(len(found) == 8 and all(same(ref, comp) for comp in found), "other result")


@operation("search in a forked child after a search")
def _(subject: Subject) -> None:
    index = subject.full()
    hyperfaiss.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    ref = index.search(np.repeat(XQ, 50, axis=0), 10)
    child = os.fork()
    if child == 0:
        comp = index.search(np.repeat(XQ, 50, axis=0), 10)
        os._exit(0 if same(ref, comp) else 1)
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            check(status == 0, f"status {status}")
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise WrongAnswerError("the child hangs")


@operation("search stops at Ctrl-C within half a second")
def _(subject: Subject) -> None:
    index = subject.full()
    queries = np.tile(XQ, (100, 1))
    index.search(XQ, 10)  # whatever a first call does
    start = time.perf_counter()
    index.search(queries, 100)
    queries = np.tile(queries, (int(3 / (time.perf_counter() - start)) + 1, 1))  # about three seconds
    sent: list[float] = []

    def interrupt() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.3, interrupt)
    timer.start()
    try:
        index.search(queries, 100)
    except KeyboardInterrupt:
        late = time.perf_counter() - sent[0]
        check(late < 0.5, f"stops {late:.1f} s late")
        check(same(index.search(XQ, 10), subject.full().search(XQ, 10)), "other result afterwards")
    except Exception as error:
        check("interrupt" in str(error).lower(), str(error))
        check(time.perf_counter() - sent[0] < 0.5, "late")
    else:
        timer.cancel()
        raise WrongAnswerError(
            f"searched on to the end, {time.perf_counter() - sent[0]:.1f} s late" if sent else "too quick to tell"
        )


@operation("range_search")
def _(subject: Subject) -> None:
    index = subject.full()
    distances, ids = index.search(XQ, N)
    radius = float(np.median(distances[:, 50]))
    lims, found_distances, found = index.range_search(XQ, radius)
    for q in range(len(XQ)):
        inside = slice(int(lims[q]), int(lims[q + 1]))
        check(set(found[inside]) == set(ids[q][distances[q] < radius]), "ids")
        check((found_distances[inside] < radius).all(), "beyond the radius")


@operation("range_search: sorted by distance")
def _(subject: Subject) -> None:
    index = subject.full()
    lims, distances, _ = index.range_search(XQ, float(np.median(index.search(XQ, 50)[0])))
    for q in range(len(XQ)):
        check((np.diff(distances[int(lims[q]) : int(lims[q + 1])]) >= 0).all(), "not sorted")


@operation("search with IDSelectorBatch")
def _(subject: Subject) -> None:
    index = subject.full()
    admitted = np.arange(N) % 7 == 3
    ids = index.search(XQ, 10, params=subject.params(faiss.IDSelectorBatch(np.flatnonzero(admitted))))[1]
    check(np.array_equal(ids, filtered(index, admitted, 10)), "ids")


@operation("search with IDSelectorNot of IDSelectorRange")
def _(subject: Subject) -> None:
    index = subject.full()
    selector = faiss.IDSelectorRange(100, 5000)
    ids = index.search(XQ, 10, params=subject.params(faiss.IDSelectorNot(selector)))[1]
    check(np.array_equal(ids, filtered(index, (np.arange(N) < 100) | (np.arange(N) >= 5000), 10)), "ids")


@operation("search with a NumPy mask")
def _(subject: Subject) -> None:
    index = subject.full()
    admitted = np.arange(N) % 7 == 3
    check(np.array_equal(index.search(XQ, 10, params=subject.params(admitted))[1], filtered(index, admitted, 10)), "ids")


@operation("search with a NumPy array of ids")
def _(subject: Subject) -> None:
    index = subject.full()
    admitted = np.arange(N) % 7 == 3
    check(
        np.array_equal(index.search(XQ, 10, params=subject.params(np.flatnonzero(admitted)))[1], filtered(index, admitted, 10)),
        "ids",
    )


@operation("range_search with a selector")
def _(subject: Subject) -> None:
    index = subject.full()
    radius = float(np.median(index.search(XQ, 50)[0]))
    selector = faiss.IDSelectorRange(0, 5000)
    lims, _, ids = index.range_search(XQ, radius, params=subject.params(selector))
    all_lims, _, all_ids = index.range_search(XQ, radius)
    for q in range(len(XQ)):
        every = all_ids[int(all_lims[q]) : int(all_lims[q + 1])]
        check(set(ids[int(lims[q]) : int(lims[q + 1])]) == set(every[every < 5000]), "ids")


@operation("search_preassigned")
def _(subject: Subject) -> None:
    index = subject.full()
    index.nprobe = 3
    closeness, lists = index.quantizer.search(XQ, 3)
    found = index.search_preassigned(XQ, 10, lists, closeness)
    check(same(found, index.search(XQ, 10)), "other result")


@operation("search no more than max_codes codes")
def _(subject: Subject) -> None:
    index = subject.full()
    untyped: Any = faiss
    params = untyped.SearchParametersIVF(nprobe=NLIST, max_codes=2000)
    check(0 < (index.search(XQ, N, params=params)[1] >= 0).sum(axis=1).max() < N, "searched on")


@operation("assign")
def _(subject: Subject) -> None:
    index = subject.full()
    check(np.array_equal(index.assign(XQ, 3), index.search(XQ, 3)[1]), "ids")


@operation("search_and_reconstruct")
def _(subject: Subject) -> None:
    index = subject.full()
    distances, ids, vectors = index.search_and_reconstruct(XQ, 5)
    check(same((distances, ids), index.search(XQ, 5)), "other result")
    check(vectors.shape == (len(XQ), 5, D), "shape")
    check(np.allclose(vectors[3, 2], index.sa_decode(index.sa_encode(XB[ids[3, 2]][None]))[0], atol=1e-5), "vectors")


# --------------------------------------------------------------------------------------------- change


@operation("remove_ids by array")
def _(subject: Subject) -> None:
    index = subject.full()
    nearest = index.search(XQ, 1)[1].ravel()
    check(index.remove_ids(np.unique(nearest)) == len(np.unique(nearest)), "count")
    check(index.ntotal == N - len(np.unique(nearest)), "ntotal")


@operation("remove_ids by selector")
def _(subject: Subject) -> None:
    index = subject.full()
    check(index.remove_ids(faiss.IDSelectorRange(0, 1000)) == 1000, "count")
    check(index.ntotal == N - 1000, "ntotal")


@operation("ids stay the same after remove_ids")
def _(subject: Subject) -> None:
    index = subject.full()
    kept = filtered(index, np.arange(N) >= 1000, 10)
    index.remove_ids(np.arange(1000))
    check(np.array_equal(index.search(XQ, 10)[1], kept), "ids moved")


@operation("automatic ids are not used twice after remove_ids")
def _(subject: Subject) -> None:
    index = subject.full()
    index.remove_ids(np.arange(1000))
    index.add(XB[:10])
    ids = index.search(XQ, N - 990)[1][0]
    check(len(np.unique(ids)) == N - 990, "an id twice")


@operation("permute_entries")
def _(subject: Subject) -> None:
    index = subject.full()
    order = np.roll(np.arange(N), 1)
    expected = (index.search(XQ, 5)[1] + 1) % N
    index.permute_entries(order)
    check(np.array_equal(index.search(XQ, 5)[1], expected), "ids")


@operation("copy_subset_to")
def _(subject: Subject) -> None:
    index, other = subject.full(), subject.trained()
    untyped: Any = faiss
    index.copy_subset_to(other, untyped.InvertedLists.SUBSET_TYPE_ID_RANGE, 100, 200)
    check(other.ntotal == 100, "ntotal")


@operation("update_vectors")
def _(subject: Subject) -> None:
    index = subject.full()
    if subject.ivf and not subject.ours:
        index.make_direct_map()
    ids = np.array([5, 17, 9000])
    index.update_vectors(ids, XB[ids - 1])
    check(index.ntotal == N, "ntotal")
    check(all({i - 1, i} <= set(index.search(XB[i - 1 : i], 20)[1][0]) for i in ids), "not found")


@operation("reconstruct")
def _(subject: Subject) -> None:
    index = subject.addressed(subject.full())
    check(np.allclose(index.reconstruct(77), index.sa_decode(index.sa_encode(XB[77:78]))[0], atol=1e-5), "vector")


@operation("reconstruct an id that was given")
def _(subject: Subject) -> None:
    index = subject.addressed(subject.trained())
    index.add_with_ids(XB[:100], np.arange(100) * 10**12)
    check(np.allclose(index.reconstruct(7 * 10**12), index.sa_decode(index.sa_encode(XB[7:8]))[0], atol=1e-5), "vector")


@operation("reconstruct without preparation")
def _(subject: Subject) -> None:
    index = subject.full()
    check(index.reconstruct(77).shape == (D,), "shape")


@operation("reconstruct_n, reconstruct_batch")
def _(subject: Subject) -> None:
    index = subject.addressed(subject.full())
    ref = index.sa_decode(index.sa_encode(XB[100:120]))
    check(np.allclose(index.reconstruct_n(100, 20), ref, atol=1e-5), "reconstruct_n")
    check(np.allclose(index.reconstruct_batch(np.arange(100, 120)), ref, atol=1e-5), "reconstruct_batch")


@operation("sa_encode, sa_decode")
def _(subject: Subject) -> None:
    index = subject.trained()
    codes = index.sa_encode(XB)
    check(codes.shape == (N, index.sa_code_size()) if callable(index.sa_code_size) else (N, index.sa_code_size), "shape")
    check(float(((index.sa_decode(codes) - XB) ** 2).sum(1).mean()) < float((XB**2).sum(1).mean()) / 2, "vectors")


@operation("add_sa_codes")
def _(subject: Subject) -> None:
    index = subject.trained()
    codes = index.sa_encode(XB)
    index.add_sa_codes(codes)
    check(same(index.search(XQ, 10), subject.full().search(XQ, 10)), "other result")


@operation("codes of 6 bits take 6 bits")
def _(subject: Subject) -> None:
    index = subject.trained(6)
    index.add(XB)
    check(index.code_size == M * 6 / 8, f"code_size {index.code_size}")


# --------------------------------------------------------------------------------------------- keep


@operation("copy.deepcopy")
def _(subject: Subject) -> None:
    index = subject.full()
    twin = copy.deepcopy(index)
    index.reset()
    check(same(twin.search(XQ, 5), subject.full().search(XQ, 5)), "other result")


@operation("copy.copy")
def _(subject: Subject) -> None:
    index = subject.full()
    check(same(copy.copy(index).search(XQ, 5), index.search(XQ, 5)), "other result")


@operation("pickle")
def _(subject: Subject) -> None:
    index = subject.full()
    check(same(pickle.loads(pickle.dumps(index)).search(XQ, 5), index.search(XQ, 5)), "other result")


@operation("repr tells d, ntotal and whether it is trained")
def _(subject: Subject) -> None:
    text = repr(subject.full())
    check(str(N) in text and f"d={D}" in text and "is_trained" in text, text[:60])


@operation("write_index, read_index")
def _(subject: Subject) -> None:
    index = subject.full()
    with file_of(subject, index) as name:
        check(same(subject.read(name).search(XQ, 5), index.search(XQ, 5)), "other result")


@operation("write_index, read_index by pathlib.Path")
def _(subject: Subject) -> None:
    index = subject.full()
    with tempfile.TemporaryDirectory() as folder:
        subject.write(index, Path(folder) / "index")
        check(same(subject.read(Path(folder) / "index").search(XQ, 5), index.search(XQ, 5)), "other result")


@operation("write_index, read_index by file object")
def _(subject: Subject) -> None:
    index, file = subject.full(), io.BytesIO()
    subject.write(index, file)
    file.seek(0)
    check(same(subject.read(file).search(XQ, 5), index.search(XQ, 5)), "other result")


@operation("search a memory-mapped file")
def _(subject: Subject) -> None:
    index = subject.full()
    with file_of(subject, index) as name:
        check(same(subject.mapped(name).search(XQ, 5), index.search(XQ, 5)), "other result")


@operation("add to a memory-mapped index")
def _(subject: Subject) -> None:
    index = subject.full()
    with file_of(subject, index) as name:
        mapped = subject.mapped(name)
        mapped.add(XB[:100])
        check(mapped.ntotal == N + 100, "ntotal")
        mapped.search(XQ, 5)
        check(subject.read(name).ntotal == N, "the file changed")


@operation("a flipped bit in a file is noticed")
def _(subject: Subject) -> None:
    with file_of(subject, subject.full()) as name:
        content = bytearray(Path(name).read_bytes())
        content[len(content) // 2] ^= 0x10
        Path(name).write_bytes(content)
        try:
            subject.read(name)
        except Exception as error:
            check(str(error), "no message")
            return
        raise WrongAnswerError("read without a word")
