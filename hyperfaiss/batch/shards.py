"""Indexes as sets of files: what a build wrote, or any index files, opened by memory mapping.

A flat index stores no ids as long as they are 0, 1, 2 … Shards of a build whose ids are row numbers keep that: each counts
from 0 and the build's manifest says what to add. Everything here adds it; who reads such a shard with ``read_index`` alone
sees its own count.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..errors import CorruptFileError, FileFormatError, InvalidParameterError
from ..index import read_index
from ..io import Header, read_header
from ..selectors import SearchParameters
from . import files
from .job import read_manifest
from .results import merge_lists
from .sources import Paths

__all__ = ["SUFFIX", "KeyTable", "Shard", "ShardReader", "file_header", "find_shards", "key_writer", "keys_url"]

SUFFIX = ".index"
_KEYS_SUFFIX = ".keys.arrow"

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """One index file of a set.

    url : where it is.
    add_id : what to add to its ids.
    digest : checksum of its header, which holds the checksums of all its content.
    ntotal : vectors in it.
    d : dimension of the vectors that it takes.
    ivf : whether it has lists.
    counts : whether its ids are not stored, but 0, 1, 2 …
    bytes : size of the file.
    keys : URL of its table of string keys, or None.
    """

    url: str
    add_id: int
    digest: str
    ntotal: int
    d: int
    ivf: bool
    counts: bool
    bytes: int
    keys: str | None

    def describe(self) -> dict[str, Any]:
        """JSON-able, for a job's fingerprint."""
        return {"path": self.url, "digest": self.digest, "add_id": self.add_id}


def keys_url(url: str) -> str:
    """Where the table of string ids of an index file is, if it has one."""
    return url.removesuffix(SUFFIX) + _KEYS_SUFFIX


def file_header(url: str) -> Header:
    """The header of a hyperfaiss file, of whatever kind. Reads no more than that.

    Raises FileNotFoundError, CorruptFileError (not a whole safetensors file), FileFormatError (one, but not of hyperfaiss).
    """
    if files.file_info(url) is None:
        raise FileNotFoundError(f"no file {url!r}")
    with files.open_head(url) as file:
        return read_header(file, url, alone=True)


