"""Recipes: the hyper-parameters of a training by name, one small TOML file each, in this folder or the user's own.

A file has a line ``about``, the fields of :class:`training.config.TrainConfig` that it sets in ``[all]``, and those that
depend on the bits of a code in ``[bits.16]``, ``[bits.32]`` and so on. ``base`` names the recipe that it changes. With
``only_these_bits = true`` other numbers of bits are refused.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from hyperfaiss.errors import InvalidParameterError
from training.config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["RECIPES", "recipe"]

_FOLDER = Path(__file__).parent
_KEYS = {"about", "base", "all", "bits", "only_these_bits"}

# Those whose names start with "_" are only for others to start from.
RECIPES: tuple[str, ...] = (
    "default",
    *sorted(p.stem for p in _FOLDER.glob("*.toml") if p.stem != "default" and not p.stem.startswith("_")),
)


def recipe(name: str | os.PathLike[str] = "default", *, bits: int | None = None, **changes: Any) -> TrainConfig:
    """A configuration by the name of a recipe, or from a file, for ``bits`` = M·nbits bits a vector.

    Args:
        name: one of ``RECIPES``; or the path of a .toml file as above, or of a ``config.json`` that a run left.
        bits: default: ``changes["M"]`` codes, else what the recipe says, 32 bits if it says nothing.
        changes: override single fields.

    Raises:
        InvalidParameterError: no such recipe, a file of another form, bits that the recipe is not for, and what
            TrainConfig refuses.
    """
    found = _load(os.fspath(name))
    fields = dict(found.get("all", {}))
    nbits = changes.get("nbits", fields.get("nbits", TrainConfig.nbits))
    if bits is not None:
        if "M" in changes:
            raise InvalidParameterError(f"give bits or M, not both: got bits = {bits} and M = {changes['M']}")
        if not isinstance(nbits, int) or nbits < 1 or bits < nbits or bits % nbits:
            raise InvalidParameterError(f"bits must be a multiple of nbits = {nbits}, got {bits}")
        changes["M"] = bits // nbits
    M = changes.get("M", fields.get("M", TrainConfig.M))
    by_bits = found.get("bits", {})
    special = by_bits.get(str(M * nbits)) if isinstance(M, int) and isinstance(nbits, int) else None
    if special is None and found.get("only_these_bits"):
        raise InvalidParameterError(f"recipe {str(name)!r} is for {', '.join(by_bits)} bits, got M = {M}, nbits = {nbits}")
    return TrainConfig.from_dict({**fields, "M": M, **(special or {}), **changes})


def _load(name: str) -> dict[str, Any]:
    """A recipe's tables, those of its base below its own."""
    path = _FOLDER / f"{name}.toml"
    if not path.is_file():
        path = Path(name).expanduser()
        if path.suffix not in {".toml", ".json"}:
            raise InvalidParameterError(f"no recipe {name!r}; there are {', '.join(RECIPES)}, and files .toml and .json")
    try:
        text = path.read_text()
    except OSError as error:
        raise InvalidParameterError(f"no recipe at {name}: {error}") from error
    try:
        if path.suffix == ".json":
            return {"all": dict(json.loads(text))}
        found: dict[str, Any] = tomllib.loads(text)
    except (ValueError, TypeError) as error:  # of which both decoders' errors are
        raise InvalidParameterError(f"{path} can't be read as a recipe: {error}") from error
    unknown = sorted(set(found) - _KEYS)
    if unknown:
        raise InvalidParameterError(f"{path} has {unknown}; a recipe has {sorted(_KEYS)}, and its fields in [all]")
    if "base" not in found:
        return found
    below = _load(found["base"])
    own, bits = found.get("bits", {}), below.get("bits", {})
    return {
        **below,
        **found,
        "all": below.get("all", {}) | found.get("all", {}),
        "bits": {b: bits.get(b, {}) | own.get(b, {}) for b in {**bits, **own}},
    }
