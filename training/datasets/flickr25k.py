"""Flickr25K: the MIRFLICKR-25000 collection (Huiskes and Lew, 2008) with its 24 concepts as labels."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hyperfaiss.errors import CorruptFileError, InvalidParameterError
from training.data import ImageSet, digest, read_image
from training.datasets.layout import find, read_lines

__all__ = ["CONCEPTS", "load_flickr25k"]

# The topics of the annotations' "potential labels". Fourteen have a second file, animals_r1.txt and so on, with the images
# that show the topic saliently: a narrower reading of the same word, which papers on hashing leave out.
CONCEPTS = (
    "animals", "baby", "bird", "car", "clouds", "dog", "female", "flower", "food", "indoor", "lake", "male",
    "night", "people", "plant_life", "portrait", "river", "sea", "sky", "structures", "sunset", "transport", "tree", "water",
)  # fmt: skip

_IMAGES = ("mirflickr", "mirflickr25k", "mirflickr25k/mirflickr", "images", ".")
_ANNOTATIONS = (
    "annotations",
    "mirflickr25k_annotations_v080",
    "annotations_v080",
    "mirflickr/annotations",
    "mirflickr/mirflickr25k_annotations_v080",
    ".",
)
_NAME = re.compile(r"im([1-9][0-9]*)\.jpg", re.ASCII)


def load_flickr25k(folder: str | os.PathLike[str]) -> ImageSet:
    """MIRFLICKR-25000 as its archives unpack: image i − 1 is im<i>.jpg, labels (n, 24) bool are those of CONCEPTS.

    In ``folder``: the images in ``mirflickr/`` (or ``images/``, or the folder itself), and one file a concept, with the
    numbers of its images one a line, in ``annotations/``, ``mirflickr25k_annotations_v080/`` or the folder itself. Of the
    25,000 images 24,581 have a label.

    Raises:
        InvalidParameterError: no such folder, or images or annotation files that are missing.
        CorruptFileError: an annotation that is not the number of an image.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise InvalidParameterError(f"no folder at {root}")
    first = find(root, [f"{place}/im1.jpg" for place in _IMAGES], "images")
    paths, sizes = _images(first.parent)
    marks = [f"{place}/{CONCEPTS[k]}.txt" for k in (0, -1) for place in _ANNOTATIONS]
    annotations = find(root, marks, "annotations").parent
    missing = [f"{concept}.txt" for concept in CONCEPTS if not (annotations / f"{concept}.txt").is_file()]
    if missing:
        raise InvalidParameterError(f"{annotations} lacks {', '.join(missing)}")
    labels = np.zeros((len(paths), len(CONCEPTS)), bool)
    for c, concept in enumerate(CONCEPTS):
        labels[_numbers(annotations / f"{concept}.txt", len(paths)) - 1, c] = True
    fingerprint = digest("flickr25k", sizes, labels)
    return ImageSet("flickr25k", len(paths), labels, CONCEPTS, fingerprint, lambda i: read_image(paths[i]))


def _images(folder: Path) -> tuple[list[Path], npt.NDArray[np.int64]]:
    """Paths of im1.jpg, im2.jpg and so on, and their sizes."""
    with os.scandir(folder) as entries:
        found = {int(m[1]): e.stat().st_size for e in entries if (m := _NAME.fullmatch(e.name))}
    last = max(found)
    if len(found) < last:
        absent = sorted(set(range(1, last + 1)) - set(found))
        names = ", ".join(f"im{i}.jpg" for i in absent[:3]) + (" …" if len(absent) > 3 else "")
        raise InvalidParameterError(f"{folder} lacks {len(absent):,} of im1.jpg … im{last}.jpg: {names}")
    numbers = range(1, last + 1)
    return [folder / f"im{i}.jpg" for i in numbers], np.array([found[i] for i in numbers], np.int64)


def _numbers(path: Path, n: int) -> npt.NDArray[np.int64]:
    numbers = []
    for i, line in enumerate(read_lines(path), 1):
        if not line:
            continue
        if not (line.isascii() and line.isdigit() and 1 <= int(line) <= n):
            raise CorruptFileError(f"{path}, line {i}: expected the number of an image from 1 to {n}, got {line[:40]!r}")
        numbers.append(int(line))
    return np.array(numbers, np.int64)
