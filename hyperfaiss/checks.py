"""What every public function does first: turn what a user passed into what the code below takes, or say what is wrong."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InvalidParameterError, InvalidVectorsError

__all__ = ["FloatArray", "IntArray", "as_codes", "as_id_array", "as_integer", "as_new_ids", "as_vectors"]

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

# The largest int64 marks an empty place in a search, -1 a missing neighbour.
MAX_ID = 2**63 - 2


def as_integer(value: Any, name: str, low: int, high: int | None = None) -> int:
    """An int in [low, high] from any integer type (NumPy's included, bool excluded), or InvalidParameterError."""
    expected = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
    try:
        if isinstance(value, (bool, np.bool_)):
            raise TypeError
        integer = operator.index(value)
    except TypeError:
        raise InvalidParameterError(f"{name} must be {expected}, got {value!r}") from None
    if integer < low or (high is not None and integer > high):
        raise InvalidParameterError(f"{name} must be {expected}, got {integer}")
    return integer


def as_positive(value: Any, name: str) -> float:
    """A finite positive float, or InvalidParameterError."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise InvalidParameterError(f"{name} must be a positive number, got {value!r}")
    return number


def as_vectors(x: Any, d: int, name: str = "x") -> FloatArray:
    """Contiguous float32 (n, d) from any real array (float64, float16, strided, a torch CPU tensor), all values finite.

    InvalidVectorsError names the shape, the dtype or the first row at fault.
    """
    if getattr(x, "requires_grad", False):
        x = x.detach()
    try:
        array = np.asarray(x)
    except (TypeError, ValueError) as error:  # a GPU tensor, a ragged list
        raise InvalidVectorsError(f"{name} can't be read as an array of vectors: {error}") from error
    if array.dtype.kind not in "fiu":
        raise InvalidVectorsError(f"{name} must hold real numbers, got dtype {array.dtype}")
    if array.ndim != 2 or array.shape[1] != d:
        hint = f"; for one vector pass {name}[None, :]" if array.ndim == 1 and array.shape[0] == d else ""
        raise InvalidVectorsError(f"{name} must have shape (n, {d}), got {array.shape}{hint}")
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(array, dtype=np.float32)
    # One sum finds whether there is anything to look for: nan and inf both survive it.
    with np.errstate(invalid="ignore", over="ignore"):
        suspicious = not np.isfinite(vectors.sum(dtype=np.float64))
    if suspicious:
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise InvalidVectorsError(
                f"{name} must be finite in float32: {len(bad)} of {len(vectors)} rows are not, first row {bad[0]}"
            )
    return vectors


def as_codes(codes: Any, code_size: int, ksub: int = 256) -> npt.NDArray[np.uint8]:
    """Contiguous uint8 (n, code_size) with every byte below ``ksub``, or InvalidVectorsError."""
    try:
        array = np.asarray(codes)
    except (TypeError, ValueError) as error:  # a ragged list
        raise InvalidVectorsError(f"codes can't be read as an array: {error}") from error
    if array.dtype != np.uint8 or array.ndim != 2 or array.shape[1] != code_size:
        raise InvalidVectorsError(f"codes must be uint8 of shape (n, {code_size}), got {array.dtype} of shape {array.shape}")
    if ksub < 256 and array.size and int(array.max()) >= ksub:
        raise InvalidVectorsError(f"codes must be below ksub = {ksub}, got {array.max()}")
    return np.ascontiguousarray(array)


def as_id_array(ids: Any, name: str = "ids") -> IntArray:
    """Contiguous int64 (n,) from integers; InvalidVectorsError for floats, which would be cut, and uint64, which would wrap."""
    try:
        array = np.asarray(ids)
    except (TypeError, ValueError) as error:
        raise InvalidVectorsError(f"{name} can't be read as an array: {error}") from error
    if not array.size and array.ndim == 1:  # [] is float64 for NumPy
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:
        raise InvalidVectorsError(f"{name} must be int64, got {array.dtype}")
    if array.ndim != 1:
        raise InvalidVectorsError(f"{name} must have shape (n,), got {array.shape}")
    return np.ascontiguousarray(array, dtype=np.int64)


def as_new_ids(ids: Any, n: int) -> IntArray:
    """Ids for ``n`` vectors: int64 (n,), from 0 to 2**63 - 2, no two alike; or InvalidVectorsError."""
    array = as_id_array(ids)
    if len(array) != n:
        raise InvalidVectorsError(f"{n} vectors need {n} ids, got {len(array)}")
    if n and not (array.min() >= 0 and array.max() <= MAX_ID):
        raise InvalidVectorsError(f"ids must be from 0 to 2**63 - 2, got {array.min()} to {array.max()}")
    if not (array[1:] > array[:-1]).all():
        ordered = np.sort(array)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if len(twice):
            raise InvalidVectorsError(f"ids must differ within a call, got {len(twice)} repeats, first {twice[0]}")
    return array
