"""Matrices of precomputed vectors, from .npy, .npz and Parquet. Everything that reads a file says which file was wrong."""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperfaiss.errors import CorruptFileError, InvalidParameterError, InvalidVectorsError
from training.split import Labels, checked_labels


@dataclass(frozen=True)
class EmbeddingSet:
    """A matrix of precomputed vectors.

    Attributes:
        vectors: (n, d) float32, finite.
        labels: (n,) int64, or None.
        class_names: name of class c at position c; empty without labels, or if they are numbers.
    """

    name: str
    vectors: npt.NDArray[np.float32]
    labels: Labels | None
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.vectors)


def load_embeddings(
    path: str | os.PathLike[str], labels: str | os.PathLike[str] | None = None, *, column: str | None = None
) -> EmbeddingSet:
    """Vectors from .npy, .npz or Parquet (a file or a folder of them).

    Args:
        path: .npy (n, d); .npz with a (n, d) array; Parquet with a List or FixedSizeList column of numbers.
        labels: the array of the .npz or the column of the Parquet file that holds the labels (numbers or strings), or
            the path of a .npy file (n,).
        column: which array or column holds the vectors; it may be left out when only one can.

    Raises:
        InvalidParameterError: no such file, format, array or column.
        InvalidVectorsError: not (n, d) numbers, NaN or inf among them, or labels that do not fit.
        CorruptFileError: a file that can't be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise InvalidParameterError(f"no file at {path}")
    if path.suffix in (".npy", ".npz"):
        x, y = _read_numpy(path, column, labels)
    elif path.is_dir() or path.suffix in (".parquet", ".pq"):
        x, y = _read_parquet(path, column, labels)
    else:
        raise InvalidParameterError(f"{path} ends in {path.suffix!r}, expected .npy, .npz or .parquet")
    if labels is not None and y is None:
        y = _load_npy(Path(labels).expanduser())
    vectors = _checked_vectors(x, path)
    if y is None:
        return EmbeddingSet(path.stem, vectors, None, ())
    if y.dtype.kind in "OUS":
        names, codes = np.unique(y.astype(str), return_inverse=True)
        return EmbeddingSet(path.stem, vectors, checked_labels(codes, len(vectors)), tuple(names.tolist()))
    return EmbeddingSet(path.stem, vectors, checked_labels(y, len(vectors)), ())


def _load_npy(path: Path, *, mmap: bool = False) -> npt.NDArray[Any]:
    if not path.is_file():
        raise InvalidParameterError(f"no labels at {path}, nor an array or a column of that name")
    try:
        return np.asarray(np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False))
    except (OSError, ValueError, EOFError) as e:
        raise CorruptFileError(f"{path} can't be read as .npy: {e}") from e


def _read_numpy(
    path: Path, column: str | None, labels: str | os.PathLike[str] | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    if path.suffix == ".npy":
        if column is not None:
            raise InvalidParameterError(f"{path} is one array and has no column {column!r}")
        return _load_npy(path, mmap=True), None
    try:
        with path.open("rb") as f, np.load(f, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as e:
        raise CorruptFileError(f"{path} can't be read as .npz: {e}") from e
    column = _choose(path, "array", column, list(arrays), [n for n, a in arrays.items() if a.ndim == 2])
    return arrays[column], arrays.get(os.fspath(labels)) if labels is not None else None


def _choose(path: Path, kind: str, wanted: str | None, names: list[str], fitting: list[str]) -> str:
    if wanted is not None:
        if wanted not in names:
            raise InvalidParameterError(f"{path} has no {kind} {wanted!r}; it has {', '.join(names)}")
        return wanted
    if len(fitting) != 1:
        raise InvalidParameterError(f"{path}: name the {kind} of vectors; it has {', '.join(names)}")
    return fitting[0]


def _read_parquet(
    path: Path, column: str | None, labels: str | os.PathLike[str] | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    try:
        import pyarrow as pa
        import pyarrow.dataset as ds
    except ImportError as e:
        raise InvalidParameterError(f"reading {path} needs pyarrow: pip install 'hyperfaiss[batch]'") from e
    try:
        dataset = ds.dataset(path, format="parquet")
        is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
        lists = [f.name for f in dataset.schema if any(test(f.type) for test in is_list)]
        column = _choose(path, "column", column, dataset.schema.names, lists)
        if column not in lists:
            held = dataset.schema.field(column).type
            raise InvalidParameterError(f"column {column!r} of {path} holds {held}, expected lists of numbers")
        label_column = os.fspath(labels) if labels is not None and os.fspath(labels) in dataset.schema.names else None
        table = dataset.to_table(columns=[column] if label_column is None else [column, label_column])
    except (pa.ArrowInvalid, OSError) as e:
        raise CorruptFileError(f"{path} can't be read as Parquet: {e}") from e
    rows = [_list_rows(path, column, chunk) for chunk in table.column(column).chunks if len(chunk)]
    widths = sorted({r.shape[1] for r in rows})
    if len(widths) != 1:
        raise InvalidVectorsError(f"column {column!r} of {path} holds vectors of widths {widths}, expected one width")
    y = None if label_column is None else table.column(label_column).to_numpy()
    return np.concatenate(rows), y


def _list_rows(path: Path, column: str, chunk: Any) -> npt.NDArray[Any]:
    """(rows, width) of one pyarrow chunk of lists."""
    import pyarrow.compute as pc

    values = chunk.flatten()
    if chunk.null_count or values.null_count:
        raise InvalidVectorsError(f"column {column!r} of {path} holds nulls, expected a vector in every row")
    widths = pc.min_max(pc.list_value_length(chunk)).as_py()
    if widths["min"] != widths["max"]:
        raise InvalidVectorsError(
            f"column {column!r} of {path} holds vectors of widths {widths['min']}..{widths['max']}, expected one width"
        )
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(len(chunk), widths["min"])


def _checked_vectors(x: npt.NDArray[Any], path: Path) -> npt.NDArray[np.float32]:
    if x.ndim != 2 or 0 in x.shape or x.dtype.kind not in "fiu":
        raise InvalidVectorsError(f"{path} holds {x.dtype} of shape {x.shape}, expected numbers of shape (n, d)")
    with np.errstate(over="ignore"):  # a float64 beyond float32's range becomes inf, which the check below reports
        vectors = np.ascontiguousarray(x, dtype=np.float32)
    for start in range(0, len(vectors), 65536):  # in parts: a mapped file need not fit into memory
        bad = ~np.isfinite(vectors[start : start + 65536]).all(axis=1)
        if bad.any():
            row = start + int(bad.argmax())
            raise InvalidVectorsError(f"row {row} of {path} holds NaN or inf, expected finite numbers")
    return vectors
