"""Progress of long calls on stderr: a bar by rich; where that is not installed, a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn

__all__ = ["progress_bar", "track"]

T = TypeVar("T")

# Seconds between two lines where there is no bar.
_INTERVAL = 2.0


def track(items: Sequence[T], description: str, verbose: bool) -> Iterable[T]:
    """``items``, one after the other, with progress on stderr if ``verbose``."""
    if not verbose:
        return items
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        return _lines(items, description)
    return rich_track(items, description, console=Console(stderr=True))


def progress_bar(*columns: ProgressColumn, shown: bool = True) -> Progress:
    """A bar, to be started and given a task: its description, the bar, ``columns``, and the time that is left.

    Nothing unless ``shown`` and stderr is a terminal. Needs rich.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    every = (TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn())
    return Progress(*every, console=console, disable=not (shown and console.is_terminal))


def _lines(items: Sequence[T], description: str) -> Iterator[T]:
    shown = time.monotonic()
    for done, item in enumerate(items):
        yield item
        if time.monotonic() - shown > _INTERVAL or done + 1 == len(items):
            shown = time.monotonic()
            sys.stderr.write(f"{description}: {done + 1}/{len(items)}\n")
