"""The hyperfaiss command: the whole way, its exit codes, its help, and what it says without its packages."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from hyperfaiss.cli import app

COMMANDS = ["build", "search", "encode", "merge", "eval", "info"]


def hyperfaiss(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Clustered vectors in three Parquet files, and queries."""
    rng = np.random.default_rng(0)
    label = np.arange(900) % 6
    x = (rng.normal(size=(6, 8))[label] + 0.3 * rng.normal(size=(900, 8))).astype(np.float32)
    whole = pa.table({"id": np.arange(900) + 7, "label": label, "embedding": pa.FixedSizeListArray.from_arrays(x.ravel(), 8)})
    (tmp_path / "x").mkdir()
    for part in range(3):
        pq.write_table(whole.slice(part * 300, 300), tmp_path / "x" / f"{part}.parquet")
    pq.write_table(whole.slice(0, 90), tmp_path / "queries.parquet")
    np.save(tmp_path / "narrow.npy", x[:, :3])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_whole_way(files):
    common = ("--id-column", "id", "--json")
    built = hyperfaiss("build", "-i", "x/*.parquet", "-o", "shards", "--factory", "HPQ2x4", "--shard-rows", 400, *common)
    assert built.exit_code == 0, built.output
    assert json.loads(built.stdout)["details"] == {"shards": 3, "vectors": 900, "bytes_per_vector": 1}
    found = hyperfaiss("search", "--index", "shards", "-i", "queries.parquet", "-o", "results", "--k", 20, *common)
    assert found.exit_code == 0, found.output
    summary = json.loads(found.stdout)
    assert (summary["kind"], summary["new_rows"], summary["parts"]) == ("search", 90, 1)
    assert summary["peak_memory"] > 1 << 20
    assert pq.read_table("results")["query_id"].to_pylist() == list(range(7, 97))
    again = hyperfaiss("search", "--index", "shards", "-i", "queries.parquet", "-o", "results", "--k", 20, "--id-column", "id")
    assert again.exit_code == 0
    assert "1 parts were there already" in again.stdout

    args = ("eval", "results", "--labels", "x", "--query-labels", "queries.parquet", "--id-column", "id", "--at", "5,20")
    scores = json.loads(hyperfaiss(*args, "--json").stdout)
    assert (scores["queries"], scores["k"]) == (90, 20)
    assert 0.5 < scores["metrics"]["map@20"] <= 1
    printed = dict(line.split() for line in hyperfaiss(*args).stdout.splitlines())
    assert printed["map@20"] == f"{scores['metrics']['map@20']:.4f}"

    assert hyperfaiss("merge", "shards", "-o", "all.index").exit_code == 0
    described = json.loads(hyperfaiss("info", "all.index", "--json").stdout)
    assert (described["kind"], described["ntotal"], described["checksums_ok"]) == ("flat index", 900, True)
    assert "flat index" in hyperfaiss("info", "all.index").stdout
    assert hyperfaiss("search", "--index", "all.index", "-i", "queries.parquet", "-o", "r2", "-k", 20, *common).exit_code == 0
    assert pq.read_table("r2")["ids"].to_pylist() == pq.read_table("results")["ids"].to_pylist()
    assert hyperfaiss("merge", "results", "-o", "merged", "--format", "npy", "-k", 3).exit_code == 0
    np.testing.assert_array_equal(np.load("merged/part-00000.query_ids.npy"), np.arange(7, 97))

    encoded = hyperfaiss(
        "encode", "-i", "x", "-o", "codes", "--codec", "all.index", "--where", "label in [1, 2]", "--format", "npy"
    )
    assert encoded.exit_code == 0, encoded.output
    assert np.load("codes/part-00000.codes.npy").shape == (300, 1)
    everyone = hyperfaiss("build", "-i", "x", "-o", "ivf", "--codec", "shards/template.index", "--where", "label = 3")
    assert everyone.exit_code == 0
    assert json.loads(hyperfaiss("info", "ivf", "--json").stdout)["ntotal"] == 150


