"""The four kinds of index, by the names of FAISS's calls, and the vectors that they hold."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

import hyperfaiss

D, M, NLIST, N = 16, 4, 16, 10_000
_rng = np.random.default_rng(0)
XB = _rng.normal(size=(N, D)).astype(np.float32)
XQ = _rng.normal(size=(20, D)).astype(np.float32)


@dataclass(frozen=True)
class Subject:
    """One of the four kinds of index, by FAISS's names."""

    name: str
    ours: bool
    ivf: bool

    def new(self, d: int = D, m: int = M, nbits: int = 8) -> Any:
        """An untrained index."""
        if self.ivf:
            kind = hyperfaiss.HyperbolicIVFPQIndex if self.ours else faiss.IndexIVFPQ
            index = kind(faiss.IndexFlatL2(D), d, NLIST, m, nbits)
            index.nprobe = NLIST
            return index
        return hyperfaiss.HyperbolicPQIndex(d, m, nbits) if self.ours else faiss.IndexPQ(d, m, nbits)

    def trained(self, nbits: int = 8) -> Any:
        """A trained, empty index."""
        master = _trained(self, nbits)
        if not self.ours:
            return faiss.clone_index(master)
        if not self.ivf:
            return hyperfaiss.HyperbolicPQIndex.from_codec(master.codec)
        index = hyperfaiss.HyperbolicIVFPQIndex.from_codec(faiss.clone_index(master.quantizer), master.codec, NLIST)
        index.nprobe = NLIST
        return index

    def full(self) -> Any:
        """An index that holds XB under the ids 0 … N − 1."""
        index = self.trained()
        index.add(XB)
        return index

    def addressed(self, index: Any) -> Any:
        """The index, ready to find vectors by id: FAISS's inverted files want to be told."""
        if self.ivf and not self.ours:
            untyped: Any = faiss
            index.set_direct_map_type(untyped.DirectMap.Hashtable)
        return index

    def params(self, sel: Any) -> Any:
        """Search parameters that carry a selector; FAISS's own classes wherever they can."""
        if self.ours and not isinstance(sel, faiss.IDSelector):
            return hyperfaiss.SearchParameters(sel)
        untyped: Any = faiss
        return untyped.SearchParametersIVF(sel=sel, nprobe=NLIST) if self.ivf else untyped.SearchParameters(sel=sel)

    def write(self, index: Any, file: Any) -> None:
        """Write to a file."""
        (hyperfaiss if self.ours else faiss).write_index(index, file)

    def read(self, file: Any) -> Any:
        """Read from a file."""
        return (hyperfaiss if self.ours else faiss).read_index(file)

    def mapped(self, file: str) -> Any:
        """Open a file without reading its codes."""
        return hyperfaiss.read_index(file, mmap=True) if self.ours else faiss.read_index(file, faiss.IO_FLAG_MMAP_IFC)


@functools.cache
def _trained(subject: Subject, nbits: int) -> Any:
    index = subject.new(nbits=nbits)
    index.train(XB)
    return index


SUBJECTS = {
    s.name: s
    for s in (
        Subject("faiss.IndexPQ", ours=False, ivf=False),
        Subject("faiss.IndexIVFPQ", ours=False, ivf=True),
        Subject("HyperbolicPQIndex", ours=True, ivf=False),
        Subject("HyperbolicIVFPQIndex", ours=True, ivf=True),
    )
}
