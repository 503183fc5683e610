"""Scores: against naive counts and scikit-learn, from every source of truth and labels."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import average_precision_score

from hyperfaiss.batch import Results, build, evaluate, open_source, search
from hyperfaiss.errors import FileFormatError, InvalidParameterError, InvalidVectorsError

K = 30


@pytest.fixture(scope="module")
def results(tmp_path_factory, xb, xq, codec, parquet, saved):
    """Results of a search in several parts, and their ids."""
    folder = tmp_path_factory.mktemp("eval")
    build(parquet(folder / "x", xb), str(folder / "s"), codec=str(codec), shard_rows=1000)
    search(str(folder / "s"), str(saved(folder / "q.npy", xq)), str(folder / "r"), k=K, part_rows=50)
    return str(folder / "r"), Results.open(str(folder / "r")).read(0, len(xq)).I


def test_recall_against_true_neighbours(results, tmp_path, xb, xq, saved):
    folder, I = results  # noqa: E741
    distances = ((xq[:, None].astype(float) - xb[None]) ** 2).sum(axis=2)
    truth = np.argsort(distances, axis=1, kind="stable")[:, :20]
    ref = {
        f"recall@{n}": np.mean([len(set(a[:n]) & set(b[:n])) / n for a, b in zip(I, truth, strict=True)]) for n in (1, 5, 20)
    }
    ref |= {f"1-recall@{n}": np.mean([b[0] in a[:n] for a, b in zip(I, truth, strict=True)]) for n in (1, 5, 20, 30)}
    assert 0.05 < ref["recall@20"] < 1
    lists = pa.ListArray.from_arrays(pa.array(np.arange(0, truth.size + 1, 20), pa.int32()), pa.array(truth.ravel()))
    pq.write_table(pa.table({"neighbours": lists}), tmp_path / "gt.parquet")
    paths = [saved(tmp_path / f"gt{suffix}", truth.astype(dtype)) for suffix, dtype in
             ((".npy", "i8"), (".ivecs", "i4"), (".ibin", "i4"))]  # fmt: skip
    for path in (*paths, tmp_path / "gt.parquet"):
        scores = evaluate(folder, ground_truth=str(path), at=(1, 5, 20, 100))
        assert (scores.queries, scores.k) == (len(xq), K)
        assert scores.metrics == pytest.approx(ref), path
    perfect = evaluate(folder, ground_truth=folder)
    assert set(perfect.metrics.values()) == {1.0}
    assert set(perfect.metrics) == {f"{name}@{n}" for name in ("recall", "1-recall") for n in (1, 10, K)}


def naive(I, wanted, labels):  # noqa: E741
    """Precision and MAP by scikit-learn, at K and at 10."""
    scores = {}
    for n in (10, K):
        relevant = labels[I[:, :n]] == wanted[:, None]
        scores[f"precision@{n}"] = relevant.mean()
        ranks = -np.arange(n)
        scores[f"map@{n}"] = np.mean([average_precision_score(row, ranks) if row.any() else 0.0 for row in relevant])
    return scores


def test_precision_and_map_against_labels(results, tmp_path, xb, xq, saved):
    folder, I = results  # noqa: E741
    rng = np.random.default_rng(0)
    labels, wanted = rng.integers(0, 5, len(xb)), rng.integers(0, 6, len(xq))
    ref = naive(I, wanted, labels)
    assert 0.01 < ref[f"map@{K}"] < 0.9
    names = np.array([f"class {c}" for c in range(6)])
    order = rng.permutation(len(xb))
    for name, (base, asked) in {"numbers": (labels, wanted), "strings": (names[labels], names[wanted])}.items():
        pq.write_table(pa.table({"label": pa.array(base)}), tmp_path / f"{name}.parquet", row_group_size=99)
        pq.write_table(pa.table({"label": pa.array(asked)}), tmp_path / f"{name}-q.parquet")
        shuffled = pa.table({"key": order, "class": pa.array(base[order])})
        pq.write_table(shuffled, tmp_path / f"{name}-ids.parquet")
        pq.write_table(pa.table({"class": pa.array(asked)}), tmp_path / f"{name}-ids-q.parquet")
        np.save(tmp_path / f"{name}.npy", base)
        np.save(tmp_path / f"{name}-q.npy", asked)
        for labels_file, query_file, options in (
            (f"{name}.parquet", f"{name}-q.parquet", {}),
            (f"{name}.npy", f"{name}-q.npy", {}),
            (f"{name}-ids.parquet", f"{name}-ids-q.parquet", {"label_column": "class", "id_column": "key"}),
        ):
            scores = evaluate(
                folder, labels=str(tmp_path / labels_file), query_labels=str(tmp_path / query_file), at=(10,), **options
            )
            assert scores.metrics == pytest.approx(ref), labels_file


def test_several_labels_of_each(results, tmp_path, xb, xq, saved):
    folder, I = results  # noqa: E741
    rng = np.random.default_rng(1)
    labels, wanted = rng.random((len(xb), 70)) < 0.01, rng.random((len(xq), 70)) < 0.02
    shared = (labels[I] & wanted[:, None]).any(axis=2)
    y, yq = str(saved(tmp_path / "y.npy", labels)), str(saved(tmp_path / "yq.npy", wanted))
    ref = naive(np.where(shared, 1, 0), np.ones(len(xq)), np.arange(2))
    assert 0 < ref["map@10"] < 0.9
    assert evaluate(folder, labels=y, query_labels=yq, at=(10,)).metrics == pytest.approx(ref)
    with pytest.raises(InvalidVectorsError, match="labels must be integers or strings"):
        evaluate(folder, labels=y, query_labels=str(saved(tmp_path / "one.npy", np.zeros(len(xq), int))))


def test_labels_by_string_key(tmp_path, xb, xq, codec, parquet, saved):
    keys, labels = np.array([f"key {i}" for i in range(len(xb))]), np.arange(len(xb)) % 4
    folder = parquet(tmp_path / "x", xb, key=pa.array(keys), label=labels)
    build(open_source(folder, id_column="key"), str(tmp_path / "s"), codec=str(codec))
    search(str(tmp_path / "s"), str(saved(tmp_path / "q.npy", xq)), str(tmp_path / "r"), k=K)
    np.save(tmp_path / "yq.npy", np.arange(len(xq)) % 4)
    I = Results.open(str(tmp_path / "r")).read(0, len(xq)).I  # noqa: E741
    scores = evaluate(str(tmp_path / "r"), labels=str(folder), query_labels=str(tmp_path / "yq.npy"), id_column="key", at=(10,))
    assert scores.metrics == pytest.approx(naive(I, np.arange(len(xq)) % 4, labels))


def test_places_without_a_result_are_not_relevant(tmp_path, xb, xq, codec, saved):
    build(str(saved(tmp_path / "x.npy", xb[:6])), str(tmp_path / "s"), codec=str(codec))
    search(str(tmp_path / "s"), str(saved(tmp_path / "q.npy", xq)), str(tmp_path / "r"), k=12)
    np.save(tmp_path / "y.npy", np.zeros(6, int))
    np.save(tmp_path / "yq.npy", np.zeros(len(xq), int))
    scores = evaluate(str(tmp_path / "r"), labels=str(tmp_path / "y.npy"), query_labels=str(tmp_path / "yq.npy"), at=())
    assert scores.metrics == {"map@12": 1.0, "precision@12": 0.5}


def test_what_does_not_fit_is_refused(results, tmp_path, xq, saved):
    folder, I = results  # noqa: E741
    np.save(tmp_path / "y.npy", np.zeros(10, int))
    np.save(tmp_path / "yq.npy", np.zeros(len(xq), int))
    np.save(tmp_path / "names.npy", np.array(["a"] * len(xq)))
    np.save(tmp_path / "floats.npy", np.zeros(len(xq)))
    y, yq = str(tmp_path / "y.npy"), str(tmp_path / "yq.npy")
    short, floats = str(saved(tmp_path / "short.npy", I[:3])), str(saved(tmp_path / "f.npy", I.astype(np.float32)))
    for options, error, message in (
        ({}, InvalidParameterError, "give ground_truth, or both"),
        ({"labels": y}, InvalidParameterError, "give ground_truth, or both"),
        ({"ground_truth": short}, InvalidVectorsError, "ground truth has 3 queries, .* has 170"),
        ({"ground_truth": floats}, InvalidVectorsError, "holds float32, expected ids"),
        ({"labels": y, "query_labels": y}, InvalidVectorsError, "there are 10 query labels"),
        ({"labels": y, "query_labels": yq}, InvalidVectorsError, "there is no label for id"),
        ({"labels": y, "query_labels": str(tmp_path / "names.npy")}, InvalidVectorsError, "integers in both files or strings"),
        ({"labels": y, "query_labels": str(tmp_path / "floats.npy")}, InvalidVectorsError, "expected labels"),
        ({"ground_truth": folder, "at": (0,)}, InvalidParameterError, "at must be"),
    ):
        with pytest.raises(error, match=message):
            evaluate(folder, **options)
    with pytest.raises(FileFormatError, match="holds no results"):
        evaluate(str(tmp_path), ground_truth=short)
