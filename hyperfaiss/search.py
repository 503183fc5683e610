"""How a search is carried out: the work is cut into tasks for threads, and each task drives the scan kernels.

Everything that can be searched is lists of blocks of codes, a :class:`View`; a flat index is one list. Two searches exist, the
k nearest and all within a radius. Both are exact: their results do not depend on how the work is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .checks import FloatArray
from .kernels import scan as kernels
from .kernels import simd
from .kernels.runtime import get_num_threads, run_tasks

__all__ = ["View", "nearest", "simd_level", "within"]

IntArray = npt.NDArray[np.int64]
Tables = Callable[[slice], FloatArray]

# Bytes of distance tables, and of buffers, that one task holds at a time: what bounds a search's memory, whatever nq is.
_TABLE_BYTES = 4 << 20
_BUFFER_BYTES = 8 << 20
# Table look-ups of one kernel call, some tens of milliseconds at most: how long Ctrl-C may wait.
_LOOKUPS = 1 << 25
# Entries of buffers that one kernel call sorts.
_ENTRIES = 1 << 19
# Look-ups below which a second thread costs more than it brings.
_WORTH_A_THREAD = 1 << 21
# Blocks of one piece of work of a range search, whose buffers have room for all lanes of two such pieces.
_RANGE_BLOCKS = 512
# From this many neighbours on, a first limit comes from every 32nd block.
_MANY = 256
_SAMPLE = 32
# Queries below which each goes its own way through the lists.
_FEW = 8

_level = simd.requested_level()


def simd_level() -> str:
    """The SIMD level of the scan: "vbmi" (AVX-512 VBMI), "avx2" or "generic".

    It is chosen at import: the best that the CPU has, or what the environment variable HYPERFAISS_SIMD names. Results are the
    same to the bit at every level.
    """
    return _level


class View(NamedTuple):
    """What a search reads, taken once at its start. Position p is lane p % 64 of block p // 64."""

    blocks: npt.NDArray[np.uint8]
    """(nblocks, M, 64), C-contiguous: byte (block, m, lane)."""
    n: int
    """Without ``masks``, positions 0 … n − 1 are in use."""
    ids: IntArray
    """(≥ n,) the id of each position; empty: the position itself."""
    masks: npt.NDArray[np.uint64]
    """(nblocks,) bit ``lane`` admits that lane; empty: all positions below n."""
    order: IntArray
    """Numbers of the blocks to visit, list after list; empty: 0 … nblocks − 1."""
    starts: IntArray
    """(nlist + 1,): list l is order[starts[l] : starts[l + 1]]."""


def nearest(
    tables_of: Tables,
    nq: int,
    view: View,
    k: int,
    D: FloatArray,
    I: IntArray,  # noqa: E741
    probes: IntArray | None = None,
) -> None:
    """Fill D and I (nq, k) with each query's k smallest (distance, id), sorted; missing ones are (+inf, -1).

    ``tables_of(rows)`` makes the tables (len, M, ksub) float32 of some queries. ``probes`` (nq, nprobe) are the lists that each
    query visits, the most promising first, -1 for none; without it every query visits all that ``view`` orders.
    """
    places = _places(view)
    keep = min(k, places)
    if not keep or not nq:
        D[:], I[:] = np.inf, -1
        return
    capacity = min(2 * keep + kernels.BLOCK, places) + 1
    chunks, parts = _split(nq, view, probes, capacity)
    _carry_out([_Nearest(_Job(tables_of, view, probes, capacity, parts), rows, keep, D[rows], I[rows]) for rows in chunks])


