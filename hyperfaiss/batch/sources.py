"""Where vectors come from: files of any of the formats below, seen as one long table that is read in ranges of rows.

=====================  =============================================================================================
``.parquet .pq``       a column of lists of numbers (FixedSizeList, List or LargeList); ids may be another column
``.npy``               a matrix (n, d) of any real dtype
``.fvecs .bvecs .ivecs``   rows with their length before each: float32, uint8, int32 (TEXMEX)
``.fbin .u8bin .i8bin .ibin``   two uint32, n and d, then the rows: float32, uint8, int8, int32 (big-ann)
=====================  =============================================================================================

Rows are numbered from 0 through all files, in the order of the files. A filter leaves rows out, it never renumbers them.
Nothing is read before it is asked for, and a range costs the memory of its rows, not that of a file or of a row group.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow.fs import FSSpecHandler, PyFileSystem

from ..checks import as_vectors
from ..errors import CorruptFileError, InvalidParameterError, InvalidVectorsError
from .files import File, file_system, list_files, open_file, read_bytes

__all__ = ["SUFFIXES", "Batch", "Filters", "Source", "as_source", "open_source", "split"]

# As pyarrow.parquet takes them: conditions (column, operator, value) that must all hold.
Filters: TypeAlias = Sequence[tuple[str, str, Any]]
Paths: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

_PARQUET = (".parquet", ".pq")
_VECS: dict[str, np.dtype[Any]] = {".fvecs": np.dtype("<f4"), ".bvecs": np.dtype("u1"), ".ivecs": np.dtype("<i4")}
_BINS: dict[str, np.dtype[Any]] = {
    ".fbin": np.dtype("<f4"),
    ".u8bin": np.dtype("u1"),
    ".i8bin": np.dtype("i1"),
    ".ibin": np.dtype("<i4"),
}
SUFFIXES = (*_PARQUET, ".npy", *_VECS, *_BINS)

# Parquet pages are decoded through a buffer of this size, instead of whole column chunks.
_BUFFER_BYTES = 8 << 20
# Bytes of vectors that pyarrow decodes at a time: a range is made of such pieces.
_DECODE_BYTES = 4 << 20
# Footers and headers are read by so many threads: over a network each takes a round trip.
_OPENERS = 16


@dataclass(frozen=True)
class Batch:
    """Some rows of a source.

    first, stop : the range of row numbers that was read; a filter may have left out some or all of its rows.
    rows : int64 (n,), the number of each row.
    ids : int64 (n,) or a pyarrow string array (n,); the row numbers where the source has no column of ids.
    vectors : (n, d), of the file's dtype.
    """

    first: int
    stop: int
    rows: npt.NDArray[np.int64]
    ids: Any
    vectors: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.rows)


class Source:
    """Vectors in files. ``open_source`` makes one; it can be pickled, and opens files when it reads.

    Attributes
    ----------
    n : rows before filtering.
    d : dimension.
    string_ids : whether ids are strings.
    explicit_ids : whether ids come from a column: else they are row numbers.
    filtered : whether there is a filter.
    files : list of File
    """

    def __init__(
        self, tables: Sequence[_Matrix | _Parquet], column: str | None, id_column: str | None, filters: Filters
    ) -> None:
        self._tables = list(tables)
        self._starts = np.cumsum([0, *(table.n for table in tables)])
        self._options = {"column": column, "id_column": id_column, "filters": [list(f) for f in filters]}
        self.n = int(self._starts[-1])
        self.d = _common({table.file.url: table.d for table in tables if table.n or len(tables) == 1}, "vectors of dimension")
        self.string_ids = _common({table.file.url: table.string_ids for table in tables}, "string ids:")
        self.explicit_ids = id_column is not None
        self.filtered = bool(filters)

    @property
    def files(self) -> list[File]:
        """The files, in the order of their rows."""
        return [table.file for table in self._tables]

    def describe(self) -> dict[str, Any]:
        """JSON-able, for a job's fingerprint: files with sizes and stamps, columns, filters."""
        return {"files": [file.describe() for file in self.files], **self._options}

    def read(self, ranges: Iterable[tuple[int, int]]) -> Iterator[Batch]:
        """The rows start … stop − 1 of each range, one batch a range. Ranges that go forward are read in one pass."""
        readers: dict[int, Any] = {}
        try:
            for first, stop in ranges:
                pieces = []
                for t in _overlapping(self._starts, first, stop):
                    begin, end = int(self._starts[t]), int(self._starts[t + 1])
                    if t not in readers:
                        readers[t] = self._tables[t].reader()
                    for numbers, ids, vectors in readers[t].read(max(first, begin) - begin, min(stop, end) - begin):
                        pieces.append((numbers + begin, ids, vectors))
                    if end <= stop:
                        readers.pop(t).close()
                yield self._batch(first, stop, pieces)
        finally:
            for reader in readers.values():
                reader.close()

    def checked(self, batch: Batch) -> Batch:
        """The batch with its vectors in float32, all finite; InvalidVectorsError names the file and the rows."""
        with self.naming(batch):
            return replace(batch, vectors=as_vectors(batch.vectors, self.d))

    @contextlib.contextmanager
    def naming(self, batch: Batch) -> Iterator[None]:
        """An InvalidVectorsError in the block says which rows of which file it is about."""
        try:
            yield
        except InvalidVectorsError as error:
            table = int(np.searchsorted(self._starts, batch.first, side="right")) - 1
            begin, end = int(self._starts[table]), min(batch.stop, int(self._starts[table + 1]))
            more = "" if end == batch.stop else f" and the {batch.stop - end:,} rows that follow"
            where = f"rows {batch.first - begin} to {end - begin - 1} of {self._tables[table].file.url}{more}"
            raise InvalidVectorsError(f"{where}: {error}") from error

    def _batch(self, first: int, stop: int, pieces: list[tuple[npt.NDArray[np.int64], Any, npt.NDArray[Any]]]) -> Batch:
        if not pieces:
            none = pa.array([], pa.large_string()) if self.string_ids else np.empty(0, np.int64)
            return Batch(first, stop, np.empty(0, np.int64), none, np.empty((0, self.d), np.float32))
        rows = np.concatenate([piece[0] for piece in pieces])
        vectors = pieces[0][2] if len(pieces) == 1 else np.concatenate([piece[2] for piece in pieces])
        if not self.explicit_ids:
            ids: Any = rows
        elif self.string_ids:
            ids = pa.concat_arrays([piece[1] for piece in pieces])
        else:
            ids = np.concatenate([piece[1] for piece in pieces])
        return Batch(first, stop, rows, ids, vectors)


