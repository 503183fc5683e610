"""What each index can do, found by doing it: the same operations on faiss.IndexPQ, faiss.IndexIVFPQ and both of ours.

    python -m benchmarks.contract [--details] [--json contract.json]

Every cell of the table is a call that was made, on a fresh index of the same 10,000 vectors, in a process of its own kind
(some calls abort the process that makes them, some never return), and whose answer was checked. An operation is one piece
of code that runs on all four; only what differs by design in FAISS itself, the class of search parameters and the name of
the constructor, is told apart.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import pickle
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import faiss
import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

import hyperfaiss

D, M, NLIST, N = 16, 4, 16, 10_000
_rng = np.random.default_rng(0)
XB = _rng.normal(size=(N, D)).astype(np.float32)
XQ = _rng.normal(size=(20, D)).astype(np.float32)
TIMEOUT = 60.0

# What may come of an operation. For bad input, an error that tells its reason is a yes.
YES, WRONG, ERROR, NO_REASON, ACCEPTED, BROKEN, ABORTS, HANGS = (
    "yes", "wrong answer", "error", "error without reason", "accepted", "refused, then broken", "aborts the process", "hangs",
)  # fmt: skip


class WrongAnswerError(Exception):
    """The call returned, and what it returned or left behind is not right."""


def check(right: Any, what: str) -> None:
    """Fail the operation unless ``right``."""
    if not right:
        raise WrongAnswerError(what)


@dataclass(frozen=True)
class Subject:
    """One of the four kinds of index, by FAISS's names."""

    name: str
    ours: bool
    ivf: bool

    def new(self, d: int = D, m: int = M, nbits: int = 8) -> Any:
        """An untrained index."""
        if self.ivf:
            kind = hyperfaiss.HyperbolicIVFPQIndex if self.ours else faiss.IndexIVFPQ
            index = kind(faiss.IndexFlatL2(D), d, NLIST, m, nbits)
            index.nprobe = NLIST
            return index
        return hyperfaiss.HyperbolicPQIndex(d, m, nbits) if self.ours else faiss.IndexPQ(d, m, nbits)

    def trained(self, nbits: int = 8) -> Any:
        """A trained, empty index."""
        master = _trained(self, nbits)
        if not self.ours:
            return faiss.clone_index(master)
        if not self.ivf:
            return hyperfaiss.HyperbolicPQIndex.from_codec(master.codec)
        index = hyperfaiss.HyperbolicIVFPQIndex.from_codec(faiss.clone_index(master.quantizer), master.codec, NLIST)
        index.nprobe = NLIST
        return index

    def full(self) -> Any:
        """An index that holds XB under the ids 0 … N − 1."""
        index = self.trained()
        index.add(XB)
        return index

    def addressed(self, index: Any) -> Any:
        """The index, ready to find vectors by id: FAISS's inverted files want to be told."""
        if self.ivf and not self.ours:
            untyped: Any = faiss
            index.set_direct_map_type(untyped.DirectMap.Hashtable)
        return index

    def params(self, sel: Any) -> Any:
        """Search parameters that carry a selector; FAISS's own classes wherever they can."""
        if self.ours and not isinstance(sel, faiss.IDSelector):
            return hyperfaiss.SearchParameters(sel)
        untyped: Any = faiss
        return untyped.SearchParametersIVF(sel=sel, nprobe=NLIST) if self.ivf else untyped.SearchParameters(sel=sel)

    def write(self, index: Any, file: Any) -> None:
        """Write to a file."""
        (hyperfaiss if self.ours else faiss).write_index(index, file)

    def read(self, file: Any) -> Any:
        """Read from a file."""
        return (hyperfaiss if self.ours else faiss).read_index(file)

    def mapped(self, file: str) -> Any:
        """Open a file without reading its codes."""
        return hyperfaiss.read_index(file, mmap=True) if self.ours else faiss.read_index(file, faiss.IO_FLAG_MMAP_IFC)


@functools.cache
def _trained(subject: Subject, nbits: int) -> Any:
    index = subject.new(nbits=nbits)
    index.train(XB)
    return index


SUBJECTS = {
    s.name: s
    for s in (
        Subject("faiss.IndexPQ", ours=False, ivf=False),
        Subject("faiss.IndexIVFPQ", ours=False, ivf=True),
        Subject("HyperbolicPQIndex", ours=True, ivf=False),
        Subject("HyperbolicIVFPQIndex", ours=True, ivf=True),
    )
}

Operation = Callable[[Subject], None]
OPERATIONS: dict[str, Operation] = {}
REFUSALS: dict[str, Callable[[Subject, Any], Any]] = {}


def operation(name: str) -> Callable[[Operation], Operation]:
    """Register what an index should do."""

    def register(function: Operation) -> Operation:
        OPERATIONS[name] = function
        return function

    return register


def refusal(name: str) -> Callable[[Callable[[Subject, Any], Any]], Callable[[Subject, Any], Any]]:
    """Register bad input, which an index should refuse with a reason and survive."""

    def register(function: Callable[[Subject, Any], Any]) -> Callable[[Subject, Any], Any]:
        REFUSALS[name] = function
        return function

    return register


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


# --------------------------------------------------------------------------------------------- bad input


def spoiled(value: float) -> npt.NDArray[np.float32]:
    """Vectors, one of them with a bad value."""
    x: npt.NDArray[np.float32] = XB[:10].copy()
    x[3, 2] = value
    return x


