"""What commands share: options that exclude each other, values, errors in one line, and progress bars."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer
from rich.progress import MofNCompleteColumn
from typer.testing import CliRunner

from hyperfaiss import InvalidParameterError
from hyperfaiss.batch.progress import Bar
from hyperfaiss.progress import progress_bar, track
from hyperfaiss.terminal import command_line, fields_of, json_or_text, only_one, reported_errors


def test_only_one() -> None:
    only_one(codec="x", factory=None)
    only_one(codec=None, factory="")  # given, if empty
    for given in ({"codec": "x", "factory": "y"}, {"codec": None, "factory": None}):
        with pytest.raises(typer.BadParameter, match="give --codec or --factory"):
            only_one(**given)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("[1, 2]", [1, 2]), ('"3"', "3"), ("null", None), (" cat ", "cat"), ("2020-01-01", "2020-01-01")],
)
def test_json_or_text(text: str, value: Any) -> None:
    assert json_or_text(text) == value


def test_fields_of_changes() -> None:
    assert fields_of(["lr=0.1", "levels=[9, 3]", "geometry=cosine", "lr=0.2", "note=a=b"]) == {
        "lr": 0.2,
        "levels": [9, 3],
        "geometry": "cosine",
        "note": "a=b",
    }
    assert fields_of(None) == {}
    for wrong in ("lr", "=0.1"):
        with pytest.raises(typer.BadParameter, match=f"--set takes NAME=VALUE, got '{wrong}'"):
            fields_of([wrong])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InvalidParameterError("k must be 1, got [bold]0"), 1, "error: k must be 1, got [bold]0"),
        (FileNotFoundError("no file 'x'"), 1, "error: no file 'x'"),
        (KeyboardInterrupt(), 130, "stopped here"),
        (KeyboardInterrupt("saved what there was"), 130, "saved what there was"),
    ],
)
def test_what_a_user_can_mend_is_one_line(error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    app = command_line("It fails.")

    @app.command()
    def fail() -> None:
        with reported_errors("stopped here"):
            raise error

    result = CliRunner().invoke(app, [])
    assert (result.exit_code, result.output.strip()) == (code, line)


def test_bugs_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), reported_errors():
        json.dumps(1 / 0)


def test_a_bar_is_for_terminals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def show() -> str:
        with progress_bar(MofNCompleteColumn()) as bar:
            bar.advance(bar.add_task("reading", total=8), 3)
        with Bar("build", 1000, 200) as rows:
            rows.advance(50)
        with Bar("hidden", 1000, shown=False):
            pass
        out, err = capsys.readouterr()
        assert not out
        return err

    assert not show()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    shown = show()
    for part in ("reading", "3/8", "build", "25%", "250 rows"):
        assert part in shown
    assert "hidden" not in shown


def test_track_goes_through_all(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (False, True):
        assert list(track([3, 1, 2], "training", verbose)) == [3, 1, 2]
    assert "training" in capsys.readouterr().err
