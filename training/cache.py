"""Features and augmented views through a frozen backbone, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hyperfaiss.errors import InvalidParameterError, InvalidVectorsError
from training.augment import Augmentation, augment, resolve_augmentation
from training.backbones import Amp, Backbone, FeatureExtractor, Features, Pixels, autocast_dtype, best_device
from training.data import ImageSet
from training.locks import locked
from training.terminal import progress_bar

FLUSH_SECONDS = 5.0  # the most work that a killed run loses


def cache_features(
    images: ImageSet,
    backbone: Backbone,
    directory: str | os.PathLike[str],
    *,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    amp: Amp = "auto",
    threads: int | None = None,
    progress: bool = True,
) -> Features:
    """Un-augmented features of every image, computed once: (n, d_out) float32, a read-only memory map.

    A file in `directory` holds them; its name comes from a fingerprint of the images, the backbone with its weights and
    the size, and the precision that `amp` chose, so a change of any of these is another file. A killed run goes on
    where it stopped.

    Raises:
        CorruptFileError: an image that can't be decoded.
    """
    more = {"compute": _precision(device, amp)}
    shape = (images.n, backbone.d_out)
    cache = _RowCache(Path(directory), "features", images, backbone, more, shape, np.dtype(np.float32))
    cache.fill(
        lambda row: backbone.prepare(images.image(row)),
        lambda: FeatureExtractor(backbone, batch_size=batch_size, device=device, amp=amp, threads=threads),
        f"{backbone.name} features of {images.name}" if progress else None,
    )
    return cache.open()


def cache_views(
    images: ImageSet,
    backbone: Backbone,
    directory: str | os.PathLike[str],
    *,
    views: int = 10,
    augmentation: str | Augmentation | None = None,
    seed: int = 0,
    dtype: npt.DTypeLike = np.float16,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    amp: Amp = "auto",
    threads: int | None = None,
    progress: bool = True,
) -> npt.NDArray[Any]:
    """Features of `views` augmented copies of every image, computed once: (V, n, d_out), a read-only memory map.

    View v of image i depends on (seed, v, i) alone. The cache is as that of `cache_features`, its fingerprint has the
    augmentation, the seed, V and the dtype too.

    Args:
        augmentation: a name in AUGMENTATIONS or an Augmentation; default `augmentation_for(images, backbone)`.
        dtype: float16 (half the space, relative error 5e-4) or float32.

    Raises:
        InvalidParameterError: views < 1, a negative seed, another dtype, an unknown augmentation.
        InvalidVectorsError: a feature that float16 can't hold.
        CorruptFileError: an image that can't be decoded.
    """
    kept = np.dtype(dtype)
    if views < 1 or seed < 0:
        raise InvalidParameterError(f"views must be at least 1 and seed at least 0, got {views} and {seed}")
    if kept not in (np.dtype(np.float16), np.dtype(np.float32)):
        raise InvalidParameterError(f"dtype must be float16 or float32, got {kept}")
    change = resolve_augmentation(augmentation, images, backbone)
    more = {"augmentation": repr(change), "seed": seed, "dtype": kept.name, "compute": _precision(device, amp)}
    cache = _RowCache(Path(directory), "views", images, backbone, more, (views, images.n, backbone.d_out), kept)

    def load(row: int) -> Pixels:
        v, i = divmod(row, images.n)
        return augment(images.image(i), backbone, change, [seed, v, i])

    cache.fill(
        load,
        lambda: FeatureExtractor(backbone, batch_size=batch_size, device=device, amp=amp, threads=threads),
        f"{views} views of {images.name}" if progress else None,
    )
    return cache.open()


def _precision(device: torch.device | str | None, amp: Amp) -> str:
    return str(autocast_dtype(device if device is not None else best_device(), amp) or torch.float32)


class _RowCache:
    """A .npy file that is filled row by row, and beside it a JSON file that says of what and how far.

    The JSON is replaced (never edited) after the rows that it counts are on disk, so whatever kills a run, the rows up
    to `rows_done` are whole. One process fills a file at a time; another that wants the same waits, then finds it full.
    """

    def __init__(
        self,
        directory: Path,
        kind: str,
        images: ImageSet,
        backbone: Backbone,
        more: dict[str, Any],
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> None:
        self.fingerprint = {
            "format": 1,
            "kind": kind,
            "images": images.fingerprint,
            "n": images.n,
            "backbone": backbone.name,
            "weights": backbone.fingerprint(),
            "image_size": backbone.image_size,
            "shape": list(shape),
            **more,
        }
        digest = hashlib.blake2b(json.dumps(self.fingerprint, sort_keys=True).encode(), digest_size=6).hexdigest()
        safe = "".join(c if c.isalnum() else "-" for c in f"{images.name}-{backbone.name}-{backbone.image_size}")
        self.path = directory / f"{safe}-{kind}-{digest}.npy"
        self.state_path = self.path.with_suffix(".json")
        self.shape, self.dtype = shape, dtype
        self.rows = int(np.prod(shape[:-1]))

    def fill(self, load: Callable[[int], Pixels], extractor: Callable[[], FeatureExtractor], title: str | None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._rows_done() == self.rows:
            return
        with locked(self.path.with_suffix(".lock")):
            done = self._rows_done()
            if done == self.rows:
                return
            rows = self._writable(new=done == 0)
            flat = rows.reshape(self.rows, self.shape[-1])
            saved = time.monotonic()
            with progress_bar(title or "", self.rows, shown=title is not None) as show:
                show(done)
                for first, block in extractor().blocks(load, self.rows, start=done):
                    flat[first : first + len(block)] = self._converted(first, block)
                    done = first + len(block)
                    show(done)
                    if time.monotonic() - saved >= FLUSH_SECONDS:
                        rows.flush()
                        self._save_state(done)
                        saved = time.monotonic()
            rows.flush()
            self._save_state(done)

    def open(self) -> npt.NDArray[Any]:
        return np.asarray(np.load(self.path, mmap_mode="r", allow_pickle=False))

    def _converted(self, first: int, block: Features) -> npt.NDArray[Any]:
        if self.dtype == np.float16 and np.abs(block).max() > np.finfo(np.float16).max:
            raise InvalidVectorsError(f"a feature of row {first} or after is beyond float16; use dtype=float32")
        return block.astype(self.dtype)

    def _rows_done(self) -> int:
        """Rows that are on disk; 0 when there is nothing to go on from."""
        try:
            state = json.loads(self.state_path.read_text())
            array = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return 0
        same = state.get("fingerprint") == self.fingerprint and array.shape == self.shape and array.dtype == self.dtype
        done = state.get("rows_done", 0) if same else 0
        return done if isinstance(done, int) and 0 <= done <= self.rows else 0

    def _writable(self, *, new: bool) -> np.memmap[Any, Any]:
        if not new:
            return np.lib.format.open_memmap(self.path, mode="r+")
        self.state_path.unlink(missing_ok=True)
        rows = np.lib.format.open_memmap(self.path, mode="w+", dtype=self.dtype, shape=self.shape)
        if hasattr(os, "posix_fallocate"):  # a full disk is an OSError here, but kills the process at a mapped write
            with self.path.open("r+b") as f:
                os.posix_fallocate(f.fileno(), 0, self.path.stat().st_size)
        return rows

    def _save_state(self, rows_done: int) -> None:
        temporary = self.state_path.with_suffix(".json.tmp")
        with temporary.open("w") as f:
            json.dump({"fingerprint": self.fingerprint, "rows": self.rows, "rows_done": rows_done}, f, indent=1)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(self.state_path)
