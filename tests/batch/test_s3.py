"""The whole way on an S3-compatible server: vectors, shards, results and manifests at s3:// URLs."""

from __future__ import annotations

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from hyperfaiss.batch import Results, build, info, merge_shards, open_source, search
from hyperfaiss.batch.job import MANIFEST
from hyperfaiss.errors import InvalidParameterError

pytest.importorskip("s3fs", reason="s3fs is not installed")
server = pytest.importorskip("moto.server", reason="moto's server is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # botocore's own


@pytest.fixture
def bucket(monkeypatch):
    """An empty bucket of a server on 127.0.0.1, and how fsspec is told of it."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://{host}:{port}"})
    fs = fsspec.filesystem("s3")
    fs.mkdir("lake")
    yield fs
    running.stop()


def test_the_whole_way(bucket, tmp_path, xb, xq, codec, whole, parquet):
    folder = parquet(tmp_path / "x", xb, key=pa.array([f"key {i}" for i in range(len(xb))]), year=np.arange(len(xb)) % 5)
    queries = parquet(tmp_path / "q", xq)
    bucket.put(f"{folder}/", "lake/x/", recursive=True)
    bucket.put(f"{queries}/", "lake/q/", recursive=True)
    bucket.put(str(codec), "lake/codec.safetensors")

    def run():
        source = open_source("s3://lake/x/*.parquet", id_column="key", filters=[("year", ">=", 0)])
        built = build(source, "s3://lake/s", codec="s3://lake/codec.safetensors", shard_rows=1300)
        found = search("s3://lake/s", "s3://lake/q", "s3://lake/r", k=9, part_rows=64, cache=str(tmp_path / "cache"))
        return built.parts, found.parts

    assert run() == (3, 3)
    comp = Results.open("s3://lake/r").read(0, len(xq))
    D, I = whole.search(xq, 9)  # noqa: E741
    np.testing.assert_array_equal(comp.I, I)
    np.testing.assert_array_equal(comp.D, D)
    assert comp.keys.to_pylist() == [f"key {i}" for i in I.ravel()]

    # Parts that are gone are made again, the same; what is there is left alone.
    before = bucket.cat("lake/r/part-00001.parquet")
    bucket.rm("lake/r/part-00001.parquet")
    assert run() == (0, 1)
    assert bucket.cat("lake/r/part-00001.parquet") == before
    with pytest.raises(InvalidParameterError, match=r"options\.k was 9, is 8"):
        search("s3://lake/s", "s3://lake/q", "s3://lake/r", k=8)
    names = {path.rsplit("/", 1)[-1] for path in bucket.ls("lake/r", refresh=True)}
    assert names == {MANIFEST, *(f"part-0000{i}.parquet" for i in range(3))}

    merge_shards("s3://lake/s", "s3://lake/all.index")
    described = info("s3://lake/all.index")
    assert (described["ntotal"], described["checksums_ok"]) == (3000, True)
    bucket.pipe_file("lake/x/000.parquet", bucket.cat("lake/x/001.parquet"))
    with pytest.raises(InvalidParameterError, match=r"vectors\.files\[0\]\.stamp was"):
        run()