def open_source(
    paths: Paths, *, column: str | None = None, id_column: str | None = None, filters: Filters | None = None
) -> Source:
    """The vectors in files, folders, globs or URLs, all of one format; see the module's table.

    Parameters
    ----------
    column : the Parquet column of vectors; may be left out if only one column holds lists of numbers.
    id_column : the Parquet column of ids, integers or strings; without it a row's number is its id.
    filters : conditions ``(column, operator, value)`` that must all hold, operators ``= != < <= > >= in "not in"``.

    Raises FileNotFoundError; InvalidParameterError for mixed formats, unknown columns, columns asked of a format without any;
    InvalidVectorsError for files of different dimensions; CorruptFileError for what can't be read.
    """
    files = list_files(paths, SUFFIXES)
    formats = {"Parquet" if file.suffix in _PARQUET else file.suffix: file for file in files}
    if len(formats) > 1:
        raise InvalidParameterError(f"inputs must be of one format, got {', '.join(f.url for f in formats.values())}")
    (form, sample), conditions = next(iter(formats.items())), list(filters or [])
    if form == "Parquet":
        try:
            _ = pq.filters_to_expression(conditions) if conditions else None
        except (ValueError, TypeError) as error:
            raise InvalidParameterError(f"filters must be (column, operator, value), got {conditions}: {error}") from error
        with ThreadPoolExecutor(_OPENERS) as pool:
            tables: list[_Matrix | _Parquet] = list(
                pool.map(lambda file: _Parquet.open(file, column, id_column, conditions), files)
            )
        return Source(tables, tables[0].column if tables else column, id_column, conditions)
    if column is not None or id_column is not None or conditions:
        raise InvalidParameterError(f"{sample.url} has no columns: column, id_column and filters are for Parquet")
    if form not in SUFFIXES:
        raise InvalidParameterError(f"{sample.url} ends in {form!r}, expected one of {' '.join(SUFFIXES)}")
    with ThreadPoolExecutor(_OPENERS) as pool:
        return Source(list(pool.map(_Matrix.open, files)), None, None, ())


def as_source(source: Source | Paths) -> Source:
    """A source as it is, paths opened."""
    return source if isinstance(source, Source) else open_source(source)


def split(start: int, stop: int, rows: int) -> Iterator[tuple[int, int]]:
    """The range start … stop − 1 in pieces of ``rows``, the last one shorter."""
    return ((first, min(first + rows, stop)) for first in range(start, stop, rows))


