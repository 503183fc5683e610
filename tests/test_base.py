"""What both indexes share: ids that stay, removals, updates, merges, reconstruction, codes; and a model of all of it."""

# ruff: noqa: E741 (D and I are FAISS's names)
from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import hyperfaiss
import hyperfaiss.search
import hyperfaiss.storage
from hyperfaiss import (
    HyperbolicIVFPQIndex,
    HyperbolicPQIndex,
    HyperbolicProductQuantizer,
    InvalidParameterError,
    SearchParameters,
    UnknownIdError,
    read_index,
    write_index,
)
from hyperfaiss.packing import pack, packed_size, unpack
from tests.toys import Index, empty_index, flat_quantizer

D, M, NLIST = 12, 3, 5
CODECS = {
    nbits: HyperbolicProductQuantizer.from_codebooks(np.random.default_rng(0).normal(size=(M, 1 << nbits, 4)), 1.0)
    for nbits in (4, 8)
}
COARSE = flat_quantizer(np.random.default_rng(1).normal(size=(NLIST, D)).astype(np.float32))
Q = np.random.default_rng(2).normal(size=(4, D)).astype(np.float32)


def vectors(n: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32)


def empty(kind: str, nbits: int = 4) -> Index:
    return empty_index(kind, CODECS[nbits], COARSE)


