"""Where the work of a job is done: here, or on a Ray cluster. Both give the same results in the same order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import InvalidParameterError
from .progress import prefetch
from .shards import Shard, ShardReader
from .sources import Batch

__all__ = ["Advance", "Engine", "EngineName", "Found", "LocalEngine", "open_engine"]

EngineName = Literal["local", "ray"]
Advance = Callable[[float], None]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Found:
    """The k nearest of a batch of queries over all shards: D float32 and I int64 (n, k)."""

    batch: Batch
    D: npt.NDArray[np.float32]
    I: npt.NDArray[np.int64]  # noqa: E741


class Engine(Protocol):
    """What a job asks of an engine. A context manager."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def run(self, function: Callable[[T, Advance], R], items: Sequence[T], advance: Advance) -> None:
        """Call ``function`` with each item, in any order, each to its end at least once. It may be pickled and moved."""

    def search(
        self, shards: Sequence[Shard], batches: Iterator[Batch], k: int, nprobe: int | None, advance: Advance
    ) -> Generator[Found, None, None]:
        """The k nearest of each batch of queries, in the order of the batches; to be closed if it is not read to its end."""


class LocalEngine:
    """This process and its threads."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def run(self, function: Callable[[T, Advance], R], items: Sequence[T], advance: Advance) -> None:
        """Call ``function`` with each item, one after the other: each uses all threads."""
        for item in items:
            function(item, advance)

    def search(
        self, shards: Sequence[Shard], batches: Iterator[Batch], k: int, nprobe: int | None, advance: Advance
    ) -> Generator[Found, None, None]:
        """The k nearest of each batch, shard after shard, while the next batch is read."""
        for batch in prefetch(batches):
            progress = partial(advance, (batch.stop - batch.first) / len(shards))
            yield Found(batch, *self._reader.search(shards, batch.vectors, k, nprobe, progress))


def open_engine(name: EngineName, address: str | None, reader: ShardReader, **options: Any) -> Engine:
    """The engine of this name. InvalidParameterError if there is none, or its extra is not installed."""
    if name == "local":
        if address is not None:
            raise InvalidParameterError(f"address {address!r} is for engine 'ray', got engine 'local'")
        return LocalEngine(reader)
    if name != "ray":
        raise InvalidParameterError(f"engine must be 'local' or 'ray', got {name!r}")
    from .ray_engine import RayEngine

    return RayEngine(address, **options)
