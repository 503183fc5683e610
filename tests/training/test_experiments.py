"""Tables and sweeps: what they run, what they write, and that they go on where they were stopped."""

from __future__ import annotations

import csv
import json
import os
import signal

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from hyperfaiss.errors import InvalidParameterError
from training.config import TrainConfig
from training.data import load_images
from training.experiments import cli, runs, sweeps, tables
from training.experiments.baselines import faiss_index, normalized
from training.experiments.published import published_map
from training.experiments.runs import Result
from training.recipes import RECIPES
from training.views import CachedViews

app = typer.Typer()
cli.register(app)

TINY = [f"all:{change}" for change in ("nbits=4", "dsub=4", "hidden=8", "epochs=2", "levels=[8,4]", "warmup=1", "lr=0.1")]
RUN_FILES = {"best.pt", "config.json", "last.pt", "log.csv", "result.json", "run.json", "summary.json"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def hihpq(cache, tmp_path, monkeypatch):
    """Runs a command on a few digits; OUT is ``tmp_path / out``. Without curves, which take longer than the training."""
    monkeypatch.setattr("training.plots.plot_curves", lambda *_, **__: None)

    def run(command, *args, out="out", changes=TINY, **options):
        given = {
            "protocol": "cifar10-ii",
            "data": "digits",
            "queries_per_class": 4,
            "train_per_class": 12,
            "seeds": "0",
            "backbone": "pixels",
            "image_size": 8,
            "cached_views": 2,
            "cache": cache,
            "out": tmp_path / out,
        } | options
        named = [text for name, value in given.items() for text in ("--" + name.replace("_", "-"), str(value))]
        sets = [text for change in changes for text in ("--set", change)]
        return CliRunner().invoke(app, [command, *map(str, args), *named, *sets])

    return run


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def figures(path):
    """A CSV without what differs between two runs: times."""
    timed = ("seconds", "queries_per_second")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows_of(path)]


def test_a_table_the_whole_way(hihpq, tmp_path):
    out = tmp_path / "out"
    done = hihpq("table", methods="hihpq,exact,pq", bits="8,16", seeds="0,1")
    assert done.exit_code == 0, done.output
    assert "run 1 of 9: exact, float32, seed 0" in done.output
    rows = rows_of(out / "table.csv")
    assert sorted((r["method"], r["bits"], r["seed"]) for r in rows) == sorted(
        [("exact", "", "0"), *((m, b, s) for m in ("hihpq", "pq") for b in ("8", "16") for s in "01")]
    )
    assert all(0 < float(r["map_at_n"]) < 1 and int(r["n"]) == 1000 for r in rows)
    ours = [r for r in rows if r["method"] == "hihpq"]
    assert all(float(r["recall@10"]) > 0 and float(r["codebook_used"]) <= 16 for r in ours)

    page = (out / "table.md").read_text()
    cells = [float(r["map_at_n"]) * 100 for r in ours if r["bits"] == "8"]
    assert f"| hihpq | {np.mean(cells):.2f} ± {np.std(cells, ddof=1):.2f} |" in page
    assert "| method | 8 bits | 16 bits | seeds |" in page  # the paper measured no digits
    assert page.index("| exact |") < page.index("| pq |") < page.index("| hihpq |")
    assert "40 queries, 1,757 in the database, 120 training images (2 augmented views" in page

    folder = out / "hihpq" / "8bits" / "seed1"
    assert {p.name for p in folder.iterdir()} - {".lock"} == RUN_FILES
    result = json.loads((folder / "result.json").read_text())
    assert result["identity"]["config"] == json.loads((folder / "config.json").read_text())
    assert result["identity"]["config"]["seed"] == 1
    assert result["versions"]["torch"]
    assert json.loads((out / "split.json").read_text())["images"] == load_images("digits").fingerprint


