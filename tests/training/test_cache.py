"""Features and views on disk: what names a file, what a kill, damage or an error leaves of it."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hyperfaiss.errors import CorruptFileError, InvalidParameterError, InvalidVectorsError
from tests.training.toys import PIXELS, colour_backbone, grey_images
from training import cache as cache_module
from training.augment import AUGMENTATIONS, MildAugmentation, augment
from training.backbones import Backbone, extract_features, load_backbone
from training.cache import cache_features, cache_views
from training.data import ImageSet


def files(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.glob("*.npy"))


def test_cached_features_are_the_extracted_ones(tmp_path: Path) -> None:
    images = grey_images()
    comp = cache_features(images, PIXELS, tmp_path / "new", progress=False)
    np.testing.assert_array_equal(comp, extract_features(PIXELS, images, progress=False))
    assert (comp.dtype, comp.flags.writeable) == (np.float32, False)


def test_view_v_of_image_i_depends_on_seed_v_and_i(tmp_path: Path) -> None:
    images = grey_images()
    comp = cache_views(images, PIXELS, tmp_path, views=3, seed=5, dtype=np.float32, progress=False)
    assert comp.shape == (3, 30, 64)
    for v, i in ((0, 0), (1, 29), (2, 7)):
        ref = augment(images.image(i), PIXELS, AUGMENTATIONS["mild"], [5, v, i])
        np.testing.assert_allclose(comp[v, i], ref.ravel() / 255, rtol=1e-6)
    fewer = cache_views(images, PIXELS, tmp_path, views=2, seed=5, dtype=np.float32, batch_size=7, threads=3, progress=False)
    np.testing.assert_array_equal(fewer, comp[:2])
    half = cache_views(images, PIXELS, tmp_path, views=3, seed=5, progress=False)
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, comp, rtol=1e-3, atol=1e-6)


def test_second_call_reads_and_any_change_is_another_file(tmp_path: Path) -> None:
    calls = 0

    def counted(images: ImageSet) -> ImageSet:
        def load(i: int) -> Image.Image:
            nonlocal calls
            calls += 1
            return images.image(i)

        return dataclasses.replace(images, load=load)

    images = counted(grey_images())
    ref = cache_views(images, PIXELS, tmp_path, views=2, progress=False)
    assert calls == 60
    np.testing.assert_array_equal(cache_views(images, PIXELS, tmp_path, views=2, progress=False), ref)
    assert calls == 60
    variants: list[tuple[ImageSet, Backbone, dict[str, Any]]] = [
        (images, PIXELS, {"views": 3}),
        (images, PIXELS, {"seed": 1}),
        (images, PIXELS, {"augmentation": "mild-flip"}),
        (images, PIXELS, {"augmentation": MildAugmentation(shift=0.2)}),
        (images, PIXELS, {"dtype": np.float32}),
        (images, PIXELS, {"amp": True}),
        (images, load_backbone("pixels", image_size=9), {}),
        (images.subset(np.arange(29)), PIXELS, {}),
        (grey_images(seed=1), PIXELS, {}),
    ]
    for count, (changed, backbone, options) in enumerate(variants, start=2):
        cache_views(changed, backbone, tmp_path, **{"views": 2, "progress": False, **options})
        assert len(files(tmp_path)) == count
    one, other = colour_backbone(), colour_backbone()
    with torch.no_grad():
        next(other.module.parameters()).mul_(1.001)
    assert one.fingerprint() != other.fingerprint()


KILLED = """
import sys, time
import numpy as np
from PIL import Image
from training import cache
from training.backbones import load_backbone
from training.data import ImageSet

cache.FLUSH_SECONDS = 0.0

def load(i):
    time.sleep(0.01)
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8)).astype(np.uint8))

