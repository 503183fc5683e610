"""The one file format: safetensors, with a JSON header under the key ``hyperfaiss``.

Codecs, indexes and models are the same kind of file: named tensors, and a header with the kind of object, the format's
version, the library's version, the object's own fields and a SHA-256 of every tensor and of itself. Nothing in it can run code,
and any safetensors reader opens it.

The layout is read and written here, and not by the safetensors package, because that can neither map a tensor, nor write one
without a second copy in memory, nor use file objects: 8 bytes with the length of a JSON object, the object, which gives dtype,
shape and range of bytes of every tensor, and the tensors one after the other.

A file is written beside its target under a temporary name, flushed to disk and renamed, so that a save that is killed leaves
the old file whole. Reading checks the layout and the header, then each tensor's dtype, shape and checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import mmap
import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ._version import __version__
from .errors import CorruptFileError, FileFormatError, InvalidParameterError, UnsupportedVersionError

__all__ = ["Header", "Reader", "Source", "Stored", "Target", "TensorPieces", "atomic_path", "read_header", "write_tensors"]

# (major, minor): a file with a newer minor version opens, one with another major version does not.
FORMAT = (1, 1)
_KEY = "hyperfaiss"
_DTYPES = {"uint8": "U8", "int64": "I64", "float32": "F32", "float64": "F64", "int32": "I32"}
# Tensors start at a multiple of this in a file, so that mapped ones are aligned.
_ALIGNMENT = 64
_MAX_HEADER = 100 << 20
# Bytes hashed, written and read at a time: how long Ctrl-C may wait.
_PIECE = 64 << 20

Source = str | os.PathLike[str] | BinaryIO
Target = str | os.PathLike[str] | BinaryIO


class TensorPieces(Protocol):
    """A tensor that is written without ever being whole in memory; pieces are contiguous and come in order, each time anew."""

    dtype: Any
    shape: tuple[int, ...]

    def pieces(self) -> Iterator[npt.NDArray[Any]]:
        """The tensor's rows, some at a time."""


def write_tensors(
    target: Target, kind: str, fields: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any] | TensorPieces]
) -> None:
    """Write ``tensors`` and the JSON-able ``fields`` of an object of this ``kind``.

    To a path all or nothing; to a binary file object from its position on.
    """
    # Wide dtypes first: then all of them are aligned, wherever the file is read.
    names = sorted(tensors, key=lambda name: (-np.dtype(tensors[name].dtype).itemsize, name))
    header = {
        "kind": kind,
        "format": list(FORMAT),
        "library": __version__,
        # As reading will find them: JSON turns the keys of a dict into strings, and the checksum sorts by key.
        "fields": json.loads(json.dumps(dict(fields))),
        "sha256": {name: _digest(tensors[name]) for name in names},
    }
    header["digest"] = _header_digest(header)
    layout: dict[str, Any] = {"__metadata__": {_KEY: json.dumps(header, sort_keys=True)}}
    end = 0
    for name in names:
        dtype, shape = np.dtype(tensors[name].dtype), tensors[name].shape
        start, end = end, end + math.prod(shape) * dtype.itemsize
        layout[name] = {"dtype": _DTYPES[dtype.name], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(layout).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)

    def write(file: BinaryIO) -> None:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for piece in _pieces(tensors[name]):
                file.write(piece)

    file: Any = target
    if isinstance(target, (str, os.PathLike)):
        with atomic_path(target) as temporary, temporary.open("wb") as file:
            write(file)
    elif callable(getattr(file, "write", None)) and not isinstance(file, io.TextIOBase):
        write(file)
    else:
        raise InvalidParameterError(f"expected a path or a binary file object to write to, got {type(target).__name__}")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; on success it is flushed to disk and takes ``path``'s place."""
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no folder {str(target.parent)!r} to write {target.name!r} in")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class Stored(NamedTuple):
    """Where a tensor is: its dtype in safetensors's words, and its bytes ``start`` to ``start + nbytes`` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    name : of the file.
    kind : of the object that it holds.
    version : of the format, (major, minor).
    library : version of the library that wrote it.
    fields : the object's own.
    sha256 : checksums of the tensors by name, "" for empty ones.
    digest : checksum of all else in the header, and so of the whole content.
    intact : whether that is so.
    tensors : where they are, by name.
    end : first byte behind the last tensor.
    """

    name: str
    kind: str
    version: tuple[int, ...]
    library: str
    fields: dict[str, Any]
    sha256: dict[str, str]
    digest: str
    intact: bool
    tensors: dict[str, Stored]
    end: int

    def require(self, kind: str) -> None:
        """Raise UnsupportedVersionError, CorruptFileError or FileFormatError unless the file is a sound one of this kind."""
        if self.version[:1] != FORMAT[:1]:
            raise UnsupportedVersionError(
                f"{self.name} has format {'.'.join(map(str, self.version))}, written by hyperfaiss {self.library}; "
                f"this hyperfaiss {__version__} reads {FORMAT[0]}.x"
            )
        if not self.intact:
            raise CorruptFileError(f"{self.name}: the header does not match its checksum")
        if self.kind != kind:
            raise FileFormatError(f"{self.name} holds {_a(self.kind)}, expected {_a(kind)}")