def test_finished_runs_are_kept_and_tables_grow(hihpq, tmp_path, monkeypatch):
    assert hihpq("table", methods="pq", bits="8").exit_code == 0
    stamp = (tmp_path / "out" / "pq" / "8bits" / "seed0" / "result.json").stat().st_mtime_ns
    again = hihpq("table", methods="pq,exact", bits="8")
    assert again.exit_code == 0
    assert "1 of 2 runs are done already" in again.output
    assert "run 2 of 2: exact, float32, seed 0" in again.output
    assert (tmp_path / "out" / "pq" / "8bits" / "seed0" / "result.json").stat().st_mtime_ns == stamp
    # Asked for one method, the table shows all that there are; nothing is computed for it.
    monkeypatch.setattr(runs, "_measured", None)
    assert hihpq("table", methods="pq", bits="8").exit_code == 0
    assert [r["method"] for r in rows_of(tmp_path / "out" / "table.csv")] == ["exact", "pq"]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stopped_inside_a_run_it_goes_on(hihpq, tmp_path, monkeypatch, sent):
    out, asked = tmp_path / "out", {"methods": "hihpq,hihpq-euclidean", "bits": "8", "changes": [*TINY, "all:batch_size=40"]}
    views, calls = CachedViews.views, []

    def counted(self, indices, rng):
        calls.append(1)
        if len(calls) == 10:  # of 12: inside the second run
            os.kill(os.getpid(), sent)
        return views(self, indices, rng)

    monkeypatch.setattr(CachedViews, "views", counted)
    stopped = hihpq("table", **asked)
    assert stopped.exit_code == 130, stopped.output
    assert "the same command goes on from there" in stopped.output
    assert not (out / "hihpq" / "8bits" / "seed0" / "result.json").exists()
    assert [r["method"] for r in rows_of(out / "table.csv")] == ["hihpq-euclidean"]
    again = hihpq("table", **asked)
    assert again.exit_code == 0
    assert "1 of 2 runs are done already" in again.output
    assert len(calls) == 12  # nothing was done twice
    assert hihpq("table", out="whole", **asked).exit_code == 0
    assert figures(out / "table.csv") == figures(tmp_path / "whole" / "table.csv")


@pytest.mark.parametrize("name", ["run.json", "result.json", "table.csv"])
def test_stopped_between_runs_it_goes_on(hihpq, tmp_path, monkeypatch, name):
    asked = {"methods": "pq,hihpq", "bits": "8"}
    wait = {"run.json": 1, "result.json": 1, "table.csv": 0}[name]

    def stop_at(path):
        nonlocal wait
        if path.name == name:
            wait -= 1
            if wait < 0:
                raise KeyboardInterrupt

    write, write_csv = runs._write, tables.write_csv
    with monkeypatch.context() as patched:
        patched.setattr(runs, "_write", lambda path, fields: (stop_at(path), write(path, fields)))
        patched.setattr(tables, "write_csv", lambda results, path: (stop_at(path), write_csv(results, path)))
        assert hihpq("table", **asked).exit_code == 130
    assert hihpq("table", **asked).exit_code == 0
    assert hihpq("table", out="whole", **asked).exit_code == 0
    assert figures(tmp_path / "out" / "table.csv") == figures(tmp_path / "whole" / "table.csv")


def test_other_runs_in_the_folder_are_refused(hihpq, tmp_path):
    asked = {"methods": "hihpq", "bits": "8"}
    assert hihpq("table", **asked).exit_code == 0
    before = (tmp_path / "out" / "table.csv").read_bytes()
    for options, differing in (
        ({"changes": [*TINY, "lr=0.2"]}, "config.lr = 0.1 (asked: 0.2)"),
        ({"split_seed": 1}, "split = "),
        ({"cached_views": 3}, "views = 2 (asked: 3)"),
        ({"image_size": 7}, "image_size = 8 (asked: 7)"),
    ):
        refused = hihpq("table", **asked | options)
        assert refused.exit_code == 1, differing
        assert "hihpq/8bits/seed0 holds another run" in refused.output
        assert differing in refused.output
        assert (tmp_path / "out" / "table.csv").read_bytes() == before
    assert "n = 1000 (asked: 50)" in hihpq("table", "-n", 50, **asked).output
    # A folder that was only started is no different.
    (tmp_path / "out" / "hihpq" / "8bits" / "seed0" / "result.json").unlink()
    assert "config.lr = 0.1" in hihpq("table", **asked, changes=[*TINY, "lr=0.2"]).output
    assert hihpq("table", **asked).exit_code == 0
    assert (tmp_path / "out" / "table.csv").read_bytes() != b""


