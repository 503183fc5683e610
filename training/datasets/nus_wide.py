"""NUS-WIDE (Chua et al., 2009) with its 21 most frequent concepts as labels."""

from __future__ import annotations

import os
import warnings
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt

from hyperfaiss.errors import CorruptFileError, InvalidParameterError
from training.data import ImageSet, digest, read_image
from training.datasets.layout import find, read_lines

__all__ = ["CONCEPTS", "load_nus_wide"]

# The most frequent of the 81, from sky (74,190 images) to mountain (5,099), in the order of the lists that are passed around.
CONCEPTS = (
    "animal", "beach", "buildings", "clouds", "flowers", "grass", "lake", "mountain", "ocean", "person", "plants",
    "reflection", "road", "rocks", "sky", "snow", "sunset", "tree", "vehicle", "water", "window",
)  # fmt: skip

_LISTS = ("ImageList/Imagelist.txt", "ImageList/ImageList.txt", "Imagelist.txt", "ImageList.txt")
_LABELS = ("Groundtruth/AllLabels", "NUS-WIDE/Groundtruth/AllLabels", "AllLabels")
_IMAGES = ("Flickr", "images", "image")


def load_nus_wide(folder: str | os.PathLike[str]) -> ImageSet:
    """NUS-WIDE as its archives unpack: the images with at least one of CONCEPTS, labels (n, 21) bool, in the list's order.

    In ``folder``: ``ImageList/Imagelist.txt`` with a path an image (``actor\\0001_2124494179.jpg``),
    ``Groundtruth/AllLabels/Labels_<concept>.txt`` with a 0 or 1 an image, and the images below ``Flickr/`` (or ``images/``),
    in folders as listed or all in one. 195,834 of the 269,648 listed images have one of the labels.

    The images come from Flickr, where many are gone: those not on disk, or empty, are left out, and a warning says how many.

    Raises:
        InvalidParameterError: no such folder, files that are missing, or none of the images.
        CorruptFileError: a label that is neither 0 nor 1, or as many labels as there are no images.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InvalidParameterError(f"no folder at {root}")
    image_list = find(root, _LISTS, "list of images")
    annotations = find(root, _LABELS, "labels")
    images = find(root, _IMAGES, "images")
    listed = read_lines(image_list)
    if "" in listed:
        raise CorruptFileError(f"{image_list}, line {listed.index('') + 1}: expected the path of an image, got an empty line")
    missing = [name for c in CONCEPTS if not (annotations / (name := f"Labels_{c}.txt")).is_file()]
    if missing:
        raise InvalidParameterError(f"{annotations} lacks {', '.join(missing)}")
    labels = np.stack([_column(annotations / f"Labels_{c}.txt", len(listed), image_list) for c in CONCEPTS], axis=1)
    labelled = np.flatnonzero(labels.any(axis=1))
    sizes = _sizes(images)
    rows, paths, absent = [], [], []
    for row in labelled:
        # Some copies of the list carry the authors' own folders, C:\ImageData\Flickr\actor\0001_2124494179.jpg.
        path = PurePosixPath(listed[row].replace("\\", "/"))
        relative = next((r for r in ("/".join(path.parts[-2:]), path.name) if sizes.get(r)), None)
        if relative is None:
            absent.append(listed[row])
        else:
            rows.append(row)
            paths.append(relative)
    if not rows:
        such = f", such as {absent[0]}" if absent else ""
        raise InvalidParameterError(f"none of the {len(labelled):,} images with one of the 21 labels is in {images}{such}")
    if absent:
        warnings.warn(
            f"{len(absent):,} of the {len(labelled):,} images of NUS-WIDE with one of the 21 labels are not in {images}, "
            f"such as {absent[0]}: left out",
            stacklevel=2,
        )
    kept = labels[rows]
    fingerprint = digest("nus-wide", *(f"{p}\0{sizes[p]}" for p in paths), kept)
    return ImageSet("nus-wide", len(rows), kept, CONCEPTS, fingerprint, lambda i: read_image(images / paths[i]))


def _column(path: Path, n: int, image_list: Path) -> npt.NDArray[np.bool_]:
    lines = read_lines(path)
    if len(lines) != n:
        raise CorruptFileError(f"{path} has {len(lines):,} labels, {image_list} has {n:,} images")
    column = np.array(lines)
    ones = np.asarray(column == "1")
    wrong = np.flatnonzero(~ones & (column != "0"))
    if len(wrong):
        raise CorruptFileError(f"{path}, line {wrong[0] + 1}: expected 0 or 1, got {lines[wrong[0]][:40]!r}")
    return ones


def _sizes(folder: Path) -> dict[str, int]:
    """Size of each file by its path in the folder, one folder deep."""
    sizes = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                sizes[entry.name] = entry.stat().st_size
                continue
            with os.scandir(entry.path) as inner:
                sizes.update({f"{entry.name}/{e.name}": e.stat().st_size for e in inner})
    return sizes
