"""The losses of HiHPQ, as functions of distances; which distances, :mod:`training.model` decides.

All distances here are those on the product manifold, ``Σ_m d_m`` (Eq. 8), and every similarity is ``-distance / tau_qc``.
Equation numbers are those of HiHPQ (Qiu et al., AAAI 2024); where the printed equation and the text or the experiments
disagree, the docstring says which reading this is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from hyperfaiss import lorentz

__all__ = [
    "batch_prototype_loss",
    "distillation_loss",
    "draw_partners",
    "first_partners",
    "instance_loss",
    "product_distance",
    "prototype_loss",
    "quantized_contrastive_loss",
]


def product_distance(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    """Geodesic distances on the product manifold (Eq. 8): points (n, M, dsub) and (k, M, dsub) to (n, k)."""
    squared = lorentz.pairwise_squared_distance(x.transpose(0, 1), y.transpose(0, 1), theta)
    distances: Tensor = _Geodesic.apply(squared, theta.to(squared.dtype)[:, None, None])
    return distances.sum(0)


class _Geodesic(torch.autograd.Function):
    """``d = 2/√θ · asinh(√(θs)/2)`` of squared Lorentzian distances s, with its gradient in closed form.

    The same numbers as :func:`hyperfaiss.lorentz.distance`, whose case distinctions autograd follows at five times the cost:
    half the time of a training step. ``∂d/∂s = 1 / (2·√(s(1 + θs/4)))``, taken as 0 at s = 0, and
    ``∂d/∂θ = (2s·∂d/∂s - d) / 2θ``.
    """

    @staticmethod
    def forward(ctx: Any, squared: Tensor, theta: Tensor) -> Tensor:
        half = theta.clamp(min=1e-12).sqrt() / 2  # at 0, a curvature too small to be told from it
        r = squared.sqrt().mul_(half)
        square = r * r
        r.add_(square.div_((square + 1).sqrt_().add_(1)))  # asinh(r) = log1p(r + r² / (1 + √(1 + r²)))
        distances = r.log1p_().div_(half)
        ctx.save_for_backward(squared, theta, distances)
        return distances

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        (gradient,) = gradients
        squared, theta, distances = ctx.saved_tensors
        twice = (squared * (theta / 4)).add_(1).mul_(squared).rsqrt_().masked_fill_(squared == 0, 0).mul_(gradient)
        to_theta = None
        if ctx.needs_input_grad[1]:
            to_theta = (twice * squared - gradient * distances).sum((-2, -1), keepdim=True) / (2 * theta)
        return twice.mul_(0.5), to_theta


def quantized_contrastive_loss(distances: Tensor, tau_qc: float) -> Tensor:
    """Quantised contrastive loss (Eq. 13-15), symmetric: the mean over all 2N views as anchors.

    ``distances`` (2N, 2N) are those between the soft-quantised views; row i and row i + N show the same item. The
    denominator of an anchor holds its positive and the 2N - 2 views of other items.
    """
    n = len(distances) // 2
    logits = _without_self(-distances / tau_qc)
    positives = torch.arange(2 * n, device=distances.device).roll(n)
    return F.cross_entropy(logits, positives)


def prototype_loss(distances: Sequence[Tensor], assignments: Tensor, tau_qc: float) -> Tensor:
    """Prototype loss (Eq. 18): the mean over levels and anchors of ``-log softmax`` at the anchor's own prototype.

    ``distances[l]`` (N, n_l) are those of the soft-quantised anchors to the prototypes of level l, each of which counts
    once in the denominator, whether or not an item of the batch belongs to it. ``assignments`` (L, N) int64.
    """
    losses = [F.cross_entropy(-d / tau_qc, a) for d, a in zip(distances, assignments, strict=True)]
    return torch.stack(losses).mean()


def batch_prototype_loss(distances: Sequence[Tensor], assignments: Tensor, tau_qc: float) -> Tensor:
    """The prototype loss of the released code (quirk "batch-prototypes"): an anchor is compared with the prototypes of the
    batch's items, each as often as an item has it, so that the anchor's own is also among the negatives."""
    anchors = torch.arange(assignments.shape[1], device=assignments.device)
    losses = [F.cross_entropy(-d[:, a] / tau_qc, anchors) for d, a in zip(distances, assignments, strict=True)]
    return torch.stack(losses).mean()


def instance_loss(distances: Tensor, partners: Tensor, tau_qc: float, *, with_self: bool = False) -> Tensor:
    """Instance loss (Eq. 19): the mean over levels and anchors of ``-log softmax`` at a partner of the same prototype.

    ``distances`` (N, N) are those between the soft-quantised anchors; ``partners`` (L, N) int64 comes from
    :func:`draw_partners`. The anchor itself is not in the denominator. An anchor without a partner (-1) adds nothing to
    the sum, and the sum is divided by N in any case. ``with_self`` (quirk "self-negative") leaves the anchor in the
    denominator, at distance 0.
    """
    logits = -distances / tau_qc
    logits = logits if with_self else _without_self(logits)
    losses = [F.cross_entropy(logits, p, ignore_index=-1, reduction="sum") / len(p) for p in partners]
    return torch.stack(losses).mean()


def distillation_loss(distances: Tensor, teachers: Tensor, tau_qc: float, tau_teacher: float) -> Tensor:
    """Similarity distillation: the mean over anchors of the cross-entropy between whom teachers and whom the model find near.

    ``distances`` and ``teachers`` (n, n) are those between a batch's views, by the model and by its teachers; both become
    distributions over the n - 1 others, ``softmax(-distances / tau_qc)`` and ``softmax(-teachers / tau_teacher)``.
    """
    logarithms = _without_self(-distances / tau_qc).log_softmax(-1)
    wanted = _without_self(-teachers / tau_teacher).softmax(-1)
    itself = torch.eye(len(distances), dtype=torch.bool, device=distances.device)
    return -(wanted * logarithms.masked_fill(itself, 0)).sum(-1).mean()  # 0 · -inf is no 0


def draw_partners(assignments: Tensor, keys: Tensor) -> Tensor:
    """For each level and each item of a batch, another item with the same prototype, drawn at random; -1 if there is none.

    ``assignments`` (L, N) int64; ``keys`` (L, N, N) or (N, N), independent uniform numbers in (0, 1), are the
    randomness: the item with the largest key among the candidates is drawn. Returns (L, N) int64.
    """
    same = assignments[:, :, None] == assignments[:, None, :]
    same &= ~torch.eye(assignments.shape[1], dtype=torch.bool, device=assignments.device)
    partners = torch.where(same, keys, torch.zeros_like(keys)).argmax(-1)
    return torch.where(same.any(-1), partners, torch.full_like(partners, -1))


def first_partners(assignments: Tensor) -> Tensor:
    """For each level and item of a batch, the first item with the same prototype (quirk "first-positive"): itself, for the
    first. ``assignments`` (L, N) int64; returns (L, N) int64."""
    return (assignments[:, :, None] == assignments[:, None, :]).to(torch.int8).argmax(-1)


def _without_self(logits: Tensor) -> Tensor:
    """The logits with a diagonal that no softmax sees."""
    itself = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    return logits.masked_fill(itself, -torch.inf)
