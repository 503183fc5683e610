"""The Ray engine: on a cluster of three nodes that loses workers and nodes, the bytes are those of the local engine."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

# Before Ray is imported: all of it listens on 127.0.0.1 only, and reports to nobody.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

ray = pytest.importorskip("ray", reason="the extra batch-ray is not installed")

from ray.cluster_utils import Cluster  # noqa: E402

from hyperfaiss.batch import build, encode, open_source, ray_engine, search  # noqa: E402
from hyperfaiss.batch.results import write_part  # noqa: E402
from hyperfaiss.errors import CorruptFileError, HyperfaissError, InvalidVectorsError  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own


def add_node(cluster, **options):
    return cluster.add_node(num_cpus=1, object_store_memory=80 << 20, **options)


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs for workers and two nodes with one each; a third may come."""
    made = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
    )
    for _ in range(2):
        add_node(made)
    ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def files(tmp_path_factory, xb, xq, codec, parquet):
    """Vectors in Parquet with string ids, and what the local engine makes of them."""
    folder = tmp_path_factory.mktemp("ray")
    parquet(folder / "x", xb, key=pa.array([f"key {i}" for i in range(len(xb))]))
    parquet(folder / "q", np.concatenate([xq] * 4), rows=200, key=pa.array([f"query {i}" for i in range(4 * len(xq))]))
    build(vectors(folder), str(folder / "s"), codec=str(codec), shard_rows=400)
    search(str(folder / "s"), queries(folder), str(folder / "r"), k=15, part_rows=32)
    encode(vectors(folder), str(folder / "e"), codec=str(codec), part_rows=250)
    return folder


def vectors(folder):
    return open_source(folder / "x", id_column="key")


def queries(folder):
    return open_source(folder / "q", id_column="key")


