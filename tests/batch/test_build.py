"""Building: shards of every kind hold what one index would; what can't be built is refused by name."""

from __future__ import annotations

import json

import faiss
import numpy as np
import pyarrow as pa
import pytest

from hyperfaiss import HyperbolicPQIndex, HyperbolicProductQuantizer, Model, Projector, read_index, write_index
from hyperfaiss.batch import build, encode, info, open_source
from hyperfaiss.batch.build import sample
from hyperfaiss.batch.memory import Budget, as_bytes
from hyperfaiss.batch.shards import ShardReader, find_shards
from hyperfaiss.errors import CorruptFileError, FileFormatError, InvalidParameterError, InvalidVectorsError


def entries(shards):
    """(id, code) of every vector of a build, as one sorted list."""
    found = []
    for shard in find_shards(shards):
        index = read_index(shard.url)
        found += [(int(i) + shard.add_id, code.tobytes()) for i, code in zip(index.ids, index.codes, strict=True)]
    return sorted(found)


def expected(whole, ids=None):
    return sorted((int(i), code.tobytes()) for i, code in zip(whole.ids if ids is None else ids, whole.codes, strict=True))


@pytest.mark.parametrize("shard_rows", [1, 700, 999, 100_000])
def test_shards_hold_what_one_index_does(shard_rows, tmp_path, xb, codec, whole, parquet):
    rows = 40 if shard_rows == 1 else len(xb)
    summary = build(parquet(tmp_path / "x", xb[:rows]), str(tmp_path / "s"), codec=str(codec), shard_rows=shard_rows)
    shards = find_shards(str(tmp_path / "s"))
    assert len(shards) == -(-rows // shard_rows)
    assert (summary.rows, summary.new_rows, summary.parts) == (rows, rows, len(shards))
    assert entries(str(tmp_path / "s")) == expected(whole)[:rows]
    # Row numbers cost nothing: they are not stored.
    assert all(shard.counts for shard in shards)
    assert [shard.add_id for shard in shards] == list(range(0, rows, shard_rows))


def test_memory_decides_the_size_of_batches_and_nothing_else(tmp_path, xb, codec, parquet, contents):
    source = open_source(parquet(tmp_path / "x", xb))
    little = Budget("100GiB").total - Budget("100GiB").free + (66 << 20)
    for name, memory in (("a", little), ("b", "20GiB")):
        build(source, str(tmp_path / name), codec=str(codec), shard_rows=1000, memory=memory)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_explicit_ids_are_stored(tmp_path, xb, codec, whole, parquet):
    ids = np.random.default_rng(0).permutation(9000)[: len(xb)] + 2**40
    folder = parquet(tmp_path / "x", xb, key=ids)
    build(open_source(folder, id_column="key"), str(tmp_path / "s"), codec=str(codec), shard_rows=800)
    assert entries(str(tmp_path / "s")) == expected(whole, ids)


def test_string_ids_go_into_a_table_beside_the_shard(tmp_path, xb, codec, whole, parquet):
    keys = [f"vector {i:05d} ü" for i in range(len(xb))]
    folder = parquet(tmp_path / "x", xb, key=pa.array(keys), year=np.arange(len(xb)) % 7)
    for name, filters in (("all", []), ("some", [("year", ">", 2)])):
        out = str(tmp_path / name)
        build(open_source(folder, id_column="key", filters=filters), out, codec=str(codec), shard_rows=800)
        kept = [row for row in range(len(xb)) if not filters or row % 7 > 2]
        ref = expected(whole)
        assert entries(out) == [ref[row] for row in kept]
        wanted = np.random.default_rng(0).choice(kept, (30, 5))
        wanted[3, 2:] = -1
        with ShardReader() as reader:
            comp = reader.keys(find_shards(out), wanted).to_pylist()
        assert comp == [keys[row] for row in wanted[wanted >= 0]]


def test_models_project_and_tangents_and_codes_skip_what_was_done(tmp_path, xb, codec, parquet, contents):
    rng = np.random.default_rng(0)
    projector = Projector([(rng.normal(size=(12, 12)) / 4, rng.normal(size=12) / 9)], normalize=True)
    model = str(tmp_path / "m.safetensors")
    Model(projector, HyperbolicProductQuantizer.load(codec), backbone="pixels").save(model)
    source = open_source(parquet(tmp_path / "x", xb))
    build(source, str(tmp_path / "ref"), codec=model, shard_rows=1000)
    assert read_index(tmp_path / "ref" / "shard-00000.index").projector is not None
    for content in ("tangents", "codes"):
        encode(source, str(tmp_path / content), codec=model, content=content, part_rows=500)
        build(str(tmp_path / content), str(tmp_path / f"by-{content}"), codec=model, content=content, shard_rows=1000)
        ref, comp = contents(tmp_path / "ref"), contents(tmp_path / f"by-{content}")
        assert {name: data for name, data in ref.items() if name.endswith(".index")} == {
            name: data for name, data in comp.items() if name.endswith(".index")
        }


def test_factory_trains_on_a_sample_once(tmp_path, xb, parquet, contents):
    source = open_source(parquet(tmp_path / "x", xb))
    for name in ("a", "b"):
        build(source, str(tmp_path / name), factory="HPQ4x4", curvature=0.5, clip_radius=2.0, train_rows=500, shard_rows=1500)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    index = read_index(tmp_path / "a" / "shard-00001.index")
    assert (index.M, index.nbits, index.ntotal) == (4, 4, 1500)
    np.testing.assert_array_equal(index.codec.curvatures, np.full(4, 0.5, np.float32))
    assert index.codec.clip_radius == 2.0
    same = HyperbolicProductQuantizer(12, 4, 4, curvatures=0.5, clip_radius=2.0)
    same.train(sample(source, 500, 1234))
    np.testing.assert_array_equal(same.codebooks, index.codec.codebooks)


@pytest.mark.parametrize("by", ["factory", "nlist", "index"])
def test_ivf_shards_share_their_centroids(by, tmp_path, xb, codec, whole, parquet):
    source = open_source(parquet(tmp_path / "x", xb))
    if by == "factory":
        options = {"factory": "IVF8,HPQ4x4", "clip_radius": 2.0}
    elif by == "nlist":
        options = {"codec": str(codec), "nlist": 8}
    else:
        build(source, str(tmp_path / "first"), codec=str(codec), nlist=8, shard_rows=5000)
        options = {"codec": str(tmp_path / "first" / "shard-00000.index")}
    build(source, str(tmp_path / "s"), shard_rows=800, **options)
    shards = [read_index(shard.url) for shard in find_shards(str(tmp_path / "s"))]
    assert [shard.nlist for shard in shards] == [8] * 4
    centroids = [faiss.serialize_index(shard.quantizer) for shard in shards]
    assert all((one == centroids[0]).all() for one in centroids)
    if by != "factory":
        assert entries(str(tmp_path / "s")) == expected(whole)
    ids = np.sort(np.concatenate([shard.ids for shard in shards]))
    np.testing.assert_array_equal(ids, np.arange(len(xb)))


def test_sample_is_spread_seeded_and_of_the_size_asked_for(tmp_path, saved):
    x = np.arange(50_000, dtype=np.float32)[:, None]
    source = open_source(saved(tmp_path / "x.npy", x))
    rows = sample(source, 1000, 7)[:, 0].astype(int)
    assert len(rows) == 1000
    assert len(np.unique(rows)) == 1000
    assert np.histogram(rows, 10, (0, 50_000))[0].min() > 50
    np.testing.assert_array_equal(sample(source, 1000, 7)[:, 0], rows)
    assert (sample(source, 1000, 8)[:, 0] != rows).any()
    assert len(sample(source, 99_999, 0)) == 50_000
    assert len(sample(source, 3, 0)) == 3


def test_what_does_not_fit_is_refused(tmp_path, xb, codec, parquet, saved, whole):
    x = str(saved(tmp_path / "x.npy", xb))
    write_index(whole, tmp_path / "whole.index")
    out, good = str(tmp_path / "s"), str(codec)
    narrow = str(saved(tmp_path / "n.npy", xb[:, :5]))
    for args, error, message in (
        ((x, out), InvalidParameterError, "give either a codec"),
        ((x, out, {"codec": good, "factory": "HPQ4"}), InvalidParameterError, "give either a codec"),
        ((x, out, {"factory": "HPQ4", "nlist": 3}), InvalidParameterError, "give either a codec"),
        ((x, out, {"codec": str(tmp_path / "whole.index"), "nlist": 3}), InvalidParameterError, "holds an index"),
        ((x, out, {"factory": "PQ4"}), InvalidParameterError, "not understood"),
        ((narrow, out, {"codec": good}), InvalidVectorsError, "n.npy holds embeddings of 5 dimensions, the index takes 12"),
        ((narrow, out, {"codec": good, "content": "codes"}), InvalidVectorsError, "codes of 5 dimensions, the index takes 2"),
        ((x, out, {"codec": good, "content": "pixels"}), InvalidParameterError, "content must be"),
        ((x, out, {"codec": x}), Exception, "not a whole safetensors file"),
        ((x, out, {"codec": good, "shard_rows": 0}), InvalidParameterError, "shard_rows must be"),
        ((x, out, {"codec": good, "memory": "1MB"}), InvalidParameterError, "memory 1 MiB is too little: give"),
        ((x, out, {"codec": good, "memory": "lots"}), InvalidParameterError, "memory must be a size like 2GiB"),
        (
            (x, out, {"codec": good, "shard_rows": 10**10}),
            InvalidParameterError,
            r"a shard of 10,000,000,000 vectors \(shard_rows\) takes",
        ),
        ((x, out, {"factory": "HPQ4", "train_rows": 5}), InvalidParameterError, "train_rows must be"),
        ((x, out, {"codec": good, "engine": "dask"}), InvalidParameterError, "engine must be"),
        ((x, out, {"codec": good, "address": "auto"}), InvalidParameterError, "is for engine 'ray'"),
    ):
        with pytest.raises(error, match=message):
            build(*args[:2], **(args[2] if len(args) > 2 else {}))
        assert not list((tmp_path / "s").glob("*.index")), message


def test_a_bad_vector_is_named_by_file_and_rows(tmp_path, xb, codec, parquet):
    x = xb.copy()
    x[1234, 3] = np.nan
    with pytest.raises(InvalidVectorsError, match=r"rows 0 to 699 of .*001\.parquet: .*first row 534"):
        build(parquet(tmp_path / "x", x), str(tmp_path / "s"), codec=str(codec), shard_rows=700)


def test_duplicate_ids_are_refused(tmp_path, xb, codec, parquet):
    ids = np.arange(len(xb))
    ids[17] = 16
    with pytest.raises(InvalidVectorsError, match=r"000\.parquet.*ids must differ"):
        build(open_source(parquet(tmp_path / "x", xb, key=ids), id_column="key"), str(tmp_path / "s"), codec=str(codec))


def test_shards_that_do_not_belong_together_are_refused(tmp_path, xb, codec, parquet, whole):
    for name in ("a", "b"):
        build(parquet(tmp_path / f"x{name}", xb[:100]), str(tmp_path / name), codec=str(codec))
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(InvalidParameterError, match="both hold id 0: build them in one job"):
        find_shards(both)
    other = HyperbolicPQIndex(4, 2, 4)
    other.train(xb[:, :4])
    write_index(other, tmp_path / "other.index")
    with pytest.raises(InvalidParameterError, match=r"takes vectors of 12 dimensions, .* of 4"):
        find_shards([both[0], str(tmp_path / "other.index")])
    with pytest.raises(FileFormatError, match="holds a codec, expected an index"):
        find_shards(str(codec))
    whole = (tmp_path / "other.index").read_bytes()
    for damaged, reason in ((whole[:-1], "bytes expected"), (whole.replace(b"geodesic", b"squared "), "does not match")):
        (tmp_path / "other.index").write_bytes(damaged)
        with pytest.raises(CorruptFileError, match=f"other.index: .*{reason}"):
            find_shards(str(tmp_path / "other.index"))
    with pytest.raises(FileNotFoundError):
        find_shards(str(tmp_path / "none"))
    manifest = tmp_path / "a" / "_job.json"
    text = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(text) | {"finished": None}))
    with pytest.raises(FileFormatError, match="has not finished"):
        find_shards(both[0])
    # A glob names files, whatever their job says.
    assert len(find_shards(f"{tmp_path}/a/shard-*.index")) == 1
    manifest.write_text(text)


