"""What the binary hashes among the baselines share: bits by sign, and search by Hamming distance."""

from __future__ import annotations

import faiss
import numpy as np
import numpy.typing as npt
from torch import nn

from hyperfaiss.checks import as_integer, as_vectors
from hyperfaiss.errors import InvalidParameterError
from training.config import TrainConfig
from training.model import Quantizer

__all__ = ["BinaryHash", "HammingIndex"]


class HammingIndex:
    """Codes of ``bits`` bits in ``faiss.IndexBinaryFlat``; vectors come as logits, the bits are their signs (0 gives 0).

    Hamming distances are small integers, so results have many ties. They come in the order of their ids, as FAISS gives them,
    and a measure of the ranking, as MAP, depends on it: a database sorted by class gives figures that mean nothing, one in
    random order gives fair ones.

    Parameters
    ----------
    bits : a multiple of 8; else InvalidParameterError.
    """

    def __init__(self, bits: int) -> None:
        self.bits = as_integer(bits, "bits", 1)
        if self.bits % 8:
            raise InvalidParameterError(f"bits must be a multiple of 8, got {bits}")
        self._index = faiss.IndexBinaryFlat(self.bits)

    @property
    def ntotal(self) -> int:
        """Vectors in the index."""
        return int(self._index.ntotal)

    def add(self, x: npt.ArrayLike) -> None:
        """Add logits (n, bits); their ids go on from ``ntotal``."""
        self._index.add(self._codes(x))

    def search(self, x: npt.ArrayLike, k: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """The k nearest of each query (nq, bits) of logits: D (nq, k) float32 Hamming distances, I (nq, k) int64 ids, sorted
        by both. Where there are fewer than k, the rest is (inf, -1)."""
        k = as_integer(k, "k", 1)
        codes = self._codes(x)
        D, I = np.full((len(codes), k), np.inf, np.float32), np.full((len(codes), k), -1, np.int64)  # noqa: E741
        found = min(k, self.ntotal)
        if found and len(codes):
            D[:, :found], I[:, :found] = self._index.search(codes, found)
        return D, I

    def _codes(self, x: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        return np.packbits(as_vectors(x, self.bits) > 0, axis=1)


class BinaryHash(Quantizer):
    """A binary hash of ``config.bits`` bits, a multiple of 8 (``config.dsub`` is of no use here). ``encode`` gives logits."""

    def __init__(self, d_in: int, config: TrainConfig, backbone: nn.Module | None = None) -> None:
        HammingIndex(config.bits)  # refuses other numbers of bits before anything is trained
        super().__init__(d_in, config, backbone)

    @classmethod
    def out_dim(cls, config: TrainConfig) -> int:
        """One logit a bit."""
        return config.bits

    def index(self) -> HammingIndex:
        """A new, empty index of these codes."""
        return HammingIndex(self.config.bits)
