"""Searching: over any shards, in any blocks, to any format, the answer is that of one index, to the bit."""

from __future__ import annotations

import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyperfaiss.batch import Results, build, merge_results, open_source, search
from hyperfaiss.batch.memory import Budget
from hyperfaiss.batch.results import Hits, merge_lists, write_part
from hyperfaiss.errors import CorruptFileError, FileFormatError, InvalidParameterError, InvalidVectorsError


@pytest.fixture(scope="module")
def shards(tmp_path_factory, xb, codec, parquet):
    folder = tmp_path_factory.mktemp("shards")
    build(parquet(folder / "x", xb), str(folder / "s"), codec=str(codec), shard_rows=700)
    return str(folder / "s")


@pytest.fixture(scope="module")
def queries(tmp_path_factory, xq, saved):
    return str(saved(tmp_path_factory.mktemp("queries") / "q.npy", xq))


def assert_same(folder, ref, **options):
    found = Results.open(str(folder))
    comp = found.read(0, found.n)
    np.testing.assert_array_equal(comp.D, ref[0])
    np.testing.assert_array_equal(comp.I, ref[1])
    return comp


@pytest.mark.parametrize("form", ["parquet", "npy", "ibin"])
@pytest.mark.parametrize(("k", "part_rows"), [(1, 30), (20, 64), (20, None), (5000, 100)])
def test_the_answer_is_that_of_one_index(form, k, part_rows, tmp_path, xq, whole, shards, queries):
    summary = search(shards, queries, str(tmp_path / "r"), k=k, format=form, part_rows=part_rows)
    ref = whole.search(xq, k)
    ties = (ref[0][:, 1:] == ref[0][:, :-1]) & np.isfinite(ref[0][:, 1:])
    assert k == 1 or ties.any()  # or the order of ids was not tested
    comp = assert_same(tmp_path / "r", ref)
    np.testing.assert_array_equal(comp.query_ids, np.arange(len(xq)))
    assert summary.details == {"queries": len(xq), "shards": 5, "vectors": 3000}
    found = Results.open(str(tmp_path / "r"))
    for start, stop in ((0, 1), (29, 31), (60, 170), (5, 5)):
        np.testing.assert_array_equal(found.read(start, stop).I, ref[1][start:stop])


def test_parquet_parts_are_lists_without_gaps(tmp_path, xq, whole, shards, parquet):
    ids = [f"q{i}" for i in range(len(xq))]
    folder = parquet(tmp_path / "q", xq, rows=50, name=pa.array(ids))
    search(shards, open_source(folder, id_column="name"), str(tmp_path / "r"), k=4000, part_rows=64)
    table = pa.concat_tables([pq.read_table(path) for path in sorted((tmp_path / "r").glob("*.parquet"))])
    types = {"query_id": pa.large_string(), "ids": pa.list_(pa.int64()), "distances": pa.list_(pa.float32())}
    assert {field.name: field.type for field in table.schema} == types
    assert table["query_id"].to_pylist() == ids
    D, I = whole.search(xq, 3000)  # noqa: E741
    assert table["ids"].to_pylist() == I.tolist()
    assert table["distances"].to_pylist() == D.tolist()


def test_little_memory_changes_no_byte(tmp_path, shards, queries, contents, monkeypatch):
    sizes = []
    rows = Budget.rows

    def watched(self, *args):
        sizes.append(rows(self, *args))
        return sizes[-1]

    monkeypatch.setattr(Budget, "rows", watched)
    search(shards, queries, str(tmp_path / "a"), k=50)
    monkeypatch.setattr(Budget, "rows", lambda *_: 7)
    search(shards, queries, str(tmp_path / "b"), k=50)
    assert sizes[-1] > 7
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_keys_come_with_the_results(tmp_path, xb, xq, whole, codec, queries, parquet):
    keys = np.array([f"key {i}" for i in range(len(xb))])
    folder = parquet(tmp_path / "x", xb, key=pa.array(keys))
    build(open_source(folder, id_column="key"), str(tmp_path / "s"), codec=str(codec), shard_rows=900)
    search(str(tmp_path / "s"), queries, str(tmp_path / "r"), k=12, part_rows=50)
    comp = assert_same(tmp_path / "r", whole.search(xq, 12))
    assert comp.keys.to_pylist() == keys[comp.I.ravel()].tolist()
    part = pq.read_table(tmp_path / "r" / "part-00001.parquet")
    assert part["keys"].to_pylist() == keys[comp.I[50:100]].tolist()


