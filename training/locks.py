"""One process at a time, by a lock file."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hyperfaiss.errors import InvalidParameterError

__all__ = ["locked"]


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Inside, no other process is. Without ``wait``, InvalidParameterError if one is."""
    with path.open("w") as file:  # the system lets go of the lock when a process dies
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidParameterError(f"another process is at it: {path.parent}") from error
        yield
