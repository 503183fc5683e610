"""The published evaluation protocols: a collection, its queries, database and training images, and where MAP is cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from hyperfaiss.errors import InvalidParameterError
from training.data import ImageSet, default_root, load_images
from training.datasets import load_flickr25k, load_nus_wide
from training.split import Labels, Split, random_split, split_protocol

__all__ = ["PROTOCOLS", "Protocol", "load_protocol"]

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class Protocol:
    """What retrieval is judged on.

    Attributes:
        name: one of PROTOCOLS.
        images: all images; `split` numbers them.
        split: queries, training images (part of the database) and database (all but the queries).
        n: MAP@n.
    """

    name: str
    images: ImageSet
    split: Split
    n: int

    @property
    def labels(self) -> Labels:
        """(n,) int64 or (n, L) bool, of all images; relevant = the same class, or a label in common."""
        if self.images.labels is None:
            raise InvalidParameterError(f"{self.images.name} has no labels to judge retrieval with")
        return self.images.labels


def _cifar10(data: Source) -> ImageSet:
    folder = Path(data).expanduser()
    root = folder.parent if folder.name == _BATCHES else folder
    if (root / _BATCHES).is_dir():  # the authors' archive, unpacked
        return load_images("cifar10", root=root)
    return load_images(data)


@dataclass(frozen=True)
class _Rule:
    """MAP@n; how many queries and training images of each class, or, unless `per_class`, of all; None: all the database."""

    n: int
    queries: int
    train: int | None
    per_class: bool
    load: Callable[[Source], ImageSet]
    where: str  # to get what can't be downloaded by itself


_BATCHES = "cifar-10-batches-py"
_MIRFLICKR = "mirflickr25k.zip and mirflickr25k_annotations_v080.zip from https://press.liacs.nl/mirflickr/mirdownload.html"
_NUS_WIDE = "Groundtruth, ImageList and the images as https://github.com/NExTplusplus/NUS-WIDE says"
_RULES = {
    "cifar10-i": _Rule(1000, 1000, None, True, _cifar10, ""),
    "cifar10-ii": _Rule(1000, 1000, 500, True, _cifar10, ""),
    "flickr25k": _Rule(5000, 2000, 5000, False, load_flickr25k, _MIRFLICKR),
    "nus-wide": _Rule(5000, 100, 500, True, load_nus_wide, _NUS_WIDE),
}
PROTOCOLS: tuple[str, ...] = tuple(_RULES)


def load_protocol(
    name: str,
    data: Source | ImageSet | None = None,
    *,
    seed: int = 0,
    queries_per_class: int | None = None,
    train_per_class: int | None = None,
    queries: int | None = None,
    train: int | None = None,
) -> Protocol:
    """A protocol by name, with its images and a split drawn with this seed.

    ================  ==============================  ===================  =============================  ========
    name              images                          queries              training images                MAP at
    ================  ==============================  ===================  =============================  ========
    ``cifar10-i``     60,000, ten classes             1,000 a class        the database                   1,000
    ``cifar10-ii``    60,000, ten classes             1,000 a class        500 a class                    1,000
    ``flickr25k``     25,000, 24 labels               2,000                5,000                          5,000
    ``nus-wide``      195,834, 21 labels              100 a label          500 a label                    5,000
    ================  ==============================  ===================  =============================  ========

    The database is every image that is no query; training images are in it. Queries of ``flickr25k`` may be among the 419
    images without a label, whose average precision is 0, as in the authors' runs. Of ``nus-wide`` each image is drawn once,
    for one of its labels: 2,100 queries, 10,500 training images.

    Args:
        data: the images: None for the public collection (CIFAR-10 is downloaded, the others are looked for where downloads are
            kept), an ImageSet, or a folder: for CIFAR-10 torchvision's, or one folder a class, as a whole or in parts train
            and test (any name or folder of `load_images` will do); else see `load_flickr25k` and `load_nus_wide`.
        seed: of the draw.
        queries_per_class, train_per_class: other numbers, for smaller collections; not of flickr25k.
        queries, train: the same for flickr25k.

    Raises:
        InvalidParameterError: no such protocol or data, images without labels, numbers that are not this protocol's, or too
            few images for them.
        CorruptFileError: a file of the collection that is not what it should be.
    """
    if name not in _RULES:
        raise InvalidParameterError(f"no protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    rule = _RULES[name]
    numbers = {"queries_per_class": queries_per_class, "train_per_class": train_per_class, "queries": queries, "train": train}
    mine = ["queries_per_class", "train_per_class"] if rule.per_class else ["queries", "train"]
    if rule.train is None:
        mine.pop()
    foreign = [key for key, value in numbers.items() if value is not None and key not in mine]
    if foreign:
        raise InvalidParameterError(f"{name} takes {' and '.join(mine)}, not {' or '.join(foreign)}")
    images = data if isinstance(data, ImageSet) else _images(name, rule, data)
    if images.labels is None:
        raise InvalidParameterError(f"{images.name} has no labels to judge retrieval with: give it one folder for each class")
    if len(images.class_names) < 2:
        raise InvalidParameterError(f"{images.name} has one class, {images.class_names}: every image would be relevant")
    if rule.per_class:
        split = split_protocol(
            images.labels,
            queries_per_class=rule.queries if queries_per_class is None else queries_per_class,
            train_per_class=rule.train if train_per_class is None else train_per_class,
            seed=seed,
            class_names=images.class_names,
        )
    else:
        split = random_split(
            images.n,
            queries=rule.queries if queries is None else queries,
            train=rule.train if train is None else train,
            seed=seed,
        )
    return Protocol(name, images, replace(split, fingerprint=images.fingerprint), rule.n)


def _images(name: str, rule: _Rule, data: Source | None) -> ImageSet:
    if data is not None:
        return rule.load(data)
    if not rule.where:
        return rule.load("cifar10")
    folder = default_root() / name
    if not folder.is_dir():
        raise InvalidParameterError(
            f"{name} can't be downloaded by itself: get {rule.where}, and give their folder, or {folder}"
        )
    return rule.load(folder)