def find_shards(paths: Paths) -> list[Shard]:
    """The shards that ``paths`` name: folders of builds, folders of index files, files, globs.

    Raises FileNotFoundError; FileFormatError for files that are not indexes and builds that have not finished;
    InvalidParameterError for shards that do not belong together: of different dimensions, or with the same ids.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    urls: list[str] = []
    for path in given:
        folder = files.absolute(path)
        manifest = read_manifest(folder)
        if manifest is not None:
            urls += [files.join(folder, shard["name"]) for shard in _build_output(folder, manifest)["shards"]]
        else:
            urls += [file.url for file in files.list_files(path, (SUFFIX,)) if not _is_template(file.url)]
    builds: dict[str, dict[str, Any] | None] = {}
    shards = [_shard(url, builds) for url in dict.fromkeys(urls)]
    if not shards:
        raise FileNotFoundError(f"no index files in {paths!r}")
    for shard in shards[1:]:
        if shard.d != shards[0].d:
            raise InvalidParameterError(
                f"shards differ: {shards[0].url} takes vectors of {shards[0].d} dimensions, {shard.url} of {shard.d}"
            )
        if (shard.keys is None) != (shards[0].keys is None):
            raise InvalidParameterError(f"shards differ: of {shards[0].url} and {shard.url}, one has string ids")
    counting = sorted((shard for shard in shards if shard.counts), key=lambda shard: shard.add_id)
    for one, other in zip(counting, counting[1:], strict=False):
        if one.add_id + one.ntotal > other.add_id:
            raise InvalidParameterError(
                f"{one.url} and {other.url} both hold id {other.add_id}: build them in one job, or with a column of ids"
            )
    return shards


def _build_output(folder: str, manifest: dict[str, Any]) -> dict[str, Any]:
    if manifest["kind"] != "build":
        raise FileFormatError(f"{folder} holds the output of a {manifest['kind']} job, expected an index")
    if not manifest["finished"]:
        raise FileFormatError(f"the build in {folder} has not finished: start it again to go on")
    output: dict[str, Any] = manifest["output"]
    return output


def _shard(url: str, builds: dict[str, dict[str, Any] | None]) -> Shard:
    folder, _, name = url.rpartition("/")
    if folder not in builds:
        builds[folder] = read_manifest(folder)
    manifest = builds[folder]
    described: dict[str, Any] = {}
    if manifest is not None and manifest["kind"] == "build":
        described = next((shard for shard in manifest["output"]["shards"] if shard["name"] == name), {})
    header = file_header(url)
    header.require("index")
    fields = header.fields
    d = fields["projector"]["widths"][0] if "projector" in fields else fields["codec"]["d"]
    keys = keys_url(url)
    return Shard(
        url=url,
        add_id=described.get("add_id", 0),
        digest=header.digest,
        ntotal=fields["ntotal"],
        d=d,
        ivf=fields["type"] == "ivf",
        counts=not fields["stored_ids"],
        bytes=header.end,
        keys=keys if files.file_info(keys) is not None else None,
    )


def _is_template(url: str) -> bool:
    return posixpath.basename(url) == "template" + SUFFIX


class ShardReader:
    """Opens shards, by memory mapping, when they are first used; remote ones are copied to a local folder before.

    A context manager. ``cache`` is where the copies go and stay; by default a temporary folder, removed at the end.
    """

    def __init__(self, cache: str | None = None) -> None:
        self._own = tempfile.TemporaryDirectory(prefix="hyperfaiss-") if cache is None else None
        self._cache = Path(cache if self._own is None else self._own.name)  # type: ignore[arg-type]
        self._open: dict[Shard, Any] = {}
        self._keys: dict[Shard, KeyTable] = {}

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.clear()
        self._keys.clear()
        if self._own is not None:
            with contextlib.suppress(OSError):
                self._own.cleanup()

    def local(self, shard: Shard) -> Path:
        """A local path of the shard's file."""
        return files.as_local(shard.url, self._cache)

    def index(self, shard: Shard) -> Any:
        """The shard's index."""
        if shard not in self._open:
            self._open[shard] = read_index(self.local(shard), mmap=True)
        return self._open[shard]

    def key_table(self, shard: Shard) -> KeyTable:
        """The shard's string ids; it must have them."""
        if shard not in self._keys:
            self._keys[shard] = KeyTable(files.as_local(str(shard.keys), self._cache))
        return self._keys[shard]

    def search(
        self, shards: Sequence[Shard], x: FloatArray, k: int, nprobe: int | None, advance: Callable[[], None] | None = None
    ) -> tuple[FloatArray, IntArray]:
        """The k nearest within these shards together: D and I (nq, k). ``advance`` is called after each shard."""
        params = SearchParameters(nprobe=nprobe)
        D, I = np.empty((len(x), 0), np.float32), np.empty((len(x), 0), np.int64)  # noqa: E741
        for shard in shards:
            shard_D, shard_I = self.index(shard).search(x, k, params=params)
            if shard.add_id:
                shard_I[shard_I >= 0] += shard.add_id
            D, I = (shard_D, shard_I) if not D.size else merge_lists([D, shard_D], [I, shard_I], k)[:2]  # noqa: E741
            if advance is not None:
                advance()
        return D, I

    def keys(self, shards: Sequence[Shard], I: IntArray) -> Any:  # noqa: E741
        """String keys of all ids >= 0 in I, in its order: a pyarrow string array. The shards must have them."""
        wanted, where = np.unique(I[I >= 0], return_inverse=True)
        found: list[Any] = []
        positions: list[npt.NDArray[np.int64]] = []
        for shard in shards:
            for at, keys in self.key_table(shard).lookup(wanted):
                positions.append(at)
                found.append(keys)
        number = np.concatenate(positions) if positions else np.empty(0, np.int64)
        if len(number) != len(wanted) or (np.sort(number) != np.arange(len(wanted))).any():
            raise CorruptFileError(f"the tables of string ids beside {shards[0].url} lack some of the ids in its shards")
        back = np.empty(len(wanted), np.int64)
        back[number] = np.arange(len(wanted))
        every = pa.concat_arrays(found) if found else pa.array([], pa.large_string())
        return every.take(pa.array(back[where.ravel()]))


class KeyTable:
    """A mapped Arrow file with the columns ``id``, increasing, and ``key``."""

    def __init__(self, path: Path) -> None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            self.firsts = np.array([batch.column(0)[0].as_py() for batch in self.batches], np.int64)
        except (pa.ArrowInvalid, OSError) as error:
            raise CorruptFileError(f"{path} can't be read as a table of string ids: {error}") from error

    def lookup(self, wanted: IntArray) -> Iterator[tuple[IntArray, Any]]:
        """Of sorted unique ids, those in this table: their positions in ``wanted``, and their keys."""
        bounds = np.append(np.searchsorted(wanted, self.firsts), len(wanted))
        for b, batch in enumerate(self.batches):
            some = wanted[bounds[b] : bounds[b + 1]]
            if not len(some):
                continue
            ids = batch.column(0).to_numpy()
            rows = np.minimum(np.searchsorted(ids, some), len(ids) - 1)
            here = ids[rows] == some
            yield bounds[b] + np.flatnonzero(here), batch.column(1).take(pa.array(rows[here]))


class _KeyWriter:
    """Writes a table for ``KeyTable``, batch by batch; ids increase."""

    _SCHEMA = pa.schema([("id", pa.int64()), ("key", pa.large_string())])

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, ids: IntArray, keys: Any) -> None:
        """Add some ids and their keys."""
        self._writer.write_batch(pa.record_batch([pa.array(ids), keys], schema=self._SCHEMA))


@contextlib.contextmanager
def key_writer(url: str) -> Iterator[_KeyWriter]:
    """A table of string ids, complete when the block ends."""
    with files.writing(url) as path, pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _KeyWriter._SCHEMA) as writer:
        yield _KeyWriter(writer)
