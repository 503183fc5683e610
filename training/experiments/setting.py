"""What all runs of an experiment share: the protocol, the backbone's features, the views to learn from, the judgement."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hyperfaiss.base import BaseIndex
from hyperfaiss.errors import InvalidParameterError
from training.backbones import Features, load_backbone
from training.cache import cache_features, cache_views
from training.config import TrainConfig
from training.evaluate import Searchable, evaluate_index
from training.experiments.baselines import normalized
from training.protocols import load_protocol
from training.split import Labels
from training.views import VIEW_FIELDS, ViewSource, source_of

__all__ = ["Setting", "SettingOptions"]

# Augmented views are drawn with this seed whatever a run's own is: they are made once for all runs.
_VIEWS_SEED = 0


@dataclass(frozen=True)
class SettingOptions:
    """What a :class:`Setting` is made of; plain values.

    protocol : a name in ``PROTOCOLS``; data : its images (see ``load_protocol``); n : MAP@n, None for the protocol's own.
    queries_per_class, train_per_class : other numbers than the protocol's, for smaller collections.
    split_seed : of the draw of queries and training images, one for all runs.
    backbone, weights, image_size : see ``load_backbone``; it stays frozen.
    cached_views : augmented views of each training image; 0 learns from the features alone.
    cache : folder of features and views.
    by_labels : whether labels of held-out training images choose a run's epoch; else the last one is taken.
    device : where networks compute.
    """

    protocol: str
    cache: Path
    data: str | None = None
    n: int | None = None
    queries_per_class: int | None = None
    train_per_class: int | None = None
    split_seed: int = 0
    backbone: str = "efficientnet-lite0"
    weights: Path | None = None
    image_size: int | None = None
    cached_views: int = 10
    by_labels: bool = False
    device: str = "cpu"


class Setting:
    """The data of an experiment. Features and views are computed (or read from the cache) when they are first asked for.

    Raises what ``load_protocol`` and ``load_backbone`` raise.
    """

    def __init__(self, options: SettingOptions) -> None:
        if options.cached_views < 0 or (options.n is not None and options.n < 1):
            raise InvalidParameterError(f"need cached_views >= 0 and n >= 1, got {options.cached_views} and {options.n}")
        self.options = options
        numbers = {"queries_per_class": options.queries_per_class, "train_per_class": options.train_per_class}
        self.protocol = load_protocol(options.protocol, options.data, seed=options.split_seed, **numbers)
        self.backbone = load_backbone(options.backbone, weights=options.weights, image_size=options.image_size)
        self.n = min(options.n or self.protocol.n, len(self.protocol.split.database))
        self._shared: tuple[dict[str, Any], ViewSource] | None = None

    # ------------------------------------------------------------------------------------------ what it is

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What figures must have in common to stand in one table; JSON-able."""
        split, images = self.protocol.split, self.protocol.images
        digest = hashlib.blake2b(digest_size=16)
        for rows in (split.query, split.train, self.database):
            digest.update(rows.tobytes() + b"|")
        return {
            "protocol": self.protocol.name,
            "images": images.fingerprint,
            "split": digest.hexdigest(),
            "n": self.n,
            "backbone": self.backbone.name,
            "image_size": self.backbone.image_size,
            "features": self.backbone.fingerprint(),
        }

    @property
    def learning_facts(self) -> dict[str, Any]:
        """What else decides a trained model, beside its configuration."""
        views = {"views": self.options.cached_views, "views_seed": _VIEWS_SEED} if self.options.cached_views else {"views": 0}
        return views | {"epoch_by": "validation MAP" if self.options.by_labels else "last or loss"}

    def describe(self) -> str:
        """One line for people."""
        split, images, views = self.protocol.split, self.protocol.images, self.options.cached_views
        learnt = f"{views} augmented views of each image" if views else "embeddings alone"
        return (
            f"{self.protocol.name} on {images.name}: {len(split.query):,} queries, {len(split.database):,} in the database, "
            f"{len(split.train):,} training images ({learnt}); {self.backbone.name} at {self.backbone.image_size} px, frozen"
        )

    # ------------------------------------------------------------------------------------------ what runs take

    @cached_property
    def features(self) -> Features:
        """(n, d_in) float32 of all images, a memory map."""
        return cache_features(self.protocol.images, self.backbone, self.options.cache, device=self.options.device)

    @cached_property
    def _training_features(self) -> Features:
        return np.ascontiguousarray(self.features[self.protocol.split.train])

    @cached_property
    def _views(self) -> npt.NDArray[Any]:
        """(V, training images, d_in), a memory map."""
        images = self.protocol.images.subset(self.protocol.split.train)
        options = self.options
        return cache_views(
            images, self.backbone, options.cache, views=options.cached_views, seed=_VIEWS_SEED, device=options.device
        )

    @cached_property
    def database(self) -> npt.NDArray[np.int64]:
        """Rows of the database in the order that indexes hold it: shuffled, by the split's seed.

        Equal distances are ranked by position, and images mostly come class by class: in that order, many a tied list of
        Hamming codes would hold one class.
        """
        return np.random.default_rng(self.options.split_seed).permutation(self.protocol.split.database)

    @cached_property
    def normalized_features(self) -> Features:
        """(n, d_in): what the faiss methods get."""
        return normalized(self.features, self.protocol.split.database)

    @property
    def training_labels(self) -> Labels | None:
        """Labels that may choose the epoch."""
        return self.protocol.labels[self.protocol.split.train] if self.options.by_labels else None

    def prepare(self, *, learns: bool) -> None:
        """Fill the cache now, with its progress bars."""
        _ = self.features
        if learns and self.options.cached_views:
            _ = self._views

    def source(self, config: TrainConfig) -> ViewSource:
        """What a run of this configuration learns from; runs that agree on it share it one after the other."""
        key = {name: getattr(config, name) for name in VIEW_FIELDS}
        if self._shared is None or self._shared[0] != key:
            views = self._views if self.options.cached_views else None
            self._shared = key, source_of(config, self._training_features, views)
        return self._shared[1]

    def judge(self, index: Searchable, database: npt.NDArray[np.float32], queries: npt.NDArray[np.float32]) -> dict[str, Any]:
        """The figures of an index that holds ``database`` (n, ·), in this order, asked for ``queries`` (nq, ·). JSON-able.

        Of an index of this library also what quantisation costs it: recall of the unquantised order, codeword usage, errors.
        """
        labels = self.protocol.labels
        asked, held = labels[self.protocol.split.query], labels[self.database]
        vectors = database if isinstance(index, BaseIndex) else None
        judged = evaluate_index(index, queries, asked, held, self.n, repeats=1, vectors=vectors)
        return judged.to_dict()
