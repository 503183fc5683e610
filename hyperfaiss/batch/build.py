"""The build job: vectors → index shards, and the template that all shards are copies of."""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..checks import as_integer
from ..codec import HyperbolicProductQuantizer
from ..errors import InvalidParameterError, InvalidVectorsError
from ..index import HyperbolicPQIndex, read_index, write_index
from ..ivf import HyperbolicIVFPQIndex
from . import files
from .engines import Advance, EngineName, open_engine
from .job import Job, Summary, read_manifest, versions
from .memory import Budget
from .progress import Bar, prefetch
from .shards import ShardReader, file_header, key_writer, keys_url
from .sources import Batch, Paths, Source, as_source, split

__all__ = ["Content", "build", "load_empty"]

Content = Literal["embeddings", "tangents", "codes"]

TEMPLATE = "template.index"
# Vectors of a shard, whatever the memory: 800 MB at 8 bytes; one of a thousand for 10^11.
_MOST_ROWS, _FEWEST_ROWS = 1 << 27, 1 << 16
# Vectors that are encoded at a time.
_MOST_BATCH, _FEWEST_BATCH = 1 << 16, 1 << 6
# Bytes that a shard takes in memory while it is built, over those of its codes and ids: measured, with room for growth.
_COPIES = 1.5
# Runs of consecutive rows that a training sample is made of: each costs the decoding of a row group.
_RUNS = 256


@dataclass(frozen=True)
class Plan:
    """What a worker must know to build any one of the shards."""

    source: Source
    folder: str
    template: str
    content: Content
    names: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    counted: bool
    batch_rows: int

    def shard(self, number: int, advance: Advance) -> None:
        """Build and write one shard, and before it its table of string ids."""
        source, (start, stop) = self.source, self.ranges[number]
        target = files.join(self.folder, self.names[number])
        with tempfile.TemporaryDirectory(prefix="hyperfaiss-") as cache:
            index = read_index(files.as_local(self.template, cache))
        projector = index.projector
        if self.content == "tangents":
            index.projector = None
        with contextlib.ExitStack() as stack:
            keys = stack.enter_context(key_writer(keys_url(target))) if source.string_ids else None
            for batch in prefetch(source.read(split(start, stop, self.batch_rows))):
                with source.naming(batch):
                    self._add(index, batch)
                if keys is not None and len(batch):
                    keys.write(batch.rows, batch.ids)
                advance(batch.stop - batch.first)
        index.projector = projector
        with files.writing(target) as path:
            write_index(index, path)

    def _add(self, index: Any, batch: Batch) -> None:
        ids = None if self.counted else batch.rows if self.source.string_ids else batch.ids
        if self.content == "codes":
            index.add_sa_codes(batch.vectors, ids)
        elif ids is None:
            index.add(batch.vectors)
        else:
            index.add_with_ids(batch.vectors, ids)


