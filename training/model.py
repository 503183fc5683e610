"""Trainable quantisers: features in, losses out; and, in evaluation, vectors for an index.

:class:`Quantizer` is what every method has, HiHPQ and the baselines of :mod:`training.baselines`: preprocessing, a head, and
an index of its codes. :class:`HiHPQ` is the paper's:

    views ─ backbone ─ Preprocessing ─ head ─ tangent vectors ─ clip, exp map ─ points ─ soft quantiser ─ losses
            (or none)                          (B, M·dsub)                    (B, M, dsub)

Geometry is :mod:`hyperfaiss.lorentz`, the same code that serves the index: float64 inside, whatever autocast does around
the backbone and the head. Equation numbers are those of HiHPQ (Qiu et al., AAAI 2024).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from hyperfaiss import HyperbolicPQIndex, lorentz
from hyperfaiss.codec import HyperbolicProductQuantizer
from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError
from training.config import TrainConfig
from training.losses import (
    batch_prototype_loss,
    draw_partners,
    first_partners,
    instance_loss,
    prototype_loss,
    quantized_contrastive_loss,
)
from training.spaces import Cosine, Lorentz, Space

__all__ = ["CURVATURE_RANGE", "BatchHierarchy", "HiHPQ", "Preprocessing", "Quantizer"]

# The learnt curvatures are kept in this range.
CURVATURE_RANGE = (0.01, 10.0)
# Rows that pass through the model at a time where no gradient is needed.
_ROWS = 4096


class BatchHierarchy(NamedTuple):
    """The hierarchy as a batch sees it.

    prototypes : one (n_l, d) tensor of tangent vectors per level.
    assignments : int64 (L, B), each item's prototype at each level.
    keys : (L, B, B), uniform in (0, 1): the randomness of the instance loss (see ``losses.draw_partners``).
    """

    prototypes: Sequence[Tensor]
    assignments: Tensor
    keys: Tensor


class Preprocessing(nn.Module):
    """Signed power, centring and L2 normalisation of features (B, d_in), in this order; ``mean`` is a buffer."""

    mean: Tensor

    def __init__(self, d_in: int, *, power: float, center: bool, normalize: bool) -> None:
        super().__init__()
        self.power, self.center, self.normalize = power, center, normalize
        self.register_buffer("mean", torch.zeros(d_in))

    def fit(self, features: npt.NDArray[np.float32]) -> None:
        """Take the mean from training features (n, d_in). A no-op without centring."""
        if self.center:
            total = np.zeros(features.shape[1])
            for start in range(0, len(features), _ROWS):
                block = np.asarray(features[start : start + _ROWS], dtype=np.float64)
                total += (np.sign(block) * np.abs(block) ** self.power).sum(0)
            self.mean.copy_(torch.from_numpy(total / len(features)))

    def forward(self, x: Tensor) -> Tensor:
        if self.power != 1:
            # The root's derivative is infinite at 0, where a ReLU puts many features; sign(0) = 0 drops that branch.
            magnitude = torch.where(x == 0, torch.ones_like(x), x.abs())
            x = x.sign() * magnitude**self.power
        if self.center:
            x = x - self.mean
        if self.normalize:
            x = F.normalize(x, dim=-1)
        return x


class Quantizer(nn.Module):
    """A trainable quantiser of features (or of images, with a backbone): the part that all methods share.

    Parameters
    ----------
    d_in : dimension of a feature vector.
    config : hyper-parameters.
    backbone : module from images to features (B, d_in), trained along; None if the inputs are features.

    A subclass gives ``forward``, or ``losses``, and either ``codec`` or ``index`` and ``encode``; it may have parameters
    ``codewords`` and ``log_theta`` or ``raw_theta``, which the optimiser treats as codebooks and curvatures.

    Attributes
    ----------
    loss_names : keys of what ``forward`` returns, "total" first.
    gain : factor between preprocessing and head.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("total",)

    def __init__(self, d_in: int, config: TrainConfig, backbone: nn.Module | None = None) -> None:
        super().__init__()
        self.d_in, self.config, self.backbone = d_in, config, backbone
        self.preprocessing = Preprocessing(d_in, power=config.power, center=config.center, normalize=config.normalize)
        # Of unit-norm inputs, a linear layer of the usual initialisation makes vectors near 0, where all distances are
        # alike; inputs whose features have unit mean square make some of about unit norm, the codewords' own.
        self.gain = math.sqrt(d_in) if config.normalize else 1.0
        widths = [d_in, *([config.hidden] if config.hidden else []), self.out_dim(config)]
        layers: list[nn.Module] = []
        for into, out in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(into, out), nn.ReLU()]
        self.head = nn.Sequential(*layers[:-1])

    @classmethod
    def out_dim(cls, config: TrainConfig) -> int:
        """Width of the head's output."""
        return config.d

    # ------------------------------------------------------------------------------------------ for the trainer

    @property
    def uses_clusters(self) -> bool:
        """Whether ``forward`` wants a hierarchy of clusters of the training items."""
        return False

    @property
    def theta(self) -> Tensor:
        """Curvatures (M,) (a manifold's curvature is -theta); (0,) of a method that has none."""
        return self.preprocessing.mean.new_zeros(0)

    def start_epoch(self, epoch: int) -> None:
        """Called before each epoch, the first of which is 0."""

    def after_step(self) -> None:
        """Called after each step of the optimiser."""

    def forward(
        self,
        view1: Tensor,
        view2: Tensor,
        hierarchy: BatchHierarchy | None = None,  # noqa: ARG002
        items: Tensor | None = None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Losses of a batch given as two views of each item, (B, d_in) features or images: ``loss_names`` to scalars.

        ``items``, int64 (2B,), are the training items that the views show, those of view 1 first. A method that looks at the
        views alone gives ``losses`` in place of this.
        """
        return self.losses(torch.cat([view1, view2]))

    def losses(self, views: Tensor) -> dict[str, Tensor]:
        """The same of a batch's views (2B, d_in), or images, those that are view 1 first."""
        raise NotImplementedError

    def groups(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter that is trained, with its group: "head", "codebook", "curvature" or "backbone"."""
        special = {"codewords": "codebook", "log_theta": "curvature", "raw_theta": "curvature"}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                yield "backbone" if name.startswith("backbone.") else special.get(name, "head"), parameter

    @torch.no_grad()
    def fit_inputs(self, features: npt.NDArray[np.float32], seed: int = 0) -> None:
        """What the data decides before the first step: the mean of the features, and codewords that start from data.

        ``features`` (n, d_in) are un-augmented training features; ``seed`` is of whatever is drawn. With
        ``codebook_init = "data"`` codewords are the projected vectors of ksub items, drawn anew for each subspace (with
        replacement if n < ksub).
        """
        if features.ndim != 2 or features.shape[1] != self.d_in or not len(features):
            raise InvalidVectorsError(f"features must have shape (n, {self.d_in}), got {features.shape}")
        self.preprocessing.fit(features)
        codewords = getattr(self, "codewords", None)
        if isinstance(codewords, Tensor) and self.config.codebook_init == "data":
            rng, n, k = np.random.default_rng(seed), len(features), self.config.ksub
            for m, book in enumerate(codewords):
                rows = np.sort(rng.choice(n, k, replace=n < k))
                parts = torch.from_numpy(self.encode(features[rows])).view(k, self.config.M, -1)
                book.copy_(parts[:, m])

    # ------------------------------------------------------------------------------------------ the map

    def tangents(self, x: Tensor) -> Tensor:
        """The head's output (B, out_dim) for features (B, d_in), or for images if there is a backbone and x is 4-D.

        With ``config.amp``, backbone and head run in bfloat16 in training mode; never in evaluation mode, which must agree
        with what the exported model computes.
        """
        dtype = self.preprocessing.mean.dtype
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.config.amp and self.training):
            if x.ndim == 4:
                if self.backbone is None:
                    raise InvalidVectorsError(f"this model takes features (B, {self.d_in}), got {tuple(x.shape)}")
                x = self.backbone(x)
            if x.ndim != 2 or x.shape[1] != self.d_in:
                raise InvalidVectorsError(f"features must have shape (B, {self.d_in}), got {tuple(x.shape)}")
            with torch.autocast(x.device.type, enabled=False):
                x = self.preprocessing(x.to(dtype)) * self.gain
            x = self.head(x)
        return x.to(dtype)

    def vectors(self, tangents: Tensor) -> Tensor:
        """What ``index`` takes, of the head's output: here, the output itself."""
        return tangents

    @torch.no_grad()
    def encode(self, features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Vectors (n, out_dim) float32 for ``index`` of features (n, d_in), block by block; the mode is left as it was."""
        out = np.empty((len(features), self.out_dim(self.config)), np.float32)
        training, device = self.training, self.preprocessing.mean.device
        self.eval()
        try:
            for start in range(0, len(features), _ROWS):
                block = torch.from_numpy(np.array(features[start : start + _ROWS], dtype=np.float32)).to(device)
                out[start : start + _ROWS] = self.vectors(self.tangents(block)).float().cpu().numpy()
        finally:
            self.train(training)
        return out

    def codec(self) -> HyperbolicProductQuantizer:
        """The codec as it stands. Raises InvalidParameterError for a method whose codes are no product quantiser's."""
        raise InvalidParameterError(f"{self.config.method} has no codec: its codes are not those of a product quantiser")

    def index(self) -> Any:
        """A new, empty index of this method's codes, with ``add`` and ``search`` of what ``encode`` gives."""
        return HyperbolicPQIndex.from_codec(self.codec())


class HiHPQ(Quantizer):
    """Hyperbolic product quantisation with hierarchical supervision.

    ``config.geometry = "euclidean"`` is the same method with curvature fixed at 0, "cosine" the same losses between unit
    vectors, as MeCoQ quantises and compares.

    Attributes
    ----------
    codewords : parameter (M, ksub, dsub), tangent vectors. They pass the same clip and exponential map as the data.
    log_theta : parameter (M,), logarithms of the curvatures; None in flat geometry and with the quirk "raw-curvature",
        where ``raw_theta`` holds the curvatures.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("total", "contrastive", "prototype", "instance")

    def __init__(self, d_in: int, config: TrainConfig, backbone: nn.Module | None = None) -> None:
        super().__init__(d_in, config, backbone)
        self.codewords = nn.Parameter(self._random_codewords())
        self.log_theta: nn.Parameter | None = None
        self.raw_theta: nn.Parameter | None = None
        if config.geometry == "hyperbolic":
            if "raw-curvature" in config.quirks:
                self.raw_theta = nn.Parameter(torch.full((config.M,), config.curvature))
            else:
                self.log_theta = nn.Parameter(torch.full((config.M,), math.log(config.curvature)))

    # ------------------------------------------------------------------------------------------ initialisation

    def _random_codewords(self) -> Tensor:
        """Xavier uniform over (ksub, d), then unit norm in each subspace: the authors' initialisation."""
        c = self.config
        flat = nn.init.xavier_uniform_(torch.empty(c.ksub, c.d))
        return F.normalize(flat.view(c.ksub, c.M, c.dsub), dim=-1).transpose(0, 1).contiguous()

    # ------------------------------------------------------------------------------------------ the map

    @property
    def uses_clusters(self) -> bool:
        """Whether a loss of the hierarchy counts."""
        return bool(self.config.lambda1 or self.config.lambda2)

    @property
    def theta(self) -> Tensor:
        """Curvatures (M,) (the manifold's curvature is -theta), differentiable; zeros in flat geometry."""
        if self.raw_theta is not None:
            return self.raw_theta
        if self.log_theta is None:
            return self.codewords.new_zeros(self.config.M)
        return self.log_theta.exp()

    @torch.no_grad()
    def after_step(self) -> None:
        """Bring curvatures that a step took out of CURVATURE_RANGE back to its edge."""
        low, high = CURVATURE_RANGE
        if self.log_theta is not None:
            self.log_theta.clamp_(math.log(low), math.log(high))
        if self.raw_theta is not None:
            self.raw_theta.clamp_(low, high)

    @property
    def space(self) -> Space:
        """Where points live, with the curvatures of the moment."""
        if self.config.geometry == "cosine":
            return Cosine()
        return Lorentz(self.theta, self.config.clip_radius, squared=self.config.contrast == "squared")

    def vectors(self, tangents: Tensor) -> Tensor:
        """Unclipped tangent vectors; in cosine geometry unit subvectors, joined."""
        return self.points(tangents).flatten(1) if self.config.geometry == "cosine" else tangents

    def points(self, tangents: Tensor) -> Tensor:
        """Points (n, M, dsub) of tangent vectors (n, d)."""
        return self.space.points(tangents.view(len(tangents), self.config.M, self.config.dsub))

    def codebooks(self) -> Tensor:
        """Codewords as points (M, ksub, dsub)."""
        return self.space.codebooks(self.codewords)

    def quantize(self, points: Tensor) -> Tensor:
        """Soft quantisation of points (n, M, dsub), Eq. 11-12: the mean of all codewords, near ones weighing more.

        Weights are ``softmax(-d / tau)`` of squared Lorentzian distances d (in cosine geometry, of inner products).
        """
        space, codebooks = self.space, self.codebooks()
        weights = torch.softmax(-space.to_codewords(points, codebooks) / self.config.tau, dim=-1)
        return space.mean(codebooks, weights)

    def compare(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Views (n, d_in), or images, softly quantised, (n, M, dsub); and the distances (n, n) to these that the losses see:
        from each other, or with ``config.asymmetric`` from the points that they were."""
        points = self.points(self.tangents(views))
        quantized = self.quantize(points)
        return quantized, self.space.distances(points if self.config.asymmetric else quantized, quantized)

    def forward(
        self,
        view1: Tensor,
        view2: Tensor,
        hierarchy: BatchHierarchy | None = None,
        items: Tensor | None = None,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Losses (Eq. 13-21); total = contrastive + λ1·prototype + λ2·instance.

        Without ``hierarchy`` (warm-up) the prototype and the instance loss are 0. They look at view 1 only: view 2 may
        show a neighbour, whose prototypes are its own.
        """
        c, space, b = self.config, self.space, len(view1)
        quantized, distances = self.compare(torch.cat([view1, view2]))
        contrastive = quantized_contrastive_loss(distances, c.tau_qc)
        prototype = instance = torch.zeros_like(contrastive)
        if hierarchy is not None and c.lambda1:
            to_prototypes = [space.distances(quantized[:b], self.points(p)) for p in hierarchy.prototypes]
            of_prototypes = batch_prototype_loss if "batch-prototypes" in c.quirks else prototype_loss
            prototype = of_prototypes(to_prototypes, hierarchy.assignments, c.tau_qc)
        if hierarchy is not None and c.lambda2:
            if "first-positive" in c.quirks:
                partners = first_partners(hierarchy.assignments)
            else:
                partners = draw_partners(hierarchy.assignments, hierarchy.keys)
            with_self = bool({"self-negative", "first-positive"} & set(c.quirks))
            instance = instance_loss(distances[:b, :b], partners, c.tau_qc, with_self=with_self)
        total = contrastive + c.lambda1 * prototype + c.lambda2 * instance
        return {"total": total, "contrastive": contrastive, "prototype": prototype, "instance": instance}

    @torch.no_grad()
    def quantization_error(self, vectors: npt.NDArray[np.float32]) -> float:
        """Mean over items and subspaces of the squared Lorentzian distance (cosine: of 1 - inner product) between a point
        and its nearest codeword; ``vectors`` (n, d) are those of ``encode``."""
        total, codebooks = 0.0, self.codebooks()
        for start in range(0, len(vectors), _ROWS):
            points = self.points(torch.from_numpy(vectors[start : start + _ROWS]).to(codebooks.device))
            total += float(self.space.to_codewords(points, codebooks).amin(-1).sum())
        return total / (len(vectors) * self.config.M) + (1.0 if self.config.geometry == "cosine" else 0.0)

    @torch.no_grad()
    def refit(self, vectors: npt.NDArray[np.float32]) -> None:
        """Put centres of hyperbolic k-means of ``vectors`` (n, d), n >= ksub, in place of the codewords.

        A soft codeword shares items with its neighbours; codes are hard, and the mean error of hard codes is what k-means
        lowers. See ``HyperbolicProductQuantizer.train``.
        """
        codec = self.codec()
        codec.train(vectors)
        points = torch.from_numpy(codec.codebooks).to(self.codewords)
        self.codewords.copy_(lorentz.log0(points, self.theta[:, None]))

    @torch.no_grad()
    def codec(self) -> HyperbolicProductQuantizer:
        """The codec as it stands: these codebooks as points, these curvatures, this clip radius."""
        cosine = self.config.geometry == "cosine"
        return HyperbolicProductQuantizer.from_codebooks(
            self.codebooks().float().cpu().numpy(),
            self.theta.float().cpu().numpy(),
            metric="inner_product" if cosine else "geodesic",
            clip_radius=None if cosine else self.config.clip_radius,
        )
