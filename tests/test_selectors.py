"""Filters: every selector, on both indexes, with and without stored ids, against a fresh index over the admitted vectors."""

# ruff: noqa: E741 (D and I are FAISS's names)
from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hyperfaiss.selectors
from hyperfaiss import (
    HyperbolicIVFPQIndex,
    HyperbolicPQIndex,
    HyperbolicProductQuantizer,
    InvalidParameterError,
    InvalidVectorsError,
    SearchParameters,
)
from hyperfaiss.selectors import admitted
from hyperfaiss.storage import positions_of
from tests.toys import Index, empty_index, flat_quantizer

D, NTOTAL, NLIST = 8, 700, 9
X = np.random.default_rng(1).normal(size=(NTOTAL, D)).astype(np.float32)
Q = np.random.default_rng(2).normal(size=(6, D)).astype(np.float32)
CODEC = HyperbolicProductQuantizer.from_codebooks(np.random.default_rng(0).normal(size=(4, 16, 2)), 1.0)
# ids that are neither in order nor dense
SPARSE = np.random.default_rng(3).permutation(5 * NTOTAL)[:NTOTAL]


def empty(kind: str) -> Index:
    index = empty_index(kind, CODEC, flat_quantizer(X[:NLIST]))
    if isinstance(index, HyperbolicIVFPQIndex):
        index.nprobe = 4
    return index


def ids_of(kind: str) -> np.ndarray:
    return SPARSE if kind.endswith("ids") else np.arange(NTOTAL)


def build(kind: str) -> Index:
    index = empty(kind)
    if kind.endswith("ids"):
        index.add_with_ids(X, SPARSE)
    else:
        index.add(X)
    return index