def test_as_bytes():
    assert [as_bytes(size) for size in ("2GiB", "1.5 kb", "10M", 7, "1t", "3ki")] == [2**31, 1500, 10**7, 7, 10**12, 3072]
    for wrong in ("", "GiB", "-1", "2XB", 0, True, None, "0"):
        with pytest.raises(InvalidParameterError, match="memory must be a size"):
            as_bytes(wrong)


def test_info_tells_what_things_are(tmp_path, xb, codec, parquet):
    folder = parquet(tmp_path / "x", xb)
    build(open_source(folder), str(tmp_path / "s"), codec=str(codec), shard_rows=2000)
    found = info(str(tmp_path / "s"))
    assert (found["kind"], found["finished"], found["shards"], found["shards_done"]) == ("build job", True, 2, 2)
    assert (found["ntotal"], found["d"]) == (3000, 12)
    found = info(str(tmp_path / "s" / "shard-00001.index"))
    expected = {"kind": "flat index", "ntotal": 1000, "metric": "geodesic", "d": 12, "M": 4, "nbits": 4}
    assert {name: found[name] for name in expected} == expected
    assert found["checksums_ok"] is True
    assert found["tensors"]["codec.codebooks"] == "F32 [4, 16, 3]"
    assert info(str(codec))["kind"] == "codec"
    assert info(str(folder)) == {"path": str(folder), "kind": "vectors", "files": 5, "rows": 3000, "d": 12,
                                 "bytes": sum(path.stat().st_size for path in folder.iterdir())}  # fmt: skip
    data = codec.read_bytes()
    last = data[:-1] + bytes([data[-1] ^ 1])
    for damaged in (last, data.replace(b"geodesic", b"squared ")):
        (tmp_path / "bad.safetensors").write_bytes(damaged)
        assert info(str(tmp_path / "bad.safetensors"))["checksums_ok"] is False
    assert "checksums_ok" not in info(str(codec), checksums=False)
    with pytest.raises(FileNotFoundError):
        info(str(tmp_path / "none"))
