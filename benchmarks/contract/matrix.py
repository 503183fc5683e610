"""Runs operations in processes that may die, and prints what came of them."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import faiss
import typer
from rich.console import Console
from rich.table import Table

import hyperfaiss

from .operations import OPERATIONS, WrongAnswerError, same
from .refusals import REFUSALS
from .subjects import SUBJECTS, XQ, Subject

# Seconds for an operation.
TIMEOUT = 60.0
# What may come of an operation. For bad input, an error that tells its reason is a yes.
YES, WRONG, ERROR, NO_REASON, ACCEPTED, BROKEN, ABORTS, HANGS = (
    "yes", "wrong answer", "error", "error without reason", "accepted", "refused, then broken", "aborts the process", "hangs",
)  # fmt: skip


def run(subject_name: str, name: str) -> tuple[str, str]:
    """What comes of one operation on one kind of index, and a word on it."""
    subject = SUBJECTS[subject_name]
    try:
        if name in OPERATIONS:
            OPERATIONS[name](subject)
            return YES, ""
        return _refuse(subject, REFUSALS[name])
    except WrongAnswerError as error:
        return WRONG, str(error)
    except BaseException as error:
        return (ERROR if str(error) else NO_REASON), f"{type(error).__name__}: {error}"


def _refuse(subject: Subject, function: Callable[[Subject, Any], Any]) -> tuple[str, str]:
    index = subject.full()
    before = index.search(XQ, 10)
    try:
        function(subject, index)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        if not str(error):
            return NO_REASON, message
        return (YES if same(before, index.search(XQ, 10)) else BROKEN), message
    return ACCEPTED, ""


def _prepare() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs are born without
    # FAISS writes to the standard error from C++, last words of an abort included.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare)


def measure(subject_name: str, names: list[str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Run the operations in a process that is replaced when one of them kills it or never ends."""
    pool = _pool()
    try:
        for name in names:
            future = pool.submit(run, subject_name, name)
            try:
                yield name, future.result(timeout=TIMEOUT)
            except BrokenProcessPool:
                pool.shutdown()
                pool = _pool()
                yield name, (ABORTS, "")
            except FutureTimeoutError:
                for process in list(pool._processes.values()):
                    process.kill()
                pool.shutdown()
                pool = _pool()
                yield name, (HANGS, f"no answer in {TIMEOUT:.0f} s")
    finally:
        pool.shutdown()


def main(
    details: Annotated[bool, typer.Option(help="also print what was said where the answer is not yes")] = False,
    only: Annotated[str, typer.Option(help="operations whose name contains this")] = "",
    json_path: Annotated[Path | None, typer.Option("--json", help="also write outcomes and messages to this file")] = None,
) -> None:
    """Run every operation on every kind of index and print the matrix."""
    console = Console()
    console.width = max(console.width, 150)
    names = [name for name in (*OPERATIONS, *REFUSALS) if only in name]
    results: dict[str, dict[str, tuple[str, str]]] = {name: {} for name in names}
    with console.status("") as status:
        for subject in SUBJECTS:
            for name, outcome in measure(subject, names):
                status.update(f"{subject}: {name}")
                results[name][subject] = outcome
    table = Table(title=f"faiss {faiss.__version__} and hyperfaiss {hyperfaiss.__version__}: {len(names)} operations, tried")
    table.add_column("operation")
    for subject in SUBJECTS:
        table.add_column(subject)
    for i, name in enumerate(names):
        if name in REFUSALS and (not i or names[i - 1] in OPERATIONS):
            table.add_section()
            table.add_row("[bold]refuses with a reason, and goes on as before:[/bold]")
        table.add_row(name, *("[green]yes[/green]" if o == YES else f"[red]{o}[/red]" for o, _ in results[name].values()))
    table.add_section()
    counts = {subject: Counter(results[name][subject][0] for name in names) for subject in SUBJECTS}
    table.add_row("yes, of all", *(f"{count[YES]} of {len(names)}" for count in counts.values()))
    console.print(table)
    if details:
        for name, row in results.items():
            for subject, (what, message) in row.items():
                if what != YES:
                    console.print(f"{subject}, {name}: {what}: {message}", markup=False, emoji=False)
    if json_path is not None:
        json_path.write_text(json.dumps({"faiss": faiss.__version__, "results": results}, indent=1))
