"""k-lists: merging them exactly, writing them as parts, and reading a job's results back.

A part holds the results of a range of queries, in their order. Parquet is the default: columns ``query_id`` (int64 or string),
``ids`` list<int64>, ``distances`` list<float>, and ``keys`` list<string> where the index was built from string ids; a query
with fewer than k results has shorter lists. ``npy`` and ``ibin`` write matrices with −1 and +inf in empty places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import CorruptFileError, FileFormatError, InvalidVectorsError
from . import files
from .job import MANIFEST, read_manifest
from .sources import open_source

__all__ = ["FORMATS", "Hits", "Results", "concatenate", "merge_lists", "part_files", "write_part"]

Format = Literal["parquet", "npy", "ibin"]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# What a part's file or files are called after its stem.
FORMATS: dict[str, tuple[str, ...]] = {
    "parquet": (".parquet",),
    "npy": (".query_ids.npy", ".distances.npy", ".ids.npy"),
    "ibin": (".query_ids.npy", ".distances.fbin", ".ids.ibin"),
}
_INT32 = np.iinfo(np.int32)


class Hits(NamedTuple):
    """Results of nq queries.

    query_ids : int64 (nq,) or a pyarrow string array.
    D, I : float32 and int64 (nq, k), sorted by (distance, id); +inf and −1 where there are fewer than k.
    keys : a pyarrow string array (number of results,), in the order of the results, or None.
    """

    query_ids: Any
    D: FloatArray
    I: IntArray  # noqa: E741
    keys: Any = None

    def rows(self, start: int, stop: int) -> Hits:
        """Those of the queries start … stop − 1."""
        keys = self.keys
        if keys is not None:
            offsets = np.concatenate([[0], np.cumsum((self.I >= 0).sum(axis=1))])
            keys = keys.slice(offsets[start], offsets[min(stop, len(self.I))] - offsets[start])
        return Hits(self.query_ids[start:stop], self.D[start:stop], self.I[start:stop], keys)


def merge_lists(D: Sequence[FloatArray], I: Sequence[IntArray], k: int) -> tuple[FloatArray, IntArray, IntArray]:  # noqa: E741
    """The k smallest by (distance, id) of several lists of results, each (nq, k_i) and sorted so: D and I (nq, k).

    Also ``order`` (nq, k): the column of each result when the lists stand side by side, where a result is; else any column.
    Exact: the k nearest of a union are among the k nearest of its parts.
    """
    all_D, all_I = np.concatenate(D, axis=1), np.concatenate(I, axis=1)
    if all_D.shape[1] < k:
        fill = ((0, 0), (0, k - all_D.shape[1]))
        all_D, all_I = np.pad(all_D, fill, constant_values=np.inf), np.pad(all_I, fill, constant_values=-1)
    # Timsort merges sorted runs in linear time, which a sort by two keys can't; the order of equal distances is mended after.
    order = np.argsort(all_D, axis=1, kind="stable")
    sorted_D, sorted_I = np.take_along_axis(all_D, order, axis=1), np.take_along_axis(all_I, order, axis=1)
    # As unsigned, −1 (no result) is the largest id: a real result at distance +inf comes before it.
    unsigned = sorted_I.view(np.uint64)
    wrong = ((sorted_D[:, 1:] == sorted_D[:, :-1]) & (unsigned[:, 1:] < unsigned[:, :-1])).any(axis=1)
    if wrong.any():
        mended = np.lexsort((all_I[wrong].view(np.uint64), all_D[wrong]), axis=1)
        order[wrong] = mended
        sorted_D[wrong] = np.take_along_axis(all_D[wrong], mended, axis=1)
        sorted_I[wrong] = np.take_along_axis(all_I[wrong], mended, axis=1)
    return tuple(np.ascontiguousarray(part[:, :k]) for part in (sorted_D, sorted_I, order))  # type: ignore[return-value]


# ------------------------------------------------------------------------------------------------------- writing


def part_files(stem: str, form: str) -> list[str]:
    """The names of the files of a part; the last one is written last, and its existence says that the part is done."""
    return [stem + ending for ending in FORMATS[form]]


def write_part(folder: str, stem: str, form: str, hits: Hits) -> None:
    """Write one part, each file whole or not at all.

    Raises InvalidVectorsError for what a format has no room for: string query ids except in Parquet, ids beyond int32 in ibin.
    """
    urls = [files.join(folder, name) for name in part_files(stem, form)]
    if form == "parquet":
        with files.writing(urls[0]) as path:
            pq.write_table(_table(hits), path, compression="zstd", use_dictionary=False)
        return
    if not isinstance(hits.query_ids, np.ndarray):
        raise InvalidVectorsError(f"format {form!r} has no room for string query ids: use format 'parquet'")
    if form == "ibin" and hits.I.size and hits.I.max() > _INT32.max:
        raise InvalidVectorsError(f"id {hits.I.max()} does not fit the int32 of .ibin: use format 'parquet' or 'npy'")
    _write(urls[0], lambda path: _save_npy(path, hits.query_ids))
    if form == "npy":
        _write(urls[1], lambda path: _save_npy(path, hits.D))
        _write(urls[2], lambda path: _save_npy(path, hits.I))
    else:
        _write(urls[1], lambda path: _save_bin(path, hits.D))
        _write(urls[2], lambda path: _save_bin(path, hits.I.astype("<i4")))


def _write(url: str, write: Callable[[Path], None]) -> None:
    with files.writing(url) as path:
        write(path)


def _save_npy(path: Path, array: npt.NDArray[Any]) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def _save_bin(path: Path, array: npt.NDArray[Any]) -> None:
    with path.open("wb") as file:
        file.write(np.array(array.shape, "<u4").tobytes() + array.tobytes())


def _table(hits: Hits) -> Any:
    found = hits.I >= 0
    offsets = np.concatenate([[0], np.cumsum(found.sum(axis=1))])
    if offsets[-1] > _INT32.max:
        raise InvalidVectorsError(f"a part of {offsets[-1]:,} results is too long for Parquet lists: use smaller parts")
    offsets = offsets.astype(np.int32)
    columns = {
        "query_id": pa.array(hits.query_ids),
        "ids": pa.ListArray.from_arrays(offsets, pa.array(hits.I[found])),
        "distances": pa.ListArray.from_arrays(offsets, pa.array(hits.D[found])),
    }
    if hits.keys is not None:
        columns["keys"] = pa.ListArray.from_arrays(offsets, hits.keys.cast(pa.string()))
    return pa.table(columns)


# ------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Results:
    """The finished results of a search or merge job, read in ranges of queries. ``Results.open`` makes one.

    Attributes
    ----------
    n : number of queries.
    k : length of the lists.
    keyed : whether results carry string keys.
    """

    folder: str
    form: str
    stems: tuple[str, ...]
    starts: tuple[int, ...]
    k: int
    keyed: bool
    digest: str

    @property
    def n(self) -> int:
        """Number of queries."""
        return self.starts[-1]

    @classmethod
    def open(cls, folder: str) -> Results:
        """The results in a folder. FileFormatError if there are none or the job has not finished."""
        manifest = read_manifest(folder)
        if manifest is None or manifest["kind"] not in ("search", "merge") or "results" not in manifest.get("output", {}):
            raise FileFormatError(f"{folder} holds no results: no {MANIFEST} of a search or of merged results")
        if not manifest["finished"]:
            raise FileFormatError(f"the {manifest['kind']} in {folder} has not finished: start it again to go on")
        output = manifest["output"]
        rows = manifest["finished"]["rows"]
        return cls(
            folder, output["results"], tuple(output["parts"]), tuple(np.cumsum([0, *rows]).tolist()), output["k"],
            manifest["finished"]["keyed"], manifest["finished"]["digest"],
        )  # fmt: skip

    def read(self, start: int, stop: int) -> Hits:
        """Results of the queries start … stop − 1."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        pieces = []
        for part in range(first, len(self.stems)):
            begin, end = self.starts[part], self.starts[part + 1]
            if begin >= stop:
                break
            hits = self.read_part(part)
            pieces.append(hits.rows(max(start, begin) - begin, min(stop, end) - begin))
        return concatenate(pieces, self.k)

    def read_part(self, part: int) -> Hits:
        """Results of one part."""
        urls = [files.join(self.folder, name) for name in part_files(self.stems[part], self.form)]
        n = self.starts[part + 1] - self.starts[part]
        if self.form == "parquet":
            hits = _read_parquet(urls[0], self.k, self.keyed)
        else:
            query_ids = np.load(files.open_bytes(urls[0]), allow_pickle=False)
            D, I = (_read_matrix(url) for url in urls[1:])  # noqa: E741
            hits = Hits(query_ids, D.astype(np.float32), I.astype(np.int64))
        if len(hits.I) != n or hits.I.shape != hits.D.shape:
            raise CorruptFileError(f"{urls[0]} holds {len(hits.I)} queries, the job wrote {n}")
        return hits

    def parts(self) -> Iterator[tuple[int, Hits]]:
        """Every part, with the number of its first query."""
        for part in range(len(self.stems)):
            yield self.starts[part], self.read_part(part)


