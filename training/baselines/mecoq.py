"""MeCoQ: Contrastive Quantization with Code Memory for Unsupervised Image Retrieval (Wang et al., AAAI 2022).

In each subspace a unit subvector x has codes p = softmax_k(α x·c_k) over unit codewords and the soft reconstruction
Σ_k p_k c_k. Whole reconstructions are compared by their cosine in a debiased contrastive loss, in which the reconstructions of
recent codes (the memory) are negatives, too. The codes are kept, not the vectors: they are reconstructed by the codewords of
the moment, so they age more slowly. Two regularisers: the entropy of the codes (λ) and the likeness of the codewords (γ).

``config.tau`` is 1/α: 0.1. ``config.tau_qc`` is the temperature: 0.35 (CIFAR-10 II) or 0.4. Quirks of the released code:
"mecoq-frozen-codebooks" (its codewords do not require gradients) and "mecoq-broadcast" (see :func:`debiased_loss`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from training.baselines.codebooks import CodebookQuantizer
from training.config import TrainConfig

__all__ = ["GAMMA", "LAMBDA", "MEMORY", "MEMORY_START", "RHO", "MeCoQ", "debiased_loss"]

# Weight of the entropy, and of the likeness of the codewords. The authors' λ is 0.01 to 0.1 on CIFAR-10, γ is 0.5.
LAMBDA = 0.05
GAMMA = 0.5
# Prior of the positive class: 1 of 10 classes on CIFAR-10.
RHO = 0.1
# Codes that are remembered, and the share of the epochs after which they serve: 15 of 50 epochs on CIFAR-10 II.
MEMORY = 384
MEMORY_START = 0.3


class MeCoQ(CodebookQuantizer):
    """MeCoQ. ``encode`` gives unit subvectors; queries are compared by inner products with the codewords.

    Attributes
    ----------
    memory : buffer (MEMORY, M, ksub), recent codes of both views, the oldest overwritten first.
    written : buffer () int64, the number of codes ever written to it. A checkpoint holds both, so a run resumes exactly.
    """

    loss_names = ("total", "contrastive", "entropy", "diversity")
    metric = "inner_product"
    memory: Tensor
    written: Tensor

    def __init__(self, d_in: int, config: TrainConfig, backbone: nn.Module | None = None) -> None:
        super().__init__(d_in, config, backbone)
        if "mecoq-frozen-codebooks" in config.quirks:
            codewords = self.codewords.detach()
            del self.codewords
            self.register_buffer("codewords", codewords)  # which a checkpoint holds, unlike a frozen parameter
        self.register_buffer("memory", torch.zeros(MEMORY, config.M, config.ksub))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))
        self._memory_serves = False
        self._fresh: Tensor | None = None  # codes of the step under way

    def start_epoch(self, epoch: int) -> None:
        """The memory serves after a share MEMORY_START of the epochs."""
        self._memory_serves = epoch >= MEMORY_START * self.config.epochs

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring the codewords back to unit norm, and remember the codes of the step."""
        self.codewords.copy_(F.normalize(self.codewords, dim=-1))
        if self._fresh is not None:
            fresh, start = self._fresh[-MEMORY:], int(self.written) + max(0, len(self._fresh) - MEMORY)
            self.memory[torch.arange(start, start + len(fresh), device=fresh.device) % MEMORY] = fresh
            self.written += len(self._fresh)
            self._fresh = None

    def vectors(self, tangents: Tensor) -> Tensor:
        """Unit subvectors, joined (n, d)."""
        return F.normalize(self.parts(tangents), dim=-1).flatten(1)

    def codes(self, vectors: Tensor) -> Tensor:
        """Soft codes (n, M, ksub) of unit subvectors (n, d)."""
        return torch.softmax(torch.einsum("nmd,mkd->nmk", self.parts(vectors), self.codewords) / self.config.tau, dim=-1)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Soft reconstructions (n, d) of codes (n, M, ksub), as whole vectors of unit norm."""
        return F.normalize(torch.einsum("nmk,mkd->nmd", codes, self.codewords).flatten(1), dim=-1)

    def remembered(self) -> Tensor:
        """The codes that serve as negatives now, (0 to MEMORY, M, ksub): none in evaluation mode, nor in the first epochs."""
        return self.memory[: min(int(self.written), MEMORY)] if self.training and self._memory_serves else self.memory[:0]

    def losses(self, views: Tensor) -> dict[str, Tensor]:
        """total = contrastive + λ·entropy + γ·diversity.

        The entropy is the mean over views, items and subspaces of that of the codes: low when one codeword stands out. The
        diversity is the mean of c_k·c_k' over all pairs of codewords of a subspace (k = k' included) and over subspaces.
        """
        codes = self.codes(self.vectors(self.tangents(views)))
        reconstructed, memory = self.reconstruct(codes), self.reconstruct(self.remembered())
        broadcast = "mecoq-broadcast" in self.config.quirks
        contrastive = debiased_loss(reconstructed, memory, self.config.tau_qc, RHO, broadcast=broadcast)
        entropy = torch.special.entr(codes).sum(-1).mean()
        diversity = self.codewords.mean(1).square().sum(-1).mean()  # the mean of all products is the square of the mean
        if self.training:
            self._fresh = codes.detach()
        total = contrastive + LAMBDA * entropy + GAMMA * diversity
        return {"total": total, "contrastive": contrastive, "entropy": entropy, "diversity": diversity}


def debiased_loss(x: Tensor, memory: Tensor, tau: float, rho: float, *, broadcast: bool = False) -> Tensor:
    """The mean over anchors of ``-log(P / (P + G))``, P = exp(s/τ) of the positive's cosine s, G an estimate of the negatives.

    ``x`` (2B, d) unit vectors, of which rows i and i + B show the same item; ``memory`` (any, d) unit vectors, more negatives.
    A share rho of the N = 2B - 2 others in the batch are taken for positives in disguise, each worth as much as P (Chuang et
    al., Debiased Contrastive Learning, NeurIPS 2020, Eq. 8): ``G = max((Σ exp(s_-/τ) - rho·N·P) / (1 - rho), N·exp(-1/τ))``,
    the sum being over batch and memory. The floor is what N negatives amount to at the least; the released code's, exp(-N/τ),
    is 0 in float32.

    ``broadcast`` is the slip of the released code: its sums of negatives (2B,) meet its positives (2B, 1), so the sum of
    every anchor is paired with the positive of every other, and the loss is the mean over all (2B)² pairs.
    """
    n = len(x)
    # Similarities less 1, so that no power overflows; the loss depends on ratios only.
    powers = ((x @ torch.cat([x, memory]).T - 1) / tau).exp()
    rows = torch.arange(n, device=x.device)
    positives = rows.roll(n // 2)
    positive = powers[rows, positives]
    others = torch.ones_like(powers, dtype=torch.bool)
    others[rows, rows] = others[rows, positives] = False
    negatives = (powers * others).sum(1)
    if broadcast:
        positive = positive[:, None]
    estimate = ((negatives - rho * (n - 2) * positive) / (1 - rho)).clamp(min=(n - 2) * math.exp(-2 / tau))
    return torch.log1p(estimate / positive).mean()
