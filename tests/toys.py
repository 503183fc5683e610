"""What several test files share: small random codecs and indexes, equality to the bit, scripts for other processes."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from hyperfaiss import HyperbolicIVFPQIndex, HyperbolicPQIndex, HyperbolicProductQuantizer
from hyperfaiss.packing import unpack

Index = HyperbolicPQIndex | HyperbolicIVFPQIndex
# The fixture ``python``: runs a script in a fresh interpreter.
Python = Callable[..., "subprocess.CompletedProcess[str]"]


def vectors(n: int, d: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def random_codec(
    M: int = 3, ksub: int = 16, dsub: int = 4, seed: int = 0, theta: Any = 1.0, **options: Any
) -> HyperbolicProductQuantizer:
    books = vectors(M * ksub, dsub, seed).reshape(M, ksub, dsub)
    return HyperbolicProductQuantizer.from_codebooks(books, theta, **options)


def random_index(ntotal: int = 300, **options: Any) -> HyperbolicPQIndex:
    """A flat index of ``vectors(ntotal, d, seed=2)``; ``options`` are those of ``random_codec``."""
    index = HyperbolicPQIndex.from_codec(random_codec(**options))
    index.add(vectors(ntotal, index.d, seed=2))
    return index


def flat_quantizer(centroids: np.ndarray) -> Any:
    coarse = faiss.IndexFlatL2(centroids.shape[1])
    coarse.add(centroids)
    return coarse


def empty_index(kind: str, codec: HyperbolicProductQuantizer, coarse: Any) -> Index:
    """An empty index of a kind that begins with "flat", or an inverted file over ``coarse`` that visits all its lists."""
    if kind.startswith("flat"):
        return HyperbolicPQIndex.from_codec(codec)
    index = HyperbolicIVFPQIndex.from_codec(coarse, codec, coarse.ntotal)
    index.nprobe = coarse.ntotal
    return index


def codes_of(index: Index) -> np.ndarray:
    """The stored codes (ntotal, M), a byte each."""
    return unpack(index.codes, index.M, index.nbits)


def assert_same(comp: tuple[np.ndarray, ...], ref: tuple[np.ndarray, ...]) -> None:
    """The same dtypes, shapes and values to the bit, array by array."""
    for a, b in zip(comp, ref, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
        assert a.tobytes() == b.tobytes()  # a 0 has a sign


# The end of a script: ``work()``, which would go on for seconds, is interrupted and stops within ``limit`` seconds; ``index``
# is what it was before and goes on, and so is what ``intact()`` looks at. ``x`` are vectors of its.
INTERRUPTION = """
before, codes = index.ntotal, index.codes
ref = index.search(x[:3], 5)
signal.signal(signal.SIGINT, signal.default_int_handler)  # what starts in a shell's background ignores it
sent = []
def interrupt():
    sent.append(time.monotonic())
    os.kill(os.getpid(), signal.SIGINT)
timer = threading.Timer(1.0, interrupt)
timer.start()
try:
    work()
    raise SystemExit("was not interrupted")
except KeyboardInterrupt:
    late = time.monotonic() - sent[0]
assert late < limit, late
assert intact()
assert index.ntotal == before and (index.codes == codes).all()
D, I = index.search(x[:3], 5)
assert (D == ref[0]).all() and (I == ref[1]).all()
index.add(x[:10])
assert index.ntotal == before + 10
print("intact")
"""

# The end of a script: two children, forked after searches, search ``index``, which holds ``x``, as their parent does, add
# to what they have of it, and call ``more()``.
FORKS = """
ref, ntotal = index.search(x[:50], 10), index.ntotal
def child(queue):
    D, I = index.search(x[:50], 10)
    index.add(x)
    more()
    queue.put((D, I, index.ntotal))
context = multiprocessing.get_context("fork")
queue = context.Queue()
processes = [context.Process(target=child, args=(queue,)) for _ in range(2)]
for process in processes:
    process.start()
for _ in processes:
    D, I, there = queue.get(timeout=60)
    assert (D == ref[0]).all() and (I == ref[1]).all() and there == ntotal + len(x)
for process in processes:
    process.join(60)
    assert process.exitcode == 0
assert (index.search(x[:50], 10)[1] == ref[1]).all() and index.ntotal == ntotal
print("same")
"""
