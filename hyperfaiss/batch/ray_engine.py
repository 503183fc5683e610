"""The Ray engine: a job's parts as tasks, a search's shards in actors that come and go.

A search divides the shards into groups, one for each worker (or fewer, when there are more workers than shards). A worker maps
the shards of its group and keeps them: blocks of queries travel, indexes don't. The driver reads the queries, holds a few
blocks in flight and no more (that is the back-pressure), gives each worker two of them at a time, so that it never waits,
merges the groups' lists exactly and hands the blocks on in order. So the output is written in one place, and is that of the
local engine.

Actors of its own, rather than Ray Data: a worker that is lost, alone or with its node, must not take the job with it, and its
blocks must not wait for it to come back. What it had is given to others, who map its shards, too; a new worker is asked for,
and used once Ray has found a place for it. The parts of a build or an encode job are tasks that Ray itself retries.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar

import fsspec
import numpy as np
import numpy.typing as npt

from ..errors import HyperfaissError, InvalidParameterError
from ..kernels.runtime import set_num_threads
from .engines import Advance, Found
from .progress import prefetch
from .results import merge_lists
from .shards import Shard, ShardReader
from .sources import Batch

try:
    import ray
    from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
except ImportError as error:
    raise InvalidParameterError(f"engine 'ray' needs another package: pip install 'hyperfaiss[batch-ray]' ({error})") from error

__all__ = ["RayEngine"]

T = TypeVar("T")
R = TypeVar("R")

# Blocks that a worker has at a time: the one it works on and the next.
_DEPTH = 2
# Workers that may die over one piece of work before it is thought to be what kills them.
_ATTEMPTS = 5
# Seconds without a single worker after which the cluster is thought to have no place for one.
_PATIENCE = 300.0
# Seconds after which the driver looks around, though nothing has happened.
_TICK = 5.0

_LOST = (RayActorError, ActorUnavailableError, ObjectLostError, WorkerCrashedError)


@dataclass
class _Block:
    """A batch of queries on its way."""

    batch: Batch
    queries: Any
    missing: int
    D: list[npt.NDArray[np.float32]] = field(default_factory=list)
    I: list[npt.NDArray[np.int64]] = field(default_factory=list)  # noqa: E741


@dataclass(eq=False)
class _Unit:
    """One block to be searched in one group of shards."""

    block: _Block
    group: int
    attempts: int = 0


@dataclass(eq=False)
class _Worker:
    """An actor, the group whose shards it keeps, how many units it has, and its process."""

    actor: Any
    group: int
    busy: int = 0
    pid: int = 0


class RayEngine:
    """Workers on a Ray cluster; see the module.

    Parameters
    ----------
    address : of a running cluster ("auto": this machine's); None: a new one, on this machine, bound to 127.0.0.1.
    workers : how many; default: as many as the cluster has CPUs for.
    cpus : CPUs, and threads, of a worker.
    cache : folder for copies of remote shards on the workers' machines; temporary by default.
    """

    def __init__(self, address: str | None, *, workers: int | None = None, cpus: int = 1, cache: str | None = None) -> None:
        self._address, self._count, self._cpus, self._cache = address, workers, cpus, cache
        self._own = False

    def __enter__(self) -> RayEngine:
        if not ray.is_initialized():
            quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
            if self._address is None:
                _start_privately(**quiet)
            else:
                ray.init(address=self._address, **quiet)
            self._own = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._own:
            ray.shutdown()

    def run(self, function: Callable[[T, Advance], R], items: Sequence[T], advance: Advance) -> None:
        """Call ``function`` with each item, in tasks that Ray moves and repeats when it loses a worker or a node."""
        task: Any = ray.remote(_run).options(num_cpus=self._cpus, max_retries=_ATTEMPTS, scheduling_strategy="SPREAD")
        shared, conf = ray.put(function), _configuration()
        waiting: deque[T] = deque(items)
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < _DEPTH * self._workers():
                running.append(task.remote(shared, waiting.popleft(), self._cpus, conf))
            ready, running = ray.wait(running, num_returns=1, timeout=_TICK)
            for reference in ready:
                advance(_result(reference))

    def search(
        self, shards: Sequence[Shard], batches: Iterator[Batch], k: int, nprobe: int | None, advance: Advance
    ) -> Generator[Found, None, None]:
        """The k nearest of each batch, in the order of the batches."""
        crew = _Crew(self._workers(), self._cpus, self._cache, _grouped(shards, self._workers()), k, nprobe)
        try:
            blocks: deque[_Block] = deque()
            coming = prefetch(batches)
            limit = 1 + _DEPTH * max(1, crew.size // len(crew.groups))
            more = True
            while more or blocks:
                while more and len(blocks) < limit:
                    batch = next(coming, None)
                    more = batch is not None
                    if batch is not None:
                        blocks.append(crew.submit(batch))
                for block in crew.step():
                    advance((block.batch.stop - block.batch.first) / len(crew.groups))
                while blocks and not blocks[0].missing:
                    block = blocks.popleft()
                    D, I, _ = merge_lists(block.D, block.I, k)  # noqa: E741
                    yield Found(block.batch, D, I)
        finally:
            crew.dismiss()

    def _workers(self) -> int:
        if self._count is not None:
            return self._count
        return max(1, int(ray.cluster_resources().get("CPU", 1)) // self._cpus)


def _start_privately(**options: Any) -> None:
    """A new cluster on this machine that listens on 127.0.0.1 only, and reports to nobody.

    ``ray.init(_node_ip_address="127.0.0.1")`` looks up the machine's public address instead. What Ray does where firewalls
    would complain, on macOS and Windows, is what is wanted here: its own switch for that.
    """
    from ray._private import ray_constants, services

    former = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
    try:
        if services.get_node_ip_address() != "127.0.0.1":
            raise HyperfaissError(
                f"Ray {ray.__version__} would listen on all interfaces: start a cluster, and give its address"
            )
        ray.init(address="local", include_dashboard=False, **options)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = former
        del os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"]


class _Crew:
    """The workers of a search, and who has what."""

    def __init__(self, size: int, cpus: int, cache: str | None, groups: list[list[Shard]], k: int, nprobe: int | None) -> None:
        self.size, self.groups = size, groups
        self._k, self._nprobe = k, nprobe
        self._actor = ray.remote(_Searcher).options(num_cpus=cpus, scheduling_strategy="SPREAD")
        self._arguments = (cpus, cache, _configuration())
        self._starting: dict[Any, _Worker] = {}
        self._live: list[_Worker] = []
        self._running: dict[Any, tuple[_Worker, _Unit]] = {}
        self._waiting: deque[_Unit] = deque()
        self._seen = time.monotonic()
        for number in range(size):
            self._start(number % len(groups))

    def submit(self, batch: Batch) -> _Block:
        """Take on a batch."""
        if not len(batch):
            return _Block(batch, None, 0, [np.empty((0, self._k), np.float32)], [np.empty((0, self._k), np.int64)])
        block = _Block(batch, ray.put(batch.vectors), len(self.groups))
        self._waiting.extend(_Unit(block, group) for group in range(len(self.groups)))
        return block

    def step(self) -> list[_Block]:
        """Hand out work, and wait for something to happen; the blocks that a group has been through."""
        self._hand_out()
        watched = [*self._running, *self._starting]
        if not self._running and not self._waiting:
            return []
        ready, _ = ray.wait(watched, num_returns=1, timeout=_TICK)
        # Whatever else is there already is taken along.
        ready = ray.wait(watched, num_returns=len(watched), timeout=0)[0] if ready else []
        done = []
        for reference in ready:
            if reference in self._starting:
                self._started(reference)
            elif (block := self._finished(reference)) is not None:
                done.append(block)
        if self._live:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > _PATIENCE:
            raise HyperfaissError(
                f"no Ray worker could be started in {_PATIENCE:.0f} s: each needs {self._arguments[0]} CPUs, "
                f"the cluster has {ray.cluster_resources().get('CPU', 0):g}"
            )
        return done

    def dismiss(self) -> None:
        """End all workers."""
        for worker in [*self._live, *self._starting.values()]:
            ray.kill(worker.actor)

    def _hand_out(self) -> None:
        """Give each worker units of its own group, or of groups that nobody keeps."""
        kept = {worker.group for worker in self._live}
        for worker in sorted(self._live, key=lambda worker: worker.busy):
            for unit in list(self._waiting):
                if worker.busy >= _DEPTH:
                    break
                if unit.group == worker.group or (unit.group not in kept and not worker.busy):
                    self._waiting.remove(unit)
                    reference = worker.actor.search.remote(self.groups[unit.group], unit.block.queries, self._k, self._nprobe)
                    self._running[reference] = worker, unit
                    worker.busy += 1

    def _start(self, group: int) -> None:
        worker = _Worker(self._actor.remote(*self._arguments), group)
        self._starting[worker.actor.ready.remote()] = worker

    def _started(self, reference: Any) -> None:
        worker = self._starting.pop(reference)
        try:
            worker.pid = _result(reference)
        except _LOST:
            self._start(worker.group)
        else:
            self._live.append(worker)

    def _finished(self, reference: Any) -> _Block | None:
        worker, unit = self._running.pop(reference)
        worker.busy -= 1
        try:
            D, I = _result(reference)  # noqa: E741
        except _LOST as error:
            self._lost(worker)
            unit.attempts += 1
            if unit.attempts >= _ATTEMPTS:
                names = ", ".join(shard.url for shard in self.groups[unit.group])
                raise HyperfaissError(f"{unit.attempts} workers were lost while they searched {names}: {error}") from error
            self._waiting.appendleft(unit)
            return None
        unit.block.D.append(D)
        unit.block.I.append(I)
        unit.block.missing -= 1
        if not unit.block.missing:
            unit.block.queries = None  # frees its place in the object store
        return unit.block

    def _lost(self, worker: _Worker) -> None:
        if worker in self._live:
            self._live.remove(worker)
            ray.kill(worker.actor)
            self._start(worker.group)


class _Searcher:
    """What a worker runs."""

    def __init__(self, cpus: int, cache: str | None, conf: dict[str, Any]) -> None:
        _set_up(cpus, conf)
        self._reader = ShardReader(cache)

    def ready(self) -> int:
        return os.getpid()

    def search(
        self, shards: list[Shard], x: npt.NDArray[np.float32], k: int, nprobe: int | None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        return self._reader.search(shards, x, k, nprobe)


def _run(function: Callable[[T, Advance], R], item: T, cpus: int, conf: dict[str, Any]) -> float:
    """A task: how far it advanced."""
    _set_up(cpus, conf)
    rows = [0.0]

    def advance(more: float) -> None:
        rows[0] += more

    function(item, advance)
    return rows[0]


def _set_up(cpus: int, conf: dict[str, Any]) -> None:
    set_num_threads(cpus)
    fsspec.config.conf.update(conf)


def _configuration() -> dict[str, Any]:
    """What the driver told fsspec: endpoints, options. Workers look for credentials in their own surroundings."""
    return dict(fsspec.config.conf)


def _grouped(shards: Sequence[Shard], workers: int) -> list[list[Shard]]:
    """The shards in as many groups as there are workers, of about the same number of vectors each."""
    groups: list[list[Shard]] = [[] for _ in range(min(workers, len(shards)))]
    for shard in sorted(shards, key=lambda shard: -shard.ntotal):
        min(groups, key=lambda group: sum(one.ntotal for one in group)).append(shard)
    return groups


def _result(reference: Any) -> Any:
    """A result, or the error that the code on the worker raised."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        cause = error.cause
        raise (cause if isinstance(cause, Exception) else error) from None
