"""Codes as FAISS stores them: M codes of nbits bits, packed into ceil(M · nbits / 8) bytes, lowest bit first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .kernels import layout as kernels

__all__ = ["pack", "packed_size", "unpack"]

Codes = npt.NDArray[np.uint8]


def packed_size(M: int, nbits: int) -> int:
    """Bytes of a vector's M codes."""
    return (M * nbits + 7) // 8


def pack(codes: Codes, nbits: int) -> Codes:
    """Packed codes (n, ceil(M · nbits / 8)) of codes (n, M), all below 2**nbits; the same array at 8 bits."""
    if nbits == 8:
        return codes
    packed = np.empty((len(codes), packed_size(codes.shape[1], nbits)), np.uint8)
    kernels.pack(np.ascontiguousarray(codes), nbits, packed)
    return packed


def unpack(packed: Codes, M: int, nbits: int) -> Codes:
    """The inverse of ``pack``: codes (n, M), contiguous. Bits beyond the last code are ignored."""
    packed = np.ascontiguousarray(packed)
    if nbits == 8:
        return packed
    codes = np.empty((len(packed), M), np.uint8)
    kernels.unpack(packed, nbits, codes)
    return codes
