"""Merging shards into one index. (Merging results is tested with the search that makes them.)"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from hyperfaiss import read_index
from hyperfaiss.batch import Results, build, merge, merge_shards, open_source, search
from hyperfaiss.errors import InvalidParameterError


@pytest.mark.parametrize("nlist", [None, 6])
@pytest.mark.parametrize("ids", ["rows", "numbers", "strings", "filtered"])
def test_one_index_of_all_shards(ids, nlist, tmp_path, xb, xq, codec, whole, parquet, saved):
    numbers = np.random.default_rng(0).permutation(5000)[: len(xb)]
    keys = pa.array([f"key {i}" for i in numbers])
    source = open_source(
        parquet(tmp_path / "x", xb, number=numbers, key=keys, year=np.arange(len(xb)) % 3),
        id_column={"numbers": "number", "strings": "key"}.get(ids),
        filters=[("year", "=", 1)] if ids == "filtered" else [],
    )
    build(source, str(tmp_path / "s"), codec=str(codec), nlist=nlist, shard_rows=700)
    summary = merge_shards(str(tmp_path / "s"), str(tmp_path / "all.index"))
    merged = read_index(tmp_path / "all.index")
    assert summary.rows == merged.ntotal == (1000 if ids == "filtered" else 3000)
    queries = str(saved(tmp_path / "q.npy", xq))
    options = {} if nlist is None else {"nprobe": 3}
    for name, index in (("ref", "s"), ("comp", "all.index")):
        search(str(tmp_path / index), queries, str(tmp_path / name), k=20, **options)
    ref, comp = (Results.open(str(tmp_path / name)).read(0, len(xq)) for name in ("ref", "comp"))
    np.testing.assert_array_equal(comp.I, ref.I)
    np.testing.assert_array_equal(comp.D, ref.D)
    if ids == "strings":
        assert comp.keys.to_pylist() == ref.keys.to_pylist()
    if ids == "rows" and nlist is None:
        np.testing.assert_array_equal(merged.codes, whole.codes)
        header = (tmp_path / "all.index").read_bytes()[:4000]
        assert b'\\"stored_ids\\": false' in header


def test_what_can_not_be_merged_is_refused(tmp_path, xb, codec, parquet):
    numbers = np.arange(len(xb))
    folder = parquet(tmp_path / "x", xb, number=numbers, same=numbers % 1500 + 7)
    build(open_source(folder), str(tmp_path / "s"), codec=str(codec), shard_rows=1500)
    build(open_source(folder, id_column="same"), str(tmp_path / "twice"), codec=str(codec), shard_rows=1500)
    for inputs, output, options, message in (
        ("s", "all", {}, "an index file ends in .index"),
        ("s", "all.index", {"memory": "1GB", "k": 3}, "k = 3 is for merging results"),
        ("twice", "all.index", {}, "both indexes hold id"),
    ):
        with pytest.raises(InvalidParameterError, match=message):
            merge(str(tmp_path / inputs), str(tmp_path / output), **options)
    assert not (tmp_path / "all.index").exists()
    merge([str(tmp_path / "s")], str(tmp_path / "all.index"))
    before = (tmp_path / "all.index").read_bytes()
    with pytest.raises(InvalidParameterError, match="exists already"):
        merge(str(tmp_path / "s"), str(tmp_path / "all.index"))
    merge(str(tmp_path / "s"), str(tmp_path / "all.index"), overwrite=True)
    assert (tmp_path / "all.index").read_bytes() == before
    other = tmp_path / "other"
    build(open_source(folder), str(other), factory="HPQ4x4", seed=9, shard_rows=1500)
    with pytest.raises(InvalidParameterError, match="merging needs the same codec"):
        merge_shards([str(tmp_path / "s" / "shard-00000.index"), str(other / "shard-00001.index")], str(tmp_path / "m.index"))
