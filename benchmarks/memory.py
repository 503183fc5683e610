"""How fast this machine reads memory: the limit of whatever looks at each byte once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np

from .common import seconds_of

__all__ = ["ReadTest"]

_BYTES = 1 << 30


def _xor(words: Any) -> Any:
    total = np.uint64(0)
    for word in words:
        total ^= word
    return total


class ReadTest:
    """Threads that read 1 GiB, each its part; the compiler makes wide loads and exclusive ors of it."""

    def __init__(self, threads: int) -> None:
        self._read = numba.njit(nogil=True)(_xor)
        self._parts = np.array_split(np.ones(_BYTES // 8, np.uint64), threads)
        self._pool = ThreadPoolExecutor(threads)
        self.bytes_per_second()

    def bytes_per_second(self) -> float:
        """Read once."""
        return _BYTES / seconds_of(lambda: list(self._pool.map(self._read, self._parts)))