def test_filtered_and_empty_queries(tmp_path, xq, whole, shards, parquet):
    folder = parquet(tmp_path / "q", xq, number=np.arange(len(xq)))
    source = open_source(folder, filters=[("number", ">=", 100)])
    search(shards, source, str(tmp_path / "r"), k=3, part_rows=64)
    comp = assert_same(tmp_path / "r", whole.search(xq[100:], 3))
    np.testing.assert_array_equal(comp.query_ids, np.arange(100, len(xq)))
    assert Results.open(str(tmp_path / "r")).starts == (0, 0, 28, 70)
    none = open_source(folder, filters=[("number", "<", 0)])
    search(shards, none, str(tmp_path / "empty"), k=3)
    assert Results.open(str(tmp_path / "empty")).n == 0


def test_ivf_shards_visit_the_lists_of_one_index(tmp_path, xb, xq, codec, parquet, queries):
    source = open_source(parquet(tmp_path / "x", xb))
    for name, rows in (("one", 5000), ("many", 700)):
        build(source, str(tmp_path / name), codec=str(codec), nlist=16, shard_rows=rows)
    for nprobe in (1, 3, 16):
        for name in ("one", "many"):
            search(str(tmp_path / name), queries, str(tmp_path / f"{name}{nprobe}"), k=10, nprobe=nprobe)
        ref, comp = (Results.open(str(tmp_path / f"{name}{nprobe}")).read(0, len(xq)) for name in ("one", "many"))
        np.testing.assert_array_equal(comp.I, ref.I)
        np.testing.assert_array_equal(comp.D, ref.D)


def test_shards_and_results_at_urls(tmp_path, xq, whole, shards, queries):
    memory = fsspec.filesystem("memory")
    memory.put(f"{shards}/", "/lake/shards/", recursive=True)
    search("memory://lake/shards", queries, "memory://lake/results", k=5, part_rows=99, cache=str(tmp_path / "cache"))
    found = Results.open("memory://lake/results")
    np.testing.assert_array_equal(found.read(0, len(xq)).I, whole.search(xq, 5)[1])
    assert sorted(path.rsplit("/", 1)[-1] for path in memory.ls("/lake/results", detail=False)) == [
        "_job.json", "part-00000.parquet", "part-00001.parquet",
    ]  # fmt: skip
    assert len(list((tmp_path / "cache").iterdir())) == 5
    memory.rm("/lake", recursive=True)


def test_what_does_not_fit_is_refused(tmp_path, xq, shards, queries, saved, parquet):
    out = str(tmp_path / "r")
    strings = open_source(parquet(tmp_path / "q", xq, name=pa.array([str(i) for i in range(len(xq))])), id_column="name")
    narrow = str(saved(tmp_path / "n.npy", xq[:, :3]))
    for source, options, error, message in (
        (queries, {"k": 0}, InvalidParameterError, "k must be"),
        (queries, {"k": 1, "format": "csv"}, InvalidParameterError, "format must be one of parquet, npy, ibin"),
        (queries, {"k": 1, "nprobe": 2}, InvalidParameterError, "nprobe = 2 is for IVF indexes"),
        (queries, {"k": 1, "part_rows": 0}, InvalidParameterError, "part_rows must be"),
        (narrow, {"k": 1}, InvalidVectorsError, "have 3 dimensions, the index .* takes 12"),
        (strings, {"k": 1, "format": "npy"}, InvalidParameterError, "no room for string query ids"),
        (str(tmp_path / "none.npy"), {"k": 1}, FileNotFoundError, "no file"),
    ):
        with pytest.raises(error, match=message):
            search(shards, source, out, **options)
    bad = xq.copy()
    bad[33, 2] = np.inf
    with pytest.raises(InvalidVectorsError, match=r"rows 0 to 169 of .*bad\.npy: .*first row 33"):
        search(shards, str(saved(tmp_path / "bad.npy", bad)), out, k=1)


def test_without_its_extra_the_ray_engine_says_what_to_install(tmp_path, shards, queries, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "hyperfaiss.batch.ray_engine", raising=False)
    with pytest.raises(InvalidParameterError, match=r"pip install 'hyperfaiss\[batch-ray\]'"):
        search(shards, queries, str(tmp_path / "r"), k=1, engine="ray")


def test_ids_beyond_a_format_are_refused(tmp_path):
    hits = Hits(np.arange(1), np.zeros((1, 1), np.float32), np.array([[2**31]]))
    with pytest.raises(InvalidVectorsError, match="id 2147483648 does not fit the int32"):
        write_part(str(tmp_path), "part-00000", "ibin", hits)
    with pytest.raises(InvalidVectorsError, match="no room for string query ids"):
        write_part(str(tmp_path), "part-00000", "npy", hits._replace(query_ids=pa.array(["a"])))
    assert not list(tmp_path.iterdir())


