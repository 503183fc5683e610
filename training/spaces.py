"""Where a model's vectors live: how tangent vectors become points, how points are quantised softly, how far apart they are.

HiHPQ's space is a product of Lorentz manifolds, of curvature 0 for its Euclidean twin (:class:`Lorentz`). MeCoQ's and SPQ's
is a product of spheres whose inner products compare (:class:`Cosine`). The losses see distances only, so each loss works
in either. Equation numbers are those of HiHPQ (Qiu et al., AAAI 2024).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from hyperfaiss import lorentz
from training.losses import product_distance

__all__ = ["Cosine", "Lorentz", "Space"]


class Space(Protocol):
    """What :class:`training.model.HiHPQ` needs of a space; n vectors in M subspaces of dsub dimensions."""

    def points(self, tangents: Tensor) -> Tensor:
        """Points (n, M, dsub) of vectors (n, M, dsub)."""
        ...

    def codebooks(self, codewords: Tensor) -> Tensor:
        """Codewords (M, ksub, dsub) as points."""
        ...

    def to_codewords(self, points: Tensor, codebooks: Tensor) -> Tensor:
        """What the quantiser minimises, of points (n, M, dsub) to codebooks (M, ksub, dsub): (M, n, ksub)."""
        ...

    def mean(self, codebooks: Tensor, weights: Tensor) -> Tensor:
        """Weighted means (n, M, dsub) of codewords, weights (M, n, ksub)."""
        ...

    def distances(self, x: Tensor, y: Tensor) -> Tensor:
        """(n, k) between points (n, M, dsub) and (k, M, dsub)."""
        ...


@dataclass(frozen=True)
class Lorentz:
    """Curvatures -theta (M,), 0 for flat subspaces; tangent vectors clipped to norm ``clip_radius``.

    ``squared``: :meth:`distances` are means of squared Lorentzian distances, not sums of geodesic ones.
    """

    theta: Tensor
    clip_radius: float | None
    squared: bool = False

    def points(self, tangents: Tensor) -> Tensor:
        """Clip and exponential map (Eq. 5)."""
        points: Tensor = lorentz.exp0(lorentz.clip(tangents, self.clip_radius), self.theta)
        return points

    def codebooks(self, codewords: Tensor) -> Tensor:
        """The same for codewords."""
        points: Tensor = lorentz.exp0(lorentz.clip(codewords, self.clip_radius), self.theta[:, None])
        return points

    def to_codewords(self, points: Tensor, codebooks: Tensor) -> Tensor:
        """Squared Lorentzian distances (Eq. 10)."""
        squared: Tensor = lorentz.pairwise_squared_distance(points.transpose(0, 1), codebooks, self.theta)
        return squared

    def mean(self, codebooks: Tensor, weights: Tensor) -> Tensor:
        """Lorentzian midpoints (Eq. 11)."""
        midpoints: Tensor = lorentz.midpoint(codebooks[:, None], weights, self.theta[:, None])
        return midpoints.transpose(0, 1)

    def distances(self, x: Tensor, y: Tensor) -> Tensor:
        """Geodesic distances on the product manifold (Eq. 8), or means over subspaces of squared Lorentzian ones (Eq. 10)."""
        if self.squared:
            squared: Tensor = lorentz.pairwise_squared_distance(x.transpose(0, 1), y.transpose(0, 1), self.theta)
            return squared.mean(0)
        return product_distance(x, y, self.theta)


@dataclass(frozen=True)
class Cosine:
    """Unit subvectors and unit codewords; 1 minus the cosine of whole vectors compares."""

    def points(self, tangents: Tensor) -> Tensor:
        """Unit subvectors; one of zeros stays so."""
        return F.normalize(tangents, dim=-1)

    def codebooks(self, codewords: Tensor) -> Tensor:
        """Unit codewords."""
        return F.normalize(codewords, dim=-1)

    def to_codewords(self, points: Tensor, codebooks: Tensor) -> Tensor:
        """Negated inner products: the order of L2 distances between unit vectors."""
        return -torch.einsum("nmd,mkd->mnk", points, codebooks)

    def mean(self, codebooks: Tensor, weights: Tensor) -> Tensor:
        """Σ w c, as it is: the soft reconstruction of SPQ and MeCoQ."""
        return torch.einsum("mnk,mkd->nmd", weights, codebooks)

    def distances(self, x: Tensor, y: Tensor) -> Tensor:
        """1 - cosine, of the M subvectors joined."""
        return 1 - F.normalize(x.flatten(1), dim=-1) @ F.normalize(y.flatten(1), dim=-1).T
