"""What the ``hyperfaiss`` and ``hihpq`` commands share: their look, their errors, and options. Needs typer and rich."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import typer
from rich.console import Console

from .errors import HyperfaissError

__all__ = ["command_line", "fields_of", "json_or_text", "only_one", "option", "reported_errors"]


def command_line(text: str) -> typer.Typer:
    """An empty command whose ``--help`` is ``text``."""
    return typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain text: one line an option
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        help=text,
    )


def option(metavar: str | None, text: str, *names: str, **more: Any) -> Any:
    """An option; ``names`` where they are not just the parameter's."""
    return typer.Option(*names, metavar=metavar, help=text, **more)


def only_one(**given: object) -> None:
    """A usage error unless exactly one of these options has a value."""
    if sum(value is not None for value in given.values()) != 1:
        names = " or ".join(f"--{name}" for name in given)
        raise typer.BadParameter(f"give {names} (one of them)")


def json_or_text(value: str) -> Any:
    """A value of NAME=VALUE and the like: JSON, or else the string that it is."""
    try:
        return json.loads(value)
    except ValueError:
        return value.strip()


def fields_of(changes: Iterable[str] | None) -> dict[str, Any]:
    """What ``--set NAME=VALUE``, repeated, says; a usage error for one of another form."""
    found = {}
    for change in changes or ():
        name, equals, value = change.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"--set takes NAME=VALUE, got {change!r}")
        found[name.strip()] = json_or_text(value)
    return found


@contextlib.contextmanager
def reported_errors(stopped: str = "stopped") -> Iterator[None]:
    """What a user can mend, in one line and exit code 1; the traceback is left to bugs.

    Ctrl-C, and whatever derives from KeyboardInterrupt, is exit code 130 and its message, or ``stopped`` where it has none.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        yield
    except (HyperfaissError, OSError) as error:
        console.print(f"error: {error}")
        raise typer.Exit(1) from error
    except KeyboardInterrupt as stop:
        console.print(str(stop) or stopped)
        raise typer.Exit(130) from stop