@pytest.fixture(autouse=True)
def bounded():
    """No test may hang: after ten minutes, which a busy machine does not need, the interpreter says where it is and ends."""
    faulthandler.dump_traceback_later(600, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def when_written(monkeypatch, number, action):
    """Do something, once, before the part of this number is written."""
    done = []

    def write(folder, stem, *rest):
        if stem == f"part-{number:05d}" and not done:
            done.append(action())
        write_part(folder, stem, *rest)

    monkeypatch.setattr(sys.modules["hyperfaiss.batch.search"], "write_part", write)
    return done


def test_everything_listens_on_the_loopback_only(cluster):
    sockets = set()
    for pid in _below(os.getpid()):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                sockets.add(str(descriptor.readlink()))
    bound = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                bound.append(fields[1].split(":")[0])
    assert len(bound) > 5
    assert set(bound) <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def test_a_private_cluster_listens_on_the_loopback_only(files, contents, tmp_path, python):
    code = """
import sys, ray
from hyperfaiss import batch
from hyperfaiss.batch.ray_engine import RayEngine
source = batch.open_source(sys.argv[1] + "/q", id_column="key")
with RayEngine(None) as engine:
    print([node["NodeManagerAddress"] for node in ray.nodes()], ray.get_runtime_context().gcs_address)
    batch.search(sys.argv[1] + "/s", source, sys.argv[2], k=15, part_rows=32, engine="ray", workers=1)
print(ray.is_initialized())
"""
    ended = python(code, str(files), str(tmp_path / "r"), RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="").stdout
    assert ended.startswith("['127.0.0.1'] 127.0.0.1:")
    assert ended.endswith("False\n")
    assert contents(tmp_path / "r") == contents(files / "r")


def _below(pid):
    """This process and those that it started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, more = set(), {pid}
    while more:
        found |= more
        more = {child for child, parent in parents.items() if parent in found} - found
    return found


def test_search_build_and_encode_give_the_bytes_of_the_local_engine(cluster, files, codec, contents, tmp_path):
    summary = search(str(files / "s"), queries(files), str(tmp_path / "r"), k=15, part_rows=32, engine="ray")
    assert summary.parts == 22
    build(vectors(files), str(tmp_path / "s"), codec=str(codec), shard_rows=400, engine="ray")
    encode(vectors(files), str(tmp_path / "e"), codec=str(codec), part_rows=250, engine="ray")
    for name in ("s", "r", "e"):
        assert contents(tmp_path / name) == contents(files / name), name
    assert ray.is_initialized()  # a cluster that was there stays


def test_a_worker_that_is_killed_changes_nothing(cluster, files, contents, tmp_path, monkeypatch):
    crews, init = [], ray_engine._Crew.__init__
    monkeypatch.setattr(ray_engine._Crew, "__init__", lambda self, *a: (crews.append(self), init(self, *a))[1])
    lost, forget = [], ray_engine._Crew._lost
    monkeypatch.setattr(ray_engine._Crew, "_lost", lambda self, worker: (lost.append(worker), forget(self, worker))[1])
    killed = when_written(monkeypatch, 3, lambda: os.kill(crews[0]._live[0].pid, signal.SIGKILL))
    search(str(files / "s"), queries(files), str(tmp_path / "r"), k=15, part_rows=32, engine="ray")
    assert killed
    assert lost
    assert contents(tmp_path / "r") == contents(files / "r")


def test_a_node_that_is_lost_in_a_search_changes_nothing(cluster, files, contents, tmp_path, monkeypatch):
    node = add_node(cluster)
    removed = when_written(monkeypatch, 2, lambda: cluster.remove_node(node, allow_graceful=False))
    search(str(files / "s"), queries(files), str(tmp_path / "r"), k=15, part_rows=32, engine="ray")
    assert removed
    assert contents(tmp_path / "r") == contents(files / "r")


def test_a_node_that_is_lost_in_a_build_changes_nothing(cluster, files, codec, contents, tmp_path):
    node = add_node(cluster)

    def remove():
        while not list((tmp_path / "s").glob("shard-*.index")):
            time.sleep(0.01)
        cluster.remove_node(node, allow_graceful=False)

    thread = threading.Thread(target=remove)
    thread.start()
    build(vectors(files), str(tmp_path / "s"), codec=str(codec), shard_rows=400, engine="ray")
    thread.join()
    assert contents(tmp_path / "s") == contents(files / "s")


def test_errors_of_workers_are_the_callers(cluster, files, codec, tmp_path, parquet, xb, contents):
    bad = xb.copy()
    bad[1700, 2] = np.nan
    with pytest.raises(InvalidVectorsError, match=r"002\.parquet.*first row"):
        build(parquet(tmp_path / "bad", bad), str(tmp_path / "s"), codec=str(codec), shard_rows=400, engine="ray")
    shards = tmp_path / "shards"
    build(vectors(files), str(shards), codec=str(codec), shard_rows=1000)
    path = shards / "shard-00001.index"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptFileError, match=r"shard-00001\.index"):
        search(str(shards), queries(files), str(tmp_path / "r"), k=5, engine="ray")


def test_shards_that_kill_every_worker_end_the_job(cluster, files, tmp_path, monkeypatch):
    made = {}
    exec(  # pickled by value, as what belongs to no module is
        "class Deadly:\n"
        "    def __init__(self, *_): pass\n"
        "    def ready(self): return 0\n"
        "    def search(self, *_): import os; os._exit(1)\n",
        {"__name__": "__main__"},
        made,
    )
    monkeypatch.setattr(ray_engine, "_Searcher", made["Deadly"])
    with pytest.raises(HyperfaissError, match=r"5 workers were lost while they searched .*shard-0000"):
        search(str(files / "s"), queries(files), str(tmp_path / "r"), k=5, engine="ray", workers=1)


def test_a_cluster_without_room_is_told(cluster, files, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "_PATIENCE", 1.0)
    monkeypatch.setattr(ray_engine, "_TICK", 0.5)
    with pytest.raises(HyperfaissError, match="no Ray worker could be started in 1 s: each needs 50 CPUs, the cluster has"):
        search(str(files / "s"), queries(files), str(tmp_path / "r"), k=5, engine="ray", cpus_per_worker=50)
