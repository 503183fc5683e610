"""Files by path or URL: which there are, reading parts of one, and writing one whole or not at all.

A path is a local path or any URL that fsspec knows (``s3://``, ``gs://``, ``memory://`` …); credentials and endpoints are
fsspec's own business (environment, ``fsspec.config``). A file written here appears under its name when it is complete: local
files and remote file systems by a temporary name and a rename, object stores because an upload is all or nothing there.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import io
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ..io import atomic_path

__all__ = [
    "File",
    "absolute",
    "as_local",
    "file_info",
    "file_system",
    "is_local",
    "is_temporary",
    "join",
    "list_files",
    "list_folder",
    "make_folder",
    "open_bytes",
    "open_file",
    "open_head",
    "read_bytes",
    "remove",
    "writing",
]

# Stores that show an object when its upload is complete, and whose "rename" would be one more copy of it.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "memory"})
# Bytes of a remote file that are read ahead where only its beginning is wanted; file systems' own default is up to 50 MB.
_HEAD = 64 << 10
# What says that the content of a file has changed, the best first.
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "md5Hash", "created")


@dataclass(frozen=True)
class File:
    """A file that exists: its absolute path or URL, its size in bytes, and a stamp that changes when it is written again."""

    url: str
    size: int
    stamp: str

    @property
    def suffix(self) -> str:
        """The last extension, lower case, with its dot."""
        return posixpath.splitext(self.url)[1].lower()

    def describe(self) -> dict[str, Any]:
        """JSON-able, for a job's fingerprint."""
        return {"path": self.url, "size": self.size, "stamp": self.stamp}


def list_files(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], suffixes: Sequence[str]) -> list[File]:
    """The files that ``paths`` name: files, folders (searched below, for ``suffixes``) and globs; each path's sorted by name.

    Names that start with ``_`` or ``.`` are not data, as everywhere in the Parquet world, unless they are named in full.
    Raises FileNotFoundError for a path that names no file, and for a folder without any of these suffixes.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found: dict[str, File] = {}
    for path in given:
        fs, root = file_system(os.fspath(path))
        fs.invalidate_cache()  # what this process listed last night is not what is there now
        if fs.isdir(root):
            infos = _below(fs, root, suffixes)
        elif fs.exists(root):
            infos = [fs.info(root)]
        else:
            infos = [info for info in fs.glob(root, detail=True).values() if info["type"] == "file"]
            infos = [info for info in infos if not _hidden(posixpath.basename(info["name"]))]
        if not infos:
            raise FileNotFoundError(f"no file {os.fspath(path)!r}" + (f" ({', '.join(suffixes)})" if fs.isdir(root) else ""))
        for info in sorted(infos, key=lambda info: str(info["name"])):
            file = _file(fs, info)
            found[file.url] = file
    return list(found.values())


def file_info(url: str) -> File | None:
    """What is known of one file; None if there is none of that name."""
    fs, path = file_system(url)
    try:
        info = fs.info(path)
    except FileNotFoundError:
        return None
    return _file(fs, info) if info["type"] == "file" else None


def list_folder(url: str) -> list[File]:
    """The files in a folder, not below it, sorted by name; none if there is no such folder."""
    fs, path = file_system(url)
    if not fs.isdir(path):
        return []
    fs.invalidate_cache(path)
    infos = [info for info in fs.ls(path, detail=True) if info["type"] == "file"]
    return [_file(fs, info) for info in sorted(infos, key=lambda info: str(info["name"]))]


def make_folder(url: str) -> None:
    """Make a folder and those above it; nothing to do on object stores."""
    fs, path = file_system(url)
    fs.makedirs(path, exist_ok=True)


def join(folder: str, name: str) -> str:
    """The URL of a file in a folder."""
    return posixpath.join(folder, name)


def absolute(url: str | os.PathLike[str]) -> str:
    """A path without ``~`` and ``..``, a URL as fsspec spells it: what two names of one file have in common."""
    fs, path = file_system(os.fspath(url))
    return _url(fs, path)


def remove(url: str) -> None:
    """Remove a file; it may be gone already."""
    fs, path = file_system(url)
    with contextlib.suppress(FileNotFoundError):
        fs.rm_file(path)


def is_local(url: str) -> bool:
    """Whether the file is in this machine's own file systems."""
    return isinstance(file_system(url)[0], LocalFileSystem)


