"""Merging: shards into one index file, k-lists of several searches into one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ..checks import as_integer
from ..errors import InvalidParameterError, InvalidVectorsError
from ..index import read_index, write_index
from . import files
from .job import Job, Summary, read_manifest, started, versions
from .memory import Budget
from .progress import Bar
from .results import FORMATS, Format, Hits, Results, merge_lists, part_files, write_part
from .shards import SUFFIX, Shard, ShardReader, find_shards, key_writer, keys_url
from .sources import Paths, split

__all__ = ["merge", "merge_results", "merge_shards"]


def merge(inputs: Paths, output: str, *, k: int | None = None, **options: Any) -> Summary:
    """:func:`merge_results` if ``inputs`` are folders of results, else :func:`merge_shards`."""
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    manifests = [read_manifest(files.absolute(path)) for path in given]
    if any(manifest is not None and manifest["kind"] in ("search", "merge") for manifest in manifests):
        return merge_results([os.fspath(path) for path in given], output, k=k, **options)
    if k is not None:
        raise InvalidParameterError(f"k = {k} is for merging results, {os.fspath(given[0])!r} is an index")
    return merge_shards(given, output, **options)


def merge_shards(
    index: Paths, output: str, *, memory: str | int = "2GiB", overwrite: bool = False, progress: bool = True
) -> Summary:
    """All shards as one index in the file ``output``, with the same ids; string ids go into a table beside it.

    The index is put together in memory. Raises InvalidParameterError if it does not fit ``memory``, if ``output`` exists
    already and may not be overwritten, or if the shards are not of one codec or share ids.
    """
    shards, target, clock = find_shards(index), files.absolute(output), started()
    if not target.endswith(SUFFIX):
        raise InvalidParameterError(f"an index file ends in {SUFFIX}, got {output!r}")
    if files.file_info(target) is not None and not overwrite:
        raise InvalidParameterError(f"{output} exists already: choose another name, or overwrite")
    Budget(memory).require(int(sum(shard.bytes for shard in shards) * 1.5), 1.0, "the merged index")
    total = sum(shard.ntotal for shard in shards)
    with ShardReader() as reader, Bar("merge", total, shown=progress) as bar:
        merged = read_index(reader.local(shards[0]))
        merged.reset()
        for shard in shards:
            merged.merge_from(read_index(reader.local(shard), mmap=True), add_id=shard.add_id)
            bar.advance(shard.ntotal)
        if shards[0].keys is None:
            files.remove(keys_url(target))  # of a former file of this name
        else:
            _merge_keys(shards, reader, keys_url(target))
        with files.writing(target) as path:
            write_index(merged, path)
    return clock.summary("merge", target, total, {"vectors": total, "shards": len(shards)})


def _merge_keys(shards: Sequence[Shard], reader: ShardReader, url: str) -> None:
    tables = [reader.key_table(shard) for shard in shards]
    with key_writer(url) as writer:
        for table in sorted((table for table in tables if table.batches), key=lambda table: int(table.firsts[0])):
            for batch in table.batches:
                writer.write(batch.column(0), batch.column(1))


def merge_results(
    results: Iterable[str],
    output: str,
    *,
    k: int | None = None,
    format: Format = "parquet",  # noqa: A002
    part_rows: int = 1 << 13,
    memory: str | int = "2GiB",
    overwrite: bool = False,
    progress: bool = True,
) -> Summary:
    """The k-lists of searches for the same queries over different shards, as one list for each query.

    Exact: the same lists that one search over all of the shards gives. ``k`` is by default that of the shortest lists, and not
    more, since what a search left out can't come back. Parts, resuming and ``overwrite`` are those of :func:`search`.
    Raises FileFormatError for folders without finished results, InvalidParameterError for a k beyond the inputs',
    InvalidVectorsError if the queries are not the same or a result comes twice.
    """
    inputs = [Results.open(files.absolute(folder)) for folder in results]
    if not inputs:
        raise InvalidParameterError("give at least one folder of results")
    shortest, first = min(one.k for one in inputs), inputs[0]
    k = shortest if k is None else as_integer(k, "k", 1)
    if k > shortest:
        raise InvalidParameterError(f"k = {k} asks for more than the {shortest} results of a query in the inputs")
    if format not in FORMATS:
        raise InvalidParameterError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    for one in inputs[1:]:
        if one.n != first.n or one.keyed != first.keyed:
            raise InvalidVectorsError(
                f"{first.folder} holds {first.n} queries ({'string' if first.keyed else 'int64'} ids), "
                f"{one.folder} {one.n} ({'string' if one.keyed else 'int64'} ids)"
            )
    as_integer(part_rows, "part_rows", 1)
    # All lists of a part's queries, side by side, and what merging makes of them.
    Budget(memory).require(part_rows * sum(one.k for one in inputs) * 12 * 8, 0.8, f"merging {part_rows:,} queries at a time")
    ranges = list(split(0, first.n, part_rows))
    stems = [f"part-{i:05d}" for i in range(len(ranges))]
    fingerprint = {
        "results": [{"path": one.folder, "digest": one.digest} for one in inputs],
        "options": {"k": k, "format": format, "part_rows": part_rows},
        "versions": versions(),
    }
    form = {"results": format, "k": k, "parts": stems}
    folder = files.absolute(output)
    with (
        Job(folder, "merge", fingerprint, form, [part_files(stem, format) for stem in stems], overwrite=overwrite) as job,
        Bar("merge", first.n, first.n - job.rows(ranges), shown=progress) as bar,
    ):
        for number in job.todo:
            start, stop = ranges[number]
            write_part(folder, stems[number], format, _merged([one.read(start, stop) for one in inputs], k, inputs))
            bar.advance(stop - start)
        lengths = [stop - start for start, stop in ranges]
        return job.finish(
            first.n, job.rows(ranges), {"queries": first.n, "inputs": len(inputs)}, {"rows": lengths, "keyed": first.keyed}
        )


def _merged(pieces: list[Hits], k: int, inputs: Sequence[Results]) -> Hits:
    for piece, one in zip(pieces, inputs, strict=True):
        if not _same(pieces[0].query_ids, piece.query_ids):
            raise InvalidVectorsError(f"{inputs[0].folder} and {one.folder} answer different queries")
    D, I, order = merge_lists([piece.D for piece in pieces], [piece.I for piece in pieces], k)  # noqa: E741
    if pieces[0].keys is None:
        twice = (I[:, 1:] == I[:, :-1]) & (D[:, 1:] == D[:, :-1]) & (I[:, 1:] >= 0)
        if twice.any():
            row, column = np.argwhere(twice)[0]
            raise InvalidVectorsError(
                f"query {row} finds id {I[row, column]} twice at distance {D[row, column]}: "
                "the inputs searched the same shard, or shards that use the same ids"
            )
        return Hits(pieces[0].query_ids, D, I)
    # The number of each result's key, laid out as its lists are.
    numbers, before = [], 0
    for piece in pieces:
        found = piece.I >= 0
        numbers.append(np.where(found, before + np.cumsum(found).reshape(found.shape) - 1, -1))
        before += len(piece.keys)
    chosen = np.take_along_axis(np.concatenate(numbers, axis=1), order, axis=1)[I >= 0]
    return Hits(pieces[0].query_ids, D, I, pa.concat_arrays([piece.keys for piece in pieces]).take(pa.array(chosen)))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) != isinstance(b, np.ndarray):
        return False
    return bool(np.array_equal(a, b) if isinstance(a, np.ndarray) else a.equals(b))