def read_header(file: BinaryIO, name: str, *, alone: bool) -> Header:
    """The header of the hyperfaiss file that begins at the position of ``file``. Reads no more than that.

    The layout of the tensors is checked against the length of ``file``, of which it is all if ``alone``. ``name`` is for
    messages. Raises CorruptFileError (not a whole safetensors file), FileFormatError (one, but not of hyperfaiss); whether
    the header is sound is left to ``Header.require``.
    """
    metadata, tensors, end = _read_layout(file, name, alone)
    if _KEY not in metadata:
        raise FileFormatError(f"{name} is a safetensors file, but not one of hyperfaiss")
    try:
        header = json.loads(metadata[_KEY])
        digest = header.pop("digest")
        return Header(
            name, str(header["kind"]), tuple(map(int, header["format"])), str(header.get("library")), dict(header["fields"]),
            dict(header["sha256"]), digest, digest == _header_digest(header), tensors, end,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"{name}: unreadable header: {error!r}") from error


class Reader:
    """An open file of a known ``kind``: ``fields`` from its header, and checked tensors by name. A context manager.

    ``source`` is a path, or a binary file object that is read from its position on and left behind the last tensor. With
    ``map``, ``tensor(…, large=True)`` maps the file instead of reading it. ``verify``: whether the checksums of large tensors
    are compared, too; those of all others always are.

    Raises FileNotFoundError, FileFormatError (not ours, or of another kind), UnsupportedVersionError, CorruptFileError.
    """

    def __init__(self, source: Source, kind: str, *, map: bool = False, verify: bool = True) -> None:  # noqa: A002
        self._verify = verify
        self._owned = isinstance(source, (str, os.PathLike))
        self._file = _opened(source)
        self.name = str(source if self._owned else getattr(source, "name", type(source).__name__))
        try:
            self._header = read_header(self._file, self.name, alone=self._owned)
            self._header.require(kind)
            self.fields = self._header.fields
            self._map = self._mapped() if map else None
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._owned:
            self._file.seek(self._header.end)
        self._close()

    def corrupt(self, reason: str) -> CorruptFileError:
        """An error that says why this file can't be what it claims to be."""
        return CorruptFileError(f"{self.name}: {reason}")

    def field(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A value of the header, of the given JSON type."""
        value = self.fields.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise self.corrupt(f"header field {name!r} should be {kind}, is {value!r}")
        return value

    def count(self, name: str) -> int:
        """A whole number >= 0 of the header."""
        value: int = self.field(name, int)
        if value < 0:
            raise self.corrupt(f"header field {name!r} should be at least 0, is {value}")
        return value

    def __contains__(self, name: str) -> bool:
        return name in self._header.tensors

    def tensor(
        self, name: str, dtype: npt.DTypeLike, shape: tuple[int | None, ...], *, large: bool = False
    ) -> npt.NDArray[Any]:
        """The tensor ``name``, which must have this dtype, this shape (None: any length) and its recorded checksum.

        A mapped one can't be written to.
        """
        if name not in self._header.tensors:
            raise self.corrupt(f"tensor {name!r} is missing")
        stored, found, start, nbytes = self._header.tensors[name]
        wanted = np.dtype(dtype)
        if len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found, strict=True)):
            raise self.corrupt(f"tensor {name!r} should have shape {shape}, has {found}")
        if stored != _DTYPES[wanted.name] or math.prod(found) * wanted.itemsize != nbytes:
            raise self.corrupt(f"tensor {name!r} should be {wanted}, is {stored} in {nbytes} bytes")
        # Unaligned numbers are for the kernels no arrays; this library writes none.
        if large and self._map is not None and nbytes and start % wanted.alignment == 0:
            array = np.frombuffer(self._map, wanted, math.prod(found), start).reshape(found)
        else:
            array = np.empty(found, wanted)
            self._read_into(array, start)
        if (self._verify or not large) and self._header.sha256.get(name) != _digest(array):
            raise self.corrupt(f"tensor {name!r} does not match its checksum")
        return array

    # ---------------------------------------------------------------------------------------------- inside

    def _mapped(self) -> mmap.mmap:
        try:
            descriptor = self._file.fileno()
        except (OSError, AttributeError) as error:
            raise InvalidParameterError(f"only files can be mapped, not {type(self._file).__name__}") from error
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)

    def _read_into(self, array: npt.NDArray[Any], start: int) -> None:
        self._file.seek(start)
        for piece in _pieces(array):
            if self._file.readinto(piece) != len(piece):  # type: ignore[attr-defined]
                raise self.corrupt("the file became shorter while it was read")

    def _close(self) -> None:
        # A map lives on for as long as an array refers to it.
        if self._owned:
            self._file.close()


def _opened(source: Source) -> BinaryIO:
    if isinstance(source, (str, os.PathLike)):
        if not Path(source).is_file():
            raise FileNotFoundError(f"no file {os.fspath(source)!r}")
        return Path(source).open("rb")
    if not callable(getattr(source, "read", None)):
        raise InvalidParameterError(f"expected a path or a binary file object to read from, got {type(source).__name__}")
    seekable = getattr(source, "seekable", None)
    if callable(getattr(source, "readinto", None)) and seekable is not None and seekable():
        return source
    content = source.read()
    if not isinstance(content, bytes):
        raise InvalidParameterError(
            f"expected a binary file object, got a {type(source).__name__} that reads {type(content).__name__}"
        )
    return io.BytesIO(content)


def _read_layout(file: BinaryIO, name: str, alone: bool) -> tuple[dict[str, Any], dict[str, Stored], int]:
    """The metadata, where each tensor is, and where the last one ends, checked against the file's length."""
    first = file.tell()
    size = file.seek(0, io.SEEK_END) - first
    file.seek(first)
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        layout = json.loads(file.read(length))
        metadata = layout.pop("__metadata__", None) or {}
        end = first + 8 + length
        tensors = {tensor: _checked_entry(entry, end) for tensor, entry in layout.items()}
        for stored in sorted(tensors.values(), key=lambda stored: stored[2:]):
            if stored.start != end:
                raise ValueError(f"tensors are not one after the other: one starts at {stored.start} instead of {end}")
            end += stored.nbytes
        whole = end - first
        if whole > size or (alone and whole < size):
            raise ValueError(f"{whole} bytes expected, {size} found")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptFileError(f"{name}: not a whole safetensors file: {error}") from error
    return metadata, tensors, end


def _checked_entry(entry: Any, begin: int) -> Stored:
    shape, (start, end) = entry["shape"], entry["data_offsets"]
    numbers = [*shape, start, end]
    if any(type(number) is not int or number < 0 for number in numbers) or end < start:
        raise ValueError(f"{entry} is no tensor")
    return Stored(entry["dtype"], tuple(shape), begin + start, end - start)


def _a(kind: str) -> str:
    return f"an {kind}" if kind[:1] in "aeiou" else f"a {kind}"


def _header_digest(header: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _pieces(tensor: npt.NDArray[Any] | TensorPieces) -> Iterator[memoryview]:
    arrays = [np.ascontiguousarray(tensor)] if isinstance(tensor, np.ndarray) else tensor.pieces()
    for array in arrays:
        if array.size:
            view = array.reshape(-1).view(np.uint8).data
            for start in range(0, len(view), _PIECE):
                yield view[start : start + _PIECE]


def _digest(tensor: npt.NDArray[Any] | TensorPieces) -> str:
    if not math.prod(tensor.shape):
        return ""
    digest = hashlib.sha256()
    for piece in _pieces(tensor):
        digest.update(piece)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself durable; Windows can't open folders and does without.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
