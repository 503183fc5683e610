"""How much memory a job may take: ``--memory`` as a number of bytes, and what is left of it for data."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

from ..errors import InvalidParameterError

__all__ = ["Budget", "as_bytes", "format_bytes", "peak_memory"]

_UNITS = {"": 1} | {letter: 1000 ** (i + 1) for i, letter in enumerate("kmgt")}
_UNITS |= {f"{letter}i": 1024 ** (i + 1) for i, letter in enumerate("kmgt")}
# What this process will still load before it is at work: compiled kernels, codecs of Parquet, BLAS buffers of its threads.
_RESERVE = 192 << 20
# The least that data can be streamed through.
_LEAST = 64 << 20


def as_bytes(size: str | int) -> int:
    """A number of bytes from ``2GiB``, ``500MB``, ``1.5g`` (k, M, G, T are powers of 1000; Ki, Mi … of 1024) or an int."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?i?)b?\s*", size.lower()) if isinstance(size, str) else None
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise InvalidParameterError(f"memory must be a size like 2GiB or 500MB, got {size!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(size: int) -> str:
    """As people read it: 1.5 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:,.0f} MiB"


def peak_memory() -> int:
    """The most bytes of memory that this process has had (resident, mapped files included)."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage's peak begins with that of the process that started this one
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Budget:
    """What a job may allocate: ``memory`` less what the process has taken already and will take before it is at work.

    Memory-mapped index files are not counted: their pages are the system's cache, which it takes back when it wants to.
    InvalidParameterError if too little is left to work with.
    """

    def __init__(self, memory: str | int) -> None:
        self.total = as_bytes(memory)
        self.free = self.total - _resident() - _RESERVE
        if self.free < _LEAST:
            least = self.total - self.free + _LEAST
            raise InvalidParameterError(f"memory {format_bytes(self.total)} is too little: give {format_bytes(least)} or more")

    def rows(self, row_bytes: int, share: float, low: int, high: int) -> int:
        """How many rows of ``row_bytes`` fit into a ``share`` of what is free: a power of two from ``low`` to ``high``."""
        fitting = max(1, int(self.free * share) // max(1, row_bytes))
        self.require(low * row_bytes, share, f"{low} rows of {row_bytes:,} bytes at a time")
        return min(high, max(low, 1 << (fitting.bit_length() - 1)))

    def require(self, size: int, share: float, what: str) -> None:
        """InvalidParameterError unless ``size`` bytes fit into a ``share`` of what is free."""
        if size > self.free * share:
            more = int(self.total + size / share - self.free)
            raise InvalidParameterError(
                f"{what} takes {format_bytes(size)}, too much for memory {format_bytes(self.total)}: give {format_bytes(more)} "
                "or more"
            )


def _resident() -> int:
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return peak_memory()
