"""How good ranked lists are: one definition of precision and average precision for batch jobs and for training."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["precision_and_ap"]


def precision_and_ap(relevant: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Precision and average precision within the first n = 1 … N of ranked lists.

    ``relevant`` (nq, N) bool; both results are (nq, N) float64, column n − 1 is for length n.
    AP within n = ``Σᵢ precision(i)·rel(i) / (hits within n)``, 0 without hits.
    """
    hits = relevant.cumsum(axis=1, dtype=np.int64)
    precision = hits / np.arange(1, relevant.shape[1] + 1)
    return precision, (precision * relevant).cumsum(axis=1) / np.maximum(hits, 1)
