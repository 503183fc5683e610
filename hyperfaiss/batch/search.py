"""The search job: queries × shards → parts of k-lists."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ..checks import as_integer
from ..errors import InvalidParameterError, InvalidVectorsError
from . import files
from .engines import EngineName, Found, open_engine
from .job import Job, Summary, versions
from .memory import Budget
from .progress import Bar
from .results import FORMATS, Format, Hits, concatenate, part_files, write_part
from .shards import Shard, ShardReader, find_shards
from .sources import Batch, Paths, Source, as_source, open_parquet, split

__all__ = ["search"]

# Results of a part, whatever k is: a part is what a killed job loses at the most, and 12 MiB of memory.
_RESULTS = 1 << 20
_MOST_ROWS, _FEWEST_ROWS = 1 << 16, 1 << 4


def search(
    index: Paths,
    queries: Source | Paths,
    output: str,
    *,
    k: int,
    nprobe: int | None = None,
    format: Format = "parquet",  # noqa: A002
    part_rows: int | None = None,
    memory: str | int = "2GiB",
    engine: EngineName = "local",
    address: str | None = None,
    workers: int | None = None,
    cpus_per_worker: int = 1,
    cache: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Summary:
    """The exact k nearest of every query over all shards, in parts in the folder ``output``.

    Parameters
    ----------
    index : the folder of a build, or index files (a path, a glob, several).
    queries : vectors as the index takes them; a source, or paths for ``open_source``.
    output : folder of the parts and of ``_job.json``. Called again after a kill, the job goes on where it stopped.
    k : neighbours of a query.
    nprobe : lists that an IVF index visits; by default what the index says.
    format : "parquet", "npy" or "ibin"; see ``hyperfaiss.batch.results``.
    part_rows : queries of a part; by default about 2**20 / k.
    memory : what the job may allocate, in each process: queries wait in smaller blocks if it is little.
    engine, address, workers, cpus_per_worker : "local", or "ray" on the cluster at ``address`` ("auto": the one of this
        machine; None: a new one, on this machine only), with so many workers of so many CPUs (default: what the cluster has).
    cache : folder for copies of remote shards; temporary by default.
    overwrite : start anew whatever ``output`` holds.
    progress : show a bar, if stderr is a terminal.

    Raises the errors of ``open_source`` and ``Job``, FileFormatError and CorruptFileError for what is no index,
    InvalidVectorsError for queries that do not fit it, InvalidParameterError for an option out of its range.
    """
    shards = find_shards(index)
    source = as_source(queries)
    k = as_integer(k, "k", 1)
    _check(shards, source, nprobe, format)
    default = min(_MOST_ROWS, max(_FEWEST_ROWS, 1 << (_RESULTS // k).bit_length() >> 1))
    rows = default if part_rows is None else as_integer(part_rows, "part_rows", 1)
    ranges = list(split(0, source.n, rows))
    stems = [f"part-{i:05d}" for i in range(len(ranges))]
    fingerprint = {
        "index": [shard.describe() for shard in shards],
        "queries": source.describe(),
        "options": {"k": k, "nprobe": nprobe, "format": format, "part_rows": rows},
        "versions": versions(),
    }
    form = {"results": format, "k": k, "parts": stems}
    budget = Budget(memory)
    # A part's results, as they are put together and written.
    budget.require(rows * k * 60, 0.5, f"the results of {rows:,} queries, a part")
    # A query as it is read, as float32, the next one, the projector's rows; its lists, those of one more shard, their merging.
    block_rows = budget.rows(source.d * 4 * 6 + k * 12 * 6, 0.4, 1, rows)
    folder = files.absolute(output)
    with (
        ShardReader(cache) as reader,
        Job(folder, "search", fingerprint, form, [part_files(stem, format) for stem in stems], overwrite=overwrite) as job,
        open_engine(engine, address, reader, workers=workers, cpus=cpus_per_worker, cache=cache) as runner,
        Bar("search", source.n, source.n - job.rows(ranges), shown=progress) as bar,
    ):
        batches = _batches(source, ((number, *ranges[number]) for number in job.todo), block_rows)
        with contextlib.closing(runner.search(shards, batches, k, nprobe, bar.advance)) as found:
            for number in job.todo:
                hits = _gather(found, ranges[number][1], k)
                if shards[0].keys is not None:
                    hits = hits._replace(keys=reader.keys(shards, hits.I))
                write_part(folder, stems[number], format, hits)
        lengths = part_lengths(folder, stems, format)
        details = {"queries": int(sum(lengths)), "shards": len(shards), "vectors": sum(shard.ntotal for shard in shards)}
        return job.finish(source.n, job.rows(ranges), details, {"rows": lengths, "keyed": shards[0].keys is not None})


def part_lengths(folder: str, stems: list[str], form: str) -> list[int]:
    """Number of queries in each part that was written."""

    def length(stem: str) -> int:
        url = files.join(folder, part_files(stem, form)[0])
        if form == "parquet":
            with open_parquet(url) as opened:
                return int(opened.metadata.num_rows)
        header = np.lib.format.read_array_header_1_0
        stream = files.open_bytes(url, 1024)
        np.lib.format.read_magic(stream)
        return int(header(stream)[0][0])

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(length, stems))


def _check(shards: list[Shard], source: Source, nprobe: int | None, form: str) -> None:
    if form not in FORMATS:
        raise InvalidParameterError(f"format must be one of {', '.join(FORMATS)}, got {form!r}")
    if source.n and source.d != shards[0].d:
        raise InvalidVectorsError(
            f"queries in {source.files[0].url} have {source.d} dimensions, the index {shards[0].url} takes {shards[0].d}"
        )
    if form != "parquet" and source.string_ids:
        raise InvalidParameterError(f"format {form!r} has no room for string query ids: use format 'parquet'")
    if nprobe is not None:
        as_integer(nprobe, "nprobe", 1)
        if not shards[0].ivf:
            raise InvalidParameterError(f"nprobe = {nprobe} is for IVF indexes, {shards[0].url} is flat")


def _batches(source: Source, parts: Iterator[tuple[int, int, int]], block_rows: int) -> Iterator[Batch]:
    """Blocks of queries, float32 and checked, part after part."""
    for batch in source.read(block for _, start, stop in parts for block in split(start, stop, block_rows)):
        yield source.checked(batch)


def _gather(found: Iterator[Found], stop: int, k: int) -> Hits:
    """The results of a part, from those of its blocks."""
    pieces = []
    for block in found:
        pieces.append(Hits(block.batch.ids, block.D, block.I))
        if block.batch.stop == stop:
            break
    return concatenate(pieces, k)
