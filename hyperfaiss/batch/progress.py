"""A job's progress bar on a terminal: rows, rows per second, time left. Nothing anywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

from rich.progress import ProgressColumn, Task, TaskProgressColumn
from rich.text import Text

from ..progress import progress_bar

__all__ = ["Bar", "prefetch"]

T = TypeVar("T")


class Bar:
    """Progress of ``total`` rows, of which ``done`` were there already. A context manager; ``advance`` from any thread."""

    def __init__(self, title: str, total: int, done: int = 0, *, shown: bool = True) -> None:
        self._progress = progress_bar(TaskProgressColumn(), _Rate(), shown=shown)
        self._task = self._progress.add_task(title, total=total, completed=done)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def advance(self, rows: float) -> None:
        """``rows`` more are done."""
        self._progress.advance(self._task, rows)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{task.completed:,.0f} rows" + (f", {speed:,.0f}/s" if speed else ""))


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """``items``, the next one made by a thread while the caller works on this one."""
    end: Any = object()
    with ThreadPoolExecutor(1, thread_name_prefix="hyperfaiss-read") as pool:
        pending = pool.submit(next, items, end)
        while True:
            item = pending.result()
            if item is end:
                return
            pending = pool.submit(next, items, end)
            yield item