def within(
    tables_of: Tables, nq: int, view: View, radius: float, probes: IntArray | None = None
) -> tuple[IntArray, FloatArray, IntArray]:
    """All entries with a distance below ``radius``, sorted by (distance, id) within a query.

    Returns lims (nq + 1,) int64, D float32 and I int64: query q's entries are lims[q] … lims[q + 1] - 1. The other parameters
    are those of ``nearest``.
    """
    lims, places = np.zeros(nq + 1, np.int64), _places(view)
    if not places or not nq:
        return lims, np.empty(0, np.float32), np.empty(0, np.int64)
    max_blocks = min(_RANGE_BLOCKS, -(-places // kernels.BLOCK))
    capacity = 2 * kernels.BLOCK * max_blocks + 1
    chunks, parts = _split(nq, view, probes, capacity)
    job = _Job(tables_of, view, probes, capacity, parts)
    limit = np.nextafter(np.float32(radius), np.float32(-np.inf))
    searches = [_Within(job, rows, limit, max_blocks) for rows in chunks]
    _carry_out(searches)
    found = [result for search in searches for result in search.results]
    np.cumsum([len(D) for D, _ in found], out=lims[1:])
    return lims, np.concatenate([D for D, _ in found]), np.concatenate([I for _, I in found])  # noqa: E741


class _Job(NamedTuple):
    """What all chunks of queries of one search have in common."""

    tables_of: Tables
    view: View
    probes: IntArray | None
    capacity: int  # of a query's buffer
    parts: int  # threads that share a chunk


class _Search:
    """The search of one chunk of queries: ``begin``, then ``visit`` once for each part, then ``finish``.

    Each part has a share of every list, and states and buffers of its own. The generators yield where they may be interrupted.
    """

    # Blocks of one kernel call, where a buffer could run over, and entries that a full buffer is cut to.
    max_blocks = 1 << 62
    keep = 1 << 62

    def __init__(self, job: _Job, rows: slice) -> None:
        self.job, self.view, self.rows, self.nq = job, job.view, rows, rows.stop - rows.start

    def begin(self) -> Iterator[None]:
        """Make the tables, and everything that depends on them."""
        self.tables = self.job.tables_of(self.rows)
        yield
        _, M, ksub = self.tables.shape
        parts, capacity = self.job.parts, self.job.capacity
        self.lows = np.empty((self.nq, M), np.float32)
        self.small = np.empty((parts, self.nq, M, ksub), np.uint8)
        self.states = np.zeros((parts, self.nq), kernels.STATE)
        self.D, self.I = np.empty((parts, self.nq, capacity), np.float32), np.empty((parts, self.nq, capacity), np.int64)
        kernels.prepare(self.tables, self.lows, self.states[0])
        self.states[0]["limit"], self.states[0]["limit_id"] = np.inf, kernels.EMPTY
        self.states[1:] = self.states[0]

    def visit(self, part: int) -> Iterator[None]:
        """One part's share of every list that the queries visit."""
        visits, members = self.plan()
        parts = self.job.parts
        if parts > 1:
            first, length = visits[:, 0].copy(), visits[:, 1] - visits[:, 0]
            visits[:, 0], visits[:, 1] = first + length * part // parts, first + length * (part + 1) // parts
        yield from self.run(part, visits, members, self.view.order, self.keep)

    def finish(self) -> Iterator[None]:
        """Merge the parts and deliver."""
        raise NotImplementedError

    def whole(self) -> Iterator[None]:
        """All of it, in one thread."""
        yield from self.begin()
        yield from self.visit(0)
        yield from self.close()

    def close(self) -> Iterator[None]:
        """``finish``, and let go of everything but the results: other chunks are waiting for the memory."""
        yield from self.finish()
        del self.tables, self.lows, self.small, self.states, self.D, self.I

    def plan(self) -> tuple[IntArray, IntArray]:
        """Who goes where: ``visits`` (n, 4) and ``members``, the rows, of the scan kernels."""
        if self.job.probes is None:
            return self.all_visit(len(self.view.order) or len(self.view.blocks))
        probes = self.job.probes[self.rows]
        nprobe = probes.shape[1]
        lists, rows, rank = probes.ravel(), np.repeat(np.arange(self.nq), nprobe), np.tile(np.arange(nprobe), self.nq)
        # Few queries go from list to list in order of closeness, so that their limits are low early. Of many, first each goes
        # to its closest list, then every list is scanned once for all that visit it.
        turn = rank if self.nq < _FEW else np.minimum(rank, 1)
        sequence = np.lexsort((lists, turn))
        sequence = sequence[lists[sequence] >= 0]
        lists, turn, rows = lists[sequence], turn[sequence], rows[sequence]
        changes = (np.diff(lists, prepend=-1) != 0) | (np.diff(turn, prepend=-1) != 0)
        group = np.flatnonzero(changes)
        first, last = self.view.starts[lists[group]], self.view.starts[lists[group] + 1]
        visits = np.stack([first, last, group, np.append(group[1:], len(rows))], axis=1)
        return visits[first < last], rows

    def all_visit(self, nblocks: int) -> tuple[IntArray, IntArray]:
        """The plan by which every query visits ``nblocks`` blocks."""
        return np.array([[0, nblocks, 0, self.nq]]), np.arange(self.nq)

    def run(self, part: int, visits: IntArray, members: IntArray, order: IntArray, keep: int) -> Iterator[None]:
        """Carry out ``visits``, some tens of milliseconds at a time."""
        view, scan = self.view, kernels.SCANS[_level]
        for step in _steps(visits, view.blocks.shape[1], self.max_blocks):
            scan(
                view.blocks, view.n, view.ids, view.masks, order, step, members, self.tables, self.lows,
                self.small[part], self.states[part], self.D[part], self.I[part], keep,
            )  # fmt: skip
            yield


class _Nearest(_Search):
    """The ``keep`` nearest, into rows ``out_D`` and ``out_I``."""

    def __init__(self, job: _Job, rows: slice, keep: int, out_D: FloatArray, out_I: IntArray) -> None:
        super().__init__(job, rows)
        self.keep, self.out_D, self.out_I = keep, out_D, out_I
        # Where lists and filters come in, every 32nd block need not be like the rest.
        plain = job.probes is None and not len(self.view.masks)
        self.sampled = plain and keep >= _MANY and self.view.n >= 2 * _SAMPLE * keep

    def begin(self) -> Iterator[None]:
        yield from super().begin()
        if self.sampled:
            # The rank in the sample of a distance that the keep-th nearest of all hardly exceeds: mean and four deviations.
            share = self.keep / _SAMPLE
            rank = int(share + 4 * share**0.5 + 6)
            sample = np.arange(0, len(self.view.blocks), _SAMPLE)
            yield from self.run(0, *self.all_visit(len(sample)), sample, rank)
            kernels.take_limits(self.states[0], self.D[0], self.I[0], rank)
            self.states[1:] = self.states[0]

    def finish(self) -> Iterator[None]:
        found = np.empty(self.nq, np.int64)
        step = max(1, _ENTRIES // self.job.capacity)
        for first in range(0, self.nq, step):
            part = slice(first, first + step)
            arrays = self.states[:, part], self.D[:, part], self.I[:, part], self.out_D[part], self.out_I[part], found[part]
            kernels.collect(*arrays)
            yield
        if self.sampled:  # where the sample misled, some of the k nearest are missing: once more without it
            for q in np.flatnonzero(found < self.keep):
                row = slice(self.rows.start + q, self.rows.start + q + 1)
                again = _Nearest(self.job._replace(parts=1), row, self.keep, self.out_D[q : q + 1], self.out_I[q : q + 1])
                again.sampled = False
                yield from again.whole()


class _Within(_Search):
    """All whose distance is at most ``limit``, into ``results``: D and I of each query."""

    def __init__(self, job: _Job, rows: slice, limit: np.float32, max_blocks: int) -> None:
        super().__init__(job, rows)
        self.limit, self.max_blocks = limit, max_blocks
        self.results: list[tuple[FloatArray, IntArray]] = []

    def begin(self) -> Iterator[None]:
        yield from super().begin()
        self.states["limit"] = self.limit
        self.found: list[list[tuple[FloatArray, IntArray]]] = [[] for _ in range(self.nq)]

    def run(self, part: int, visits: IntArray, members: IntArray, order: IntArray, keep: int) -> Iterator[None]:
        counts = self.states[part]["count"]
        for _ in super().run(part, visits, members, order, keep):
            for q in np.flatnonzero(counts):
                self.found[q].append((self.D[part, q, : counts[q]].copy(), self.I[part, q, : counts[q]].copy()))
            counts[:] = 0
            yield

    def finish(self) -> Iterator[None]:
        empty = np.empty(0, np.float32), np.empty(0, np.int64)
        for pieces in self.found:
            D, I = (np.concatenate(arrays) for arrays in zip(empty, *pieces, strict=True))  # noqa: E741
            order = np.lexsort((I, D))
            self.results.append((D[order], I[order]))
            yield


def _places(view: View) -> int:
    """How many positions the blocks to visit have."""
    return kernels.BLOCK * len(view.order) or view.n


def _split(nq: int, view: View, probes: IntArray | None, capacity: int) -> tuple[list[slice], int]:
    """The chunks of queries, and the number of threads that share each.

    Many queries are split by query alone; few are split by block, so that all threads have work.
    """
    M = view.blocks.shape[1]
    visited = 1.0 if probes is None else min(1.0, probes.shape[1] / max(1, len(view.starts) - 1))
    threads = max(1, min(get_num_threads(), int(_places(view) * visited * M * nq) // _WORTH_A_THREAD))
    most = max(1, min(_TABLE_BYTES // (M * 5 * 256), _BUFFER_BYTES // (12 * capacity)))
    parts = threads if nq < 4 * threads else 1
    chunks = -(-nq // most)
    if parts == 1:  # as many for each thread
        chunks = -(-chunks // threads) * threads
    bounds = [nq * i // chunks for i in range(chunks + 1)]
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False) if a < b], parts


def _steps(visits: IntArray, M: int, max_blocks: int) -> Iterator[IntArray]:
    """Cut ``visits`` into pieces of at most ``max_blocks`` blocks and ``_LOOKUPS`` look-ups; a step is one or more pieces.

    A step is less than two full pieces, so a query sees fewer than 2 · max_blocks blocks in it.
    """
    blocks, queries = visits[:, 1] - visits[:, 0], visits[:, 3] - visits[:, 2]
    if blocks.sum() <= max_blocks and (blocks * queries).sum() * M * kernels.BLOCK <= _LOOKUPS:
        yield visits
        return
    most = np.maximum(1, np.minimum(max_blocks, _LOOKUPS // (queries * M * kernels.BLOCK)))
    pieces = -(-blocks // most)
    which = np.repeat(np.arange(len(visits)), pieces)
    number = np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut = visits[which]
    cut[:, 0] += number * most[which]
    cut[:, 1] = np.minimum(cut[:, 0] + most[which], cut[:, 1])
    size = (cut[:, 1] - cut[:, 0]) / most[which]
    step = np.floor(np.cumsum(size) - size / 2)
    for piece in np.split(cut, np.flatnonzero(np.diff(step)) + 1):
        if len(piece):
            yield piece


def _carry_out(searches: Sequence[_Search]) -> None:
    """Run searches on the threads: chunk by chunk in parallel, or each chunk by all."""
    parts = searches[0].job.parts
    if parts == 1:
        run_tasks(lambda search: search.whole(), searches)
        return
    for search in searches:
        run_tasks(lambda search: search.begin(), [search])
        run_tasks(search.visit, range(parts))
        run_tasks(lambda search: search.close(), [search])