KINDS = ["flat", "flat with ids", "ivf", "ivf with ids"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Callback(faiss.PyCallbackIDSelector):
    """A selector written in Python."""


# How a selector is made, and what it admits. Each is made anew, so that nothing else keeps its parts alive.
SELECTORS: dict[str, tuple[Callable[[], Any], Callable[[np.ndarray], np.ndarray]]] = {
    "all": (faiss.IDSelectorAll, lambda i: i >= 0),
    "range": (lambda: faiss.IDSelectorRange(100, 300), lambda i: (i >= 100) & (i < 300)),
    "sorted range": (lambda: faiss.IDSelectorRange(100, 300, True), lambda i: (i >= 100) & (i < 300)),
    "empty range": (lambda: faiss.IDSelectorRange(300, 100), lambda i: i < 0),
    "array": (lambda: faiss.IDSelectorArray(np.arange(0, 900, 7)), lambda i: (i % 7 == 0) & (i < 900)),
    "empty array": (lambda: faiss.IDSelectorArray(np.array([], np.int64)), lambda i: i < 0),
    "batch": (lambda: faiss.IDSelectorBatch(np.arange(0, 900, 7)), lambda i: (i % 7 == 0) & (i < 900)),
    "bitmap": (
        lambda: faiss.IDSelectorBitmap(np.packbits(np.arange(800) % 5 == 0, bitorder="little")),
        lambda i: (i % 5 == 0) & (i < 800),
    ),
    "not": (lambda: faiss.IDSelectorNot(faiss.IDSelectorRange(100, 300)), lambda i: (i < 100) | (i >= 300)),
    "and": (
        lambda: faiss.IDSelectorAnd(faiss.IDSelectorRange(100, 600), faiss.IDSelectorBatch(np.arange(0, 900, 3))),
        lambda i: (i >= 100) & (i < 600) & (i % 3 == 0),
    ),
    "or": (
        lambda: faiss.IDSelectorOr(faiss.IDSelectorRange(0, 50), faiss.IDSelectorRange(400, 420)),
        lambda i: (i < 50) | ((i >= 400) & (i < 420)),
    ),
    "xor": (
        lambda: faiss.IDSelectorXOr(faiss.IDSelectorRange(0, 50), faiss.IDSelectorRange(40, 420)),
        lambda i: (i < 40) | ((i >= 50) & (i < 420)),
    ),
    "nested": (
        lambda: faiss.IDSelectorNot(
            faiss.IDSelectorAnd(
                faiss.IDSelectorOr(faiss.IDSelectorRange(0, 500), faiss.IDSelectorAll()),
                faiss.IDSelectorNot(faiss.IDSelectorXOr(faiss.IDSelectorRange(0, 50), faiss.IDSelectorRange(40, 420))),
            )
        ),
        lambda i: (i < 40) | ((i >= 50) & (i < 420)),
    ),
    "callback": (lambda: Callback(lambda i: i % 11 == 3), lambda i: i % 11 == 3),
    "a callback within": (
        lambda: faiss.IDSelectorAnd(faiss.IDSelectorRange(0, 400), Callback(lambda i: i % 11 == 3)),
        lambda i: (i % 11 == 3) & (i < 400),
    ),
}  # fmt: skip


def assert_filtered(comp: Index, kind: str, member: np.ndarray, params: Any) -> None:
    """Searches with ``params`` equal those of a fresh index over the members alone."""
    ref = empty(kind)
    if member.any():
        ref.add_with_ids(X[member], ids_of(kind)[member])
    for k in (1, 10, NTOTAL):
        for a, b in zip(comp.search(Q, k, params=params), ref.search(Q, k), strict=True):
            np.testing.assert_array_equal(a, b)
    for radius in (0.0, 3.0, 5.0, np.inf):
        for a, b in zip(comp.range_search(Q, radius, params=params), ref.range_search(Q, radius), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors_of_faiss(name: str, kind: str) -> None:
    make, member = SELECTORS[name]
    index, ids = build(kind), ids_of(kind)
    inside = member(ids)
    sel = make()
    assert [sel.is_member(int(i)) for i in ids] == inside.tolist()
    choices = [SearchParameters(sel), faiss.SearchParameters(sel=sel), faiss.SearchParametersIVF(sel=sel, nprobe=4)]
    later = faiss.SearchParameters()
    later.sel = make()
    del sel
    gc.collect()
    for params in (*choices, later):
        assert_filtered(index, kind, inside, params)
    assert index.remove_ids(make()) == inside.sum()
    assert set(index.ids) == set(ids[~inside])


@pytest.mark.parametrize("share", [0.0, 0.003, 0.01, 0.3, 0.99, 1.0])
def test_masks_and_ids(share: float, kind: str) -> None:
    index, ids = build(kind), ids_of(kind)
    inside = np.random.default_rng(4).random(NTOTAL) < share
    mask = np.zeros(index.next_id, np.bool_)
    mask[ids[inside]] = True
    wanted = np.random.default_rng(5).permutation(ids[inside])
    unknown = np.setdiff1d(np.arange(-3, 6 * NTOTAL), ids)
    for sel in (mask, mask.tolist(), wanted, wanted.astype(np.uint32), np.repeat(wanted, 3), np.concatenate([unknown, wanted])):
        assert_filtered(index, kind, inside, SearchParameters(sel))
    assert_filtered(index, kind, inside, SearchParameters(sel=wanted, nprobe=4))


def test_blocks_without_a_member_are_not_visited(kind: str) -> None:
    index = build(kind)
    wanted = index.ids[:3]
    whole = index._store.view()
    view = hyperfaiss.selectors.restrict(whole, wanted, index.next_id)
    assert 0 < len(view.order) <= 3
    assert len(view.starts) == len(whole.starts)
    nothing = hyperfaiss.selectors.restrict(whole, [], index.next_id)
    assert (len(nothing.blocks), nothing.n, len(nothing.order)) == (0, 0, 0)


def test_recovered_types() -> None:
    """SWIG hands parts out as the base class; those that can be told are evaluated without asking FAISS about every id."""
    params = faiss.SearchParameters(sel=faiss.IDSelectorNot(faiss.IDSelectorRange(1, 2)))
    assert type(params.sel) is faiss.IDSelector
    outer = hyperfaiss.selectors.read_parameters(params).sel
    assert type(outer) is faiss.IDSelectorNot
    assert type(hyperfaiss.selectors._typed(outer, outer.sel)) is faiss.IDSelectorRange
    params.sel = faiss.IDSelectorRange(3, 4)
    assert hyperfaiss.selectors.read_parameters(params).sel.imin == 3


def test_no_call_per_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """What FAISS must be asked, it is asked in bulk; nothing calls is_member from Python."""
    index = build("ivf with ids")

    def counted(self: Any, i: int) -> bool:
        raise AssertionError

    for name in ("IDSelector", "IDSelectorBatch", "IDSelectorRange", "IDSelectorArray", "IDSelectorNot", "IDSelectorBitmap"):
        monkeypatch.setattr(getattr(faiss, name), "is_member", counted)
    for name in set(SELECTORS) - {"callback", "a callback within"}:
        index.search(Q, 3, params=SearchParameters(SELECTORS[name][0]()))


@pytest.mark.parametrize("piece", [1, 64, 100, 10_000])
def test_pieces_of_a_large_index(piece: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = build(kind)
    ref = positions_of(admitted(index._store.view(), faiss.IDSelectorBatch(np.arange(0, 2000, 3)), index.next_id))
    monkeypatch.setattr(hyperfaiss.selectors, "_PIECE", piece)
    comp = positions_of(admitted(index._store.view(), faiss.IDSelectorBatch(np.arange(0, 2000, 3)), index.next_id))
    np.testing.assert_array_equal(comp, ref)
    assert len(ref) == np.isin(ids_of(kind), np.arange(0, 2000, 3)).sum()


@pytest.mark.parametrize(
    "bounds", [(0, 1), (63, 64), (63, 65), (64, 128), (5, 700), (5, 10**6), (-3, 2), (699, 700), (700, 9), (0, 0)]
)
def test_ranges_at_the_borders_of_blocks(bounds: tuple[int, int], kind: str) -> None:
    index, ids = build(kind), ids_of(kind)
    inside = (ids >= bounds[0]) & (ids < bounds[1])
    assert_filtered(index, kind, inside, SearchParameters(faiss.IDSelectorRange(*bounds)))


def test_removed_lanes_stay_out(kind: str) -> None:
    """Lanes that are not in use hold some id or other; no selector admits them."""
    index, ids = build(kind), ids_of(kind)
    index.remove_ids(ids[5:])
    for sel in (faiss.IDSelectorAll(), np.ones(index.next_id, np.bool_), np.arange(index.next_id)):
        I = index.search(Q, 20, params=SearchParameters(sel, nprobe=NLIST))[1]
        np.testing.assert_array_equal(np.sort(I, axis=1)[:, -5:], np.sort(ids[:5])[None].repeat(len(Q), axis=0))


@given(st.lists(st.integers(0, 2**63 - 2), unique=True, max_size=200), st.data())
def test_sets_of_any_ids(ids: list[int], data: st.DataObject) -> None:
    """Ids of the whole range, among them such as fall on the same place of the hash table."""
    ids += [i + step * 2**58 for i in ids[:20] for step in (1, 2) if i + step * 2**58 < 2**63 - 1]
    ids = list(dict.fromkeys(ids))
    wanted = data.draw(st.lists(st.sampled_from(ids), unique=True) if ids else st.just([]))
    wanted += data.draw(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
    index = HyperbolicPQIndex.from_codec(CODEC)
    index.add_with_ids(np.zeros((len(ids), D)), np.array(ids, np.int64))
    member = np.isin(np.array(ids, np.int64), np.array(wanted, np.int64))
    masks = admitted(index._store.view(), np.array(wanted, np.int64), index.next_id)
    np.testing.assert_array_equal(positions_of(masks), np.flatnonzero(member))
    found = index._store.find(index._store.view(), np.array(wanted, np.int64))
    places = {i: place for place, i in enumerate(ids)}
    assert found.tolist() == [places.get(i, -1) for i in wanted]


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("sel", "error", "words"),
    [
        (np.ones(699, np.bool_), InvalidVectorsError, r"\(700,\), got \(699,\)"),
        (np.ones(701, np.bool_), InvalidVectorsError, r"\(700,\), got \(701,\)"),
        (np.ones((1, 700), np.bool_), InvalidVectorsError, r"\(700,\), got \(1, 700\)"),
        (np.array([1.0, 2.0]), InvalidVectorsError, "int64, got float64"),
        (np.array([1, 2], np.uint64), InvalidVectorsError, "int64, got uint64"),
        (np.array([[1, 2]]), InvalidVectorsError, r"\(n,\), got \(1, 2\)"),
        (3, InvalidVectorsError, r"\(n,\), got \(\)"),
        ([[1], [2, 3]], InvalidVectorsError, "sel can't be read"),
        ("ids", InvalidVectorsError, "sel must be int64"),
        (abs, InvalidParameterError, "IDSelector, got builtin_function"),
        ({1, 2}, InvalidParameterError, "IDSelector, got set"),
    ],
)
def test_what_is_no_selector(sel: Any, error: type[Exception], words: str) -> None:
    for kind in ("flat", "ivf"):
        index = build(kind)
        before = index.search(Q, 5)
        for call in (
            lambda i: i.search(Q, 5, params=SearchParameters(sel)),
            lambda i: i.range_search(Q, 1.0, params=SearchParameters(sel)),
            lambda i: i.remove_ids(sel),
        ):
            with pytest.raises(error, match=words):
                call(index)
        for a, b in zip(index.search(Q, 5), before, strict=True):
            np.testing.assert_array_equal(a, b)


def codes_limited() -> Any:
    params = faiss.SearchParametersIVF()
    params.max_codes = 100
    return params


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (SearchParameters(nprobe=0), "nprobe must be an integer >= 1, got 0"),
        (SearchParameters(nprobe=2.5), "2.5"),
        (faiss.SearchParametersIVF(nprobe=0), "nprobe must be an integer >= 1, got 0"),
        (codes_limited(), "max_codes is not supported, got 100"),
        (faiss.SearchParametersHNSW(), "SearchParametersHNSW"),
        ({"nprobe": 3}, "dict"),
        (np.ones(700, np.bool_), "ndarray"),
        (faiss.IDSelectorAll(), "IDSelectorAll"),
    ],
)
def test_what_are_no_parameters(params: Any, words: str) -> None:
    for kind in ("flat", "ivf"):
        with pytest.raises(InvalidParameterError, match=words):
            build(kind).search(Q, 5, params=params)
