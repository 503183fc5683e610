"""The scan: exact at every SIMD level, on any tables, however the work is cut."""

# ruff: noqa: E741 (D and I are FAISS's names)
from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hyperfaiss
from hyperfaiss import InvalidParameterError, search
from hyperfaiss.kernels import scan, simd

LEVELS = simd.supported_levels()
NO_IDS, NO_MASKS = np.empty(0, np.int64), np.empty(0, np.uint64)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(search, "_level", request.param)
    assert search.simd_level() == request.param
    return str(request.param)


def view_of(codes: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64] = NO_IDS) -> search.View:
    n, M = codes.shape
    nblocks = -(-n // 64)
    padded = np.zeros((nblocks * 64, M), np.uint8)
    padded[:n] = codes
    blocks = np.ascontiguousarray(padded.reshape(nblocks, 64, M).transpose(0, 2, 1))
    return search.View(blocks, n, ids, NO_MASKS, np.empty(0, np.int64), np.array([0, nblocks]))


def float32_sums(table: npt.NDArray[np.float32], codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """What the distance is, to the bit: the float32 sum in the order of the subspaces."""
    total = table[0, codes[:, 0]].copy()
    with np.errstate(over="ignore"):
        for m in range(1, len(table)):
            total += table[m, codes[:, m]]
    return total


def ref_nearest(
    tables: npt.NDArray[np.float32], codes: npt.NDArray[np.uint8], k: int, ids: npt.NDArray[np.int64] | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    names = np.arange(len(codes)) if ids is None else ids
    D, I = np.full((len(tables), k), np.inf, np.float32), np.full((len(tables), k), -1)
    for q, table in enumerate(tables):
        distances = float32_sums(table, codes)
        first = np.lexsort((names, distances))[:k]
        D[q, : len(first)], I[q, : len(first)] = distances[first], names[first]
    return D, I


def comp_nearest(
    tables: npt.NDArray[np.float32], view: search.View, k: int, probes: npt.NDArray[np.int64] | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    D, I = np.empty((len(tables), k), np.float32), np.empty((len(tables), k), np.int64)
    search.nearest(lambda rows: tables[rows], len(tables), view, k, D, I, probes)
    return D, I


def assert_same(ref: tuple[Any, Any], comp: tuple[Any, Any]) -> None:
    np.testing.assert_array_equal(comp[0].view(np.uint32), ref[0].view(np.uint32))
    np.testing.assert_array_equal(comp[1], ref[1])


def make_tables(kind: str, nq: int, M: int, ksub: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    shape = (nq, M, ksub)
    spread = {
        "random": lambda: rng.normal(size=shape) ** 2,
        "far": lambda: 1e4 + rng.random(shape),
        "constant": lambda: np.full(shape, 0.7),
        "zero": lambda: np.zeros(shape),
        "two values": lambda: rng.integers(0, 2, shape),
        "denormal": lambda: rng.random(shape) * 1e-40,
        "huge": lambda: rng.random(shape) * 3e38,
        "infinite": lambda: np.where(rng.random(shape) < 0.3, np.inf, rng.random(shape)),
        "all infinite": lambda: np.full(shape, np.inf),
        "huge of both signs": lambda: np.where(rng.random(shape) < 0.05, -3e38, rng.uniform(2e38, 3e38, shape)) / M,
        "wide range": lambda: 10 ** rng.uniform(-30, 30, shape),
        "negative": lambda: rng.normal(size=shape),
        "negative and far": lambda: rng.normal(size=shape) - 1e6,
        "cancelling": lambda: rng.normal(size=shape) * 10 ** rng.uniform(0, 8, shape),
        "one dominates": lambda: rng.random(shape) * np.where(np.arange(M) == M // 2, 1e6, 1.0)[:, None],
        "last dominates": lambda: rng.random(shape) * np.where(np.arange(M) == M - 1, 1e12, 1e-12)[:, None],
        "few near": lambda: np.where(rng.random(shape) < 0.02, 0.0, 1.0),
    }[kind]
    return np.asarray(spread(), np.float32)


KINDS = [
    "random", "far", "constant", "zero", "two values", "denormal", "huge", "infinite", "all infinite", "huge of both signs",
    "wide range", "negative", "negative and far", "cancelling", "one dominates", "last dominates", "few near",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("M", [1, 8, 16])
def test_exact_on_all_kinds_of_tables(level: str, kind: str, M: int) -> None:
    rng = np.random.default_rng(M)
    codes = rng.integers(0, 256, (3000, M), dtype=np.uint8)
    tables = make_tables(kind, 3, M, 256, rng)
    for k in (1, 10, 300, 1000, 3000):
        assert_same(ref_nearest(tables, codes, k), comp_nearest(tables, view_of(codes), k))


@pytest.mark.parametrize("M", [1, 2, 3, 7, 8, 16, 32, 64, 260])
@pytest.mark.parametrize("nbits", [4, 5, 6, 7, 8])
def test_exact_at_every_size_of_code(level: str, M: int, nbits: int) -> None:
    rng = np.random.default_rng(M * 10 + nbits)
    codes = rng.integers(0, 1 << nbits, (1500, M), dtype=np.uint8)
    tables = make_tables("random", 2, M, 1 << nbits, rng)
    for k in (1, 20, 1500):
        assert_same(ref_nearest(tables, codes, k), comp_nearest(tables, view_of(codes), k))


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 255, 256, 257])
def test_exact_around_the_edges_of_blocks(level: str, n: int) -> None:
    rng = np.random.default_rng(n)
    codes = rng.integers(0, 256, (n, 5), dtype=np.uint8)
    tables = make_tables("random", 4, 5, 256, rng)
    # What lies in a block beyond the last vector must not be found, though it would be the nearest.
    view = view_of(codes)
    tables[:, :, 0] = -1.0
    codes[codes == 0] = 1
    for b, lane in itertools.product(range(len(view.blocks)), range(64)):
        if b * 64 + lane < n:
            view.blocks[b, :, lane] = codes[b * 64 + lane]
    for k in (1, 7, max(n, 1), n + 3):
        assert_same(ref_nearest(tables, codes, k), comp_nearest(tables, view, k))


@pytest.mark.parametrize("data", ["clustered", "duplicated", "sorted far to near", "one code"])
def test_exact_on_all_kinds_of_codes(level: str, data: str) -> None:
    rng = np.random.default_rng(5)
    n, M = 20_000, 8
    tables = make_tables("random", 3, M, 256, rng)
    codes = rng.integers(0, 256, (n, M), dtype=np.uint8)
    if data == "clustered":
        codes = rng.integers(0, 256, (50, M), dtype=np.uint8)[np.sort(rng.integers(0, 50, n))]
        codes[np.arange(n), rng.integers(0, M, n)] = rng.integers(0, 256, n)
    elif data == "duplicated":
        codes = codes[rng.integers(0, 30, n)]
    elif data == "sorted far to near":  # every block beats all before it
        codes = codes[np.argsort(-float32_sums(tables[0], codes))]
    else:
        codes[:] = codes[0]
    for k in (1, 100, 2000, n):
        assert_same(ref_nearest(tables, codes, k), comp_nearest(tables, view_of(codes), k))


def test_ties_go_to_the_smaller_id_wherever_it_is(level: str) -> None:
    rng = np.random.default_rng(6)
    codes = rng.integers(0, 2, (4000, 3), dtype=np.uint8)
    tables = make_tables("random", 3, 3, 256, rng)
    ids = rng.permutation(10**12 + np.arange(4000)) * rng.choice([-1, 1], 4000)
    for k in (1, 33, 4000):
        assert_same(ref_nearest(tables, codes, k, ids), comp_nearest(tables, view_of(codes, ids), k))


def test_masks_and_order(level: str) -> None:
    rng = np.random.default_rng(7)
    n, M = 5000, 8
    codes = rng.integers(0, 256, (n, M), dtype=np.uint8)
    tables = make_tables("random", 3, M, 256, rng)
    admitted = (rng.random(n) < 0.03) & (np.arange(n) // 64 % 3 != 1)
    bits = np.zeros(len(view_of(codes).blocks) * 64, bool)
    bits[:n] = admitted
    masks = np.packbits(bits.reshape(-1, 64), axis=1, bitorder="little").view(np.uint64).ravel()
    order = rng.permutation(np.flatnonzero(masks))
    view = view_of(codes)._replace(masks=masks, order=order, starts=np.array([0, len(order)]))
    for k in (1, 10, n):
        ref = ref_nearest(tables, codes[admitted], k, np.flatnonzero(admitted))
        assert_same(ref, comp_nearest(tables, view, k))
        assert_same(ref, comp_nearest(tables, view, k, np.zeros((3, 1), np.int64)))


def lists_of(codes: npt.NDArray[np.uint8], owner: npt.NDArray[np.int64], nlist: int) -> search.View:
    """The vectors in lists, in one arena whose blocks are in random order."""
    rng = np.random.default_rng(0)
    pieces = [np.flatnonzero(owner == one)[i : i + 64] for one in range(nlist) for i in range(0, (owner == one).sum(), 64)]
    numbers = rng.permutation(len(pieces))
    blocks = np.full((len(pieces), codes.shape[1], 64), 255, np.uint8)
    ids, masks = np.full(len(pieces) * 64, -7), np.zeros(len(pieces), np.uint64)
    for b, members in zip(numbers, pieces, strict=True):
        blocks[b, :, : len(members)] = codes[members].T
        ids[b * 64 : b * 64 + len(members)] = members
        masks[b] = np.uint64((1 << len(members)) - 1)
    counts = np.bincount(owner, minlength=nlist)
    return search.View(blocks, len(ids), ids, masks, numbers, np.append(0, np.cumsum(-(-counts // 64))))


@pytest.mark.parametrize("nq", [1, 3, 9, 100])
def test_lists(level: str, nq: int) -> None:
    rng = np.random.default_rng(8)
    n, M, nlist = 6000, 4, 37
    codes = rng.integers(0, 256, (n, M), dtype=np.uint8)
    owner = np.minimum(rng.geometric(0.05, n), nlist - 1)
    owner[owner == 5] = 6  # an empty list
    tables = make_tables("random", nq, M, 256, rng)
    view = lists_of(codes, owner, nlist)
    everywhere = np.stack([rng.permutation(nlist) for _ in range(nq)])
    for k in (1, 10, 500, n):
        assert_same(ref_nearest(tables, codes, k), comp_nearest(tables, view, k, everywhere))
        some = everywhere[:, :7].copy()
        some[::2, 3] = -1
        D, I = comp_nearest(tables, view, k, some)
        for q in range(nq):
            members = np.flatnonzero(np.isin(owner, some[q]))
            assert_same(ref_nearest(tables[q : q + 1], codes[members], k, members), (D[q : q + 1], I[q : q + 1]))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("nq", [1, 2, 13])
def test_no_split_of_the_work_changes_a_bit(level: str, threads: int, nq: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_WORTH_A_THREAD", 1000)
    monkeypatch.setattr(search, "_LOOKUPS", 50_000)
    monkeypatch.setattr(search, "_BUFFER_BYTES", 100_000)
    monkeypatch.setattr(search, "_RANGE_BLOCKS", 5)
    rng = np.random.default_rng(nq)
    n, M = 9000, 8
    codes = rng.integers(0, 20, (n, M), dtype=np.uint8)
    tables = np.round(make_tables("random", nq, M, 256, rng), 1)
    hyperfaiss.set_num_threads(threads)
    for k in (1, 50, 400):
        assert_same(ref_nearest(tables, codes, k), comp_nearest(tables, view_of(codes), k))
    check_within(tables, codes, view_of(codes), 3.0)
    owner = rng.integers(0, 11, n)
    everywhere = np.tile(np.arange(11), (nq, 1))
    assert_same(ref_nearest(tables, codes, 50), comp_nearest(tables, lists_of(codes, owner, 11), 50, everywhere))
    check_within(tables, codes, lists_of(codes, owner, 11), 3.0, everywhere)


def check_within(
    tables: npt.NDArray[np.float32],
    codes: npt.NDArray[np.uint8],
    view: search.View,
    radius: float,
    probes: npt.NDArray[np.int64] | None = None,
) -> int:
    lims, D, I = search.within(lambda rows: tables[rows], len(tables), view, radius, probes)
    assert lims.dtype == I.dtype == np.int64
    assert D.dtype == np.float32
    assert lims[0] == 0
    assert len(lims) == len(tables) + 1
    assert len(D) == len(I) == lims[-1]
    for q, table in enumerate(tables):
        distances = float32_sums(table, codes)
        near = np.flatnonzero(distances < np.float32(radius))
        near = near[np.lexsort((near, distances[near]))]
        assert_same((distances[near], near), (D[lims[q] : lims[q + 1]], I[lims[q] : lims[q + 1]]))
    return int(lims[-1])


def test_range_search(level: str) -> None:
    rng = np.random.default_rng(9)
    codes = rng.integers(0, 256, (100_000, 8), dtype=np.uint8)
    tables = make_tables("random", 5, 8, 256, rng)
    at = float(np.sort(float32_sums(tables[0], codes))[1000])  # the radius itself is not within
    assert check_within(tables, codes, view_of(codes), at) >= 1000
    assert check_within(tables, codes, view_of(codes), 1e30) == 500_000
    assert check_within(tables, codes, view_of(codes), np.inf) == 500_000
    for radius in (0.0, -1.0, 1e-45, -np.inf):
        assert check_within(tables, codes, view_of(codes), radius) == 0
    assert check_within(tables[:0], codes, view_of(codes), 1.0) == 0
    assert check_within(tables, codes[:0], view_of(codes[:0]), 1.0) == 0


# ------------------------------------------------------------------------------------------------ limits from a sample


def test_a_sample_sets_the_first_limit(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(10)
    codes = rng.integers(0, 256, (50_000, 8), dtype=np.uint8)
    tables = make_tables("random", 3, 8, 256, rng)
    ranks: list[int] = []
    monkeypatch.setattr(scan, "take_limits", Spy(scan.take_limits, ranks))
    assert_same(ref_nearest(tables, codes, 600), comp_nearest(tables, view_of(codes), 600))
    assert ranks == [42]  # 600 / 32 = 18.75; 18.75 + 4 · √18.75 + 6
    comp_nearest(tables, view_of(codes), 100)  # few neighbours need no sample
    comp_nearest(tables, view_of(codes[:10_000]), 600)  # nor do few vectors
    assert len(ranks) == 1


def test_a_sample_that_misleads_costs_time_only(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    codes = rng.integers(0, 256, (50_000, 8), dtype=np.uint8)
    tables = make_tables("random", 4, 8, 256, rng)
    # Every 32nd block, which the sample reads, holds vectors that are near to query 1, not typical of the rest.
    sampled = np.flatnonzero(np.arange(len(codes)) // 64 % 32 == 0)
    best = np.argsort(tables[1], axis=1)[:, :40].astype(np.uint8)
    codes[sampled] = best[np.arange(8), rng.integers(0, 40, (len(sampled), 8))]
    wholes = []
    monkeypatch.setattr(search._Nearest, "whole", lambda self, run=search._Nearest.whole: (wholes.append(self), run(self))[1])
    hyperfaiss.set_num_threads(1)
    assert_same(ref_nearest(tables, codes, 700), comp_nearest(tables, view_of(codes), 700))
    assert len(wholes) == 2  # the chunk, and query 1 again


@pytest.mark.parametrize("nq", [2, 5000])
def test_memory_does_not_grow_with_the_queries(nq: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of all queries at once would take 5000 · 8 KB = 40 MB."""
    rng = np.random.default_rng(12)
    view, table = view_of(rng.integers(0, 256, (300, 8), dtype=np.uint8)), make_tables("random", 1, 8, 256, rng)[0]
    monkeypatch.setattr(search, "_WORTH_A_THREAD", 100)
    hyperfaiss.set_num_threads(2)
    comp_nearest(table[None], view, 3)  # compiled
    D, I = np.empty((nq, 3), np.float32), np.empty((nq, 3), np.int64)
    tracemalloc.start()
    try:
        search.nearest(lambda rows: np.repeat(table[None], rows.stop - rows.start, axis=0), nq, view, 3, D, I)
        assert tracemalloc.get_traced_memory()[1] < 2 * 3 * search._TABLE_BYTES
        search.within(lambda rows: np.repeat(table[None], rows.stop - rows.start, axis=0), nq, view, 0.1)
        assert tracemalloc.get_traced_memory()[1] < 2 * 3 * search._TABLE_BYTES
    finally:
        tracemalloc.stop()


class Spy:
    """Records the last argument of each call."""

    def __init__(self, function: Any, log: list[Any]) -> None:
        self.function, self.log = function, log

    def __call__(self, *args: Any) -> None:
        self.log.append(args[-1])
        self.function(*args)


# ------------------------------------------------------------------------------------------------ the bound


@given(data=st.data())
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", LEVELS)
def test_exact_with_extreme_numbers(name: str, data: st.DataObject) -> None:
    """Few distinct entries of all magnitudes and signs, so that sums meet the limit exactly."""
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    entries = data.draw(st.lists(st.one_of(finite, st.floats(0, 1, width=32), st.just(0.0)), min_size=1, max_size=6))
    M = data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    codes = rng.integers(0, 16, (700, M), dtype=np.uint8)
    tables = rng.choice(np.asarray(entries, np.float32), (2, M, 16))
    k = data.draw(st.integers(1, 200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_level", name)
        with np.errstate(all="ignore"):
            finite_sums = all(np.isfinite(float32_sums(table, codes)).all() for table in tables)
        if finite_sums:
            assert_same(ref_nearest(tables, codes, k), comp_nearest(tables, view_of(codes), k))


def bounds(level: str) -> dict[int, Any]:
    return {"avx2": simd.bound_avx2, "vbmi": simd.bound_vbmi}[level]


@pytest.mark.parametrize("name", [level for level in LEVELS if level != "generic"])
@pytest.mark.parametrize("ksub", simd.SIZES)
def test_the_bound_is_the_saturated_sum(name: str, ksub: int) -> None:
    """simd's own definition, on every code and around a sum of 255."""
    import numba

    bound = bounds(name)[ksub]
    call = numba.njit(lambda block, small: bound(block, small))  # noqa: PLW0108 (an intrinsic can't be called from Python)
    rng = np.random.default_rng(ksub)
    for M, top in [(1, 256), (2, 256), (2, 130), (5, 60), (64, 5), (300, 2)]:
        small = rng.integers(0, top, (M, ksub), dtype=np.uint8)
        for _ in range(8):
            block = rng.integers(0, ksub, (M, 64), dtype=np.uint8)
            total = small[np.arange(M)[:, None], block].sum(axis=0, dtype=np.int64)
            kept = [bool(int(call(block, small)) >> lane & 1) for lane in range(64)]
            assert kept == (total < 255).tolist()


# ------------------------------------------------------------------------------------------------ the level


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", LEVELS)
def test_the_environment_chooses_the_level(name: str) -> None:
    done = run_python("import hyperfaiss; print(hyperfaiss.simd_level())", HYPERFAISS_SIMD=name)
    assert done.stdout.strip() == name


def test_the_best_level_is_the_default() -> None:
    assert LEVELS[-1] == "generic"
    done = run_python("import hyperfaiss; print(hyperfaiss.simd_level())", HYPERFAISS_SIMD="")
    assert done.stdout.strip() == LEVELS[0]


def test_an_emulated_smaller_cpu_gets_a_smaller_level() -> None:
    done = run_python("import hyperfaiss; print(hyperfaiss.simd_level())", HYPERFAISS_SIMD="", NUMBA_CPU_NAME="generic")
    assert done.stdout.strip() == "generic"


@pytest.mark.parametrize("wanted", ["sse9", "vbmi"])
def test_a_level_that_is_not_there(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simd, "_features", lambda: {"avx2": True})
    monkeypatch.setenv("HYPERFAISS_SIMD", wanted)
    with pytest.raises(InvalidParameterError, match=f"HYPERFAISS_SIMD='{wanted}'.*avx2, generic"):
        simd.requested_level()
