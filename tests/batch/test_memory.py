"""--memory is kept, measured from outside, by jobs whose inputs are larger than it."""

from __future__ import annotations

import struct

import numpy as np
import pyarrow.parquet as pq
import pytest

from hyperfaiss.batch import search
from hyperfaiss.errors import InvalidParameterError

# The peak of resident memory that the kernel has seen, in MiB; what importing took, and what the jobs came to.
SCRIPT = """
import sys
from hyperfaiss import batch
from hyperfaiss.batch.memory import peak_memory
from hyperfaiss.batch.sources import split
before = peak_memory() >> 20
{jobs}
print(before, peak_memory() >> 20)
"""


def peak(python, jobs, *args):
    before, after = map(int, python(SCRIPT.format(jobs=jobs), *map(str, args)).stdout.split()[-2:])
    return before, after


def sparse(path, head, size):
    """A file of zeros after its header, which takes no room on disk."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + size)
    return path


def test_reading_takes_the_memory_of_its_ranges(tmp_path, python, table):
    matrix = sparse(tmp_path / "x.fbin", struct.pack("<II", 1 << 19, 256), 1 << 29)
    # One row group of 240 MB, and runs of rows from all over it: neither may stay in memory whole.
    x = np.ones((60_000, 1024), np.float32)
    pq.write_table(table(x), tmp_path / "x.parquet", row_group_size=len(x), compression="none", use_dictionary=False)
    jobs = """
from hyperfaiss.batch.build import sample
for path in sys.argv[1:]:
    source = batch.open_source(path)
    assert sum(len(part) for part in source.read(split(0, source.n, 4096))) == source.n
    assert len(sample(source, 2000, 0)) == 2000
"""
    before, after = peak(python, jobs, matrix, tmp_path / "x.parquet")
    assert after - before < 150


def test_a_build_of_more_than_memory_keeps_to_it(tmp_path, python, xb, codec):
    codes = sparse(tmp_path / "x.u8bin", struct.pack("<II", 3 << 20, 128), 3 << 27)
    jobs = """
from hyperfaiss import HyperbolicProductQuantizer
import numpy as np
codec = HyperbolicProductQuantizer(128, 128, 8)
codec.train(np.random.default_rng(0).normal(size=(256, 128)))
codec.save(sys.argv[2] + "/codec")
memory = (peak_memory() >> 20) + 280
batch.build(sys.argv[1], sys.argv[2] + "/s", codec=sys.argv[2] + "/codec", content="codes", memory=f"{memory}MiB")
assert peak_memory() >> 20 <= memory, (peak_memory() >> 20, memory)
"""
    before, after = peak(python, jobs, codes, tmp_path)
    assert len(list((tmp_path / "s").glob("shard-*.index"))) > 3
    assert after - before < 300  # of 384 MiB


def test_long_lists_wait_for_their_turn(tmp_path, python, xb, codec, saved):
    queries = saved(tmp_path / "q.npy", np.zeros((1500, 12), np.float32))
    x = saved(tmp_path / "x.npy", xb)
    jobs = """
batch.build(sys.argv[2], sys.argv[4] + "/s", codec=sys.argv[3])
memory = (peak_memory() >> 20) + 280
batch.search(sys.argv[4] + "/s", sys.argv[1], sys.argv[4] + "/r", k=20_000, memory=f"{memory}MiB")
assert peak_memory() >> 20 <= memory, (peak_memory() >> 20, memory)
"""
    before, after = peak(python, jobs, queries, x, codec, tmp_path)
    assert after - before < 300  # all results are 360 MB, several times while they are merged and written
    with pytest.raises(InvalidParameterError, match=r"the results of 1,500 queries, a part takes .* give .* or more"):
        search(str(tmp_path / "s"), str(queries), str(tmp_path / "t"), k=20_000, part_rows=1500)