def test_a_damaged_file_is_told_by_info(files):
    assert hyperfaiss("build", "-i", "x", "-o", "s", "--factory", "HPQ2x4").exit_code == 0
    path = files / "s" / "shard-00000.index"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = hyperfaiss("info", path)
    assert result.exit_code == 1
    assert "checksums_ok" in result.stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["build", "-i", "x", "-o", "s"], 2, "--codec or --factory"),
        (["build", "-i", "x", "-o", "s", "--codec", "a", "--factory", "b"], 2, "--codec or --factory"),
        (["build", "-o", "s", "--factory", "HPQ2"], 2, "--input"),
        (["build", "-i", "x", "-o", "s", "--factory", "HPQ2", "--where", "label"], 2, "NAME OP VALUE"),
        (["search", "--index", "s", "-i", "x", "-o", "r", "--k", "0"], 2, "--k"),
        (["search", "--index", "s", "-i", "x", "-o", "r", "--engine", "dask"], 2, "--engine"),
        (["encode", "-o", "e", "--codec", "c"], 2, "--input or --images"),
        (["eval", "r"], 2, "--ground-truth"),
        (["eval", "r", "--ground-truth", "g", "--at", "x"], 2, "whole numbers"),
        (["merge", "-o", "x.index"], 2, "PATH"),
        (["info"], 2, "FILE"),
        (["build", "-i", "none", "-o", "s", "--factory", "HPQ2"], 1, "error: no file 'none'"),
        (["build", "-i", "x", "-o", "s", "--factory", "PQ2"], 1, "error: 'PQ2' in 'PQ2' is not understood"),
        (["build", "-i", "x", "-o", "s", "--factory", "HPQ2", "--memory", "lots"], 1, "memory must be a size like 2GiB"),
        (["build", "-i", "nope://x/y.npy", "-o", "s", "--factory", "HPQ2"], 1, "error: 'nope://x/y.npy' can't be opened"),
        (["search", "--index", "none", "-i", "x", "-o", "r"], 1, "error: no file 'none'"),
        (["search", "--index", "queries.parquet", "-i", "x", "-o", "r"], 1, "not a whole safetensors file"),
        (["merge", "x", "-o", "m.index"], 1, "error: no file 'x' (.index)"),
        (["eval", "x", "--ground-truth", "g.npy"], 1, "holds no results"),
        (["info", "none"], 1, "error: no file"),
    ],
)
def test_errors_are_one_line_and_have_their_exit_code(args, code, message, files, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = hyperfaiss(*args)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    if code == 1:
        assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_starts_with_an_example_and_fits_a_screen(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    result = hyperfaiss(command, "--help")
    assert result.exit_code == 0
    lines = result.output.strip().splitlines()
    assert len(lines) <= 45
    assert any(f"hyperfaiss {command} " in line for line in lines[1:4])


def test_nothing_but_the_summary_is_printed_without_a_terminal(files, python):
    args = ["build", "-i", str(files / "x"), "-o", str(files / "s"), "--factory", "HPQ2x4"]
    done = python("import runpy; runpy.run_module('hyperfaiss', run_name='__main__')", *args)
    assert done.stderr.replace("hyperfaiss: compiling kernels for this machine (once; cached on disk) ...\n", "") == ""
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("missing", ["typer", "pyarrow", "fsspec", "rich"])
def test_without_its_extra_the_command_says_what_to_install(missing, python):
    code = f"import sys; sys.modules[{missing!r}] = None\ntry: import hyperfaiss.cli\nexcept SystemExit as stop: print(stop)"
    assert "pip install 'hyperfaiss[batch]'" in python(code).stdout


def test_the_library_does_not_import_the_extra(python):
    python("import sys, hyperfaiss; assert not {'pyarrow', 'fsspec', 'typer', 'ray', 'hyperfaiss.batch'} & set(sys.modules)")
