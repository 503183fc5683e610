"""Sources: every format gives the same rows, whatever the ranges; what is wrong is named."""

from __future__ import annotations

import pickle

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hyperfaiss.batch import open_source
from hyperfaiss.batch.sources import split
from hyperfaiss.errors import CorruptFileError, InvalidParameterError, InvalidVectorsError

FORMATS = [(".npy", "f2"), (".npy", "f4"), (".npy", "f8"), (".npy", ">f4"), (".npy", "i4"), (".fvecs", "f4"), (".bvecs", "u1"),
           (".ivecs", "i4"), (".fbin", "f4"), (".u8bin", "u1"), (".i8bin", "i1"), (".ibin", "i4")]  # fmt: skip


def all_rows(source, rows=50):
    batches = list(source.read(split(0, source.n, rows)))
    assert [batch.first for batch in batches] == list(range(0, source.n, rows))
    return batches


def together(batches):
    return np.concatenate([batch.vectors for batch in batches])


@pytest.mark.parametrize(("suffix", "dtype"), FORMATS)
def test_matrices_give_their_rows_in_any_range(suffix, dtype, tmp_path, saved):
    x = (np.random.default_rng(0).normal(size=(137, 9)) * 20).astype(dtype)
    saved(tmp_path / f"a{suffix}", x[:60])
    saved(tmp_path / f"b{suffix}", x[60:])
    source = open_source(tmp_path)
    assert (source.n, source.d, source.string_ids) == (137, 9, False)
    for rows in (1, 50, 60, 1000):
        batches = all_rows(source, rows)
        comp = together(batches)
        np.testing.assert_array_equal(comp, x)
        assert comp.dtype.newbyteorder("=") == x.dtype.newbyteorder("=")
        np.testing.assert_array_equal(np.concatenate([batch.ids for batch in batches]), np.arange(137))
    middle = next(source.read([(55, 65)]))
    np.testing.assert_array_equal(middle.vectors, x[55:65])


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1"])
@pytest.mark.parametrize("kind", ["fixed", "list", "large"])
@pytest.mark.parametrize("rows", [1, 33, 64, 5000])
def test_parquet_columns_give_their_rows_in_any_range(dtype, kind, rows, tmp_path):
    x = (np.random.default_rng(0).normal(size=(300, 5)) * 20).astype(dtype)
    for part in range(3):
        flat, offsets = pa.array(x[part * 100 : part * 100 + 100].ravel()), pa.array(np.arange(0, 501, 5))
        if kind == "fixed":
            column = pa.FixedSizeListArray.from_arrays(flat, 5)
        else:
            made = pa.ListArray if kind == "list" else pa.LargeListArray
            column = made.from_arrays(offsets.cast(pa.int32() if kind == "list" else pa.int64()), flat)
        pq.write_table(pa.table({"v": column}), tmp_path / f"{part}.parquet", row_group_size=37)
    source = open_source(tmp_path)
    np.testing.assert_array_equal(together(all_rows(source, rows)), x)
    # Forward with gaps, and back.
    for ranges in ([(10, 20), (150, 210), (290, 300)], [(150, 160), (20, 40), (36, 38)]):
        comp = [batch.vectors for batch in source.read(ranges)]
        for (start, stop), part in zip(ranges, comp, strict=True):
            np.testing.assert_array_equal(part, x[start:stop])


def test_a_source_can_be_pickled(tmp_path, parquet, xb):
    source = open_source(parquet(tmp_path / "x", xb))
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(together(all_rows(again, 900)), xb)
    assert again.describe() == source.describe()


@pytest.mark.parametrize("kind", ["int32", "uint64", "string", "large_string"])
def test_ids_come_from_their_column(kind, tmp_path, xb, parquet):
    numbers = np.random.default_rng(3).permutation(300)
    ids = pa.array([f"k{i}" for i in numbers] if "string" in kind else numbers).cast(getattr(pa, kind)())
    folder = parquet(tmp_path / "x", xb[:300], rows=128, name=ids)
    source = open_source(folder, id_column="name")
    assert source.string_ids == ("string" in kind)
    batches = all_rows(source, 70)
    comp = [value for batch in batches for value in (batch.ids.to_pylist() if source.string_ids else batch.ids.tolist())]
    assert comp == [f"k{i}" if "string" in kind else i for i in numbers]
    np.testing.assert_array_equal(np.concatenate([batch.rows for batch in batches]), np.arange(300))


