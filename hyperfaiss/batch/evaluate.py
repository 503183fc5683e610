"""How good results are: recall against known neighbours, precision and MAP against labels, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..checks import as_integer
from ..errors import CorruptFileError, FileFormatError, InvalidParameterError, InvalidVectorsError
from ..metrics import Relevance, precision_and_ap, recall
from . import files
from .results import Hits, Results
from .sources import Paths, Source, as_source, open_parquet

__all__ = ["Scores", "evaluate"]

IntArray = npt.NDArray[np.int64]
# Queries that are judged at a time: bounds the temporaries.
_ROWS = 4096


@dataclass(frozen=True)
class Scores:
    """Means over all queries, each 0 to 1.

    queries, k : how many, and the length of their lists.
    metrics : ``recall@n`` (share of the n true neighbours among the first n results), ``1-recall@n`` (how often the nearest one
        is among them), ``precision@n`` (share of the first n results that are relevant) and ``map@n`` (mean average
        precision within the first n: Σᵢ precision(i)·rel(i) / hits within n). All are those of ``hyperfaiss.metrics``.
    """

    queries: int
    k: int
    metrics: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)


def evaluate(
    results: str,
    *,
    ground_truth: Source | Paths | None = None,
    labels: Paths | None = None,
    query_labels: Paths | None = None,
    label_column: str = "label",
    id_column: str | None = None,
    at: Sequence[int] = (1, 10, 100),
) -> Scores:
    """Judge the results of a search or merge job.

    Parameters
    ----------
    results : the job's folder.
    ground_truth : the true neighbours of each query, nearest first, in the order of the queries: ids (nq, n) as .npy, .ivecs,
        .ibin or Parquet, or the folder of another search (such as one over exact vectors).
    labels, query_labels : labels (integers or strings) of the database and of the queries: .npy (n,) or Parquet; or of several
        labels each, .npy bool (n, L). Relevant is what has the query's label, or shares one.
    label_column : their column, in Parquet.
    id_column : the column of ``labels`` that says which vector each label is for, by id or string key; without it, row i is
        for id i. The labels of queries are in the order of the queries.
    at : the lengths n of lists to judge; those beyond k are left out, k is added.

    Raises FileFormatError for a folder without finished results, FileNotFoundError, InvalidVectorsError for labels and
    neighbours that do not fit the results.
    """
    found = Results.open(files.absolute(results))
    if (labels is None) != (query_labels is None) or (labels is None and ground_truth is None):
        raise InvalidParameterError("give ground_truth, or both labels and query_labels")
    lengths = sorted({*(as_integer(n, "at", 1) for n in at if n <= found.k), found.k})
    sums: dict[str, float] = {}
    judges = []
    if ground_truth is not None:
        judges.append(_Neighbours(ground_truth, found))
    if labels is not None:
        judges.append(_Labels(labels, query_labels, label_column, id_column, found))  # type: ignore[arg-type]
    for first, part in found.parts():
        for judge in judges:
            for start in range(0, len(part.I), _ROWS):
                for name, value in judge.score(first + start, part.rows(start, start + _ROWS), lengths):
                    sums[name] = sums.get(name, 0.0) + value
    return Scores(found.n, found.k, {name: value / max(found.n, 1) for name, value in sums.items()})


class _Neighbours:
    """Judges by the true neighbours."""

    def __init__(self, truth: Source | Paths, results: Results) -> None:
        self._lists: Results | Source
        try:
            self._lists = Results.open(files.absolute(truth))  # type: ignore[arg-type]
            n, self._width = self._lists.n, self._lists.k
        except (FileFormatError, TypeError):
            self._lists = as_source(truth)
            n, self._width = self._lists.n, self._lists.d
        if n != results.n:
            raise InvalidVectorsError(f"the ground truth has {n} queries, {results.folder} has {results.n}")

    def score(self, first: int, hits: Hits, lengths: Sequence[int]) -> list[tuple[str, float]]:
        true = self._read(first, first + len(hits.I))
        scores = []
        for n in lengths:
            nearest = (hits.I[:, :n] == true[:, :1]) & (hits.I[:, :n] >= 0)
            scores.append((f"1-recall@{n}", float(nearest.any(axis=1).sum())))
            if n <= self._width:
                scores.append((f"recall@{n}", float(recall(hits.I[:, :n], true[:, :n]).sum())))
        return scores

    def _read(self, first: int, stop: int) -> IntArray:
        if isinstance(self._lists, Results):
            return self._lists.read(first, stop).I
        vectors = next(self._lists.read([(first, stop)])).vectors
        if vectors.dtype.kind not in "iu":
            raise InvalidVectorsError(f"{self._lists.files[0].url} holds {vectors.dtype}, expected ids of neighbours")
        return vectors.astype(np.int64)


class _Labels:
    """Judges by whether a result has the query's label, or shares one with it."""

    def __init__(self, labels: Paths, query_labels: Paths, column: str, id_column: str | None, results: Results) -> None:
        base, asked = _read_column(labels, column), _read_column(query_labels, column)
        if len(asked) != results.n:
            raise InvalidVectorsError(f"there are {len(asked)} query labels, {results.folder} has {results.n} queries")
        if isinstance(base, np.ndarray) != isinstance(asked, np.ndarray):
            raise InvalidVectorsError("labels must be integers in both files or strings in both files")
        if not isinstance(base, np.ndarray):  # strings, by number
            coded = base.dictionary_encode()
            base = coded.indices.to_numpy()
            asked = pc.fill_null(pc.index_in(asked, value_set=coded.dictionary), -1).to_numpy()
        self._ids = None if id_column is None else _read_column(labels, id_column)
        self._keyed = self._ids is not None and not isinstance(self._ids, np.ndarray)
        if self._ids is not None and not self._keyed:
            order = np.argsort(self._ids, kind="stable")
            self._ids, base = self._ids[order], base[order]
        if self._keyed and not results.keyed:
            raise InvalidVectorsError(f"column {id_column!r} holds strings, the ids in {results.folder} are integers")
        self._relevance = Relevance(asked, base)

    def score(self, first: int, hits: Hits, lengths: Sequence[int]) -> list[tuple[str, float]]:
        found = hits.I >= 0
        rows = np.full(hits.I.shape, -1)
        rows[found] = self._rows(hits, found)
        precision, ap = precision_and_ap(self._relevance.of(rows, first))
        scores = []
        for n in lengths:
            scores.append((f"map@{n}", float(ap[:, n - 1].sum())))
            scores.append((f"precision@{n}", float(precision[:, n - 1].sum())))
        return scores

    def _rows(self, hits: Hits, found: npt.NDArray[np.bool_]) -> IntArray:
        """The row of the labels of each result."""
        ids = hits.I[found]
        if self._keyed:
            rows = pc.index_in(hits.keys, value_set=self._ids)
            missing = np.asarray(rows.is_null())
            numbers = pc.fill_null(rows, 0).to_numpy().astype(np.int64)
        elif self._ids is None:
            numbers, missing = ids, ids >= self._relevance.n
        else:
            numbers = np.minimum(np.searchsorted(self._ids, ids), len(self._ids) - 1)
            missing = self._ids[numbers] != ids
        if missing.any():
            raise InvalidVectorsError(
                f"there is no label for id {ids[missing][0]} ({int(missing.sum())} such results in a part)"
            )
        return np.asarray(numbers, np.int64)


