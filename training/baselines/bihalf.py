"""Bi-half Net: Deep Unsupervised Image Hashing by Maximizing Bit Entropy (Li & van Gemert, AAAI 2021).

A layer without parameters gives each bit +1 in one half of the batch and -1 in the other: so it tells most. Which half is
optimal transport's choice: +1 goes to the larger logits. The cosines between the codes are to equal those between the
continuous features.

Views serve as more items only: the method has no pairs. The features are those that the head sees (after ``power``, ``center``
and ``normalize``). ``config.tau`` and ``config.tau_qc`` are of no use here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from training.baselines.hamming import BinaryHash

__all__ = ["GAMMA", "BiHalfNet", "bi_half", "similarity_loss"]

# How strongly the gradient draws logits towards the bits that they were given.
GAMMA = 6.0


class BiHalfNet(BinaryHash):
    """Bi-half Net. In the index, bits are the signs of the logits."""

    loss_names = ("total",)

    def losses(self, views: Tensor) -> dict[str, Tensor]:
        """The loss between the cosines of features and of codes."""
        if views.ndim == 4 and self.backbone is not None:
            with torch.autocast(views.device.type, torch.bfloat16, enabled=self.config.amp and self.training):
                views = self.backbone(views)
        logits = self.tangents(views)
        features = self.preprocessing(views.detach().to(logits.dtype))
        return {"total": similarity_loss(features, bi_half(logits))}


def similarity_loss(features: Tensor, codes: Tensor) -> Tensor:
    """Mean squared difference between cosines of features (n, d) and of codes (n, K), over all pairs of different items.

    The authors' code pairs the first half of the batch with the second: the same mean, of fewer pairs.
    """
    x, b = F.normalize(features, dim=-1), F.normalize(codes, dim=-1)
    n = len(x)
    squared = (x @ x.T - b @ b.T) ** 2
    return squared.masked_fill(torch.eye(n, dtype=torch.bool, device=x.device), 0).sum() / (n * (n - 1))


def bi_half(logits: Tensor) -> Tensor:
    """Codes of ±1 (n, K): in each column, +1 for the n // 2 largest logits (ties to the earlier rows), -1 for the others.

    The gradient that comes back to the logits U of codes B is ``g + GAMMA·(U - B) / (n·K)``: straight-through, and that of
    the mean squared distance between logits and codes (the authors' code divides by n·K, with GAMMA = 6).
    """
    codes: Tensor = _BiHalf.apply(logits)
    return codes


class _BiHalf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        order = logits.argsort(dim=0, descending=True, stable=True)
        signs = torch.ones_like(logits)
        signs[len(logits) // 2 :] = -1
        codes = torch.empty_like(logits).scatter_(0, order, signs)
        codes.masked_fill_(~logits.isfinite(), torch.nan)  # or the loss would hide that training has diverged
        ctx.save_for_backward(logits, codes)
        return codes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        logits, codes = ctx.saved_tensors
        gradient: Tensor = gradients[0] + GAMMA * (logits - codes) / logits.numel()
        return gradient