def test_results_that_changed_are_found(tmp_path, shards, queries):
    search(shards, queries, str(tmp_path / "r"), k=3, part_rows=60)
    part = tmp_path / "r" / "part-00001.parquet"
    pq.write_table(pq.read_table(part).slice(1), part)
    with pytest.raises(CorruptFileError, match="holds 59 queries, the job wrote 60"):
        Results.open(str(tmp_path / "r")).read(0, 100)
    part.write_bytes(b"nothing")
    with pytest.raises(CorruptFileError, match="can't be read as results"):
        Results.open(str(tmp_path / "r")).read(60, 61)
    with pytest.raises(FileFormatError, match="holds no results"):
        Results.open(shards)


# ------------------------------------------------------------------------------------------------------- merging lists

VALUES = st.sampled_from([0.0, 1.0, 1.5, -2.0, np.inf])


@given(st.lists(st.lists(st.tuples(VALUES, st.integers(0, 40)), max_size=6), min_size=1, max_size=4), st.integers(1, 9))
def test_merging_lists_is_sorting_their_union(lists, k):
    D, I = [], []  # noqa: E741
    for entries in lists:
        ordered, width = sorted(entries), max(map(len, lists))
        fill = width - len(ordered)
        D.append(np.array([[d for d, _ in ordered] + [np.inf] * fill], np.float32).reshape(1, width))
        I.append(np.array([[i for _, i in ordered] + [-1] * fill], np.int64).reshape(1, width))
    ref = (sorted(entry for entries in lists for entry in entries) + [(np.inf, -1)] * k)[:k]
    comp_D, comp_I, order = merge_lists(D, I, k)
    assert list(zip(comp_D[0].tolist(), comp_I[0].tolist(), strict=True)) == ref
    side = np.concatenate(I, axis=1)[0]
    for column, i in zip(order[0], comp_I[0], strict=True):
        assert i < 0 or side[column] == i


def test_merged_results_are_those_of_one_search(tmp_path, xb, xq, whole, codec, shards, queries, contents, parquet):
    for number in range(5):
        search(f"{shards}/shard-0000{number}.index", queries, str(tmp_path / f"r{number}"), k=15, part_rows=20 + number)
    parts = [str(tmp_path / f"r{number}") for number in range(5)]
    merge_results(parts, str(tmp_path / "m"), part_rows=33)
    assert_same(tmp_path / "m", whole.search(xq, 15))
    merge_results(parts[::-1], str(tmp_path / "n"), k=4, format="npy")
    assert_same(tmp_path / "n", whole.search(xq, 4))
    merge_results([str(tmp_path / "m")], str(tmp_path / "again"), k=4, format="npy")
    assert {name: data for name, data in contents(tmp_path / "n").items() if name != "_job.json"} == {
        name: data for name, data in contents(tmp_path / "again").items() if name != "_job.json"
    }
    for inputs, options, error, message in (
        (parts, {"k": 16}, InvalidParameterError, "k = 16 asks for more than the 15"),
        ([parts[0], parts[0]], {}, InvalidVectorsError, "finds id .* twice"),
        ([], {}, InvalidParameterError, "at least one"),
        ([shards], {}, FileFormatError, "holds no results"),
        (parts, {"format": "csv"}, InvalidParameterError, "format must be"),
    ):
        with pytest.raises(error, match=message):
            merge_results(inputs, str(tmp_path / "x"), **options)
    search(shards, open_source(parquet(tmp_path / "q", xq, id=np.arange(170) + 1), id_column="id"), str(tmp_path / "y"), k=15)
    with pytest.raises(InvalidVectorsError, match="answer different queries"):
        merge_results([parts[0], str(tmp_path / "y")], str(tmp_path / "x"))


def test_merged_results_keep_their_keys(tmp_path, xb, xq, whole, codec, queries, parquet):
    keys = np.array([f"key {i}" for i in range(len(xb))])
    parts = []
    for number, rows in enumerate((slice(0, 1000), slice(1000, 3000))):
        folder = parquet(tmp_path / f"x{number}", xb[rows], key=pa.array(keys[rows]))
        # Built apart, both number their vectors from 0: only the keys tell them apart.
        build(open_source(folder, id_column="key"), str(tmp_path / f"s{number}"), codec=str(codec))
        search(str(tmp_path / f"s{number}"), queries, str(tmp_path / f"r{number}"), k=10)
        parts.append(str(tmp_path / f"r{number}"))
    merge_results(parts, str(tmp_path / "m"))
    comp = Results.open(str(tmp_path / "m")).read(0, len(xq))
    D, I = whole.search(xq, 10)  # noqa: E741
    np.testing.assert_array_equal(comp.D, D)
    # Only without a tie does one order of ids agree with two.
    firm = np.ones(D.shape, bool)
    firm[:, 1:] &= D[:, 1:] > D[:, :-1]
    firm[:, :-1] &= D[:, :-1] < D[:, 1:]
    firm[:, -1] = False
    assert firm.sum() > 50
    found = np.array(comp.keys.to_pylist()).reshape(-1, 10)
    np.testing.assert_array_equal(found[firm], keys[I[firm]])
