"""Evaluations against their definitions written out, at their edges, and their errors."""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import naive
import numpy as np
import pytest

from hyperfaiss import HyperbolicPQIndex, HyperbolicProductQuantizer, Model
from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError
from hyperfaiss.model import Projector
from training import evaluate
from training.evaluate import (
    Evaluation,
    average_precision,
    evaluate_index,
    evaluate_model,
    mean_average_precision,
    order_recall,
    subspace_statistics,
)

M, DSUB = 3, 4
THETA = (0.0, 1.0, 2.5)


def codec(nbits: int = 4) -> HyperbolicProductQuantizer:
    books = np.random.default_rng(9).normal(size=(M, 1 << nbits, DSUB)).astype(np.float32)
    books[1, 3] = 50  # a codeword that nothing is near to
    return HyperbolicProductQuantizer.from_codebooks(books, THETA, clip_radius=1.2)


def vectors(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, M * DSUB)).astype(np.float32)


def labels(kind: str, n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(6 if seed else 5, size=n) if kind == "single" else rng.random((n, 9)) < 0.15


@pytest.mark.parametrize("kind", ["single", "sets"])
@pytest.mark.parametrize("N", [1, 5, 50])
def test_map_against_naive(N: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_RESULTS", 1000)
    rng = np.random.default_rng(N)
    database, wanted = labels(kind, 200, 0), labels(kind, 300, 1)  # class 5 has no hits
    lists = np.array([rng.permutation(200)[:50] for _ in wanted])
    lists[rng.random(lists.shape) < 0.1] = -1
    ref = naive.mean_average_precision(lists, wanted, database, N)
    comp = mean_average_precision(lists, wanted, database, N)
    assert comp == pytest.approx(ref, rel=1e-12)
    assert 0.05 < comp < 0.95


def test_average_precision_by_hand() -> None:
    lists = np.array([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]], bool)
    np.testing.assert_allclose(average_precision(lists), [(1 + 2 / 3) / 2, 0, 1, 1 / 4])


@pytest.mark.parametrize("kind", ["single", "sets"])
@pytest.mark.parametrize(("depth", "results"), [(None, 100), (90, 1000), (10**9, 10**6), (1, 1)])
def test_evaluation_against_naive(kind: str, depth: int | None, results: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same whatever the depth and the number of queries that are judged at a time."""
    monkeypatch.setattr(evaluate, "_RESULTS", results)
    xb, xq = vectors(200), vectors(23, 1)
    y, yq = labels(kind, 200, 0), labels(kind, 23, 1)
    yq[:2] = 5 if kind == "single" else False  # no relevant item
    index = HyperbolicPQIndex.from_codec(codec())
    index.add(xb)
    comp = evaluate_index(index, xq, yq, y, 40, repeats=1, at=(7, 1, 55, 201), depth=depth)
    _, I = index.search(xq, 200)  # noqa: E741
    assert comp.map_at_n == pytest.approx(naive.mean_average_precision(I, yq, y, 40))
    assert 0.05 < comp.map_at_n < 0.95
    assert comp.precision == pytest.approx({k: np.mean(naive.precision(I, yq, y, k)) for k in (1, 7, 55)})
    assert (comp.n, comp.queries, comp.database, comp.recall, comp.subspaces) == (40, 23, 200, {}, ())

    curve = comp.curve
    assert curve is not None
    ranks = {None: 40, 90: 90, 10**9: 200, 1: 40}[depth]
    assert curve.ranks == tuple(range(1, ranks + 1))
    totals = np.array([sum(naive.relevant(x, w) for x in y) for w in yq])
    assert curve.queries == (totals > 0).sum() < 23
    hits = np.array([naive.precision(I, yq, y, r) for r in curve.ranks]) * np.array(curve.ranks)[:, None]
    seen = totals > 0
    np.testing.assert_allclose(curve.precision, (hits[:, seen] / np.array(curve.ranks)[:, None]).mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(curve.recall, (hits[:, seen] / totals[seen]).mean(axis=1), rtol=1e-12)
    if ranks == 200:
        assert curve.recall[-1] == pytest.approx(1)


def test_long_curves_are_thinned() -> None:
    x, n = vectors(3000), 3000
    index = HyperbolicPQIndex.from_codec(codec())
    index.add(x)
    curve = evaluate_index(index, x[:3], np.arange(3), np.arange(n) % 3, 10, repeats=1, depth=n).curve
    assert curve is not None
    assert curve.ranks[:200] == tuple(range(1, 201))
    assert curve.ranks[-1] == n
    assert 300 < len(curve.ranks) < 600
    assert list(curve.ranks) == sorted(set(curve.ranks))
    assert curve.recall[-1] == pytest.approx(1)
    assert curve.precision[-1] == pytest.approx(1 / 3)


def test_evaluate_index_takes_any_index_and_cuts_n() -> None:
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    index = faiss.IndexFlatL2(4)
    index.add(x[:50])
    result = evaluate_index(index, x[50:], np.zeros(10, int), np.zeros(50, int), 1000)
    assert (result.map_at_n, result.n, result.queries, result.database) == (1.0, 50, 10, 50)
    assert result.queries_per_second > 0
    with pytest.raises(InvalidParameterError, match="indexes of hyperfaiss"):
        evaluate_index(index, x[50:], np.zeros(10, int), np.zeros(50, int), 10, vectors=x[:50])


def test_one_item_one_query_and_nothing_relevant() -> None:
    index = HyperbolicPQIndex.from_codec(codec())
    index.add(vectors(1))
    for label, value in ((0, 1.0), (1, 0.0)):
        comp = evaluate_index(index, vectors(1, 1), [label], [0], 10, vectors=vectors(1), depth=5)
        assert (comp.map_at_n, comp.precision, comp.recall, comp.n) == (value, {1: value}, {1: 1.0}, 1)
        assert comp.curve is not None
        assert (comp.curve.ranks, comp.curve.precision, comp.curve.recall) == ((1,), (value,), (value,))
        assert comp.curve.queries == 1 - label
        assert [(s.used, s.entropy, s.perplexity, s.relative_error) for s in comp.subspaces] == [(1, 0, 1, 0)] * M
        json.dumps(comp.to_dict(), allow_nan=False)
    none = evaluate_index(index, vectors(0), [], [0], 10, vectors=vectors(1))
    assert (none.map_at_n, none.recall, none.recall_queries) == (0, {}, 0)


def test_recall_of_the_unquantised_order() -> None:
    quantizer, xb, xq = codec(), vectors(150), vectors(9, 1)
    xb[75:] = xb[:75]  # ties in both orders
    index = HyperbolicPQIndex.from_codec(quantizer)
    index.add(xb)
    _, true = naive.exact_search(*(naive.points_of(x, THETA, 1.2) for x in (xb, xq)), THETA, 1, 50)
    _, found = index.search(xq, 50)
    ref = {k: np.mean(naive.recall([r[:k] for r in found.tolist()], [r[:k] for r in true])) for k in (1, 10, 50)}
    assert 0.02 < ref[10] < 0.98
    assert order_recall(index, xb, xq, (10, 1, 50, 151)) == pytest.approx(ref)
    part = evaluate_index(index, xq, np.zeros(9, int), np.zeros(150, int), 10, vectors=xb, recall_queries=3)
    assert part.recall_queries == 3
    assert part.recall == pytest.approx(order_recall(index, xb, xq[[0, 4, 8]]))
    assert evaluate_index(index, xq, np.zeros(9, int), np.zeros(150, int), 10, vectors=xb, recall_queries=0).recall == {}
    assert order_recall(index, xb, xq, (151,)) == {}
    with pytest.raises(InvalidVectorsError, match="holds 150 vectors, 149 were given"):
        order_recall(index, xb[:-1], xq)


@pytest.mark.parametrize("rows", [7, 10_000])
def test_subspaces_against_naive(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "_ROWS", rows)
    quantizer, x = codec(), vectors(120)
    points = naive.points_of(x, THETA, 1.2)
    assert quantizer.codebooks is not None
    for m, comp in enumerate(subspace_statistics(quantizer, x)):
        ref = naive.subspace(points[:, m], quantizer.codebooks[m], THETA[m])
        assert ref["used"] <= 16 - (m == 1)
        assert vars(comp) == pytest.approx(ref, rel=1e-6), m


def test_subspaces_of_trained_codebooks_tell_of_their_size() -> None:
    x = vectors(2000)
    relative = []
    for nbits in (4, 6):
        quantizer = HyperbolicProductQuantizer(M * DSUB, M, nbits, curvatures=THETA)
        quantizer.train(x)
        found = subspace_statistics(quantizer, x)
        assert all(s.used == s.ksub == 1 << nbits and nbits - 1 < s.entropy < nbits for s in found)
        relative.append([s.relative_error for s in found])
    assert all(0 < fine < coarse < 0.6 for coarse, fine in zip(*relative, strict=True))


def test_subspaces_of_one_point() -> None:
    """No spread, and no division by it."""
    found = subspace_statistics(codec(), np.repeat(vectors(1), 20, axis=0))
    assert [s.relative_error for s in found if s.spread == 0] == [0] * sum(s.spread == 0 for s in found)
    assert all(s.used == 1 and s.entropy == 0 and 0 <= s.spread < 1e-6 < s.squared_error for s in found)


def test_models_map_raw_features_and_files_are_mapped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    projector = Projector([(rng.normal(size=(M * DSUB, 5)), rng.normal(size=M * DSUB))])
    x, xq = rng.normal(size=(90, 5)).astype(np.float32), rng.normal(size=(8, 5)).astype(np.float32)
    y, yq = np.arange(90) % 4, np.arange(8) % 4
    np.save(tmp_path / "x.npy", x)
    model = Model(projector, codec())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    comp = evaluate_model(model, mapped, xq, y, yq, 20, quantisation=True, repeats=1)
    index = HyperbolicPQIndex.from_codec(codec())
    index.add(projector.transform(x))
    ref = evaluate_index(index, projector.transform(xq), yq, y, 20, vectors=projector.transform(x), repeats=1)
    assert without_speed(comp) == without_speed(ref)
    assert comp.recall
    assert len(comp.subspaces) == M
    assert evaluate_model(model, x, xq, y, yq, 20, repeats=1).subspaces == ()
    refit = evaluate_model(model, x, xq, y, yq, 20, quantisation=True, refit=True, repeats=1)
    assert all(
        after.squared_error < before.squared_error for after, before in zip(refit.subspaces, comp.subspaces, strict=True)
    )
    assert json.loads(json.dumps(comp.to_dict()))["precision"]["10"] == comp.precision[10]


def without_speed(result: Evaluation) -> dict:
    return {name: value for name, value in result.to_dict().items() if name != "queries_per_second"}


@pytest.mark.parametrize(
    ("lists", "wanted", "database", "N"),
    [
        (np.zeros((2, 3), int), np.zeros(3, int), np.zeros(5, int), 3),
        (np.zeros((2, 3), int), np.zeros(2, int), np.zeros(5, int), 4),
        (np.zeros((2, 3), int), np.zeros(2, int), np.zeros(5, int), 0),
        (np.zeros(3, int), np.zeros(3, int), np.zeros(5, int), 1),
        (np.full((2, 3), 5), np.zeros(2, int), np.zeros(5, int), 3),
        (np.full((2, 3), -2), np.zeros(2, int), np.zeros(5, int), 3),
        (np.zeros((2, 3), int), np.zeros((2, 4), bool), np.zeros((5, 3), bool), 3),
    ],
)
def test_bad_lists(lists: np.ndarray, wanted: np.ndarray, database: np.ndarray, N: int) -> None:
    with pytest.raises(InvalidVectorsError):
        mean_average_precision(lists, wanted, database, N)


def test_bad_evaluations() -> None:
    index = faiss.IndexFlatL2(4)
    x = np.zeros((1, 4), np.float32)
    with pytest.raises(InvalidParameterError, match="ntotal = 0"):
        evaluate_index(index, x, [0], [], 10)
    index.add(x)
    with pytest.raises(InvalidParameterError, match="N = 0"):
        evaluate_index(index, x, [0], [0], 0)
    with pytest.raises(InvalidParameterError, match="must be >= 1"):
        evaluate_index(index, x, [0], [0], 1, at=(0,))
    with pytest.raises(InvalidVectorsError, match="1 queries and 1 vectors have labels of 1 and 2"):
        evaluate_index(index, x, [0], [0, 1], 1)
    with pytest.raises(InvalidVectorsError, match="need a trained codec and vectors"):
        subspace_statistics(HyperbolicProductQuantizer(8, 2), np.zeros((3, 8), np.float32))