def _common(values: dict[str, Any], what: str) -> Any:
    """The one value that all files have."""
    urls = list(values)
    for url in urls[1:]:
        if values[url] != values[urls[0]]:
            raise InvalidVectorsError(f"files differ: {urls[0]} holds {what} {values[urls[0]]}, {url} {values[url]}")
    return values[urls[0]] if urls else 0


@contextlib.contextmanager
def open_parquet(url: str) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile, closed at the end with what it reads from."""
    opened = pq.ParquetFile(open_file(url))
    try:
        yield opened
    finally:
        opened.close(force=True)


def _overlapping(starts: npt.NDArray[np.int64], first: int, stop: int) -> range:
    """Of consecutive ranges starts[i] … starts[i + 1] − 1, the numbers of those that overlap first … stop − 1."""
    return range(int(np.searchsorted(starts, first, side="right")) - 1, int(np.searchsorted(starts, stop)))


# ------------------------------------------------------------------------------------------------------- matrices


@dataclass(frozen=True)
class _Matrix:
    """Rows of a fixed number of bytes, one after the other: .npy, *vecs, *bin. ``skip`` bytes come before each row."""

    file: File
    n: int
    d: int
    dtype: np.dtype[Any]
    offset: int
    skip: int
    string_ids: bool = False
    column: None = None

    @classmethod
    def open(cls, file: File) -> _Matrix:
        """Read a file's header and compare it with the file's size."""
        if file.suffix == ".npy":
            return cls._open_npy(file)
        head = read_bytes(file.url, 0, 8)
        if file.suffix in _VECS:
            dtype = _VECS[file.suffix]
            if not head:
                return cls(file, 0, 0, dtype, 4, 4)
            d = struct.unpack("<i", head[:4])[0] if len(head) >= 4 else 0
            n, rest = divmod(file.size, 4 + d * dtype.itemsize) if d > 0 else (0, 1)
            if rest:
                raise CorruptFileError(f"{file.url} has {file.size} bytes, which rows of {d} {dtype} values do not fill")
            return cls(file, n, d, dtype, 4, 4)
        dtype = _BINS[file.suffix]
        n, d = struct.unpack("<II", head) if len(head) == 8 else (0, 0)
        if file.size != 8 + n * d * dtype.itemsize or not d:
            raise CorruptFileError(f"{file.url} has {file.size} bytes; its header promises {n} rows of {d} {dtype} values")
        return cls(file, n, d, dtype, 8, 0)

    @classmethod
    def _open_npy(cls, file: File) -> _Matrix:
        stream = io.BytesIO(read_bytes(file.url, 0, min(file.size, 1 << 16)))
        try:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
        except (ValueError, EOFError) as error:
            raise CorruptFileError(f"{file.url} can't be read as .npy: {error}") from error
        if len(shape) != 2 or dtype.kind not in "fiu" or not shape[1]:
            raise InvalidVectorsError(f"{file.url} holds {dtype} of shape {shape}, expected real numbers of shape (n, d)")
        if fortran and min(shape) > 1:
            raise InvalidVectorsError(f"{file.url} is in Fortran order: save np.ascontiguousarray(x)")
        if file.size != stream.tell() + shape[0] * shape[1] * dtype.itemsize:
            raise CorruptFileError(f"{file.url} has {file.size} bytes; its header promises {dtype} of shape {shape}")
        return cls(file, shape[0], shape[1], dtype, stream.tell(), 0)

    def reader(self) -> _Matrix:
        return self

    def close(self) -> None:
        """Nothing is kept open."""

    def read(self, start: int, stop: int) -> Iterator[tuple[npt.NDArray[np.int64], None, npt.NDArray[Any]]]:
        """Rows start … stop − 1. Plain reads rather than a memory map: mapped pages would count as the job's memory."""
        size = self.d * self.dtype.itemsize
        step = size + self.skip
        begin = self.offset - self.skip + start * step
        data = np.frombuffer(read_bytes(self.file.url, begin, begin + (stop - start) * step), np.uint8)
        if data.size != (stop - start) * step:
            raise CorruptFileError(f"{self.file.url} became shorter while it was read")
        rows = data.reshape(stop - start, step)
        odd = (rows[:, : self.skip] != np.frombuffer(struct.pack("<i", self.d), np.uint8)[: self.skip]).any(axis=1)
        if odd.any():
            row = start + int(odd.argmax())
            raise CorruptFileError(f"row {row} of {self.file.url} does not have {self.d} values, as the first row does")
        vectors = np.ascontiguousarray(rows[:, self.skip :]).view(self.dtype)
        yield np.arange(start, stop), None, vectors


