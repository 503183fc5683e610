"""Jobs that are killed, started again, changed, overwritten: one final answer or a clear refusal."""

from __future__ import annotations

import multiprocessing
import random
import signal
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from hyperfaiss import __version__
from hyperfaiss.batch import build, encode, job, merge_results, open_source, search
from hyperfaiss.batch.files import file_info, read_bytes, writing
from hyperfaiss.errors import CorruptFileError, FileFormatError, InvalidParameterError


@pytest.fixture
def inputs(tmp_path, xb, xq, parquet, saved):
    keys = pa.array([f"key {i}" for i in range(len(xb))])
    return open_source(parquet(tmp_path / "x", xb, key=keys), id_column="key"), str(saved(tmp_path / "q.npy", xq))


def test_a_finished_job_has_nothing_to_do(tmp_path, inputs, codec, contents):
    source, queries = inputs
    for run in (
        lambda: build(source, str(tmp_path / "s"), codec=str(codec), shard_rows=700),
        lambda: search(str(tmp_path / "s"), queries, str(tmp_path / "r"), k=5, part_rows=50),
        lambda: merge_results([str(tmp_path / "r")], str(tmp_path / "m"), part_rows=40),
        lambda: encode(source, str(tmp_path / "e"), codec=str(codec), part_rows=900),
    ):
        first = run()
        before = contents(Path(first.output))
        times = {path.name: path.stat().st_mtime_ns for path in Path(first.output).iterdir() if path.name != "_job.json"}
        second = run()
        assert (first.parts, second.parts, second.all_parts, second.new_rows) == (first.all_parts, 0, first.all_parts, 0)
        assert contents(Path(first.output)) == before
        assert {name: (Path(first.output) / name).stat().st_mtime_ns for name in times} == times


