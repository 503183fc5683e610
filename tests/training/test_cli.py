"""The hihpq command: what it does, its exit codes, its help."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hyperfaiss import HyperbolicPQIndex, HyperbolicProductQuantizer, Model
from hyperfaiss.model import Projector
from training.backbones import extract_features, load_backbone
from training.checkpoint import Checkpoint
from training.cli import app
from training.data import load_images
from training.evaluate import average_precision

SMALL = ["--set", "nbits=4", "--set", "dsub=3", "--set", "hidden=8", "--set", "epochs=2", "--set", "levels=[8, 4]",
         "--set", "neighbours=3", "--set", "warmup=1", "--set", "batch_size=32"]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    x = rng.normal(size=(3, 10))[labels] + 0.4 * rng.normal(size=(120, 10))
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    np.save(tmp_path / "y.npy", labels)
    return tmp_path


def hihpq(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_embeddings_the_whole_way(files):
    x, y, out, model = files / "x.npy", files / "y.npy", files / "run", files / "m.safetensors"
    trained = hihpq("train", "--embeddings", x, "--labels", y, "--bits", 8, "--out", out, *SMALL)
    assert trained.exit_code == 0, trained.output
    assert "validation MAP" not in trained.output or "kept epoch" in trained.output
    assert f"next: hihpq export {out}" in trained.output
    config = Checkpoint.load(out).config
    assert (config.M, config.nbits, config.levels) == (2, 4, (8, 4))

    assert hihpq("export", out, model).exit_code == 0
    assert Model.load(model).projector.d_in == 10

    args = ("eval", model, "--database", x, "--database-labels", y, "--queries", x, "--query-labels", y, "-n", 20)
    figures = json.loads(hihpq(*args, "--json").stdout)
    assert figures["n"] == 20
    assert 0.5 < figures["map_at_n"] <= 1
    assert "MAP@20" in hihpq(*args).output


def test_resume_takes_the_checkpoints_configuration(files):
    args = ("train", "--embeddings", files / "x.npy", "--out", files / "run")
    assert hihpq(*args, "--bits", 8, "--seed", 3, *SMALL).exit_code == 0
    again = hihpq(*args)
    assert again.exit_code == 1
    assert "holds a run already" in again.output
    assert hihpq(*args, "--resume").exit_code == 0
    changed = hihpq(*args, "--resume", "--set", "lr=0.5")
    assert changed.exit_code == 1
    assert "lr = " in changed.output


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["train", "--out", "run"], 2, "--embeddings or --data"),
        (["train", "--embeddings", "x.npy"], 2, "--out"),
        (["train", "--embeddings", "x.npy", "--data", "digits", "--out", "run"], 2, "--embeddings or --data"),
        (["train", "--embeddings", "x.npy", "--out", "run", "--set", "lr"], 2, "NAME=VALUE"),
        (
            ["train", "--embeddings", "x.npy", "--out", "run", "--recipe", "papr"],
            2,
            "there are default, embeddings, embeddings-large, large",
        ),
        (["train", "--embeddings", "none.npy", "--out", "run"], 1, "error: no file at none.npy"),
        (["train", "--embeddings", "x.npy", "--out", "run", "--set", "lrr=1"], 1, "unknown fields ['lrr']"),
        (["train", "--embeddings", "x.npy", "--out", "run", "--bits", "12"], 1, "multiple of nbits = 8, got 12"),
        (["train", "--data", "digits", "--out", "run", "--split", "validation"], 1, "split must be train, test or all"),
        (["eval", "m", "--database", "x.npy"], 2, "--database needs --database-labels"),
        (["eval", "m"], 2, "--database or --data"),
        (["eval", "m", "--data", "digits", "--queries", "x.npy"], 2, "options of images go with --data"),
        (["eval", "m", "--data", "d", "--query-split", "test", "--queries-per-class", "3"], 2, "not both"),
        (["export", "none", "m.safetensors"], 1, "error: no checkpoint 'none'"),
        (["export", "x.npy", "m.safetensors"], 1, "not a whole checkpoint"),
    ],
)
def test_errors_are_one_line_and_have_their_exit_code(args, code, message, files, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setenv("COLUMNS", "200")
    result = hihpq(*args)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    if code == 1:
        assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["train", "export", "eval"])
def test_help_starts_with_an_example_and_fits_a_screen(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = hihpq(command, "--help")
    assert result.exit_code == 0
    lines = result.output.strip().splitlines()
    assert len(lines) <= 38
    assert any(f"hihpq {command} " in line for line in lines[1:4])


def test_images_the_whole_way(tmp_path):
    out = tmp_path / "run"
    args = (
        "train",
        "--data",
        "digits",
        "--backbone",
        "pixels",
        "--image-size",
        8,
        "--cached-views",
        2,
        "--out",
        out,
        "--bits",
        8,
    )
    result = hihpq(*args, *SMALL, "--set", "epochs=1", "--set", "val_fraction=0.1")
    assert result.exit_code == 0, result.output
    checkpoint = Checkpoint.load(out)
    assert (checkpoint.d_in, checkpoint.backbone) == (64, "pixels")
    assert checkpoint.history[0]["val_map"] > 0.1


@pytest.fixture
def folder(tmp_path):
    """36 training and 12 test images of two classes, which the test part numbers the other way round."""
    rng = np.random.default_rng(0)
    bright = {"train": {"a": 60, "c": 190}, "test": {"c": 190, "d": 0}}
    for part, classes in bright.items():
        for name, level in classes.items():
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(18 if part == "train" else 6):
                pixels = rng.normal(level, 8, size=(4, 4)).clip(0, 255).astype(np.uint8)
                pixels[:2] //= 1 + (name == "c")  # the power, centring and norm that come first leave something to see
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{i}.png")
    return tmp_path


def test_images_are_evaluated_through_the_models_own_backbone(folder):
    images, run, model = folder / "images", folder / "run", folder / "m.safetensors"
    args = ("train", "--data", images, "--split", "train", "--backbone", "pixels", "--image-size", 4, "--cached-views", 2)
    trained = hihpq(*args, "--out", run, "--bits", 8, *SMALL, "--set", "neighbours=3", "--set", "batch_size=8")
    assert trained.exit_code == 0, trained.output
    assert hihpq("export", run, model).exit_code == 0
    assert Model.load(model).metadata["features"]["image_size"] == 4

    command = ("eval", model, "--data", images, "-n", 10, "--json")
    drawn = json.loads(hihpq(*command, "--split", "train", "--queries-per-class", 3).stdout)
    assert (drawn["queries"], drawn["database"], drawn["n"]) == (6, 30, 10)
    assert drawn["map_at_n"] > 0.9

    # The same by hand: class "c" of the test part is class 1 of the training part, and "d" is in none.
    cache = folder / "run" / "cache"
    held_out = json.loads(hihpq(*command, "--split", "train", "--query-split", "test", "--cache", cache).stdout)
    assert len(list(cache.glob("*features*.npy"))) == 2
    loaded = Model.load(model)
    index = HyperbolicPQIndex.from_model(loaded)
    backbone = load_backbone("pixels", image_size=4)
    base, asked = (load_images(images, split=part) for part in ("train", "test"))
    index.add(extract_features(backbone, base, progress=False))
    _, found = index.search(extract_features(backbone, asked, progress=False), 10)
    names = np.array(asked.class_names)[asked.labels]
    relevant = np.array(base.class_names)[base.labels][found] == names[:, None]
    assert held_out["map_at_n"] == pytest.approx(average_precision(relevant).mean())
    assert 0.4 < held_out["map_at_n"] < 0.6  # "c" is found, "d" never

    for change, message in (
        (("--split", "train", "--image-size", 2), "at another size than 2 (its own: 4)"),
        (("--data", images / "train" / "a"), "has no labels"),
        (("--split", "none"), "split must be"),
    ):
        result = hihpq(*command, *change)
        assert result.exit_code == 1, result.output
        assert message in result.output


def test_eval_refuses_models_whose_features_it_can_not_make(files, folder):
    for name, metadata, message in (
        (None, {}, "takes embeddings"),
        ("resnet18", {"features": {"trained": True}}, "resnet18 was trained along"),
    ):
        random_model(name, metadata).save(files / "m.safetensors")
        result = hihpq("eval", files / "m.safetensors", "--data", folder / "images", "--split", "train")
        assert result.exit_code == 1
        assert message in result.output
    random_model("pixels", {}).save(files / "m.safetensors")  # of a file without facts: the size has to be told
    command = ("eval", files / "m.safetensors", "--data", folder / "images", "--split", "train")
    assert "must have shape (n, 16), got (30, 784)" in hihpq(*command).output
    assert hihpq(*command, "--image-size", 4).exit_code == 0


def random_model(backbone, metadata):
    rng = np.random.default_rng(0)
    codec = HyperbolicProductQuantizer.from_codebooks(rng.normal(size=(1, 16, 3)).astype(np.float32), 1.0)
    return Model(Projector([(rng.normal(size=(3, 16)), np.zeros(3))]), codec, [], backbone, metadata)


def test_help_does_not_import_torch():
    code = (
        "import sys; from training.cli import app\n"
        "try: app(['train', '--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