# ------------------------------------------------------------------------------------------------------- Parquet


@dataclass(frozen=True)
class _Parquet:
    """A Parquet file: what its footer says."""

    file: File
    n: int
    d: int
    column: str
    id_column: str | None
    filters: tuple[tuple[str, str, Any], ...]
    string_ids: bool
    groups: tuple[int, ...]

    @classmethod
    def open(cls, file: File, column: str | None, id_column: str | None, filters: Sequence[tuple[str, str, Any]]) -> _Parquet:
        """Read the footer, and choose the column of vectors."""
        try:
            with open_parquet(file.url) as opened:
                schema, metadata = opened.schema_arrow, opened.metadata
                groups = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
                column = _vector_column(file, schema, column)
                for name in [id_column, *(condition[0] for condition in filters)]:
                    if name is not None and name not in schema.names:
                        raise InvalidParameterError(f"{file.url} has no column {name!r}, but {', '.join(schema.names)}")
                kind = schema.field(column).type
                d = kind.list_size if pa.types.is_fixed_size_list(kind) else _first_length(opened, column)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise CorruptFileError(f"{file.url} can't be read as Parquet: {error}") from error
        strings = False
        if id_column is not None:
            ids = schema.field(id_column).type
            strings = pa.types.is_string(ids) or pa.types.is_large_string(ids)
            if not strings and not pa.types.is_integer(ids):
                raise InvalidParameterError(f"column {id_column!r} of {file.url} holds {ids}, expected integers or strings")
        conditions = tuple((name, operator, value) for name, operator, value in filters)
        return cls(file, metadata.num_rows, d, column, id_column, conditions, strings, groups)

    @cached_property
    def starts(self) -> npt.NDArray[np.int64]:
        """First row of each row group, and the end."""
        return np.cumsum([0, *self.groups])

    def reader(self) -> _ParquetReader:
        return _ParquetReader(self)


def _vector_column(file: File, schema: Any, column: str | None) -> str:
    def fits(kind: Any) -> bool:
        lists = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
        return any(test(kind) for test in lists) and (
            pa.types.is_floating(kind.value_type) or pa.types.is_integer(kind.value_type)
        )

    fitting = [name for name in schema.names if fits(schema.field(name).type)]
    if column is None:
        if len(fitting) != 1:
            found = f"{len(fitting)} of them ({', '.join(fitting)})" if fitting else f"none among {', '.join(schema.names)}"
            raise InvalidParameterError(f"{file.url} should have one column of lists of numbers, has {found}: name the column")
        return str(fitting[0])
    if column not in schema.names:
        raise InvalidParameterError(f"{file.url} has no column {column!r}, but {', '.join(schema.names)}")
    if column not in fitting:
        raise InvalidParameterError(
            f"column {column!r} of {file.url} holds {schema.field(column).type}, expected lists of numbers"
        )
    return column


def _first_length(opened: Any, column: str) -> int:
    """Length of the first list that is not null: the file's dimension, unless a later row says otherwise."""
    for batch in opened.iter_batches(batch_size=64, columns=[column]):
        lengths = pc.drop_null(pc.list_value_length(batch.column(0)))
        if len(lengths):
            return int(lengths[0].as_py())
    return 0


