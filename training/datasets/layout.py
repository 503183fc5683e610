"""What the loaders of public layouts share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hyperfaiss.errors import CorruptFileError, InvalidParameterError

__all__ = ["find", "read_lines"]


def find(folder: Path, places: Sequence[str], what: str) -> Path:
    """The first of these places in the folder that exists; InvalidParameterError names what was looked for."""
    for place in places:
        if (folder / place).exists():
            return folder / place
    raise InvalidParameterError(f"no {what} in {folder}: looked for {', '.join(places)}")


def read_lines(path: Path) -> list[str]:
    """Lines of a text file, stripped; empty ones at its end left out."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().split("\n")]
    except FileNotFoundError as e:
        raise InvalidParameterError(f"no file at {path}") from e
    except (OSError, UnicodeDecodeError) as e:
        raise CorruptFileError(f"{path} can't be read as text: {e}") from e