@pytest.mark.parametrize("form", ["parquet", "npy", "ibin"])
def test_missing_parts_are_made_again_the_same(form, tmp_path, inputs, codec, contents):
    source, queries = inputs
    shards, results = tmp_path / "s", tmp_path / "r"

    def run():
        built = build(source, str(shards), codec=str(codec), shard_rows=700)
        found = search(str(shards), queries, str(results), k=5, part_rows=50, format=form)
        return built.parts, found.parts

    assert run() == (5, 4)
    before = contents(shards), contents(results)
    (shards / "shard-00003.index").unlink()
    (shards / "shard-00001.keys.arrow").unlink()
    (shards / "shard-00001.index").unlink()
    # Killed before a part's last file, and while it was written.
    last = sorted(results.glob("part-*"), key=lambda path: (path.name.split(".")[0], ".ids." in path.name))
    assert [path.name.split(".")[0] for path in last[:: len(last) // 4]] == [f"part-0000{i}" for i in range(4)]
    for path in last[len(last) // 4 - 1 :: len(last) // 4][1:3]:
        path.unlink()
    (results / ".part-00002.ids.npy.0123abcd.tmp").write_bytes(b"half")
    (shards / ".shard-00003.index.0123abcd.tmp").write_bytes(b"half")
    assert run() == (2, 2)
    assert (contents(shards), contents(results)) == before


def test_the_manifest_is_there_before_any_part_and_says_what_the_job_is(tmp_path, inputs, codec, monkeypatch):
    source, queries = inputs
    build(source, str(tmp_path / "s"), codec=str(codec))
    seen = []

    def stop(folder, *_):
        seen.append(job.read_manifest(folder))
        raise KeyError

    monkeypatch.setattr(sys.modules["hyperfaiss.batch.search"], "write_part", stop)
    with pytest.raises(KeyError):
        search(str(tmp_path / "s"), queries, str(tmp_path / "r"), k=5)
    manifest = seen[0]
    assert manifest["finished"] is None
    fingerprint = manifest["fingerprint"]
    assert fingerprint["options"] == {"k": 5, "nprobe": None, "format": "parquet", "part_rows": 65536}
    assert fingerprint["versions"] == {"hyperfaiss": __version__, "pyarrow": pa.__version__}
    assert fingerprint["queries"]["files"][0]["size"] == Path(queries).stat().st_size
    assert len(fingerprint["index"][0]["digest"]) == 64


def test_another_job_is_refused_and_the_field_named(tmp_path, inputs, codec, saved, xq, contents, monkeypatch):
    source, queries = inputs
    shards, out = str(tmp_path / "s"), str(tmp_path / "r")
    build(source, shards, codec=str(codec), shard_rows=1000)
    search(shards, queries, out, k=5)
    before = contents(tmp_path / "r")

    def refused(message, **options):
        with pytest.raises(InvalidParameterError, match=message):
            search(shards, queries, out, **({"k": 5} | options))
        assert contents(tmp_path / "r") == before

    refused(r"options\.k was 5, is 6", k=6)
    refused(r"options\.part_rows was 65536, is 9\. .*or overwrite", part_rows=9)
    with monkeypatch.context() as patch:
        patch.setattr("hyperfaiss.batch.job.__version__", "9.9")
        refused(r"versions\.hyperfaiss was '.*', is '9\.9'")
    with pytest.raises(InvalidParameterError, match="kind was 'search', is 'encode'"):
        encode(source, out, codec=str(codec))
    build(source, str(tmp_path / "other"), codec=str(codec), shard_rows=1000)
    saved(Path(queries), xq + 1)
    refused(r"queries\.files\[0\]\.stamp was")
    build(source, shards, codec=str(codec), shard_rows=1500, overwrite=True)
    with pytest.raises(InvalidParameterError, match=r"index\[0\]\.digest was .*more fields"):
        search(shards, queries, out, k=5)
    search(shards, queries, out, k=6, overwrite=True)
    assert job.read_manifest(out)["fingerprint"]["options"]["k"] == 6


def test_overwriting_removes_what_was_ours_and_nothing_else(tmp_path, inputs, codec):
    source, _ = inputs
    out = tmp_path / "s"
    build(source, str(out), codec=str(codec), shard_rows=500)
    (out / "notes.txt").write_text("mine")
    build(source, str(out), codec=str(codec), shard_rows=2000, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == [
        "_job.json", "notes.txt", "shard-00000.index", "shard-00000.keys.arrow", "shard-00001.index", "shard-00001.keys.arrow",
        "template.index",
    ]  # fmt: skip


def test_parts_without_a_manifest_are_not_touched(tmp_path, inputs, codec):
    source, _ = inputs
    out = tmp_path / "s"
    out.mkdir()
    (out / "shard-00000.index").write_bytes(b"whose?")
    with pytest.raises(InvalidParameterError, match=r"holds shard-00000\.index but no _job\.json"):
        build(source, str(out), codec=str(codec))
    assert (out / "shard-00000.index").read_bytes() == b"whose?"
    for text, error in (("{", CorruptFileError), ("[]", CorruptFileError), ('{"format": 7}', FileFormatError)):
        (out / "_job.json").write_text(text)
        with pytest.raises(error, match=r"_job\.json"):
            build(source, str(out), codec=str(codec))


def test_a_job_that_made_nothing_stands_in_nobodys_way(tmp_path, inputs, codec):
    source, _ = inputs
    shards = str(tmp_path / "s")
    with pytest.raises(InvalidParameterError, match="train_rows must be"):
        build(source, shards, factory="HPQ4x4", train_rows=3)
    build(source, shards, codec=str(codec))


def test_two_processes_do_not_work_in_one_folder(tmp_path, inputs, codec):
    source, queries = inputs
    build(source, str(tmp_path / "s"), codec=str(codec))
    with (
        job.Job(str(tmp_path / "r"), "search", {}, {}, []),
        pytest.raises(InvalidParameterError, match="another process works in"),
    ):
        search(str(tmp_path / "s"), queries, str(tmp_path / "r"), k=1)
    search(str(tmp_path / "s"), queries, str(tmp_path / "r"), k=1)


def test_shard_rows_are_those_of_the_job_that_goes_on(tmp_path, inputs, codec):
    source, _ = inputs
    out = tmp_path / "s"
    build(source, str(out), codec=str(codec), shard_rows=1100)
    (out / "shard-00001.index").unlink()
    summary = build(source, str(out), codec=str(codec))
    assert (summary.parts, summary.all_parts) == (1, 3)


def test_a_file_that_is_being_written_is_not_there_yet(tmp_path):
    def fail(url):
        with writing(url) as path:
            path.write_bytes(b"half")
            raise KeyError

    for url in (str(tmp_path / "a.bin"), "memory://half/a.bin"):
        with pytest.raises(KeyError):
            fail(url)
        assert file_info(url) is None
        with writing(url) as path:
            path.write_bytes(b"whole")
            assert file_info(url) is None
        assert read_bytes(url) == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


# ------------------------------------------------------------------------------------------------------- kill -9


def whole_way(folder, codec):
    """Every kind of job, one after the other, in parts so small that there are many."""
    source = open_source(folder / "x", id_column="key")
    build(source, str(folder / "s"), codec=str(codec), shard_rows=150)
    search(str(folder / "s"), str(folder / "q.npy"), str(folder / "r"), k=20, part_rows=5)
    merge_results([str(folder / "r")], str(folder / "m"), part_rows=7)
    encode(source, str(folder / "e"), codec=str(codec), part_rows=200)


@pytest.mark.slow
def test_twenty_kills_leave_one_answer(tmp_path, xb, xq, codec, parquet, saved, contents):
    folders = ("s", "r", "m", "e")
    parquet(tmp_path / "x", xb, key=pa.array([f"key {i}" for i in range(len(xb))]))
    saved(tmp_path / "q.npy", xq)
    whole_way(tmp_path, codec)
    ref = {name: contents(tmp_path / name) for name in folders}
    parts = sum(len(files) for files in ref.values())
    for name in folders:
        (tmp_path / name).rename(tmp_path / f"undisturbed-{name}")

    def done():
        return sum(1 for name in folders for _ in (tmp_path / name).glob("[!.]*"))

    # A server that has imported what the jobs need, so that each of them takes no time to start.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hyperfaiss.batch"])
    rng, killed = random.Random(7), []
    for number in range(20):
        process = context.Process(target=whole_way, args=(tmp_path, codec))
        process.start()
        # When some more parts are there, and a moment later: kills fall all over the jobs, and in the middle of writing.
        goal = max(done(), number * parts // 20) + rng.randint(0, 3)
        while done() < goal and process.is_alive():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        killed.append(process.exitcode == -signal.SIGKILL)
        process.close()
    assert sum(killed) >= 19  # the last one may have come too late
    whole_way(tmp_path, codec)
    assert {name: contents(tmp_path / name) for name in folders} == ref