def test_a_field_that_configurations_get_later_has_its_default(hihpq, tmp_path):
    assert hihpq("table", methods="hihpq", bits="8").exit_code == 0
    path = tmp_path / "out" / "hihpq" / "8bits" / "seed0"
    for name in ("run.json", "result.json"):
        fields = json.loads((path / name).read_text())
        del fields["identity"]["config"]["mixup"]
        (path / name).write_text(json.dumps(fields))
    assert "1 of 1 runs are done already" in hihpq("table", methods="hihpq", bits="8").output


def test_a_failing_run_does_not_stop_the_others(hihpq, tmp_path):
    done = hihpq(
        "table", methods="hihpq,hihpq-euclidean,pq", bits="8", changes=[*TINY, "all:batch_size=40", "hihpq-euclidean:lr=1e30"]
    )
    assert done.exit_code == 1
    assert "hihpq-euclidean, 8 bits, seed 0 failed: the loss became" in done.output
    assert "1 of 3 runs failed" in done.output
    assert [r["method"] for r in rows_of(tmp_path / "out" / "table.csv")] == ["hihpq", "pq"]
    assert "the loss became" in (tmp_path / "out" / "hihpq-euclidean" / "8bits" / "seed0" / "error.txt").read_text()


def test_whatever_fails_is_told_and_tried_again(hihpq, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(runs, "faiss_index", lambda *_, **__: 1 / 0)
        done = hihpq("table", methods="pq", bits="8")
    assert done.exit_code == 1
    assert "ZeroDivisionError: division by zero" in done.output
    error = tmp_path / "out" / "pq" / "8bits" / "seed0" / "error.txt"
    assert "Traceback" in error.read_text()
    assert hihpq("table", methods="pq", bits="8").exit_code == 0
    assert not error.exists()


@pytest.mark.slow  # each process imports torch
def test_runs_in_processes_of_their_own(hihpq, tmp_path):
    done = hihpq(
        "table", methods="pq,hihpq", bits="8", seeds="0,1", jobs=2, changes=[*TINY, "all:batch_size=40", "hihpq:lr=1e30"]
    )
    assert done.exit_code == 1
    rows = rows_of(tmp_path / "out" / "table.csv")
    assert [(r["method"], r["seed"]) for r in rows] == [("pq", "0"), ("pq", "1")]
    assert "hihpq, 8 bits, seed 1: the loss became" in done.output


def test_two_commands_leave_each_others_runs_alone(hihpq, tmp_path, monkeypatch):
    import fcntl

    folder = tmp_path / "out" / "pq" / "8bits" / "seed0"
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = hihpq("table", methods="pq", bits="8,16")
    assert done.exit_code == 1
    assert "pq, 8 bits, seed 0: another process is at it" in done.output
    assert [r["bits"] for r in rows_of(tmp_path / "out" / "table.csv")] == ["16"]


def test_embeddings_only_and_labels_that_choose_the_epoch(hihpq, tmp_path, cache):
    more = ("--embeddings-only", "--by-labels", "--set", "all:val_fraction=0.1")
    done = hihpq("table", *more, methods="hihpq", bits="8", train_per_class=20, cache=tmp_path / "cache")
    assert done.exit_code == 0, done.output
    assert not list((tmp_path / "cache").glob("*views*"))
    folder = tmp_path / "out" / "hihpq" / "8bits" / "seed0"
    assert all(float(row["val_map"]) > 0 for row in rows_of(folder / "log.csv"))
    identity = json.loads((folder / "result.json").read_text())["identity"]
    assert (identity["views"], identity["epoch_by"]) == (0, "validation MAP")


# ---------------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("args", "options", "code", "message"),
    [
        (["table"], {"bits": "16,x"}, 2, "--bits takes numbers between commas, got '16,x'"),
        (["table"], {"seeds": ""}, 2, "--seeds takes numbers"),
        (["table"], {"methods": "hihpk"}, 1, "no method 'hihpk'; there are exact, pq, opq, spq"),
        (["table"], {"methods": "pq", "changes": ["lr"]}, 2, "--set takes NAME=VALUE, got 'lr'"),
        (["table"], {"methods": "hihpq", "changes": ["lrr=1"]}, 1, "unknown fields ['lrr']"),
        (["table"], {"methods": "hihpq", "changes": ["mecoq:lr=1"]}, 1, "changes for mecoq, which the table does not have"),
        (["table"], {"methods": "hihpq", "recipe": "papr"}, 1, "no recipe 'papr'"),
        (["table"], {"methods": "hihpq", "recipe": "paper", "bits": "24"}, 1, "is for 16, 32, 64 bits"),
        (["table", "--by-labels"], {"methods": "hihpq"}, 1, "val_fraction must be positive to hold images out, got 0.0"),
        (["table"], {"methods": "pq", "protocol": "cifar10"}, 1, "no protocol 'cifar10'"),
        (["table"], {"methods": "pq", "data": "no/such"}, 1, "no folder at no/such"),
        (["sweep", "codebook"], {}, 2, "no sweep 'codebook'; there are codebooks"),
        (["sweep", "tau-qc"], {"values": "0.1,a"}, 2, "--values takes numbers between commas"),
        (["sweep", "tau-qc"], {"values": "-1"}, 1, "tau_qc must be positive, got -1.0"),
        (["sweep", "quantization-error"], {"values": "1"}, 1, "quantization-error takes no values"),
        (["sweep", "codebooks"], {"changes": ["lambda1=1"]}, 1, "codebooks sets lambda1 itself"),
        (["sweep", "hierarchy"], {"values": "50-100"}, 1, "levels must be numbers of clusters >= 2, strictly decreasing"),
    ],
)  # fmt: skip
def test_usage_errors_come_before_any_work(hihpq, tmp_path, args, options, code, message):
    done = hihpq(*args, **{"changes": []} | options)
    assert (done.exit_code, "Traceback" in done.output) == (code, False), done.output
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_lists_may_be_repeated_options(hihpq, tmp_path):
    done = hihpq("table", "--bits", "8", "--bits", "16 32", "--methods", "pq", "--methods", "exact")
    assert done.exit_code == 0, done.output
    found = [(r["method"], r["bits"]) for r in rows_of(tmp_path / "out" / "table.csv")]
    assert found == [("exact", ""), ("pq", "8"), ("pq", "16"), ("pq", "32")]


