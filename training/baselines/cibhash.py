"""CIBHash: Unsupervised Hashing with Contrastive Information Bottleneck (Qiu et al., IJCAI 2021).

Each bit of a view is drawn from a Bernoulli distribution of probability σ(logit). The loss is SimCLR's between the drawn codes
of the two views, plus β times the divergence between the views' distributions, which bounds what the codes tell about the
view rather than the item (the information bottleneck).

``config.tau_qc`` is the temperature: 0.3. ``config.tau`` is of no use here. The released code draws nothing: it takes the more
probable bit in training, too. Here bits are drawn, as the paper says.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from training.baselines.hamming import BinaryHash
from training.losses import quantized_contrastive_loss

__all__ = ["BETA", "CIBHash", "bernoulli_divergence", "draw_bits"]

# Weight of the divergence.
BETA = 0.001


class CIBHash(BinaryHash):
    """CIBHash. Its codes are the more probable bits: the signs of the logits."""

    loss_names = ("total", "contrastive", "divergence")

    def losses(self, views: Tensor) -> dict[str, Tensor]:
        """total = contrastive + β·divergence. In evaluation mode bits are not drawn but the more probable ones."""
        logits = self.tangents(views)
        uniform = torch.rand_like(logits) if self.training else torch.full_like(logits, 0.5)
        # ±1, all of the same norm: the cosine, which is 1 - 2/K times the Hamming distance.
        codes = F.normalize(2 * draw_bits(logits, uniform) - 1, dim=-1)
        contrastive = quantized_contrastive_loss(-codes @ codes.T, self.config.tau_qc)
        one, two = logits.chunk(2)
        divergence = (bernoulli_divergence(one, two) + bernoulli_divergence(two, one)) / 2
        return {"total": contrastive + BETA * divergence, "contrastive": contrastive, "divergence": divergence}


def draw_bits(logits: Tensor, uniform: Tensor) -> Tensor:
    """Bits, 1 where σ(logit) > ``uniform`` in (0, 1); the gradient is that of σ(logit) (straight-through)."""
    p = torch.sigmoid(logits)
    return (p > uniform).to(p.dtype) + (p - p.detach())


def bernoulli_divergence(logits: Tensor, towards: Tensor) -> Tensor:
    """KL(σ(logits) ‖ σ(towards)) of Bernoulli distributions (B, K), summed over bits, mean over items.

    ``towards`` stands for the marginal distribution of the codes and gets no gradient, as in the authors' code.
    """
    towards = towards.detach()
    p = torch.sigmoid(logits)
    ones = p * (F.logsigmoid(logits) - F.logsigmoid(towards))
    zeros = (1 - p) * (F.logsigmoid(-logits) - F.logsigmoid(-towards))
    return (ones + zeros).sum(-1).mean()
