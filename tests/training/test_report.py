"""Reports of evaluations: what is in the files and on the terminal, and through the command."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from hyperfaiss import HyperbolicProductQuantizer, Model
from hyperfaiss.model import Projector
from training.cli import app
from training.evaluate import Curve, Evaluation, Subspace
from training.report import plot_precision_recall, summary, write_report

SUBSPACE = Subspace(16, 12, 3.25, 2**3.25, 0.5, 0.6, 2.0, 0.25)


def evaluation(precision: float, *, subspaces: tuple[Subspace, ...] = ()) -> Evaluation:
    curve = Curve((1, 2, 5), (precision, precision / 2, precision / 4), (0.1, 0.2, 0.3), 7)
    return Evaluation(0.5, 5, 1000.0, 8, 90, {1: precision, 5: 0.25}, curve, {1: 0.75} if subspaces else {}, 8, subspaces)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as f:
        return list(csv.DictReader(f))


def test_files(tmp_path: Path) -> None:
    named = {"a": evaluation(0.9), "b": evaluation(0.8, subspaces=(SUBSPACE, SUBSPACE))}
    written = write_report(named, tmp_path / "deep" / "out")
    assert [p.name for p in written] == ["precision_recall.csv", "precision_recall.png", "subspaces.csv"]
    assert sorted(p.name for p in (tmp_path / "deep" / "out").iterdir()) == sorted(p.name for p in written)
    points = rows_of(written[0])
    assert [(r["name"], int(r["rank"]), float(r["precision"]), float(r["recall"])) for r in points[2:4]] == [
        ("a", 5, 0.225, 0.3),
        ("b", 1, 0.8, 0.1),
    ]
    image = np.asarray(Image.open(written[1]).convert("RGB"))
    assert image.shape[1] > 900
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10
    usage = rows_of(written[2])
    assert [(r["name"], r["m"], r["used"], r["entropy"]) for r in usage] == [("b", "0", "12", "3.25"), ("b", "1", "12", "3.25")]
    assert len(write_report({"a": evaluation(0.9)}, tmp_path)) == 2
    plot_precision_recall({}, tmp_path / "none.png")


def test_summary_tells_percentages_and_what_was_measured() -> None:
    texts = []
    for result in (evaluation(0.9), evaluation(0.9, subspaces=(SUBSPACE,))):
        console = Console(file=io.StringIO(), width=120)
        console.print(summary(result, code_size=3))
        texts.append(console.file.getvalue())
    for expected in ("MAP@5", "50.00 %", "precision@1", "90.00 %", "bytes per vector", "8, 90"):
        assert expected in texts[0]
    assert "recall@1" not in texts[0]
    assert "codewords used" not in texts[0]
    for expected in ("recall@1 of the unquantised order", "75.00 %", "12 of 16", "3.25 bits", "25.0 %"):
        assert expected in texts[1]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A model, and vectors of which each has several labels."""
    rng = np.random.default_rng(0)
    quantizer = HyperbolicProductQuantizer.from_codebooks(rng.normal(size=(2, 16, 3)).astype(np.float32), 1.0)
    Model(Projector([(rng.normal(size=(6, 5)), np.zeros(6))]), quantizer).save(tmp_path / "m.safetensors")
    for name, n in (("", 300), ("q", 20)):
        x = rng.normal(size=(n, 5)).astype(np.float32)
        np.save(tmp_path / f"x{name}.npy", x)
        np.save(tmp_path / f"y{name}.npy", x > 0.5)
    return tmp_path


def test_command(files: Path) -> None:
    command = ["eval", files / "m.safetensors", "--database", files / "x.npy", "--database-labels", files / "y.npy"]
    command += ["--queries", files / "xq.npy", "--query-labels", files / "yq.npy", "-n", 50]

    def run(*options: object) -> str:
        result = CliRunner().invoke(app, [str(a) for a in (*command, *options)])
        assert result.exit_code == 0, result.output
        return result.stdout

    found = json.loads(run("--json", "-k", 5, "-k", 20, "--depth", 70, "--recall-queries", 4))
    assert found["n"] == 50
    assert 0 < found["map_at_n"] < 1
    assert set(found["precision"]) == set(found["recall"]) == {"5", "20"}
    assert found["recall_queries"] == 4
    assert found["curve"]["ranks"][-1] == 70
    assert [s["ksub"] for s in found["subspaces"]] == [16, 16]
    assert json.loads(run("--json", "--recall-queries", 0))["recall"] == {}
    assert json.loads(run("--json"))["curve"]["ranks"][-1] == 50
    text = run("--plots", files / "out")
    for expected in ("MAP@50", "precision@100", "recall@10 of the unquantised order", "of 16", "wrote"):
        assert expected in text
    points = rows_of(files / "out" / "precision_recall.csv")
    assert points[-1]["name"] == "m"
    assert (int(points[-1]["rank"]), float(points[-1]["recall"])) == (300, pytest.approx(1))
