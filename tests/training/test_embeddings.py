"""Matrices of vectors, from every format that is read; damaged files are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hyperfaiss.errors import CorruptFileError, InvalidParameterError, InvalidVectorsError
from training.embeddings import load_embeddings

X = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
Y = np.array([2, 0, 1, 1, 0, 2, 2])


def parquet(path: Path, column: pa.Array, **more: Any) -> Path:
    pq.write_table(pa.table({"embedding": column, **more}), path)
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", np.int32, np.uint8])
def test_npy_of_any_number_type(tmp_path: Path, dtype: Any) -> None:
    ref = (X * 100).clip(0).astype(dtype)
    np.save(tmp_path / "x.npy", np.asfortranarray(ref))
    comp = load_embeddings(tmp_path / "x.npy")
    assert (comp.name, comp.labels, len(comp)) == ("x", None, 7)
    assert comp.vectors.dtype == np.float32
    assert comp.vectors.flags.c_contiguous
    np.testing.assert_array_equal(comp.vectors, ref.astype(np.float32))


def test_labels_from_a_file_an_array_or_a_column(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y.astype(np.uint8))
    np.savez(tmp_path / "x.npz", vectors=X, y=Y)
    parquet(tmp_path / "x.parquet", pa.FixedSizeListArray.from_arrays(X.ravel(), 3), y=Y, name=list("cabbacc"))
    for path, labels in (("x.npy", tmp_path / "y.npy"), ("x.npz", "y"), ("x.parquet", "y"), ("x.parquet", "name")):
        comp = load_embeddings(tmp_path / path, labels)
        np.testing.assert_array_equal(comp.vectors, X)
        assert comp.labels is not None
        np.testing.assert_array_equal(comp.labels, Y)
        assert comp.class_names == (("a", "b", "c") if labels == "name" else ())
    np.save(tmp_path / "y.npy", Y - 10**12)  # any integers: nothing is as long as the largest
    np.testing.assert_array_equal(load_embeddings(tmp_path / "x.npy", tmp_path / "y.npy").labels, Y - 10**12)


@pytest.mark.parametrize("kind", ["fixed", "list", "large_list", "sliced", "chunked"])
def test_parquet_list_columns(tmp_path: Path, kind: str) -> None:
    rows = X.tolist()
    column = {
        "fixed": lambda: pa.array(rows, pa.list_(pa.float32(), 3)),
        "list": lambda: pa.array(rows, pa.list_(pa.float64())),
        "large_list": lambda: pa.array(rows, pa.large_list(pa.float16())),
        "sliced": lambda: pa.array([[9.0, 9.0, 9.0], *rows], pa.list_(pa.float32(), 3)).slice(1),
        "chunked": lambda: pa.chunked_array([pa.array(rows[:2]), pa.array(rows[2:])]),
    }[kind]()
    comp = load_embeddings(parquet(tmp_path / "x.parquet", column))
    np.testing.assert_allclose(comp.vectors, X, rtol=1e-3 if kind == "large_list" else 1e-7)


def test_parquet_folder_in_order_of_names(tmp_path: Path) -> None:
    for part in range(2):
        parquet(tmp_path / f"part-{part}.parquet", pa.array(X[part::2].tolist()))
    comp = load_embeddings(tmp_path)
    np.testing.assert_allclose(comp.vectors, np.concatenate([X[0::2], X[1::2]]))


def test_bad_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    ragged = parquet(path, pa.array([[1.0], [1.0, 2.0]]))
    with pytest.raises(InvalidVectorsError, match=r"widths 1\.\.2"):
        load_embeddings(ragged)
    for holed in ([[1.0], None], [[1.0], [None]]):
        with pytest.raises(InvalidVectorsError, match="nulls"):
            load_embeddings(parquet(path, pa.array(holed, pa.list_(pa.float32()))))
    two = parquet(path, pa.array([[1.0]]), other=pa.array([[1.0]]), text=["a"])
    with pytest.raises(InvalidParameterError, match=r"name the column of vectors.*embedding, other, text"):
        load_embeddings(two)
    assert load_embeddings(two, column="other").vectors.shape == (1, 1)
    with pytest.raises(InvalidParameterError, match="holds string"):
        load_embeddings(two, column="text")
    with pytest.raises(InvalidParameterError, match="no column 'absent'"):
        load_embeddings(two, column="absent")
    with pytest.raises(InvalidVectorsError, match="widths"):
        load_embeddings(parquet(path, pa.array([], pa.list_(pa.float32()))))
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(CorruptFileError, match=r"x\.parquet"):
        load_embeddings(path)


def test_bad_numpy_files(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    with pytest.raises(InvalidParameterError, match="no file"):
        load_embeddings(path)
    for bad, message in ((X[0], r"\(3,\)"), (X[:0], r"\(0, 3\)"), (X.astype(str), "<U"), (X > 0, "bool")):
        np.save(path, bad)
        with pytest.raises(InvalidVectorsError, match=message):
            load_embeddings(path)
    for value in (np.nan, np.inf, 1e300):
        holed = X.astype(np.float64)
        holed[4, 1] = value
        np.save(path, holed)
        with pytest.raises(InvalidVectorsError, match="row 4"):
            load_embeddings(path)
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(CorruptFileError, match=r"x\.npy"):
        load_embeddings(path)
    np.save(path, X)
    whole = path.read_bytes()
    for cut in (0, 5, 40, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CorruptFileError, match=r"x\.npy"):
            load_embeddings(path)
    (tmp_path / "x.npz").write_bytes(b"PK\3\4 not really")
    with pytest.raises(CorruptFileError, match=r"x\.npz"):
        load_embeddings(tmp_path / "x.npz")
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(InvalidParameterError, match=r"'\.csv'"):
        load_embeddings(tmp_path / "x.csv")


def test_bad_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y[:-1])
    with pytest.raises(InvalidVectorsError, match=r"\(7,\), got int64 of shape \(6,\)"):
        load_embeddings(tmp_path / "x.npy", tmp_path / "y.npy")
    np.save(tmp_path / "y.npy", Y * 0.5)
    with pytest.raises(InvalidVectorsError, match="float64"):
        load_embeddings(tmp_path / "x.npy", tmp_path / "y.npy")
    with pytest.raises(InvalidParameterError, match="no labels at"):
        load_embeddings(tmp_path / "x.npy", tmp_path / "absent.npy")