def build(
    vectors: Source | Paths,
    output: str,
    *,
    codec: str | None = None,
    factory: str | None = None,
    nlist: int | None = None,
    metric: str = "geodesic",
    curvature: float = 1.0,
    clip_radius: float | None = None,
    train_rows: int | None = None,
    seed: int = 1234,
    content: Content = "embeddings",
    shard_rows: int | None = None,
    memory: str | int = "2GiB",
    engine: EngineName = "local",
    address: str | None = None,
    workers: int | None = None,
    cpus_per_worker: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> Summary:
    """Encode vectors into index shards in the folder ``output``.

    Parameters
    ----------
    vectors : a source, or paths for ``open_source``. A vector's id is that of the column of ids or, without one and for
        string ids, its row number; strings go into a table beside each shard.
    output : folder of the shards and of ``_job.json``. Called again after a kill, the job goes on where it stopped. With
        engine "ray", a folder that every worker can write to.
    codec : a trained file whose copies the shards are: a codec, a model, or an index (its vectors are left out).
    nlist : with a codec or a model: make IVF shards of so many lists, whose centroids are trained here.
    factory : instead of a codec, ``index_factory`` for an index that is trained here, with ``metric``, ``curvature``,
        ``clip_radius`` and ``seed``.
    train_rows : how many of the vectors to train on (default: 256 a codeword, 64 a list).
    content : what ``vectors`` are: "embeddings" as the index takes them, "tangents" as a model's projector makes them, or
        "codes" of an index or an ``encode`` job.
    shard_rows : vectors of a shard; by default as many as ``memory`` allows, at most 2**27.
    memory : what the job may allocate, in each process.
    engine, address, workers, cpus_per_worker, overwrite, progress : as in :func:`search`.

    Raises the errors of ``open_source`` and ``Job``; InvalidVectorsError, which names the file and the rows, for vectors that
    the index refuses; InvalidParameterError for an option out of its range.
    """
    source = as_source(vectors)
    if not source.n:
        raise InvalidVectorsError(f"{source.files[0].url} and the other inputs hold no vectors")
    if (codec is None) == (factory is None) or (codec is None and nlist is not None):
        raise InvalidParameterError("give either a codec (and nlist, for an IVF index) or a factory string")
    if content not in ("embeddings", "tangents", "codes"):
        raise InvalidParameterError(f"content must be 'embeddings', 'tangents' or 'codes', got {content!r}")
    folder, budget = files.absolute(output), Budget(memory)
    if codec is not None:
        codec = files.absolute(codec)
        kept: dict[str, Any] = {"codec": file_header(codec).digest, "nlist": nlist, "train_rows": train_rows}
        empty = load_empty(codec, nlist)
    else:
        options = {"metric": metric, "curvature": curvature, "clip_radius": clip_radius, "seed": seed}
        kept = {"factory": factory, **options, "train_rows": train_rows}
        empty = _from_factory(source.d, str(factory), metric, curvature, clip_radius, seed)
    _check(source, empty, content)
    counted = not hasattr(empty, "nlist") and not source.filtered and (source.string_ids or not source.explicit_ids)
    shard_rows = _shard_rows(shard_rows, empty.M + (0 if counted else 8), budget, folder, overwrite)
    ranges = tuple(split(0, source.n, shard_rows))
    names = tuple(f"shard-{i:05d}.index" for i in range(len(ranges)))
    fingerprint = {
        "vectors": source.describe(), "index": kept, "options": {"content": content, "shard_rows": shard_rows},
        "versions": versions(),
    }  # fmt: skip
    shards = [{"name": name, "add_id": ranges[i][0] if counted else 0} for i, name in enumerate(names)]
    # A vector as it is read, as float32, the next one, the projector's rows, and its codes.
    batch_rows = budget.rows(source.d * 4 * 6 + 64, 0.2, _FEWEST_BATCH, _MOST_BATCH)
    plan = Plan(source, folder, files.join(folder, TEMPLATE), content, names, ranges, counted, batch_rows)
    with (
        Job(folder, "build", fingerprint, {"shards": shards}, [[name] for name in names], overwrite=overwrite) as job,
        ShardReader() as reader,
        open_engine(engine, address, reader, workers=workers, cpus=cpus_per_worker) as runner,
        Bar("build", source.n, source.n - job.rows(ranges), shown=progress) as bar,
    ):
        if files.file_info(plan.template) is None:
            if not empty.is_trained:
                _train(empty, source, train_rows, seed, budget)
            with files.writing(plan.template) as path:
                write_index(empty, path)
        runner.run(plan.shard, job.todo, bar.advance)
        ntotal = [file_header(files.join(folder, name)).fields["ntotal"] for name in names]
        details = {"shards": len(names), "vectors": sum(ntotal), "bytes_per_vector": empty.code_size}
        return job.finish(source.n, job.rows(ranges), details, {"ntotal": ntotal})


def sample(source: Source, n: int, seed: int) -> npt.NDArray[np.float32]:
    """About ``n`` vectors from all over the source, the same for the same seed: runs of rows, one in each of equal parts."""
    if n >= source.n:
        ranges = list(split(0, source.n, 1 << 14))
    else:
        rng = np.random.default_rng(seed)
        runs = min(_RUNS, n)
        bounds = np.linspace(0, source.n, runs + 1).astype(np.int64)
        lengths = np.diff(np.linspace(0, n, runs + 1).astype(np.int64))
        starts = [int(a + rng.integers(b - a - m + 1)) for a, b, m in zip(bounds, bounds[1:], lengths, strict=False)]
        ranges = [(start, start + int(m)) for start, m in zip(starts, lengths, strict=True)]
    return np.concatenate([source.checked(batch).vectors for batch in source.read(ranges)])


def _train(index: Any, source: Source, train_rows: int | None, seed: int, budget: Budget) -> None:
    wanted = max(256 * index.ksub, 64 * getattr(index, "nlist", 0)) if train_rows is None else train_rows
    wanted = min(as_integer(wanted, "train_rows", index.ksub), source.n)
    budget.require(wanted * source.d * 4 * 5, 1.0, f"training on {wanted:,} vectors (train_rows)")
    index.train(sample(source, wanted, seed))


def _from_factory(d: int, text: str, metric: Any, curvature: float, clip_radius: float | None, seed: int) -> Any:
    from ..factory import index_factory

    return index_factory(d, text, metric, curvatures=curvature, clip_radius=clip_radius, seed=seed)


def load_empty(url: str, nlist: int | None = None) -> Any:
    """An empty index from a file of a codec, a model or an index; with ``nlist``, of untrained lists."""
    kind = file_header(url).kind
    if nlist is not None and kind == "index":
        raise InvalidParameterError(f"nlist = {nlist} is for codecs and models, {url} holds an index")
    with tempfile.TemporaryDirectory(prefix="hyperfaiss-") as cache:
        path = files.as_local(url, cache)
        if kind == "codec":
            codec = HyperbolicProductQuantizer.load(path)
            return HyperbolicPQIndex.from_codec(codec) if nlist is None else HyperbolicIVFPQIndex.from_codec(None, codec, nlist)
        if kind == "model":
            return HyperbolicPQIndex.from_model(path) if nlist is None else HyperbolicIVFPQIndex.from_model(path, nlist)
        index = read_index(path, mmap=True)
        index.reset()
        return index


def _check(source: Source, index: Any, content: Content) -> None:
    expected = {"embeddings": index.d, "tangents": index.codec.d, "codes": index.sa_code_size}[content]
    if source.d != expected:
        raise InvalidVectorsError(f"{source.files[0].url} holds {content} of {source.d} dimensions, the index takes {expected}")


def _shard_rows(given: int | None, vector_bytes: int, budget: Budget, folder: str, overwrite: bool) -> int:
    """Vectors of a shard: as given, as in the job that is to go on, or what memory allows."""
    need = int(vector_bytes * _COPIES)
    if given is None and not overwrite:
        former = read_manifest(folder)
        with contextlib.suppress(KeyError, TypeError):
            given = None if former is None else int(former["fingerprint"]["options"]["shard_rows"])
    if given is None:
        return budget.rows(need, 0.6, _FEWEST_ROWS, _MOST_ROWS)
    rows = as_integer(given, "shard_rows", 1)
    budget.require(rows * need, 0.7, f"a shard of {rows:,} vectors (shard_rows)")
    return rows
