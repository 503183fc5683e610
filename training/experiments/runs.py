"""Runs in folders of their own: a finished one is kept, a started one goes on, and one of another kind is refused.

A run's folder holds ``run.json`` (written at the start: what the run is), the trainer's files, and ``result.json`` (written
at the end: the same, and the figures). So a stopped experiment is started again with the same command.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import hyperfaiss
from hyperfaiss.errors import CorruptFileError, HyperfaissError, InvalidParameterError
from hyperfaiss.io import atomic_path
from training.config import TrainConfig
from training.experiments.baselines import faiss_index
from training.experiments.setting import Setting, SettingOptions
from training.locks import locked

__all__ = ["Experiment", "Failure", "Result", "Run"]

_FORMAT = 1


@dataclass(frozen=True)
class Run:
    """One cell of an experiment, for one seed.

    row, column : where its figure stands, and its folder: row/column/seed<k>.
    method : a name in ``tables.METHODS``.
    bits : of a code; 0 for exact search.
    config : of the training; None for a method of faiss.
    """

    row: str
    column: str
    seed: int
    method: str
    bits: int
    config: TrainConfig | None

    @property
    def folder(self) -> Path:
        """Within the experiment's."""
        return Path(_safe(self.row), _safe(self.column), f"seed{self.seed}")

    def __str__(self) -> str:
        return f"{self.row}, {self.column}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """What a finished run left.

    metrics : of ``Setting.judge``; seconds : of training and of the judgement.
    """

    row: str
    column: str
    seed: int
    method: str
    bits: int
    metrics: dict[str, Any]
    seconds: dict[str, float]
    folder: Path

    @property
    def map(self) -> float:
        """Mean average precision in percent."""
        return 100 * float(self.metrics["map_at_n"])


@dataclass(frozen=True)
class Failure:
    """A run that did not finish; its folder's ``error.txt`` has the traceback."""

    run: Run
    message: str


