"""Relevance, precision and recall against plain loops."""

from __future__ import annotations

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperfaiss.errors import InvalidVectorsError
from hyperfaiss.metrics import Relevance, precision_and_ap, recall


def labels_of(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "numbers":
        return rng.integers(-2, 5, n)
    if kind == "strings":
        return np.array(["a", "bb", "c", "d"])[rng.integers(4, size=n)]
    return rng.random((n, int(kind))) < 1.5 / int(kind)


@pytest.mark.parametrize("kind", ["numbers", "strings", "1", "7", "8", "21", "64", "65", "150"])
def test_relevance_and_totals_against_naive(kind: str) -> None:
    rng = np.random.default_rng(len(kind))
    wanted, labels = labels_of(kind, 12, rng), labels_of(kind, 40, rng)
    if kind in ("numbers", "strings"):
        wanted[0] = 99 if kind == "numbers" else "z"  # nobody's
    else:
        wanted[0] = False
    I = rng.integers(-1, 40, (12, 9))  # noqa: E741
    relevance = Relevance(wanted, labels)
    ref = [[i >= 0 and naive.relevant(labels[i], w) for i in row] for row, w in zip(I, wanted, strict=True)]
    np.testing.assert_array_equal(relevance.of(I), ref)
    np.testing.assert_array_equal(relevance.of(I[3:7], 3), ref[3:7])
    totals = [sum(naive.relevant(x, w) for x in labels) for w in wanted]
    assert totals[0] == 0
    assert max(totals) > 0
    np.testing.assert_array_equal(relevance.totals(), totals)


def test_totals_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    wanted, labels = labels_of("70", 30, rng), labels_of("70", 50, rng)
    whole = Relevance(wanted, labels)
    monkeypatch.setattr("hyperfaiss.metrics._PAIRS", 3)
    monkeypatch.setattr("hyperfaiss.metrics._ROWS", 7)
    np.testing.assert_array_equal(Relevance(wanted, labels).totals(), whole.totals())
    np.testing.assert_array_equal(whole.totals(), [(labels & w).any(axis=1).sum() for w in wanted])


def test_an_empty_database_and_no_queries() -> None:
    for empty, one in ((np.empty(0, int), np.zeros(1, int)), (np.zeros((0, 3), bool), np.ones((1, 3), bool)), ([], [1])):
        assert Relevance(one, empty).totals().tolist() == [0]
        assert not Relevance(one, empty).of(np.full((1, 4), -1)).any()
        assert Relevance(empty, one).totals().shape == (0,)
        assert Relevance(empty, one).of(np.zeros((0, 4), int)).shape == (0, 4)


def test_labels_are_read_from_a_mapped_file(tmp_path: object) -> None:
    labels = np.random.default_rng(0).integers(0, 3, 100).astype(np.int32)
    np.save(f"{tmp_path}/y.npy", labels)
    mapped = np.load(f"{tmp_path}/y.npy", mmap_mode="r")
    relevance = Relevance([1], mapped)
    assert np.shares_memory(relevance._database, mapped)
    np.testing.assert_array_equal(relevance.of(np.arange(100)[None]), labels[None] == 1)


@pytest.mark.parametrize(
    ("wanted", "labels"),
    [
        ([0], ["a"]),
        ([0.5], [0]),
        ([[True, False]], [[True]]),
        ([[True]], [0]),
        ([[0, 1]], [[0, 1]]),
        (np.zeros((1, 0), bool), np.zeros((3, 0), bool)),
        (0, [0]),
    ],
)
def test_labels_that_do_not_fit(wanted: object, labels: object) -> None:
    with pytest.raises(InvalidVectorsError, match="labels must be integers or strings"):
        Relevance(wanted, labels)


@pytest.mark.parametrize(
    ("I", "first", "message"),
    [
        ([[0, 3]], 0, "results 0 to 3 for a database of 3"),
        ([[-2]], 0, "results -2 to -2"),
        ([[0.0]], 0, "need integers"),
        ([0], 0, "need integers"),
        ([[0], [0]], 1, "for 2 queries"),
        ([[0]], -1, "for 2 queries"),
    ],
)
def test_results_that_do_not_fit(I: list, first: int, message: str) -> None:  # noqa: E741
    with pytest.raises(InvalidVectorsError, match=message):
        Relevance([0, 1], [0, 1, 2]).of(I, first)


@given(st.data())
def test_recall_against_naive(data: st.DataObject) -> None:
    nq, k, n = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 6)), data.draw(st.integers(0, 6))
    ids = st.one_of(st.integers(-1, 5), st.sampled_from([2**62, 2**63 - 2]))
    draw = lambda width: np.array(data.draw(st.lists(st.lists(ids, min_size=width, max_size=width), min_size=nq,  # noqa: E731
                                                     max_size=nq)), np.int64).reshape(nq, width)  # fmt: skip
    found, true = draw(k), draw(n)
    np.testing.assert_allclose(recall(found, true), naive.recall(found, true), rtol=1e-15)


def test_recall_refuses_other_shapes() -> None:
    with pytest.raises(InvalidVectorsError, match=r"got \(2,\) and \(2, 1\)"):
        recall([1, 2], [[1], [2]])
    with pytest.raises(InvalidVectorsError, match=r"got \(1, 1\) and \(2, 1\)"):
        recall([[1]], [[1], [2]])


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_precision_and_ap_by_the_definition(row: list[bool]) -> None:
    precision, ap = precision_and_ap(np.array([row]))
    for n in range(1, len(row) + 1):
        I = np.array([[0 if r else -1 for r in row]])  # noqa: E741
        assert precision[0, n - 1] == pytest.approx(naive.precision(I, [1], [1], n)[0])
        assert ap[0, n - 1] == pytest.approx(naive.mean_average_precision(I, [1], [1], n))