# ---------------------------------------------------------------------------------------------- what is compared


def test_methods_keep_what_defines_them():
    changes = {
        "": {"lambda1": 2.0, "lr": 0.5},
        "all": {"epochs": 7},
        "mecoq": {"lr": 0.25},
        "vanilla-hyperbolic": {"lambda2": 9.0},
    }
    found = {
        run.method: run.config
        for run in tables.table_runs(["hihpq", "vanilla-hyperbolic", "mecoq", "pq"], [16], [3], changes=changes)
    }
    assert found["pq"] is None
    assert isinstance(found["hihpq"], TrainConfig)
    assert (found["hihpq"].lambda1, found["hihpq"].lr, found["hihpq"].M, found["hihpq"].seed) == (2.0, 0.5, 2, 3)
    assert (found["vanilla-hyperbolic"].lambda1, found["vanilla-hyperbolic"].lambda2) == (0.0, 9.0)
    assert (found["mecoq"].method, found["mecoq"].lr, found["mecoq"].tau) == ("mecoq", 0.25, 0.1)
    assert {found[m].epochs for m in ("hihpq", "vanilla-hyperbolic", "mecoq")} == {7}


@pytest.mark.parametrize("name", RECIPES)
def test_every_method_takes_every_recipe(name):
    planned = tables.table_runs(tables.expand(["all"]), [32], [0], recipe_name=name)
    assert {run.method for run in planned} == set(tables.METHODS)