REFUSALS.update(
    {
        "add NaN": lambda _, index: index.add(spoiled(np.nan)),
        "add inf": lambda _, index: index.add(spoiled(np.inf)),
        "search NaN": lambda _, index: index.search(spoiled(np.nan), 5),
        "train with NaN": lambda subject, _: subject.new().train(np.concatenate([XB, spoiled(np.nan)])),
        "train on fewer vectors than codewords": lambda subject, _: subject.new().train(XB[:100]),
        "search vectors of another dimension": lambda _, index: index.search(XQ[:, :8].copy(), 5),
        "search one vector that is not a matrix": lambda _, index: index.search(XQ[0], 5),
        "search strings": lambda _, index: index.search(np.full((2, D), "a"), 5),
        "k = 0": lambda _, index: index.search(XQ, 0),
        "k = -1": lambda _, index: index.search(XQ, -1),
        "k = 2.5": lambda _, index: index.search(XQ, 2.5),
        "D of another shape": lambda _, index: index.search(
            XQ, 5, D=np.empty((1, 5), np.float32), I=np.empty((1, 5), np.int64)
        ),
        "add before train": lambda subject, _: subject.new().add(XB),
        "search before train": lambda subject, _: subject.new().search(XQ, 5),
        "ids that are floats": lambda _, index: index.add_with_ids(XB[:10], np.arange(10) + N + 0.5),
        "uint64 ids beyond int64": lambda _, index: index.add_with_ids(XB[:10], np.arange(10, dtype=np.uint64) + 2**63),
        "the same id twice in a call": lambda _, index: index.add_with_ids(XB[:10], np.full(10, N)),
        "fewer ids than vectors": lambda _, index: index.add_with_ids(XB[:10], np.arange(N, N + 9)),
        "reconstruct an id that is not there": lambda _, index: index.reconstruct(N + 5),
        "reconstruct_n out of range": lambda _, index: index.reconstruct_n(N - 5, 10),
        "d that M does not divide": lambda subject, _: subject.new(D, 5),
        "read a file that is no index": lambda subject, _: _read_junk(subject),
    }
)


def _read_junk(subject: Subject) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junk"
        path.write_bytes(b"no index " * 1000)
        return subject.read(str(path))


# --------------------------------------------------------------------------------------------- run


def run(subject_name: str, name: str) -> tuple[str, str]:
    """What comes of one operation on one kind of index, and a word on it."""
    subject = SUBJECTS[subject_name]
    try:
        if name in OPERATIONS:
            OPERATIONS[name](subject)
            return YES, ""
        return _refuse(subject, REFUSALS[name])
    except WrongAnswerError as error:
        return WRONG, str(error)
    except BaseException as error:
        return (ERROR if str(error) else NO_REASON), f"{type(error).__name__}: {error}"


def _refuse(subject: Subject, function: Callable[[Subject, Any], Any]) -> tuple[str, str]:
    index = subject.full()
    before = index.search(XQ, 10)
    try:
        function(subject, index)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        if not str(error):
            return NO_REASON, message
        return (YES if same(before, index.search(XQ, 10)) else BROKEN), message
    return ACCEPTED, ""


def _quiet() -> None:
    """FAISS writes to the standard error from C++, last words of an abort included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_quiet)


def measure(subject_name: str, names: list[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Run the operations in a process that is replaced when one of them kills it or never ends."""
    pool = _pool()
    try:
        for name in names:
            future = pool.submit(run, subject_name, name)
            try:
                yield name, future.result(timeout=TIMEOUT)
            except BrokenProcessPool:
                pool.shutdown()
                pool = _pool()
                yield name, (ABORTS, "")
            except FutureTimeoutError:
                for process in list(pool._processes.values()):
                    process.kill()
                pool.shutdown()
                pool = _pool()
                yield name, (HANGS, f"no answer in {TIMEOUT:.0f} s")
    finally:
        pool.shutdown()


def main(
    details: Annotated[bool, typer.Option(help="also print what was said where the answer is not yes")] = False,
    only: Annotated[str, typer.Option(help="operations whose name contains this")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="also write outcomes and messages to this file")] = None,
) -> None:
    """Run every operation on every kind of index and print the matrix."""
    console = Console()
    console.width = max(console.width, 150)
    names = [name for name in (*OPERATIONS, *REFUSALS) if only in name]
    results: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in names}
    with console.status("") as status:
        for subject in SUBJECTS:
            for name, outcome in measure(subject, names):
                status.update(f"{subject}: {name}")
                results[name][subject] = outcome
    table = Table(title=f"faiss {faiss.__version__} and hyperfaiss {hyperfaiss.__version__}: {len(names)} operations, tried")
    table.add_column("operation")
    for subject in SUBJECTS:
        table.add_column(subject)
    for i, name in enumerate(names):
        if name in REFUSALS and (not i or names[i - 1] in OPERATIONS):
            table.add_section()
            table.add_row("[bold]refuses with a reason, and goes on as before:[/bold]")
        table.add_row(name, *("[green]yes[/green]" if o == YES else f"[red]{o}[/red]" for o, _ in results[name].values()))
    table.add_section()
    counts = {subject: Counter(results[name][subject][0] for name in names) for subject in SUBJECTS}
    table.add_row("yes, of all", *(f"{count[YES]} of {len(names)}" for count in counts.values()))
    console.print(table)
    if details:
        for name, row in results.items():
            for subject, (what, message) in row.items():
                if what != YES:
                    console.print(f"{subject}, {name}: {what}: {message}", markup=False, emoji=False)
    if json_path is not None:
        json_path.write_text(json.dumps({"faiss": faiss.__version__, "results": results}, indent=1))


if __name__ == "__main__":
    typer.run(main)
