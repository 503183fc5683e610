"""What a long run shows on the terminal, and how it hears that it should stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.progress import MofNCompleteColumn, TimeElapsedColumn

from hyperfaiss.progress import progress_bar as bar_of


@contextmanager
def progress_bar(title: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar with an ETA on stderr, if that is a terminal; call what it gives with the number of items done."""
    with bar_of(MofNCompleteColumn(), TimeElapsedColumn(), shown=shown) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def deferred_signals() -> Iterator[Callable[[], bool]]:
    """While inside, the first SIGINT or SIGTERM only sets a flag, so that no step is cut in half; a second one acts."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []
    former = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 (the handler's signature)
        if received:
            raise KeyboardInterrupt
        received.append(number)

    for s in former:
        signal.signal(s, note)
    try:
        yield lambda: bool(received)
    finally:
        for s, handler in former.items():
            signal.signal(s, handler)