def _read_matrix(url: str) -> npt.NDArray[Any]:
    source = open_source(url)
    if not source.n:
        return np.empty((0, source.d))
    return next(source.read([(0, source.n)])).vectors


def _read_parquet(url: str, k: int, keyed: bool) -> Hits:
    try:
        table = pq.read_table(files.open_file(url)).combine_chunks()
        ids, distances = (_padded(table.column(name), k, fill, url) for name, fill in (("ids", -1), ("distances", np.inf)))
        keys = table.column("keys").combine_chunks().flatten() if keyed and len(table) else None
        if keyed and keys is None:
            keys = pa.array([], pa.string())
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise CorruptFileError(f"{url} can't be read as results: {error}") from error
    query_ids = table.column("query_id").combine_chunks()
    numbers = query_ids.to_numpy() if pa.types.is_integer(query_ids.type) else query_ids
    return Hits(numbers, distances.astype(np.float32), ids.astype(np.int64), keys)


def _padded(column: Any, k: int, fill: float, url: str) -> npt.NDArray[Any]:
    """A column of lists as a matrix (n, k), filled up at the ends of the rows."""
    if not len(column):
        return np.empty((0, k))
    lists = column.combine_chunks()
    lengths = np.asarray(pc.list_value_length(lists))
    if lengths.max(initial=0) > k:
        raise CorruptFileError(f"{url} has lists of {lengths.max()}, the job wrote {k} at most")
    values = lists.flatten().to_numpy()
    padded = np.full((len(lists), k), fill, values.dtype)
    padded[np.arange(k) < lengths[:, None]] = values
    return padded


def concatenate(pieces: list[Hits], k: int) -> Hits:
    if not pieces:
        return Hits(np.empty(0, np.int64), np.empty((0, k), np.float32), np.empty((0, k), np.int64))
    if len(pieces) == 1:
        return pieces[0]
    ids = [piece.query_ids for piece in pieces]
    keys = [piece.keys for piece in pieces]
    return Hits(
        np.concatenate(ids) if isinstance(ids[0], np.ndarray) else pa.concat_arrays(ids),
        np.concatenate([piece.D for piece in pieces]),
        np.concatenate([piece.I for piece in pieces]),
        None if keys[0] is None else pa.concat_arrays(keys),
    )
