"""Two views of each training item: what HiHPQ learns from in place of labels.

A :class:`ViewSource` gives the trainer raw vectors (or images, when the backbone is trained too). Augmented images can
be passed through a frozen backbone once and kept on disk (`training.cache`); a view may also come from one of the item's
nearest neighbours, or from noise in the space of the vectors. All randomness comes from generators that callers pass
or seed, never from a global one, so a run can be repeated and resumed exactly.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError
from training.augment import Augmentation, augment, resolve_augmentation
from training.backbones import Amp, Backbone, FeatureExtractor, Features, Pixels, extract_features
from training.config import TrainConfig
from training.data import ImageSet
from training.neighbours import checked_neighbours, nearest_neighbours

Indices = npt.NDArray[np.int64]
# How many nearest neighbours, or a table (n, k) of them.
Neighbours = int | Indices


class Views(NamedTuple):
    """Two views of a batch of B items.

    view1, view2 : each (B, d_in) float32 features, or (B, C, S, S) normalised images.
    partners : int64 (B,), the items that view 2 shows: neighbours, or the items themselves.
    """

    view1: torch.Tensor
    view2: torch.Tensor
    partners: Indices


@runtime_checkable
class ViewSource(Protocol):
    """What the trainer consumes.

    Attributes:
        n: number of training items.
        d_in: length of a feature vector.
        backbone: the trainable module that turns a batch of views into features; None when views are features already.
    """

    n: int
    d_in: int
    backbone: torch.nn.Module | None

    def features(self) -> Features:
        """(n, d_in) float32: un-augmented features as the backbone gives them, before any centring or normalisation."""
        ...

    def views(self, indices: Indices, rng: np.random.Generator) -> Views:
        """Two views of the items `indices` (B,), int64.

        All randomness comes from `rng`; the same state gives the same views.
        """
        ...


class _Partners:
    """Draws whom the second view of an item comes from: a neighbour with some probability, else the item itself."""

    def __init__(self, features: Features, neighbours: Neighbours, probability: float) -> None:
        if not 0 <= probability <= 1 or (isinstance(neighbours, int) and neighbours < 0):
            raise InvalidParameterError(
                f"neighbours must be at least 0 and their probability in [0, 1], got {neighbours} and {probability}"
            )
        self.probability = probability
        self.table: Indices | None
        if not isinstance(neighbours, int):
            self.table = checked_neighbours(neighbours, len(features))
        else:
            self.table = nearest_neighbours(features, neighbours) if neighbours and probability else None

    def draw(self, indices: Indices, rng: np.random.Generator) -> Indices:
        if self.table is None:
            return indices
        chosen = self.table[indices, rng.integers(self.table.shape[1], size=len(indices))]
        return np.where(rng.random(len(indices)) < self.probability, chosen, indices)


# Sources


class CachedViews:
    """Views from a cache of augmented images' features; the second one may show a neighbour.

    Args:
        features: (n, d) float32, un-augmented (`cache_features`).
        views: (V, n, d) float16 or float32 (`cache_views`).
        neighbours: k, and the second view shows one of the k nearest neighbours in `features`; or whom it shows, as integers
            (n, k) (see `training.neighbours`). 0: always the item itself.
        neighbour_probability: how often it does.

    Raises:
        InvalidVectorsError: shapes that do not fit each other.
        InvalidParameterError: a parameter out of its range, or one view alone and no neighbours: nothing to contrast.
    """

    backbone: torch.nn.Module | None = None

    def __init__(
        self,
        features: Features,
        views: npt.NDArray[Any],
        *,
        neighbours: Neighbours = 0,
        neighbour_probability: float = 1.0,
    ) -> None:
        self._features = _matrix(features)
        self.n, self.d_in = self._features.shape
        if views.ndim != 3 or views.shape[1:] != self._features.shape or not len(views) or views.dtype.kind != "f":
            raise InvalidVectorsError(
                f"views must be floats (V, {self.n}, {self.d_in}) as the features are, got {views.dtype} {views.shape}"
            )
        self._views = views
        self._partners = _Partners(self._features, neighbours, neighbour_probability)
        if len(views) == 1 and self._partners.table is None:
            raise InvalidParameterError("one cached view and no neighbours would make both views equal; use V >= 2")

    def features(self) -> Features:
        return self._features

    def views(self, indices: Indices, rng: np.random.Generator) -> Views:
        """Features; two views of the same item are never the same view."""
        count = len(self._views)
        partners = self._partners.draw(indices, rng)
        first = rng.integers(count, size=len(indices))
        second = (first + 1 + rng.integers(max(count - 1, 1), size=len(indices))) % count
        one, two = self._views[first, indices], self._views[second, partners]
        return Views(torch.from_numpy(one.astype(np.float32)), torch.from_numpy(two.astype(np.float32)), partners)


class EmbeddingViews:
    """Views made in the space of the vectors, for data that has no images.

    The two views of item x start as x and, with `neighbours`, one of its nearest neighbours y; then each is changed:

    - mixup > 0: the second becomes l x + (1 - l) y with l drawn from Beta(mixup, mixup) (near 0: either x or y).
    - noise: Gaussian noise of `noise` times each coordinate's spread over the items is added.
    - dropout: each coordinate takes its mean over the items with this probability, which is 0 once centred.

    Args:
        features: (n, d) float32, the training vectors.
        neighbours, neighbour_probability: as for CachedViews.

    Raises:
        InvalidVectorsError: features are not (n, d) floats.
        InvalidParameterError: a parameter out of its range, mixup without neighbours, or equal views.
    """

    backbone: torch.nn.Module | None = None

    def __init__(
        self,
        features: Features,
        *,
        neighbours: Neighbours = 0,
        neighbour_probability: float = 1.0,
        dropout: float = 0.0,
        noise: float = 0.0,
        mixup: float = 0.0,
    ) -> None:
        if not 0 <= dropout < 1 or noise < 0 or mixup < 0:
            raise InvalidParameterError(f"need 0 <= dropout < 1, noise >= 0 and mixup >= 0, got {dropout}, {noise} and {mixup}")
        self._features = _matrix(features)
        self.n, self.d_in = self._features.shape
        self._partners = _Partners(self._features, neighbours, neighbour_probability)
        if self._partners.table is None and (mixup or not (dropout or noise)):
            raise InvalidParameterError(
                "mixup needs neighbours" if mixup else "give neighbours, dropout or noise: else both views are equal"
            )
        self._dropout, self._noise, self._mixup = dropout, noise, mixup
        self._mean = self._features.mean(axis=0, dtype=np.float64).astype(np.float32)
        self._spread = self._features.std(axis=0, dtype=np.float64).astype(np.float32)

    def features(self) -> Features:
        return self._features

    def views(self, indices: Indices, rng: np.random.Generator) -> Views:
        """Features; of a mixture of two, the partner is the neighbour."""
        partners = self._partners.draw(indices, rng)
        one, two = self._features[indices], self._features[partners]
        if self._mixup:
            share = rng.beta(self._mixup, self._mixup, size=(len(indices), 1)).astype(np.float32)
            two = share * one + (1 - share) * two
        return Views(self._changed(one, rng), self._changed(two, rng), partners)

    def _changed(self, x: Features, rng: np.random.Generator) -> torch.Tensor:
        if self._noise:
            x = x + np.float32(self._noise) * self._spread * rng.standard_normal(x.shape, dtype=np.float32)
        if self._dropout:
            x = np.where(rng.random(x.shape, dtype=np.float32) < self._dropout, self._mean, x)
        return torch.from_numpy(x)


# Fields of a configuration on which views depend.
VIEW_FIELDS = ("power", "neighbours", "neighbour_probability", "diffusion", "dropout", "noise", "mixup")


def neighbours_of(config: TrainConfig, features: Features) -> dict[str, Any]:
    """A source's arguments that say whom a configuration shows as the second view, among items with features (n, d)."""
    k = min(config.neighbours, len(features) - 1)
    shown: Neighbours = k
    if k and config.neighbour_probability:
        shown = nearest_neighbours(features, k, power=config.power, diffusion=config.diffusion)
    return {"neighbours": shown, "neighbour_probability": config.neighbour_probability}