def read_bytes(url: str, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes ``start`` to ``stop`` of a file (None: to its end)."""
    fs, path = file_system(url)
    if isinstance(fs, LocalFileSystem):
        with Path(path).open("rb") as file:
            file.seek(start)
            return file.read() if stop is None else file.read(stop - start)
    data: bytes = fs.cat_file(path, start=start, end=stop)
    return data


def open_bytes(url: str, limit: int | None = None) -> io.BytesIO:
    """A file, or its first ``limit`` bytes, in memory."""
    return io.BytesIO(read_bytes(url, 0, limit))


def open_file(url: str) -> Any:
    """What pyarrow may be given to read a file: the path of a local one, else an open binary file."""
    fs, path = file_system(url)
    return path if isinstance(fs, LocalFileSystem) else fs.open(path, "rb")


def open_head(url: str) -> Any:
    """A file, open to read some of its first bytes: of a remote one, these in one request, and few more."""
    fs, path = file_system(url)
    return Path(path).open("rb") if isinstance(fs, LocalFileSystem) else fs.open(path, "rb", block_size=_HEAD)


def as_local(url: str, cache: str | os.PathLike[str]) -> Path:
    """A local path of a file; a remote one is copied into the folder ``cache``, unless that holds its present state."""
    file = file_info(url)
    if file is None:
        raise FileNotFoundError(f"no file {url!r}")
    fs, path = file_system(url)
    if isinstance(fs, LocalFileSystem):
        return Path(path)
    name = hashlib.sha256(repr(file).encode()).hexdigest()[:16] + "-" + posixpath.basename(path)
    target = Path(cache) / name
    if not target.exists():
        Path(cache).mkdir(parents=True, exist_ok=True)
        with atomic_path(target) as temporary:
            fs.get_file(path, str(temporary))
    return target


@contextlib.contextmanager
def writing(url: str) -> Iterator[Path]:
    """A local path to write to; when the block ends without an error, the file is complete under ``url``, flushed to disk."""
    fs, path = file_system(url)
    if isinstance(fs, LocalFileSystem):
        with atomic_path(path) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="hyperfaiss-") as folder:
        spool = Path(folder) / "part"
        yield spool
        if _protocol(fs) in _OBJECT_STORES:
            fs.put_file(str(spool), path)
        else:
            hidden = posixpath.join(posixpath.dirname(path), f".{posixpath.basename(path)}.{uuid.uuid4().hex[:8]}.tmp")
            fs.put_file(str(spool), hidden)
            fs.mv(hidden, path)


def is_temporary(name: str) -> bool:
    """Whether a file's name is one that ``writing`` gives until a file is complete."""
    return fnmatch.fnmatch(name, ".*.????????.tmp")


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path in it. OSError if there is none for it."""
    try:
        fs, path = fsspec.core.url_to_fs(url if "://" in url else str(Path(url).expanduser()))
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is missing
        raise OSError(f"{url!r} can't be opened: {error}") from error
    return fs, path


def _below(fs: Any, root: str, suffixes: Sequence[str]) -> list[dict[str, Any]]:
    below = fs.find(root, detail=True).values()
    shown = [info for info in below if not any(map(_hidden, posixpath.relpath(info["name"], root).split("/")))]
    return [info for info in shown if str(info["name"]).lower().endswith(tuple(suffixes))]


def _hidden(name: str) -> bool:
    return name.startswith(("_", ".")) and name not in (".", "..")


def _file(fs: Any, info: dict[str, Any]) -> File:
    if isinstance(fs, LocalFileSystem):
        stamp = str(Path(info["name"]).stat().st_mtime_ns)
    else:
        stamp = next((str(info[name]) for name in _STAMPS if info.get(name) is not None), "")
    return File(_url(fs, info["name"]), int(info["size"] or 0), stamp)


def _url(fs: Any, path: str) -> str:
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def _protocol(fs: Any) -> str:
    return fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