class _ParquetReader:
    """Reads ranges of rows, going forward: a range that follows the last one costs nothing twice."""

    def __init__(self, table: _Parquet) -> None:
        self._table = table
        self._file: Any = None
        self._group = -1
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = None
        self._position = 0  # row of the file where _batch begins
        self._matching: set[int] | None = None

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close(force=True)
            self._file = None

    def read(self, start: int, stop: int) -> Iterator[tuple[npt.NDArray[np.int64], Any, npt.NDArray[Any]]]:
        """Row numbers in the file, ids and vectors of the rows start … stop − 1 that pass the filter."""
        table = self._table
        if self._file is None:
            self._open()
        for group in _overlapping(table.starts, start, stop):
            first, last = max(start, int(table.starts[group])), min(stop, int(table.starts[group + 1]))
            if first < last and (self._matching is None or group in self._matching):
                for position, batch in self._rows(group, first, last):
                    yield from self._convert(position, batch)

    def _open(self) -> None:
        table = self._table
        try:
            self._file = pq.ParquetFile(open_file(table.file.url), buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise CorruptFileError(f"{table.file.url} can't be read as Parquet: {error}") from error
        if table.filters:
            fs, path = file_system(table.file.url)
            fragment = ds.ParquetFileFormat().make_fragment(path, PyFileSystem(FSSpecHandler(fs)))
            with self._fitting():
                kept = fragment.subset(filter=pq.filters_to_expression(list(table.filters)), schema=self._file.schema_arrow)
            # Row groups whose statistics rule out the filter are not read at all.
            self._matching = {info.id for info in kept.row_groups}

    @contextlib.contextmanager
    def _fitting(self) -> Iterator[None]:
        """What pyarrow says of a filter that compares a column with a value of another type."""
        try:
            yield
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, TypeError) as error:
            table = self._table
            raise InvalidParameterError(f"filter {list(table.filters)} does not fit {table.file.url}: {error}") from error

    def _rows(self, group: int, first: int, last: int) -> Iterator[tuple[int, Any]]:
        """Record batches of the rows first … last − 1 of one row group, each with its first row."""
        table = self._table
        names = dict.fromkeys([table.column, table.id_column or table.column, *(f[0] for f in table.filters)])
        if group != self._group or first < self._position:
            rows = max(64, min(4096, _DECODE_BYTES // (4 * max(1, table.d))))
            self._batches = self._file.iter_batches(batch_size=rows, row_groups=[group], columns=list(names))
            self._group, self._position, self._batch = group, int(table.starts[group]), None
        while first < last:
            if self._batch is None or self._position + len(self._batch) <= first:
                self._position += 0 if self._batch is None else len(self._batch)
                try:
                    self._batch = next(self._batches)
                except (StopIteration, pa.ArrowInvalid, OSError) as error:
                    raise CorruptFileError(f"{table.file.url}, row {self._position}: can't be read: {error}") from error
                continue
            skip = first - self._position
            part = self._batch.slice(skip, last - first)
            yield first, part
            first += len(part)

    def _convert(self, first: int, batch: Any) -> Iterator[tuple[npt.NDArray[np.int64], Any, npt.NDArray[Any]]]:
        table = self._table
        rows = np.arange(first, first + len(batch))
        if table.filters:
            numbered = pa.table(batch.columns, names=batch.schema.names).append_column("\0row", pa.array(rows))
            with self._fitting():
                kept = numbered.filter(pq.filters_to_expression(list(table.filters))).combine_chunks()
            if not kept.num_rows:
                return
            batch = kept.to_batches()[0]
            rows = batch.column("\0row").to_numpy()
        vectors = self._vectors(rows, batch.column(table.column))
        if len(vectors) < len(self._batch):
            # A view would keep all rows that were decoded with these.
            vectors = vectors.copy()
        yield rows, None if table.id_column is None else self._ids(rows, batch.column(table.id_column)), vectors

    def _vectors(self, rows: npt.NDArray[np.int64], lists: Any) -> npt.NDArray[Any]:
        table = self._table
        if lists.null_count:
            row = rows[np.flatnonzero(np.asarray(lists.is_null()))[0]]
            raise InvalidVectorsError(f"row {row} of {table.file.url} is null in column {table.column!r}, expected a vector")
        if not pa.types.is_fixed_size_list(lists.type):
            lengths = np.asarray(pc.list_value_length(lists))
            if (lengths != table.d).any():
                bad = int(np.flatnonzero(lengths != table.d)[0])
                raise InvalidVectorsError(
                    f"row {rows[bad]} of {table.file.url} has {lengths[bad]} values in {table.column!r}, expected {table.d}"
                )
        values = lists.flatten()
        if values.null_count:
            row = rows[np.flatnonzero(np.asarray(values.is_null()))[0] // table.d]
            raise InvalidVectorsError(f"row {row} of {table.file.url} has a null value in column {table.column!r}")
        return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(len(rows), table.d)

    def _ids(self, rows: npt.NDArray[np.int64], ids: Any) -> Any:
        table = self._table
        if ids.null_count:
            row = rows[np.flatnonzero(np.asarray(ids.is_null()))[0]]
            raise InvalidVectorsError(f"row {row} of {table.file.url} is null in column {table.id_column!r}, expected an id")
        if table.string_ids:
            return ids.cast(pa.large_string())
        try:
            return ids.cast(pa.int64()).to_numpy()
        except pa.ArrowInvalid as error:
            raise InvalidVectorsError(f"column {table.id_column!r} of {table.file.url} does not fit int64: {error}") from error