images = ImageSet("slow", 200, None, (), "fixed", load)
cache.cache_views(images, load_backbone("pixels", image_size=8), sys.argv[1], views=5, batch_size=4, threads=1)
"""


def test_a_killed_cache_goes_on_where_it_stopped(tmp_path: Path) -> None:
    loaded: list[int] = []

    def load(i: int) -> Image.Image:
        loaded.append(i)
        return Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8)).astype(np.uint8))

    images = ImageSet("slow", 200, None, (), "fixed", load)
    options: dict[str, Any] = {"views": 5, "batch_size": 4, "progress": False}
    ref = cache_views(images, PIXELS, tmp_path / "ref", **options)

    def rows_done() -> int:
        states = list(tmp_path.glob("killed/*.json"))
        return int(json.loads(states[0].read_text())["rows_done"]) if states else 0

    (tmp_path / "killed.py").write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "killed")]
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 60
        while rows_done() < 20 and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    done = rows_done()
    assert 20 <= done < 1000
    # What was written after the count must not matter.
    rows = np.lib.format.open_memmap(next((tmp_path / "killed").glob("*.npy")), mode="r+")
    rows.reshape(1000, 64)[done:] = 77
    rows.flush()
    del rows
    loaded.clear()
    comp = cache_views(images, PIXELS, tmp_path / "killed", **options)
    assert len(loaded) == 1000 - done
    np.testing.assert_array_equal(comp, ref)


@pytest.mark.parametrize("damage", ["no-array", "short-array", "no-state", "torn-state", "other-state", "odd-count"])
def test_a_damaged_cache_is_computed_again(tmp_path: Path, damage: str) -> None:
    images = grey_images()
    ref = np.array(cache_features(images, PIXELS, tmp_path, progress=False))
    (array,), (state,) = tmp_path.glob("*.npy"), tmp_path.glob("*.json")
    np.save(array, np.zeros_like(ref))
    if damage == "no-array":
        array.unlink()
    elif damage == "short-array":
        array.write_bytes(array.read_bytes()[:-40])
    elif damage == "no-state":
        state.unlink()
    elif damage == "torn-state":
        state.write_text(state.read_text()[:-20])
    else:
        content = json.loads(state.read_text())
        content.update({"fingerprint": {}} if damage == "other-state" else {"rows_done": 31})
        state.write_text(json.dumps(content))
    np.testing.assert_array_equal(cache_features(images, PIXELS, tmp_path, progress=False), ref)


def test_an_error_keeps_the_rows_before_it_for_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "FLUSH_SECONDS", 0.0)
    good, broken = grey_images(), True

    def load(i: int) -> Image.Image:
        if broken and i == 25:
            raise CorruptFileError("25.png can't be read")
        return good.image(i)

    images = dataclasses.replace(good, load=load)
    with pytest.raises(CorruptFileError, match=r"25\.png"):
        cache_features(images, PIXELS, tmp_path, batch_size=5, progress=False)
    (state,) = tmp_path.glob("*.json")
    assert 0 < json.loads(state.read_text())["rows_done"] <= 25
    broken = False
    comp = cache_features(images, PIXELS, tmp_path, batch_size=5, progress=False)
    np.testing.assert_array_equal(comp, extract_features(PIXELS, good, progress=False))


def test_two_runs_at_once_give_one_whole_cache(tmp_path: Path) -> None:
    images = grey_images()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(cache_features, images, PIXELS, tmp_path, progress=False) for _ in range(2)]
    one, two = (job.result() for job in jobs)
    np.testing.assert_array_equal(one, two)
    assert len(files(tmp_path)) == 1


def test_cache_parameters_are_checked(tmp_path: Path) -> None:
    images = grey_images()
    bad: list[tuple[dict[str, Any], str]] = [
        ({"views": 0}, "views must be at least 1"),
        ({"seed": -1}, "got 10 and -1"),
        ({"dtype": np.float64}, "float64"),
        ({"augmentation": "strong"}, "'strong'; known: paper, mild, mild-flip"),
    ]
    for options, message in bad:
        with pytest.raises(InvalidParameterError, match=message):
            cache_views(images, PIXELS, tmp_path, progress=False, **options)
    assert files(tmp_path) == []

    class Loud(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) * 1e5

    loud = Backbone("loud", 64, 8, (0.0,), (1.0,), Loud())
    with pytest.raises(InvalidVectorsError, match="beyond float16"):
        cache_views(images, loud, tmp_path, augmentation="mild", progress=False)
    cache_views(images, loud, tmp_path, views=1, augmentation="mild", dtype=np.float32, progress=False)