@pytest.mark.parametrize("group", [16, 64, 1000])
def test_a_filter_leaves_rows_out_and_never_renumbers(group, tmp_path, xb, parquet):
    year = np.repeat([2018, 2019, 2020], 100)
    kind = np.array(["a", "b"])[np.arange(300) % 2]
    folder = parquet(tmp_path / "x", xb[:300], rows=140, group=group, year=year, kind=pa.array(kind))
    source = open_source(folder, filters=[("year", ">=", 2019), ("kind", "in", ["b"])])
    ref = np.flatnonzero((year >= 2019) & (kind == "b"))
    batches = all_rows(source, 45)
    np.testing.assert_array_equal(np.concatenate([batch.rows for batch in batches]), ref)
    np.testing.assert_array_equal(together([batch for batch in batches if len(batch)]), xb[ref])
    assert source.n == 300
    assert source.filtered
    assert not len(batches[0])


def test_folders_globs_and_lists_name_files(tmp_path, xb, parquet, saved):
    folder = parquet(tmp_path / "x", xb[:300], rows=100)
    (folder / "_SUCCESS").write_text("")
    (folder / ".hidden.parquet").write_text("no Parquet")
    (folder / "notes.txt").write_text("no data")
    deep = parquet(folder / "year=2020", xb[300:400])
    assert open_source(folder).n == 400
    assert open_source(f"{folder}/*.parquet").n == 300
    assert open_source([folder / "002.parquet", folder / "000.parquet"]).files[0].url.endswith("002.parquet")
    assert open_source(deep).n == 100
    # A name with a bracket is a name before it is a pattern.
    odd = saved(tmp_path / "a[1].npy", xb[:5])
    assert open_source(odd).n == 5


def test_urls_of_fsspec(xb, tmp_path, parquet):
    folder = parquet(tmp_path / "x", xb[:300], rows=100)
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    np.save(tmp_path / "q.npy", xb[:70])
    memory.pipe_file("/bucket/q.npy", (tmp_path / "q.npy").read_bytes())
    for path in ("memory://bucket/*.parquet", [f"memory://bucket/{i:03d}.parquet" for i in range(3)]):
        np.testing.assert_array_equal(together(all_rows(open_source(path))), xb[:300])
    source = open_source("memory://bucket/q.npy")
    np.testing.assert_array_equal(together(all_rows(source, 33)), xb[:70])
    assert source.files[0].url.endswith("bucket/q.npy")
    memory.rm("/bucket", recursive=True)