def _read_column(paths: Paths, column: str) -> Any:
    """One column of all rows: integers (n,) or bool (n, L), memory-mapped from a local .npy; or a pyarrow string array."""
    found = files.list_files(paths, (".npy", ".parquet", ".pq"))
    pieces = [_read_npy(file) if file.suffix == ".npy" else _read_parquet(file, column) for file in found]
    if any(isinstance(piece, np.ndarray) for piece in pieces):
        if not all(isinstance(piece, np.ndarray) for piece in pieces):
            raise InvalidVectorsError(f"column {column!r} holds integers in some files and strings in others")
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return pa.concat_arrays(pieces)


def _read_npy(file: files.File) -> Any:
    local = files.is_local(file.url)
    try:
        array: Any = np.load(
            file.url if local else files.open_bytes(file.url), mmap_mode="r" if local else None, allow_pickle=False
        )
    except (ValueError, EOFError) as error:
        raise CorruptFileError(f"{file.url} can't be read as .npy: {error}") from error
    if not (array.ndim == 1 and array.dtype.kind in "iuUS") and not (array.ndim == 2 and array.dtype == np.bool_):
        raise InvalidVectorsError(f"{file.url} holds {array.dtype} of shape {array.shape}, expected labels (n,) or bool (n, L)")
    return pa.array(array.astype(str).tolist(), pa.large_string()) if array.dtype.kind in "US" else array


def _read_parquet(file: files.File, column: str) -> Any:
    try:
        with open_parquet(file.url) as opened:
            names = opened.schema_arrow.names
            if column not in names:
                raise InvalidParameterError(f"{file.url} has no column {column!r}, but {', '.join(names)}")
            values = opened.read(columns=[column]).column(0).combine_chunks()
    except pa.ArrowInvalid as error:
        raise CorruptFileError(f"{file.url} can't be read as Parquet: {error}") from error
    if values.null_count:
        raise InvalidVectorsError(f"column {column!r} of {file.url} has {values.null_count} nulls")
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_integer(values.type):
        return values.to_numpy().astype(np.int64)
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return values.cast(pa.large_string())
    raise InvalidVectorsError(f"column {column!r} of {file.url} holds {values.type}, expected integers or strings")