def test_the_papers_tables_are_groups():
    assert tables.expand(["table1"])[:3] == ["exact", "pq", "opq"]
    assert {"spq", "mecoq", "cibhash", "bihalf", "hihpq"} <= set(tables.expand(["table1"]))
    seven = {f"{kind}-{space}" for kind in ("vanilla", "instance", "prototype") for space in ("euclidean", "hyperbolic")}
    assert seven | {"hihpq"} <= set(tables.expand(["table2"]))
    assert tables.expand(["all"]) == list(tables.METHODS) == tables.expand(reversed(tables.METHODS))


def test_seeds_are_outermost_and_exact_search_runs_once():
    order = [str(run) for run in tables.table_runs(["exact", "pq", "opq"], [8, 16], [0, 1])]
    assert order[:3] == ["exact, float32, seed 0", "pq, 8 bits, seed 0", "pq, 16 bits, seed 0"]
    assert sum(name.startswith("exact") for name in order) == 1
    assert len(order) == len(set(order)) == 9


def result(method, bits, seed, value, column=None):
    metrics = {"map_at_n": value / 100, "n": 1000}
    return Result(method, column or f"{bits} bits", seed, method, bits, metrics, {"train": 1.0}, None)


def test_tables_show_mean_spread_and_the_papers_figures():
    results = [result("hihpq", 16, s, v) for s, v in enumerate((50.0, 51.0, 52.0))]
    results += [result("hihpq", 32, 0, 60.0), result("pq", 32, 0, 40.0), result("exact", 0, 0, 55.0, "float32")]
    page = tables.markdown(results, "title", ["about"], "cifar10-ii").splitlines()
    assert page[:3] == ["# title", "", "about"]
    assert "| method | 16 bits | 32 bits | paper, 16 | paper, 32 | seeds |" in page
    assert "| hihpq | 51.00 ± 1.00 | 60.00 | 63.31 | 65.81 | 1–3 |" in page
    assert "| pq | – | 40.00 | 28.16 | 30.24 | 1 |" in page
    assert "| exact | 55.00 | 55.00 |  |  |  |" in page
    assert "VGG16" in page[-1]
    assert "paper" not in tables.markdown(results, "title")
    assert tables.terminal_table(results, "title", "cifar10-ii").row_count == 3


def test_published_figures_are_of_known_methods():
    assert published_map("cifar10-ii", "hihpq", 32) == 65.81
    assert published_map("nus-wide", "mecoq", 64) == 81.80
    assert published_map("cifar10-ii", "hihpq", 24) is None
    assert published_map("flickr25k", "vanilla-euclidean", 16) is None
    assert all(
        published_map("cifar10-ii", m, 16) for m in tables.expand(["table2"]) if m not in ("hihpq-cosine", "hihpq-euclidean")
    )


# ---------------------------------------------------------------------------------------------- sweeps