def test_describe_changes_with_the_content(tmp_path, saved, xb):
    path = saved(tmp_path / "x.npy", xb[:10])
    before = open_source(path).describe()
    assert open_source(path).describe() == before
    saved(path, xb[10:20])
    assert open_source(path).describe() != before


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (lambda p: np.save(p / "x.npy", np.ones(3)), InvalidVectorsError, r"shape \(3,\), expected real numbers"),
        (lambda p: np.save(p / "x.npy", np.array([["a"]])), InvalidVectorsError, "expected real numbers"),
        (lambda p: np.save(p / "x.npy", np.asfortranarray(np.ones((3, 4)))), InvalidVectorsError, "Fortran order"),
        (lambda p: (p / "x.npy").write_bytes(b"\x93NUMPY junk"), CorruptFileError, "can't be read as .npy"),
        (lambda p: (p / "x.fvecs").write_bytes(b"\4\0\0\0" + bytes(15)), CorruptFileError, "19 bytes, which rows of 4"),
        (lambda p: (p / "x.fvecs").write_bytes(b"\xff" * 8), CorruptFileError, "rows of -1"),
        (lambda p: (p / "x.fbin").write_bytes(b"\2\0\0\0\4\0\0\0" + bytes(31)), CorruptFileError, "promises 2 rows of 4"),
        (lambda p: (p / "x.ibin").write_bytes(b"\2"), CorruptFileError, "promises 0 rows"),
        (lambda p: (p / "x.parquet").write_bytes(b"PAR1 no"), CorruptFileError, "can't be read as Parquet"),
        (lambda p: (p / "x.txt").write_text("hello"), FileNotFoundError, "no file"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_vectors_is_named(write, error, message, tmp_path):
    write(tmp_path)
    with pytest.raises(error, match=message):
        open_source(tmp_path)


def test_files_of_one_source_must_agree(tmp_path, saved, xb, parquet):
    saved(tmp_path / "a.npy", xb[:5])
    saved(tmp_path / "b.npy", xb[:5, :3])
    with pytest.raises(InvalidVectorsError, match=r"a\.npy holds vectors of dimension 12, .*b\.npy 3"):
        open_source(tmp_path)
    saved(tmp_path / "b.fbin", xb[:5])
    with pytest.raises(InvalidParameterError, match=r"one format, got .*b\.npy, .*b\.fbin"):
        open_source(tmp_path)
    with pytest.raises(InvalidParameterError, match=r"ends in '\.txt'"):
        open_source(saved(tmp_path / "c.txt", xb[:1]))
    for option in ({"column": "v"}, {"id_column": "id"}, {"filters": [("a", "=", 1)]}):
        with pytest.raises(InvalidParameterError, match="has no columns"):
            open_source(tmp_path / "a.npy", **option)
    folder = parquet(tmp_path / "x", xb[:10], rows=5, id=np.arange(10))
    strings = pq.read_table(folder / "001.parquet").set_column(0, "id", pa.array([*"abcde"]))
    pq.write_table(strings, folder / "001.parquet")
    with pytest.raises(InvalidVectorsError, match=r"string ids: False, .* True"):
        open_source(folder, id_column="id")


def test_columns_are_chosen_or_named(tmp_path, table, xb):
    pq.write_table(table(xb[:4], id=[1.5] * 4, other=[[1.0]] * 4), tmp_path / "x.parquet")
    for options, message in (
        ({}, r"one column of lists of numbers, has 2 of them \(other, embedding\)"),
        ({"column": "vector"}, "no column 'vector', but id, other, embedding"),
        ({"column": "id"}, "'id' of .* holds double, expected lists of numbers"),
        ({"column": "embedding", "id_column": "key"}, "no column 'key'"),
        ({"column": "embedding", "id_column": "id"}, "holds double, expected integers or strings"),
        ({"column": "embedding", "filters": [("year", "=", 1)]}, "no column 'year'"),
    ):
        with pytest.raises(InvalidParameterError, match=message):
            open_source(tmp_path / "x.parquet", **options)
    assert open_source(tmp_path / "x.parquet", column="other").d == 1
    source = open_source(tmp_path / "x.parquet", column="embedding", filters=[("id", ">", "a")])
    with pytest.raises(InvalidParameterError, match="does not fit"):
        all_rows(source)
    for filters in ([("id", "~", 1)], ["id > 1"]):
        with pytest.raises(InvalidParameterError, match="filters must be"):
            open_source(tmp_path / "x.parquet", column="embedding", filters=filters)


def test_bad_rows_are_named(tmp_path):
    good = [[1.0, 2.0]] * 6
    for bad, message in (
        ([None], "row 6 of .* is null"),
        ([[1.0]], "row 6 of .* has 1 values in 'v', expected 2"),
        ([[1.0, None]], "row 6 of .* has a null value"),
    ):
        pq.write_table(pa.table({"v": pa.array(good + bad, pa.list_(pa.float32()))}), tmp_path / "x.parquet", row_group_size=4)
        with pytest.raises(InvalidVectorsError, match=message):
            all_rows(open_source(tmp_path / "x.parquet"))
    for ids, message in (([1, None], "row 1 of .* is null in column 'id'"), ([1, 2**63], "does not fit int64")):
        pq.write_table(pa.table({"v": good[:2], "id": pa.array(ids, pa.uint64())}), tmp_path / "x.parquet")
        with pytest.raises(InvalidVectorsError, match=message):
            all_rows(open_source(tmp_path / "x.parquet", id_column="id"))


def test_a_row_of_another_length_is_found(tmp_path, saved, xb):
    path = saved(tmp_path / "x.fvecs", xb[:10])
    data = bytearray(path.read_bytes())
    data[7 * 52] = 11
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match="row 7 of"):
        all_rows(open_source(path))


def test_a_damaged_page_is_a_typed_error(tmp_path, parquet, xb):
    path = parquet(tmp_path / "x", xb, rows=len(xb)) / "000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3 : len(data) // 3 + 4000] = b"\xff" * 4000
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match="can't be read"):
        all_rows(open_source(path))
