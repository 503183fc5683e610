"""SPQ: Self-supervised Product Quantization for Deep Unsupervised Image Retrieval (Jang & Cho, ICCV 2021).

A vector x is quantised softly in each subspace, z = Σ_k softmax_k(-‖x - c_k‖² / τ_q) c_k, and its whole is compared with the
quantised whole of the other view: the cross-quantised contrastive loss. Neither x nor the codewords are normalised.

``config.tau`` is τ_q: 1/5 in the authors' experiments, whose code names the inverse, 5, so. ``config.tau_qc`` is τ_cqc, 0.5.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from training.baselines.codebooks import CodebookQuantizer

__all__ = ["SPQ", "cross_quantized_loss"]


class SPQ(CodebookQuantizer):
    """SPQ. ``encode`` gives x as it is; queries are compared by Σ_m ‖x_m - c_m‖, as the authors rank (no squares)."""

    loss_names = ("total",)
    metric = "geodesic"  # at curvature 0, the L2 distance

    def quantize(self, x: Tensor) -> Tensor:
        """Softly quantised vectors (n, d) of vectors (n, d)."""
        # ‖x‖² is the same for all codewords and leaves the softmax as it is.
        inner = self.parts(x).transpose(0, 1) @ self.codewords.mT
        weights = torch.softmax((2 * inner - self.codewords.square().sum(-1)[:, None]) / self.config.tau, dim=-1)
        return (weights @ self.codewords).transpose(0, 1).flatten(1)

    def losses(self, views: Tensor) -> dict[str, Tensor]:
        """The cross-quantised contrastive loss of a batch, both ways round."""
        x = self.tangents(views)
        (x1, x2), (z1, z2) = x.chunk(2), self.quantize(x).chunk(2)
        tau = self.config.tau_qc
        return {"total": cross_quantized_loss(x1, z2, tau) + cross_quantized_loss(x2, z1, tau)}


def cross_quantized_loss(x: Tensor, z: Tensor, tau: float) -> Tensor:
    """Mean over n of ``-log softmax_n'(cos(x_n, z_n') / tau)`` at n' = n: vectors x (B, d) of a view, quantised z of the other.

    The candidates are the quantised vectors of the other view, as the paper pairs them, the positive among them. (The
    released code is a SimCLR loss over the 2B vectors of x and z together: x's and z's of other images are negatives, too.)
    """
    cosines = F.normalize(x, dim=-1) @ F.normalize(z, dim=-1).T
    return F.cross_entropy(cosines / tau, torch.arange(len(x), device=x.device))