@pytest.fixture(params=["flat", "ivf"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def filled(kind: str, n: int = 300, nbits: int = 4, seed: int = 3) -> Index:
    index = empty(kind, nbits)
    index.add(vectors(n, seed))
    return index


def fresh(kind: str, x: np.ndarray, ids: Any, nbits: int = 4) -> Index:
    index = empty(kind, nbits)
    index.add_with_ids(x, ids)
    return index


def assert_same_answers(comp: Index, ref: Index, *, some_lists: bool = True) -> None:
    """The same neighbours to the bit, over all lists and over some of them, and the same vectors."""
    assert comp.ntotal == ref.ntotal
    for params in (None, SearchParameters(nprobe=2)) if some_lists else (None,):
        for k in (1, 10, comp.ntotal + 2):
            for a, b in zip(comp.search(Q, k, params=params), ref.search(Q, k, params=params), strict=True):
                np.testing.assert_array_equal(a, b)
        for a, b in zip(comp.range_search(Q, 4.0, params=params), ref.range_search(Q, 4.0, params=params), strict=True):
            np.testing.assert_array_equal(a, b)
    ids = np.sort(comp.ids)
    np.testing.assert_array_equal(ids, np.sort(ref.ids))
    if len(np.unique(ids)) == len(ids):
        np.testing.assert_array_equal(comp.reconstruct_batch(ids), ref.reconstruct_batch(ids))


# ------------------------------------------------------------------------------------------------ closing up


@pytest.mark.parametrize("piece", [1, 3, 16384])
def test_what_is_left_lies_as_if_added_alone(kind: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over lists of many blocks, some untouched, some with a gap at either end, some emptied."""
    monkeypatch.setattr(hyperfaiss.storage, "_PIECE", piece)
    n, x = 1500, vectors(1500)
    lists = np.zeros(n, int) if kind == "flat" else COARSE.search(x, 1)[1].ravel()
    place = np.arange(n)
    gaps = {
        "first": place == 0, "last": place == n - 1, "middle": place == n // 2, "a block": place // 64 == 9,
        "the end": place > 700, "some": place % 7 == 3, "all": place >= 0,
        "a list": lists == lists[0], "of a list": (lists == lists[0]) & (place % 2 == 1),
    }  # fmt: skip
    for name, gone in gaps.items():
        for ids in (place, place[::-1] * 3):
            comp, ref = fresh(kind, x, ids), fresh(kind, x[~gone], ids[~gone])
            assert comp.remove_ids(ids[gone]) == gone.sum(), name
            np.testing.assert_array_equal(comp.ids, ref.ids, err_msg=name)
            np.testing.assert_array_equal(comp.codes, ref.codes, err_msg=name)
            for a, b in zip(comp.search(Q, 20), ref.search(Q, 20), strict=True):
                np.testing.assert_array_equal(a, b, err_msg=name)
            comp.add_with_ids(x[:9], np.arange(9) + 10**6)
            ref.add_with_ids(x[:9], np.arange(9) + 10**6)
            np.testing.assert_array_equal(comp.codes, ref.codes, err_msg=name)


# ------------------------------------------------------------------------------------------------ ids


def test_ids_are_stored_when_they_must_be() -> None:
    index, x = filled("flat"), vectors(300)
    assert not index._store.has_ids
    index.add_with_ids(vectors(2), [300, 301])  # what they would be anyhow
    assert not index._store.has_ids
    assert "ids=stored" not in repr(index)
    tail = copy.copy(index)
    assert tail.remove_ids([300, 301]) == 2
    assert not tail._store.has_ids
    tail.add(vectors(1))
    assert tail._store.has_ids
    assert tail.ids.tolist() == [*range(300), 302]
    index.remove_ids([7])
    assert index._store.has_ids
    assert "ids=stored" in repr(index)
    index.reset()
    assert not index._store.has_ids
    index.add(x)
    assert index.ids.tolist() == list(range(300))
    index.add_with_ids(x[:1], [1000])
    assert index._store.has_ids
    assert_same_answers(index, fresh("flat", np.concatenate([x, x[:1]]), [*range(300), 1000]))


def test_automatic_ids_go_on_from_the_largest_ever(kind: str) -> None:
    index, x = filled(kind, 10), vectors(3)
    index.remove_ids([9])
    index.add(x[:1])
    assert sorted(index.ids) == [*range(9), 10]
    index.add_with_ids(x[:1], [50])
    index.remove_ids([50])
    index.add(x)
    assert sorted(index.ids) == [*range(9), 10, 51, 52, 53]
    assert index.next_id == 54
    for twin in (copy.deepcopy(index), round_trip(index)):
        twin.add(x[:1])
        assert twin.next_id == 55
    index.reset()
    index.add(x)
    assert sorted(index.ids) == [0, 1, 2]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.uint32, list, np.dtype(">i8")])
def test_any_integers_are_ids(dtype: Any, kind: str) -> None:
    ids = np.array([5, 3, 200])
    index = fresh(kind, vectors(3), ids.tolist() if dtype is list else ids.astype(dtype))
    assert_same_answers(index, fresh(kind, vectors(3), ids))
    spread = np.arange(9)
    spread[::3] = ids
    assert_same_answers(fresh(kind, vectors(3), spread[::3]), index)


def test_an_id_may_be_given_twice_in_two_calls(kind: str) -> None:
    x = vectors(3)
    index = fresh(kind, x[:2], [7, 8])
    index.add_with_ids(x[2:], [7])
    assert sorted(index.search(Q[:1], 5)[1][0]) == [-1, -1, 7, 7, 8]
    assert any(np.array_equal(index.reconstruct(7), v) for v in index.sa_decode(index.sa_encode(x[[0, 2]])))
    index.update_vectors([7], x[1:2])
    assert (index.search(Q, 3)[0] == index.search(Q, 1)[0]).all()
    assert index.remove_ids([7]) == 2
    assert index.ids.tolist() == [8]


# ------------------------------------------------------------------------------------------------ removal, update, merge


@pytest.mark.parametrize("nbits", [4, 8])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 400])
def test_remove(n: int, nbits: int, kind: str) -> None:
    x = vectors(n)
    for gone in ([0], [n - 1], range(0, n, 2), range(n // 2), range(n), []):
        index = filled(kind, n, nbits)
        ids = np.setdiff1d(np.arange(n), gone)
        assert index.remove_ids([*gone, n + 5, *gone]) == len(gone)
        assert_same_answers(index, fresh(kind, x[ids], ids, nbits))
        index.add(Q[:2])
        ids = np.append(ids, [n, n + 1])
        assert_same_answers(index, fresh(kind, np.concatenate([x, Q[:2]])[ids], ids, nbits))


def test_remove_by_what_search_takes(kind: str) -> None:
    """A mask, a selector, ids: the same."""
    mask = np.random.default_rng(5).random(300) < 0.4
    results = []
    for sel in (mask, np.flatnonzero(mask), faiss.IDSelectorBatch(np.flatnonzero(mask))):
        index = filled(kind)
        assert index.remove_ids(sel) == mask.sum()
        results.append(index)
    for index in results:
        assert_same_answers(index, fresh(kind, vectors(300)[~mask], np.flatnonzero(~mask)))


@pytest.mark.parametrize("stored", [False, True])
def test_update(stored: bool, kind: str) -> None:
    ids = np.random.default_rng(6).permutation(1000)[:300] if stored else np.arange(300)
    x, index = vectors(300), fresh(kind, vectors(300), ids)
    which = np.random.default_rng(7).permutation(300)[:70]
    index.update_vectors(ids[which], vectors(70, seed=8))
    x[which] = vectors(70, seed=8)
    assert_same_answers(index, fresh(kind, x, ids))
    assert index.next_id == ids.max() + 1
    with pytest.raises(UnknownIdError, match="2000"):
        index.update_vectors([ids[0], 2000], vectors(2, seed=9))
    assert_same_answers(index, fresh(kind, x, ids))


@pytest.mark.parametrize("n", [0, 1, 64, 200])
def test_merge(n: int, kind: str) -> None:
    x, y = vectors(100), vectors(n, seed=9)
    both = np.concatenate([x, y])
    # explicit: ids are kept, plus add_id
    index, other = fresh(kind, x, np.arange(100) * 3), fresh(kind, y, np.arange(n) * 3 + 1)
    index.merge_from(other)
    ids = np.concatenate([np.arange(100) * 3, np.arange(n) * 3 + 1])
    assert_same_answers(index, fresh(kind, both, ids))
    assert (other.ntotal, other.next_id) == (0, 0)
    index, other = fresh(kind, x, np.arange(100) * 3), fresh(kind, y, np.arange(n) * 3)
    index.merge_from(other, add_id=np.int64(5000))
    ids = np.concatenate([np.arange(100) * 3, np.arange(n) * 3 + 5000])
    assert_same_answers(index, fresh(kind, both, ids))
    index.add(x[:1])
    assert index.next_id == max(ids) + 2
    # automatic
    index, other = filled(kind, 100), filled(kind, n, seed=9)
    if kind == "flat":  # as faiss.IndexPQ
        index.merge_from(other)
        assert not index._store.has_ids
    elif n:
        with pytest.raises(InvalidParameterError, match=r"both indexes hold id \d+ .*pass add_id=100"):
            index.merge_from(other)
        assert (index.ntotal, other.ntotal) == (100, n)
        index.merge_from(other, 100)
    assert_same_answers(index, filled(kind, 0) if not len(both) else fresh(kind, both[: index.ntotal], np.arange(index.ntotal)))
    other.add(x)
    assert_same_answers(other, filled(kind, 100))


def test_merge_takes_equal_codecs_and_quantizers() -> None:
    for kind in ("flat", "ivf"):
        index, other = filled(kind), round_trip(filled(kind))
        assert other.codec is not index.codec
        index.merge_from(other, 300)
        assert index.ntotal == 600
    moved = faiss.IndexFlatL2(D)
    moved.add(COARSE.reconstruct_n(0, NLIST) + 1)
    other = HyperbolicIVFPQIndex.from_codec(moved, CODECS[4], NLIST)
    with pytest.raises(InvalidParameterError, match="the same lists"):
        index.merge_from(other)


def test_changes_leave_copies_alone(kind: str) -> None:
    """Also where both go on writing behind what they share."""
    index = filled(kind, 70)
    twin, ref = copy.copy(index), filled(kind, 70)
    index.add(vectors(10, seed=20))
    twin.add(vectors(10, seed=21))
    twin.update_vectors([3], Q[:1])
    index.remove_ids([5])
    assert_same_answers(copy.copy(twin), twin)
    ref.add(vectors(10, seed=20))
    ref.remove_ids([5])
    assert_same_answers(index, ref)


# ------------------------------------------------------------------------------------------------ reconstruction


def test_reconstruct_by_id(kind: str) -> None:
    x, ids = vectors(200), np.random.default_rng(6).permutation(400)[:200]
    index = fresh(kind, x, ids)
    ref = dict(zip(ids.tolist(), index.codec.decode(index.codec.compute_codes(x)), strict=True))
    for i in (ids[0], ids[17], ids[-1]):
        np.testing.assert_array_equal(index.reconstruct(i), ref[int(i)])
    wanted = np.concatenate([ids[::3], ids[::7], ids[:1], ids[:1]])
    np.testing.assert_array_equal(index.reconstruct_batch(wanted), np.stack([ref[int(i)] for i in wanted]))
    np.testing.assert_array_equal(index.reconstruct_n(), np.stack([ref[i] for i in sorted(ref)]))
    np.testing.assert_array_equal(index.reconstruct_n(100), np.stack([ref[i] for i in sorted(ref) if i >= 100]))
    gap = int(np.setdiff1d(np.arange(ids.max()), ids)[0])
    run = next(i for i in range(400) if i in ref and i + 1 in ref)
    np.testing.assert_array_equal(index.reconstruct_n(run, 2), np.stack([ref[run], ref[run + 1]]))
    for call in (lambda: index.reconstruct(gap), lambda: index.reconstruct_n(gap, 1), lambda: index.reconstruct_batch([gap])):
        with pytest.raises(UnknownIdError, match=str(gap)):
            call()


def test_search_and_reconstruct(kind: str) -> None:
    index = filled(kind, 20)
    index.remove_ids([0, 5])
    D_, I, R = index.search_and_reconstruct(Q, 25)
    for a, b in zip((D_, I), index.search(Q, 25), strict=True):
        np.testing.assert_array_equal(a, b)
    assert R.shape == (4, 25, D)
    assert R.dtype == np.float32
    assert np.isnan(R[I < 0]).all()
    np.testing.assert_array_equal(R[I >= 0], index.reconstruct_batch(I[I >= 0]))
    only = index.search_and_reconstruct(Q, 3, params=SearchParameters([4]))
    assert only[1].tolist() == [[4, -1, -1]] * 4


def test_assign(kind: str) -> None:
    index = filled(kind)
    np.testing.assert_array_equal(index.assign(Q), index.search(Q, 1)[1])
    np.testing.assert_array_equal(index.assign(Q, 4), index.search(Q, 4)[1])


# ------------------------------------------------------------------------------------------------ range search


def test_range_search_is_search_cut_off(kind: str) -> None:
    index = filled(kind, 500)
    D_, I = index.search(Q, 500)
    nearest = D_[0, 0]
    for radius in (-1.0, 0.0, nearest, np.nextafter(nearest, np.float32(9)), 3.0, 5.0, np.inf, 1e300, np.float64(4), 4):
        lims, d, i = index.range_search(Q, radius)
        assert (lims.dtype, d.dtype, i.dtype) == (np.int64, np.float32, np.int64)
        with np.errstate(over="ignore"):
            inside = np.float32(radius) > D_
        assert lims.tolist() == [0, *np.cumsum(inside.sum(axis=1))]
        np.testing.assert_array_equal(d, D_[inside])
        np.testing.assert_array_equal(i, I[inside])


# ------------------------------------------------------------------------------------------------ codes


@given(st.integers(1, 40), st.integers(4, 8), st.integers(0, 70), st.integers(0, 2**32))
@settings(max_examples=50)
def test_packing(M: int, nbits: int, n: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(1 << nbits, size=(n, M)).astype(np.uint8)
    packed = pack(codes, nbits)
    assert packed.shape == (n, packed_size(M, nbits))
    bits = np.unpackbits(codes[:, :, None], axis=2, bitorder="little")[:, :, :nbits].reshape(n, M * nbits)
    np.testing.assert_array_equal(packed, np.packbits(bits, axis=1, bitorder="little").reshape(packed.shape))
    np.testing.assert_array_equal(unpack(packed, M, nbits), codes)


@pytest.mark.parametrize("nbits", [4, 5, 6, 7, 8])
def test_codes_are_packed_as_faiss_packs_them(nbits: int, kind: str) -> None:
    """Same codebooks, same bytes: sa_encode, sa_decode, codes."""
    theirs = faiss.IndexPQ(D, M, nbits) if kind == "flat" else faiss.IndexIVFPQ(COARSE, D, NLIST, M, nbits)
    if kind == "ivf":
        theirs.by_residual = False
    x = vectors(2000)
    theirs.train(x)
    books = faiss.vector_to_array(theirs.pq.centroids).reshape(M, 1 << nbits, D // M)
    codec = HyperbolicProductQuantizer.from_codebooks(books, 0.0, metric="squared")
    flat, ivf = HyperbolicPQIndex.from_codec(codec), HyperbolicIVFPQIndex.from_codec(COARSE, codec, NLIST)
    ours: Index = flat if kind == "flat" else ivf
    assert ours.sa_code_size == theirs.sa_code_size()
    assert ours.code_size == theirs.code_size
    codes = theirs.sa_encode(x)
    same = (ours.sa_encode(x) == codes).all(axis=1)
    assert same.mean() > 0.99  # but for rounding at the border between two codewords
    np.testing.assert_allclose(ours.sa_decode(codes), theirs.sa_decode(codes), rtol=1e-6)
    ours.add_sa_codes(codes)
    if kind == "flat":
        np.testing.assert_array_equal(ours.codes, codes)
    else:
        theirs.add_sa_codes(codes, np.arange(2000))
        for number in range(NLIST):
            ids, mine = ours.get_list(number)
            invlists = theirs.invlists
            np.testing.assert_array_equal(ids, faiss.rev_swig_ptr(invlists.get_ids(number), invlists.list_size(number)))
            size = invlists.list_size(number) * ours.code_size
            np.testing.assert_array_equal(mine.ravel(), faiss.rev_swig_ptr(invlists.get_codes(number), size))


# ------------------------------------------------------------------------------------------------ a model


def round_trip(index: Any) -> Any:
    file = io.BytesIO()
    write_index(index, file)
    file.seek(0)
    return read_index(file)


class Model(RuleBasedStateMachine):
    """Both indexes beside a list of (id, row of VECTORS), through any sequence of changes.

    Few ids and few vectors, so that repeats of ids and equal distances are the rule.
    """

    VECTORS = vectors(30, seed=11)

    @initialize(nbits=st.sampled_from([4, 8]))
    def start(self, nbits: int) -> None:
        self.nbits = nbits
        self.codes = CODECS[nbits].compute_codes(self.VECTORS)
        self.indexes = [empty("flat", nbits), empty("ivf", nbits)]
        self.held: list[tuple[int, int]] = []
        self.next_id = 0

    def record(self, ids: list[int], rows: list[int]) -> None:
        self.held += zip(ids, rows, strict=True)
        self.next_id = max([self.next_id, *(i + 1 for i in ids)])

    @rule(rows=st.lists(st.integers(0, 29), max_size=90), by=st.sampled_from(["vectors", "codes"]))
    def add(self, rows: list[int], by: str) -> None:
        for index in self.indexes:
            if by == "vectors":
                index.add(self.VECTORS[rows])
            else:
                index.add_sa_codes(index.sa_encode(self.VECTORS[rows]))
        self.record(list(range(self.next_id, self.next_id + len(rows))), rows)

    @rule(ids=st.lists(st.integers(0, 150), unique=True, max_size=70), data=st.data())
    def add_with_ids(self, ids: list[int], data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.integers(0, 29), min_size=len(ids), max_size=len(ids)))
        for index in self.indexes:
            index.add_with_ids(self.VECTORS[rows], ids)
        self.record(ids, rows)

    @rule(wanted=st.lists(st.integers(0, 200), max_size=100), by=st.sampled_from(["ids", "mask", "batch", "not"]))
    def remove(self, wanted: list[int], by: str) -> None:
        gone = set(wanted)
        if by == "not":
            gone = {i for i, _ in self.held} - gone
        for index in self.indexes:
            sel: Any = wanted
            if by == "mask":
                sel = np.isin(np.arange(self.next_id), wanted)
            elif by in ("batch", "not"):
                sel = faiss.IDSelectorBatch(np.array(wanted, np.int64))
                sel = faiss.IDSelectorNot(sel) if by == "not" else sel
            assert index.remove_ids(sel) == sum(i in gone for i, _ in self.held)
        self.held = [(i, row) for i, row in self.held if i not in gone]

    @rule(data=st.data())
    def update(self, data: st.DataObject) -> None:
        known = sorted({i for i, _ in self.held})
        ids = data.draw(st.lists(st.sampled_from(known), unique=True, max_size=40)) if known else []
        rows = data.draw(st.lists(st.integers(0, 29), min_size=len(ids), max_size=len(ids)))
        for index in self.indexes:
            index.update_vectors(ids, self.VECTORS[rows])
        new = dict(zip(ids, rows, strict=True))
        self.held = [(i, new.get(i, row)) for i, row in self.held]

    @rule(ids=st.lists(st.integers(0, 150), unique=True, max_size=30), add_id=st.integers(-5, 200).filter(bool))
    def merge(self, ids: list[int], add_id: int) -> None:
        rows = [i % 30 for i in ids]
        moved = [i + add_id for i in ids]
        allowed = not set(moved) & {i for i, _ in self.held} and min(moved, default=0) >= 0
        for index in self.indexes:
            other = empty("flat" if isinstance(index, HyperbolicPQIndex) else "ivf", self.nbits)
            other.add_with_ids(self.VECTORS[rows], ids)
            if allowed:
                index.merge_from(other, add_id)
                assert other.ntotal == 0
            else:
                with pytest.raises(InvalidParameterError, match="id"):
                    index.merge_from(other, add_id)
                assert other.ntotal == len(ids)
        if allowed:
            self.record(moved, rows)

    @rule(how=st.sampled_from([copy.copy, copy.deepcopy, round_trip]))
    def replace(self, how: Callable[[Index], Index]) -> None:
        self.indexes = [how(index) for index in self.indexes]

    @rule()
    def reset(self) -> None:
        for index in self.indexes:
            index.reset()
        self.held, self.next_id = [], 0

    @invariant()
    def follows(self) -> None:
        ids = np.array([i for i, _ in self.held], np.int64)
        codes = self.codes[[row for _, row in self.held]].reshape(-1, M)
        for index in self.indexes:
            assert (index.ntotal, index.next_id) == (len(ids), self.next_id)
            stored = unpack(index.codes, M, self.nbits)
            assert sorted(zip(index.ids, map(bytes, stored), strict=True)) == sorted(zip(ids, map(bytes, codes), strict=True))
        np.testing.assert_array_equal(self.indexes[0].ids, ids)  # a flat index keeps the order
        tables = CODECS[self.nbits].compute_distance_tables(Q[:2])
        for q, table in enumerate(tables):
            total = (table[0, codes[:, 0]] + table[1, codes[:, 1]]) + table[2, codes[:, 2]]
            order = np.lexsort((ids, total))
            for index in self.indexes:
                D_, I = index.search(Q[q : q + 1], len(ids) + 1)
                np.testing.assert_array_equal(I[0], [*ids[order], -1])
                np.testing.assert_array_equal(D_[0], [*total[order], np.inf])
                D_, I = index.search(Q[q : q + 1], 5)
                np.testing.assert_array_equal(D_[0], [*total[order][:5], *[np.inf] * (5 - len(order))])


Model.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True)
TestModel = Model.TestCase
TestModel.__test__ = True


# ------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("n", [70, 128, 300])
@pytest.mark.parametrize("change", ["add", "add_with_ids", "remove_ids", "update_vectors", "merge_from", "reset"])
def test_a_search_sees_one_state_of_the_index(change: str, n: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may change the index while a search runs, here before each of its tasks."""
    hyperfaiss.set_num_threads(1)
    monkeypatch.setattr(hyperfaiss.search, "_TABLE_BYTES", 1)  # a task for each query
    index, steps = filled(kind, n), iter(range(99))
    ref = index.search(Q, n + 50)
    tables_of = index.codec.tables_of

    def changing(*args: Any) -> np.ndarray:
        step = next(steps)
        gone = np.arange(10 * step, 10 * step + 10)
        arguments: dict[str, Callable[[], tuple[Any, ...]]] = {
            "add": lambda: (Q,), "add_with_ids": lambda: (Q[:2], [7000 - 2 * step, 6999 - 2 * step]),
            "remove_ids": lambda: (gone,), "update_vectors": lambda: (gone, np.zeros((10, D))),
            "merge_from": lambda: (filled(kind, 30), 1000 * (step + 1)), "reset": tuple,
        }  # fmt: skip
        getattr(index, change)(*arguments[change]())
        return tables_of(*args)

    with monkeypatch.context() as patch:
        patch.setattr(index.codec, "tables_of", changing)
        comp = index.search(Q, n + 50)
    assert next(steps) == len(Q)
    for a, b in zip(comp, ref, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (index.search(Q, n + 50)[0] != ref[0]).any()


def test_searches_during_changes(kind: str) -> None:
    """Threads that search while one adds and removes: each answer is that of some state in between, whole."""
    x = vectors(1500)
    codes = CODECS[4].compute_codes(x)
    tables = CODECS[4].compute_distance_tables(Q)
    distances = np.stack([(t[0, codes[:, 0]] + t[1, codes[:, 1]]) + t[2, codes[:, 2]] for t in tables])
    index, done = empty(kind), threading.Event()
    failures: list[object] = []
    seen: set[int] = set()

    def search() -> None:
        while not done.is_set():
            D_, I = index.search(Q, 2000)
            held = [np.sort(row[row >= 0]) for row in I]
            ids = held[0]
            # the first so many, with or without the even ones
            states = (np.arange(len(ids)), np.arange(1, 2 * len(ids), 2))
            if not any(np.array_equal(ids, state) for state in states) or any(not np.array_equal(ids, other) for other in held):
                failures.append(ids)
            for q in range(len(Q)):
                if not np.array_equal(D_[q, : len(ids)], distances[q, I[q, : len(ids)]]):
                    failures.append(q)
            seen.add(len(ids))

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        index.reset()
        for start in range(0, len(x), 50):
            index.add(x[start : start + 50])
        index.remove_ids(np.arange(0, len(x), 2))
    done.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures
    assert len(seen) > 2


# ------------------------------------------------------------------------------------------------ memory


def test_codes_are_stored_once(kind: str) -> None:
    """Flat: at most 1 % and 64 KB over the codes, and no ids. IVF: ids, and less than a block a list more."""
    n = 200_000
    index = empty(kind, 8)
    codes = np.random.default_rng(0).integers(256, size=(n, M), dtype=np.uint8)
    if kind == "ivf":
        codes = np.concatenate([np.random.default_rng(1).integers(NLIST, size=(n, 1), dtype=np.uint8), codes], axis=1)
    for start in range(0, n, 7777):
        index.add_sa_codes(codes[start : start + 7777])
    per_vector = M if kind == "flat" else M + 8
    assert index._store.nbytes <= 1.01 * n * per_vector + 2 * (64 << 10) + 64 * NLIST * per_vector


def test_files_grow_with_codes_alone(kind: str, tmp_path: Path) -> None:
    """A file takes half a percent more than codes and ids, and what the codec and a part-filled block a list take."""
    n = 200_000
    index = empty(kind, 8)
    codes = np.random.default_rng(0).integers(256, size=(n, index.sa_code_size), dtype=np.uint8)
    if kind == "ivf":
        codes[:, 0] %= NLIST
    index.add_sa_codes(codes)
    write_index(index, tmp_path / "file")
    per_vector = M if kind == "flat" else M + 8
    fixed = M * 256 * 4 * 4 + 64 * NLIST * per_vector + 8000
    assert (tmp_path / "file").stat().st_size < 1.005 * n * per_vector + fixed