def test_a_sweep_of_codebooks_with_and_without_hierarchy(hihpq, tmp_path):
    asked = {"values": "1,2", "seeds": "0,1"}
    done = hihpq("sweep", "codebooks", changes=[change.removeprefix("all:") for change in TINY], **asked)
    assert done.exit_code == 0, done.output
    rows = rows_of(tmp_path / "out" / "codebooks.csv")
    series = ("with hierarchy", "without hierarchy")
    assert [(r["row"], r["column"], r["bits"], r["seed"]) for r in rows] == [
        (s, f"M={M}", str(4 * M), seed) for s in series for M in (1, 2) for seed in "01"
    ]
    with Image.open(tmp_path / "out" / "codebooks.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert {(0x1F, 0x77, 0xB4), (0xD9, 0x5F, 0x02)} <= colours  # both lines are there
    history = rows_of(tmp_path / "out" / "without-hierarchy" / "M=2" / "seed0" / "log.csv")
    assert all(float(row["prototype"]) == float(row["instance"]) == 0 for row in history)
    more = hihpq("sweep", "codebooks", changes=[change.removeprefix("all:") for change in TINY], values="2", seeds="1")
    assert "2 of 2 runs are done already" in more.output
    assert len(rows_of(tmp_path / "out" / "codebooks.csv")) == 2  # what was asked for


@pytest.mark.parametrize(
    ("name", "values", "columns"),
    [
        ("quantization-error", None, ["8 bits"]),
        ("tau-qc", "0.2,0.5", ["tau_qc=0.2", "tau_qc=0.5"]),
        ("curvature", "1,0.5", ["curvature=0.5", "curvature=1"]),
        ("hierarchy", "8-4,6", ["levels=6", "levels=8-4"]),
    ],
)
def test_sweeps(hihpq, tmp_path, name, values, columns):
    changes = [change.removeprefix("all:") for change in TINY if not (name == "hierarchy" and "levels" in change)]
    done = hihpq("sweep", name, changes=changes, bits=8, **({"values": values} if values else {}))
    assert done.exit_code == 0, done.output
    assert sorted({r["column"] for r in rows_of(tmp_path / "out" / f"{name}.csv")}) == columns
    with Image.open(tmp_path / "out" / f"{name}.png") as picture:
        assert (0x1F, 0x77, 0xB4) in {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}


@pytest.mark.parametrize("name", list(sweeps.SWEEPS))
def test_default_values_are_valid(name):
    assert len(sweeps.sweep_runs(name, [0])) >= 2


# ---------------------------------------------------------------------------------------------- faiss


def test_faiss_methods():
    import faiss

    x = np.random.default_rng(0).normal(size=(600, 24)).astype(np.float32)
    plain = faiss.IndexPQ(24, 2, 8)
    plain.pq.cp.min_points_per_centroid = 1
    plain.train(x)
    for method, bits, same in (("exact", 0, None), ("pq", 16, plain), ("opq", 16, None), ("opq", 32, None)):
        index = faiss_index(method, x, bits)
        assert (index.ntotal, index.is_trained) == (0, True)
        index.add(x)
        D, _ = index.search(x[:5], 3)
        assert D.shape == (5, 3)
        if same is not None:
            same.add(x)
            np.testing.assert_array_equal(D, same.search(x[:5], 3)[0])
    one, two = (faiss.vector_to_array(faiss_index("pq", x, 8, seed=s).pq.centroids) for s in (0, 1))
    assert not np.array_equal(one, two)


@pytest.mark.parametrize(
    ("method", "n", "bits", "message"),
    [
        ("ivf", 300, 8, "method must be one of exact, pq, opq"),
        ("pq", 300, 12, "multiple of 8, got 12"),
        ("pq", 300, 56, "a dimension that 7 divides, got 24"),
        ("opq", 300, 200, "at least 25 dimensions, got 24"),
        ("pq", 255, 8, "256 codewords can't be learnt from 255 vectors"),
    ],
)
def test_faiss_methods_refuse(method, n, bits, message):
    with pytest.raises(InvalidParameterError, match=message):
        faiss_index(method, np.zeros((n, 24), np.float32), bits)


def test_normalized_features():
    x = np.random.default_rng(0).normal(2, 1, size=(50, 6)).astype(np.float32)
    rows = np.arange(30)
    wanted = x - x[:30].mean(0)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    before = x.copy()
    np.testing.assert_allclose(normalized(x, rows), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(x, before)
    assert not normalized(np.ones((3, 2), np.float32), np.arange(3)).any()


@pytest.mark.parametrize("method", ["spq", "mecoq", "cibhash", "bihalf"])
def test_baselines_stand_in_tables(hihpq, tmp_path, method):
    done = hihpq("table", methods=method, bits="8")
    assert done.exit_code == 0, done.output
    assert [r["method"] for r in rows_of(tmp_path / "out" / "table.csv")] == [method]
