"""The package as a whole: its facade, what an import costs and drags in, and its version."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import hyperfaiss
from hyperfaiss import errors
from tests.toys import Python

ROOT = Path(__file__).resolve().parent.parent


def test_every_export_exists_and_is_documented() -> None:
    assert sorted(hyperfaiss.__all__) == list(hyperfaiss.__all__)
    assert len(set(hyperfaiss.__all__)) == len(hyperfaiss.__all__)
    for name in hyperfaiss.__all__:
        thing = getattr(hyperfaiss, name)
        if name != "__version__":
            assert inspect.getdoc(thing), name


def test_public_members_are_documented() -> None:
    for name in hyperfaiss.__all__:
        thing = getattr(hyperfaiss, name)
        if not inspect.isclass(thing):
            continue
        for member, value in vars(thing).items():
            if not member.startswith("_") and (callable(value) or isinstance(value, (property, classmethod))):
                assert inspect.getdoc(getattr(thing, member)), f"{name}.{member}"
    for name in hyperfaiss.lorentz.__all__:
        assert inspect.getdoc(getattr(hyperfaiss.lorentz, name)), name


def test_nothing_public_is_missing_from_the_facade() -> None:
    own = {
        name
        for name, value in vars(hyperfaiss).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }
    assert own <= set(hyperfaiss.__all__)
    exceptions = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert exceptions <= set(hyperfaiss.__all__)


def test_errors_are_one_tree() -> None:
    for value in vars(errors).values():
        if inspect.isclass(value):
            assert issubclass(value, errors.HyperfaissError)
            assert value.__name__ in (errors.__doc__ or "")
    assert issubclass(errors.InvalidVectorsError, ValueError)
    assert issubclass(errors.InvalidParameterError, ValueError)
    assert issubclass(errors.NotTrainedError, RuntimeError)
    assert issubclass(errors.UnknownIdError, LookupError)
    assert issubclass(errors.CorruptFileError, errors.FileFormatError)
    assert issubclass(errors.UnsupportedVersionError, errors.FileFormatError)


def test_import_is_silent_and_light(python: Python) -> None:
    script = """
import sys
import hyperfaiss
heavy = {"torch", "torchvision", "sklearn", "matplotlib", "pandas", "pyarrow", "ray", "rich", "typer", "training"}
print(sorted(heavy & set(sys.modules)))
"""
    done = python(script, flags=("-W", "error"))
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_import_is_quick(python: Python) -> None:
    """Under 0.3 s beyond NumPy, Numba and FAISS; the best of a few tries, since others share the machine."""
    script = """
import time
import numpy, numba, faiss
start = time.perf_counter()
import hyperfaiss
print(time.perf_counter() - start)
"""
    costs: list[float] = []
    while len(costs) < 5 and min(costs, default=1.0) >= 0.3:
        costs.append(float(python(script).stdout))
    assert min(costs) < 0.3


def test_training_is_never_imported_by_the_core() -> None:
    for path in (ROOT / "hyperfaiss").rglob("*.py"):
        # Jobs may encode images, and import what that takes when they do.
        indent = "" if path.parent.name == "batch" else r"\s*"
        text = path.read_text()
        for module in ("torch", "training", "benchmarks", "sklearn", "matplotlib"):
            assert not re.search(rf"^{indent}(import {module}|from {module})\b", text, re.MULTILINE), (path, module)


def test_version_is_the_changelogs() -> None:
    headings = re.findall(r"^## \[?(\d+\.\d+\.\d+\S*?)\]?(?: |$)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings
    assert headings[0] == hyperfaiss.__version__
    assert headings == sorted(headings, key=lambda v: [int(n) for n in re.findall(r"\d+", v)], reverse=True)