class Experiment:
    """Runs of one setting below a folder."""

    def __init__(self, out: str | os.PathLike[str], setting: Setting) -> None:
        self.out, self.setting = Path(out), setting

    def pending(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that have no result yet.

        Raises InvalidParameterError if a folder holds a run of another kind, naming what differs, or if labels are to choose
        the epoch of a run that holds nothing out.
        """
        if self.setting.options.by_labels:
            for run in runs:
                if run.config is not None and run.config.val_fraction == 0:
                    raise InvalidParameterError(
                        f"labels can't choose an epoch of {run}: val_fraction must be positive to hold images out, got 0.0"
                    )
        return [run for run in runs if _stored_result(self.out / run.folder, _identity(run, self.setting)) is None]

    def run(
        self,
        runs: Sequence[Run],
        *,
        jobs: int = 1,
        say: Callable[[str], None] = lambda _: None,
        after: Callable[[], None] = lambda: None,
        progress: bool = True,
    ) -> list[Failure]:
        """Do those that have no result yet, ``jobs`` at a time, each in a process of its own if that is more than one.

        A run that fails does not stop the others. ``say`` is told what happens, ``after`` is called after each run.
        Ctrl-C stops at once (TrainingInterrupted, KeyboardInterrupt); the same call goes on.
        """
        waiting = self.pending(runs)
        if len(waiting) < len(runs):
            say(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already")
        if not waiting:
            return []
        self.out.mkdir(parents=True, exist_ok=True)
        self.setting.protocol.split.save(self.out / "split.json")
        self.setting.prepare(learns=any(run.config is not None for run in waiting))
        first, start = len(runs) - len(waiting) + 1, time.monotonic()
        failures: list[Failure] = []

        def finished(done: int, run: Run, outcome: Result | Failure) -> None:
            left = (len(waiting) - done) * (time.monotonic() - start) / done
            rest = f"; about {_duration(left)} left" if done < len(waiting) else ""
            if isinstance(outcome, Failure):
                failures.append(outcome)
                say(f"{run} failed: {outcome.message} (see {self.out / run.folder}){rest}")
            else:
                took = _duration(sum(outcome.seconds.values()))
                say(f"{run}: MAP@{outcome.metrics['n']} {outcome.map:.2f} % in {took}{rest}")
            after()

        if min(jobs, len(waiting)) > 1:
            outcomes = _in_processes(waiting, self.setting.options, self.out, min(jobs, len(waiting)))
            for done, (run, outcome) in enumerate(outcomes, start=1):
                finished(done, run, outcome)
            return failures
        for done, run in enumerate(waiting, start=1):
            say(f"run {first + done - 1} of {len(runs)}: {run}")
            finished(done, run, _attempt(run, self.setting, self.out, progress=progress))
        return failures

    def results(self) -> list[Result]:
        """All finished runs below the folder, of this setting's protocol, data and features, whoever asked for them."""
        found: list[Result] = []
        for path in sorted(self.out.glob("*/*/seed*/result.json")):
            fields = _read(path)
            identity = fields["identity"]
            if all(identity.get(name) == value for name, value in self.setting.facts.items()):
                own = {name: identity[name] for name in ("row", "column", "seed", "method", "bits")}
                found.append(Result(**own, metrics=fields["metrics"], seconds=fields["seconds"], folder=path.parent))
        return sorted(found, key=lambda r: (r.row, r.bits, r.column, r.seed))


# ---------------------------------------------------------------------------------------------- one run


def _identity(run: Run, setting: Setting) -> dict[str, Any]:
    """All that decides a run's figures; JSON-able."""
    own = {"row": run.row, "column": run.column, "seed": run.seed, "method": run.method, "bits": run.bits}
    learnt = {} if run.config is None else setting.learning_facts | {"config": run.config.to_dict()}
    return {"format": _FORMAT} | own | setting.facts | learnt


def _stored_result(folder: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The folder's result, None if there is none yet; InvalidParameterError for a run of another kind, finished or not."""
    result = None
    for name in ("run.json", "result.json"):
        if not (folder / name).exists():
            continue
        result = _read(folder / name)
        differing = "; ".join(_differences(_with_defaults(result["identity"]), identity))
        if differing:
            raise InvalidParameterError(
                f"{folder} holds another run: {differing}. Ask for the same, choose another folder, or remove it"
            )
    return result if result is not None and "metrics" in result else None


def _attempt(run: Run, setting: Setting, out: Path, *, progress: bool) -> Result | Failure:
    """Do a run; whatever goes wrong with it is a Failure, and a stop is a stop."""
    folder = out / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / ".lock", wait=False):  # two commands may share an experiment's folder, but not a run's
            (folder / "error.txt").unlink(missing_ok=True)
            identity = _identity(run, setting)
            stored = _stored_result(folder, identity)  # another process may have finished it by now
            if stored is None:
                _write(folder / "run.json", {"identity": identity})
                stored = {"identity": identity} | _measured(run, setting, folder, progress=progress)
                _write(folder / "result.json", stored)
    except Exception as error:  # a table of many hours must outlive whatever one run does
        known = isinstance(error, (HyperfaissError, OSError))
        message = str(error) if known else f"{type(error).__name__}: {error}"
        (folder / "error.txt").write_text(traceback.format_exc())
        return Failure(run, message)
    return Result(run.row, run.column, run.seed, run.method, run.bits, stored["metrics"], stored["seconds"], folder)


def _measured(run: Run, setting: Setting, folder: Path, *, progress: bool) -> dict[str, Any]:
    """Train, fill an index with the database, search it; or the same by faiss."""
    held, asked = setting.database, setting.protocol.split.query
    start = time.perf_counter()
    more: dict[str, Any] = {}
    if run.config is None:
        x = setting.normalized_features
        database, queries = x[held], x[asked]
        index = faiss_index(run.method, database, run.bits, seed=run.seed)
        training = time.perf_counter() - start
    else:
        from training.train import train

        trained = train(
            setting.source(run.config),
            run.config,
            folder,
            labels=setting.training_labels,
            backbone=setting.backbone,
            teachers=folder.parents[2] / "teachers",
            resume=True,
            device=setting.options.device,
            progress=progress,
        )
        training = sum(row["seconds"] for row in trained.history)  # of all sittings
        more["epoch"] = trained.best_epoch
        start = time.perf_counter()
        database, queries = (trained.model.encode(setting.features[rows]) for rows in (held, asked))
        index = trained.model.index()
    index.add(database)
    metrics = setting.judge(index, database, queries)
    seconds = {"train": training, "evaluate": time.perf_counter() - start - (training if run.config is None else 0.0)}
    return {"metrics": metrics, "seconds": seconds, **more, "versions": _versions()}


# ---------------------------------------------------------------------------------------------- several at a time


class _Worker:
    """What a process of the pool keeps between runs."""

    setting: Setting
    stopped = False


def _in_processes(runs: Sequence[Run], options: SettingOptions, out: Path, jobs: int) -> Iterator[tuple[Run, Result | Failure]]:
    """The outcomes, as they come."""
    context = multiprocessing.get_context("spawn")  # a forked child would inherit threads' locks
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(options, jobs)) as pool:
        futures = {pool.submit(_work, run, out): run for run in runs}
        try:
            for future in as_completed(futures):
                run = futures[future]
                try:
                    yield run, future.result()
                except BrokenProcessPool:
                    yield run, Failure(run, "its process, or one beside it, was killed: too little memory for so many jobs?")
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _start_worker(options: SettingOptions, jobs: int) -> None:
    import faiss
    import torch

    # Ctrl-C reaches every process of the terminal: the trainer saves and stops, anything else may die where it is.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    threads = max(1, hyperfaiss.get_num_threads() // jobs)
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    hyperfaiss.set_num_threads(threads)
    _Worker.setting = Setting(options)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # which the trainer, too, takes for a stop


def _work(run: Run, out: Path) -> Result | Failure:
    if _Worker.stopped:  # the pool hands out runs ahead
        raise KeyboardInterrupt
    try:
        return _attempt(run, _Worker.setting, out, progress=False)
    except KeyboardInterrupt:
        _Worker.stopped = True
        parent = multiprocessing.parent_process()
        if parent is None or not parent.is_alive():
            os._exit(130)  # nobody is left to tell
        raise


# ---------------------------------------------------------------------------------------------- pieces


def _with_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    """Fields that a configuration has got since have their defaults, which do what was done before."""
    try:
        return identity | {"config": TrainConfig.from_dict(identity["config"]).to_dict()}
    except (KeyError, TypeError, InvalidParameterError):
        return identity


def _differences(stored: dict[str, Any], asked: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name in {**asked, **stored}:
        mine, theirs = asked.get(name), stored.get(name)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            yield from _differences(theirs, mine, f"{prefix}{name}.")
        elif mine != theirs:
            yield f"{prefix}{name} = {theirs!r} (asked: {mine!r})"


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise CorruptFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("identity"), dict):
        raise CorruptFileError(f"{path} is no file of an experiment's run")
    return fields


def _write(path: Path, fields: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(fields, indent=1) + "\n")


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("torch", "numpy", "faiss-cpu")}
    return {"python": platform.python_version(), "hyperfaiss": hyperfaiss.__version__} | packages


def _safe(name: str) -> str:
    """A folder's name: "16 bits" is 16bits, "with hierarchy" with-hierarchy."""
    return re.sub(r"[^\w.=-]", "-", re.sub(r"(?<=\d) ", "", name))


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