def source_of(config: TrainConfig, features: Features, views: npt.NDArray[Any] | None = None) -> CachedViews | EmbeddingViews:
    """The views that a configuration makes of features (n, d), or of cached views (V, n, d) where there are some."""
    shown = neighbours_of(config, features)
    if views is not None:
        return CachedViews(features, views, **shown)
    return EmbeddingViews(features, **shown, dropout=config.dropout, noise=config.noise, mixup=config.mixup)


class ImageViews:
    """Views augmented on the fly: images for a trainable backbone, features from a frozen one.

    Args:
        images: the training images.
        backbone: if trainable, `views` gives images, `backbone` is the module to train, and `features()` computes with
            its weights of the moment.
        augmentation: as for `cache_views`.
        features: (n, d_out) float32, un-augmented features, if they are known already; else computed here.
        neighbours, neighbour_probability: as for CachedViews; neighbours are those at construction.
        batch_size, device, amp, threads: see FeatureExtractor; `threads` also augment.

    Raises:
        InvalidVectorsError: features of another shape.
        InvalidParameterError: a parameter out of its range.
    """

    def __init__(
        self,
        images: ImageSet,
        backbone: Backbone,
        *,
        augmentation: str | Augmentation | None = None,
        features: Features | None = None,
        neighbours: Neighbours = 0,
        neighbour_probability: float = 1.0,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        amp: Amp = "auto",
        threads: int | None = None,
        progress: bool = True,
    ) -> None:
        self.n, self.d_in = images.n, backbone.d_out
        self.backbone: torch.nn.Module | None = backbone.module if backbone.trainable else None
        self._images, self._backbone = images, backbone
        self._augmentation = resolve_augmentation(augmentation, images, backbone)
        self._options: dict[str, Any] = {"batch_size": batch_size, "device": device, "amp": amp, "threads": threads}
        self._progress = progress
        self._threads = threads or torch.get_num_threads()
        self._features = self._extract() if features is None else _matrix(features)
        if self._features.shape != (self.n, self.d_in):
            raise InvalidVectorsError(f"features must be {(self.n, self.d_in)}, got {self._features.shape}")
        self._partners = _Partners(self._features, neighbours, neighbour_probability)
        self._extractor = None if backbone.trainable else FeatureExtractor(backbone, **self._options)

    def features(self) -> Features:
        """(n, d_in) float32; of a trainable backbone, with its weights of the moment: a pass over all images."""
        return self._extract() if self._backbone.trainable else self._features

    def views(self, indices: Indices, rng: np.random.Generator) -> Views:
        """Normalised images for a trainable backbone, else features."""
        partners = self._partners.draw(indices, rng)
        items = np.concatenate([indices, partners])
        seeds = rng.integers(2**63, size=len(items))

        def load(row: int) -> Pixels:
            image = self._images.image(int(items[row]))
            return augment(image, self._backbone, self._augmentation, [int(seeds[row])])

        if self._extractor is not None:
            blocks = [block for _, block in self._extractor.blocks(load, len(items))]
            both = torch.from_numpy(np.concatenate(blocks))
        else:
            with ThreadPoolExecutor(self._threads) as pool:
                pixels = np.stack(list(pool.map(load, range(len(items)))))
            both = self._backbone.normalize(torch.from_numpy(pixels))
        return Views(both[: len(indices)], both[len(indices) :], partners)

    def _extract(self) -> Features:
        return extract_features(self._backbone, self._images, progress=self._progress, **self._options)


def _matrix(x: Features) -> Features:
    x = np.asarray(x)
    if x.ndim != 2 or 0 in x.shape or x.dtype.kind != "f":
        raise InvalidVectorsError(f"features must be floats of shape (n, d), got {x.dtype} of shape {x.shape}")
    return x.astype(np.float32, copy=False)
