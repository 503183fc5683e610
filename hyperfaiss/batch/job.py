"""What makes a job one that can be killed: a folder of parts, each written whole, and a manifest that says what they are.

``_job.json`` is written before the first part. It holds the job's fingerprint: index, inputs with sizes and times of
writing, options, versions: whatever the parts depend on. A job that is started again with the same fingerprint makes the
parts that are missing; with another, it refuses and names the fields that differ. Parts are a function of the
fingerprint alone, so it does not matter how often a job was killed, where, or on how many machines it ran. When all parts are
there, the manifest is written once more, with ``finished`` filled in.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

import pyarrow as pa

from .._version import __version__
from ..errors import CorruptFileError, FileFormatError, InvalidParameterError
from . import files
from .memory import peak_memory

__all__ = ["MANIFEST", "Job", "Summary", "read_manifest", "started", "versions"]

MANIFEST = "_job.json"
_FORMAT = 1
# Files that jobs write, by prefix and suffix: what --overwrite may remove.
_OWN = (("part-", ""), ("shard-", ".index"), ("shard-", ".keys.arrow"), ("template", ".index"))


@dataclass
class Summary:
    """What a job did.

    kind : "build", "search", "merge" or "encode".
    output : the folder or file.
    rows : vectors or queries of the whole job; ``new_rows``, of these, were done now, in ``parts`` parts of ``all_parts``.
    seconds, rows_per_second : of this run.
    peak_memory : bytes of this process at the most, with what it had before and the mapped pages of index files.
    details : what else there is to say.
    """

    kind: str
    output: str
    rows: int = 0
    new_rows: int = 0
    parts: int = 0
    all_parts: int = 0
    seconds: float = 0.0
    rows_per_second: float = 0.0
    peak_memory: int = 0
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return asdict(self)

    def __str__(self) -> str:
        resumed = "" if self.parts == self.all_parts else f", {self.all_parts - self.parts} parts were there already"
        return (
            f"{self.kind}: {self.new_rows:,} rows in {self.parts} parts, {self.seconds:.1f} s, "
            f"{self.rows_per_second:,.0f} rows/s, peak memory {self.peak_memory / 2**20:,.0f} MiB{resumed}; {self.output}"
        )


@dataclass(frozen=True)
class _Clock:
    began: float

    def summary(self, kind: str, output: str, rows: int, details: dict[str, Any], new_rows: int | None = None) -> Summary:
        """What was done since the start; one part, unless the caller says more."""
        seconds, new = time.perf_counter() - self.began, rows if new_rows is None else new_rows
        return Summary(kind, output, rows, new, 1, 1, round(seconds, 3), round(new / seconds, 1), peak_memory(), details)


def started() -> _Clock:
    """A clock that starts now."""
    return _Clock(time.perf_counter())


def versions() -> dict[str, str]:
    """Versions that the bytes of a part depend on."""
    return {"hyperfaiss": __version__, "pyarrow": pa.__version__}


def read_manifest(folder: str) -> dict[str, Any] | None:
    """The manifest in a folder, None if there is none. CorruptFileError or FileFormatError if it is not one of ours."""
    url = files.join(folder, MANIFEST)
    try:
        text = files.read_bytes(url)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        manifest: dict[str, Any] = json.loads(text)
        if manifest["format"] != _FORMAT:
            raise FileFormatError(f"{url} has format {manifest['format']}, this hyperfaiss {__version__} knows {_FORMAT}")
        if not isinstance(manifest["fingerprint"], dict) or not isinstance(manifest["output"], dict):
            raise TypeError("no fingerprint")
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise CorruptFileError(f"{url} is not the manifest of a job: {error!r}") from error
    return manifest


class Job:
    """A job in a folder, from the first start to the end. A context manager: it holds the folder while it runs.

    Parameters
    ----------
    folder : where the parts go.
    kind : of job.
    fingerprint : JSON-able; what the parts depend on.
    output : JSON-able; what a reader of the finished job must know, the names of parts among it.
    parts : the files of each part; the part is done when its last one exists.
    overwrite : remove what a former job left, instead of going on or refusing.

    Attributes
    ----------
    todo : numbers of the parts that are missing.

    Raises InvalidParameterError when the folder holds another job, or parts that no manifest explains, and when another
    process works in it.
    """

    def __init__(
        self,
        folder: str,
        kind: str,
        fingerprint: dict[str, Any],
        output: dict[str, Any],
        parts: Sequence[Sequence[str]],
        *,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.kind, self.parts = folder, kind, [list(part) for part in parts]
        # As reading finds it: tuples become lists, NumPy integers are refused here and not when the job ends.
        self._manifest: dict[str, Any] = json.loads(
            json.dumps({"format": _FORMAT, "kind": kind, "fingerprint": fingerprint, "output": output, "finished": None})
        )
        files.make_folder(folder)
        self._clock = started()
        self._lock = _lock(folder)
        try:
            self._start(overwrite)
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._release()

    @property
    def digest(self) -> str:
        """Of the fingerprint: names the job's output, which is a function of it."""
        return hashlib.sha256(json.dumps(self._manifest["fingerprint"], sort_keys=True).encode()).hexdigest()

    def finish(self, rows: int, new_rows: int, details: dict[str, Any], finished: dict[str, Any]) -> Summary:
        """Write into the manifest what is known now that all parts exist, and sum up this run."""
        self._manifest["finished"] = finished | {"digest": self.digest}
        self._write_manifest()
        summary = self._clock.summary(self.kind, self.folder, rows, details, new_rows)
        summary.parts, summary.all_parts = len(self.todo), len(self.parts)
        return summary

    def rows(self, ranges: Sequence[tuple[int, int]]) -> int:
        """Rows of the parts that are missing, if these are the ranges of all parts."""
        return sum(ranges[i][1] - ranges[i][0] for i in self.todo)

    def _start(self, overwrite: bool) -> None:
        found = {posix.rsplit("/", 1)[-1] for posix in (file.url for file in files.list_folder(self.folder))}
        for name in filter(files.is_temporary, list(found)):  # of a run that was killed
            files.remove(files.join(self.folder, name))
        former = read_manifest(self.folder)
        own = sorted(name for name in found if any(name.startswith(a) and name.endswith(b) for a, b in _OWN))
        if overwrite:
            # The manifest goes last: killed in between, the folder holds the former job with some parts missing.
            for name in [*own, MANIFEST]:
                files.remove(files.join(self.folder, name))
            found, former = set(), None
        elif not any(name.startswith(("part-", "shard-")) for name in own):
            # Whatever was begun here, no part of it exists: nothing to mix with, and nothing to lose.
            if former is not None and self._differing(former):
                for name in own:
                    files.remove(files.join(self.folder, name))
                former = None
        elif former is None:
            raise InvalidParameterError(f"{self.folder} holds {own[0]} but no {MANIFEST}: choose another folder, or overwrite")
        if former is None:
            self._write_manifest()
        else:
            self._compare(former)
        self.todo = [i for i, part in enumerate(self.parts) if part[-1] not in found]

    def _differing(self, former: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        """Name, former and present value of the fields of the fingerprint that differ."""
        if former["kind"] != self.kind:
            return [("kind", former["kind"], self.kind)]
        there, now = (_flat(job["fingerprint"]) for job in (former, self._manifest))
        return [(key, there.get(key), now.get(key)) for key in sorted(there | now) if there.get(key) != now.get(key)]

    def _compare(self, former: dict[str, Any]) -> None:
        differing = self._differing(former)
        if differing:
            shown = [f"{key} was {was!r}, is {now!r}" for key, was, now in differing[:5]]
            more = f"; and {len(differing) - 5} more fields" if len(differing) > 5 else ""
            raise InvalidParameterError(
                f"{self.folder} holds another job: {'; '.join(shown)}{more}. Choose another folder, or overwrite"
            )

    def _write_manifest(self) -> None:
        with files.writing(files.join(self.folder, MANIFEST)) as path:
            path.write_text(json.dumps(self._manifest, indent=1, sort_keys=True) + "\n")

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Leaves of nested dicts and lists, by dotted name."""
    if isinstance(value, dict):
        pairs: Iterator[tuple[Any, Any]] = iter(value.items())
    elif isinstance(value, list) and value:
        pairs = ((f"[{i}]", item) for i, item in enumerate(value))
    else:
        return {name: value}
    leaves: dict[str, Any] = {}
    for key, item in pairs:
        dot = "." if name and not str(key).startswith("[") else ""
        leaves |= _flat(item, f"{name}{dot}{key}")
    return leaves


def _lock(folder: str) -> int | None:
    """Hold a local folder until the descriptor is closed or the process ends, however it ends."""
    if not files.is_local(folder):
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise InvalidParameterError(f"another process works in {folder}") from None
    except OSError:  # a file system without locks
        with contextlib.suppress(OSError):
            os.close(descriptor)
        return None
    return descriptor
