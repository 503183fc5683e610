"""The loop: deterministic, exact when resumed wherever it was stopped, safe when killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hyperfaiss.errors import CorruptFileError, FileFormatError, HyperfaissError, InvalidParameterError, InvalidVectorsError
from training.checkpoint import Checkpoint
from training.config import TrainConfig
from training.loop import _groups, _schedule, _split
from training.terminal import deferred_signals
from training.train import TrainingInterrupted, train
from training.views import Views

N, D = 160, 12
CONFIG = TrainConfig(
    M=2,
    nbits=4,
    dsub=4,
    hidden=16,
    epochs=4,
    batch_size=32,
    warmup=1,
    levels=(10, 4),
    subclusters=60,
    lr=0.05,
    val_fraction=0.15,
)
LABELS = np.arange(N) % 4


class NoisyViews:
    """A ViewSource: clusters by label, views with noise. ``after`` calls of ``views``, something may happen."""

    def __init__(self, backbone=None, seed=0):
        rng = np.random.default_rng(seed)
        self._x = (rng.normal(size=(4, D))[LABELS] + 0.5 * rng.normal(size=(N, D))).astype(np.float32)
        self.n, self.d_in, self.backbone = N, D, backbone
        self.calls, self.after, self.action, self.modes = 0, -1, lambda: None, []

    def features(self):
        return self._x

    def views(self, indices, rng):
        self.calls += 1
        if self.calls == self.after:
            self.action()
        if self.backbone is not None:
            self.modes.append(self.backbone.training)
        x = self._x[indices]
        one, two = (x + 0.3 * rng.standard_normal(x.shape, dtype=np.float32) for _ in range(2))
        shape = (len(x), 3, 2, 2) if self.backbone is not None else x.shape
        return Views(torch.from_numpy(one).reshape(shape), torch.from_numpy(two).reshape(shape), indices)


def state(result):
    return {k: v.clone() for k, v in result.model.state_dict().items()}


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


def without_seconds(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def written(folder):
    """When each file of a run was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("[!.]*") if path.is_file()}


def stopped_and_resumed(config, call, out):
    """A run whose Ctrl-C came at this call of ``views``, after it has gone on."""
    source = NoisyViews()
    source.after, source.action = call, lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(TrainingInterrupted, match=r"last\.pt: run again with resume"):
        train(source, config, out, labels=LABELS, progress=False)
    return train(NoisyViews(), None, out, labels=LABELS, resume=True, progress=False)


@pytest.fixture(scope="module")
def undisturbed():
    return train(NoisyViews(), CONFIG, labels=LABELS, progress=False)


def test_learns_and_reports(undisturbed):
    rows = undisturbed.history
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["contrastive"] < rows[0]["contrastive"]
    assert rows[0]["prototype"] == rows[0]["instance"] == 0  # the warm-up
    assert all(row["prototype"] > 0 and row["instance"] > 0 for row in rows[1:])
    for row in rows:
        total = row["contrastive"] + CONFIG.lambda1 * row["prototype"] + CONFIG.lambda2 * row["instance"]
        assert row["total"] == pytest.approx(total, rel=1e-5)
        assert 0 < row["val_map"] <= 1
        assert all(0.01 <= theta <= 10 for theta in row["theta"])
    assert rows[-1]["theta"] != rows[0]["theta"]  # curvatures learn
    assert undisturbed.best_epoch == 1 + int(np.argmax([row["val_map"] for row in rows]))
    assert undisturbed.hierarchy.sizes == (5, 2)  # (10, 4), scaled down to the 136 items
    assert not undisturbed.model.training


def test_a_seed_decides_everything(undisturbed):
    again = train(NoisyViews(), CONFIG, labels=LABELS, progress=False)
    assert_same(state(again), state(undisturbed))
    assert without_seconds(again.history) == without_seconds(undisturbed.history)
    other = train(NoisyViews(), CONFIG.replace(seed=1, epochs=1), labels=LABELS, progress=False)
    assert not torch.equal(other.model.codewords, undisturbed.model.codewords)


def test_the_callers_generators_are_left_alone():
    torch.manual_seed(5)
    ref = torch.rand(1)
    torch.manual_seed(5)
    train(NoisyViews(), CONFIG.replace(epochs=1), progress=False)
    assert torch.equal(torch.rand(1), ref)


# 136 training items are 4 steps an epoch; each epoch ends with one call for the validation's views.
@pytest.mark.parametrize("call", [1, 7, 10, 11])
def test_resuming_after_ctrl_c_is_exact(call, undisturbed, tmp_path):
    comp = stopped_and_resumed(CONFIG, call, tmp_path)
    assert_same(state(comp), state(undisturbed))
    assert without_seconds(comp.history) == without_seconds(undisturbed.history)
    assert comp.best_epoch == undisturbed.best_epoch
    assert (comp.hierarchy.assignments == undisturbed.hierarchy.assignments).all()


def test_resuming_with_a_trained_backbone_is_exact(tmp_path):
    def source(**kwargs):
        torch.manual_seed(0)
        backbone = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(D, D), torch.nn.Dropout(0.3), torch.nn.Linear(D, D), torch.nn.BatchNorm1d(D)
        )
        backbone[1].requires_grad_(False)
        return NoisyViews(backbone)

    config = CONFIG.replace(epochs=2)
    whole = source()
    frozen = whole.backbone[1].weight.clone()
    start = whole.backbone[3].weight.clone()
    ref = train(whole, config, progress=False)
    assert torch.equal(whole.backbone[1].weight, frozen)
    assert not torch.equal(whole.backbone[3].weight, start)
    assert set(whole.modes) == {True, False}  # eval while validating, and back
    assert whole.modes[-2] is True

    part = source()
    part.after, part.action = 6, lambda: signal.raise_signal(signal.SIGTERM)
    with pytest.raises(TrainingInterrupted):
        train(part, config, tmp_path, progress=False)
    stored = Checkpoint.load(tmp_path / "last.pt")
    assert not any(name.startswith("backbone.1.") for name in stored.model)  # frozen weights are not stored
    comp = train(source(), config, tmp_path, resume=True, progress=False)
    assert_same(state(comp), state(ref))
    assert Checkpoint.load(tmp_path).build().backbone is None  # features in, without the backbone's module


_SCRIPT = """
import sys
sys.path[:0] = {path!r}
from tests.training.test_train import CONFIG, LABELS, NoisyViews
from training.train import train
train(NoisyViews(), CONFIG.replace(epochs={epochs}), {out!r}, labels=LABELS, resume=True, progress=False)
"""


@pytest.mark.slow
def test_a_killed_run_resumes_exactly(tmp_path):
    config = CONFIG.replace(epochs=20)
    script = _SCRIPT.format(path=[str(Path(__file__).parents[2])], epochs=20, out=str(tmp_path / "run"))
    process = subprocess.Popen(
        [sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "last.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert 1 <= Checkpoint.load(tmp_path / "run" / "last.pt").epoch < 20
    comp = train(NoisyViews(), config, tmp_path / "run", labels=LABELS, resume=True, progress=False)
    ref = train(NoisyViews(), config, labels=LABELS, progress=False)
    assert_same(state(comp), state(ref))
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_run_leaves_its_files(tmp_path):
    result = train(NoisyViews(), CONFIG, tmp_path / "a" / "b", labels=LABELS, backbone="made-up", progress=False)
    out = tmp_path / "a" / "b"
    assert {p.name for p in out.iterdir()} == {"config.json", "last.pt", "best.pt", "log.csv", "summary.json", "curves.png"}
    with (out / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert [float(row["theta_1"]) for row in rows] == [row["theta"][1] for row in result.history]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["best_epoch"] == result.best_epoch
    assert TrainConfig.from_dict(summary["config"]) == CONFIG
    assert summary["items"] == {"train": 136, "validation": 24}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    best = Checkpoint.load(out)
    assert (best.epoch, best.backbone) == (result.best_epoch, "made-up")
    assert_same({k: v.clone() for k, v in best.build().state_dict().items()}, state(result))

    before = written(out)
    again = train(NoisyViews(), None, out, labels=LABELS, resume=True, progress=False)  # nothing left to do
    assert_same(state(again), state(result))
    assert again.hierarchy.sizes == result.hierarchy.sizes
    assert (again.hierarchy.assignments == result.hierarchy.assignments).all()
    assert written(out) == before


def test_a_former_runs_summary_does_not_finish_a_run(tmp_path):
    config = CONFIG.replace(refit=True)
    result = train(NoisyViews(), config, tmp_path, labels=LABELS, progress=False)
    (tmp_path / "last.pt").unlink()
    comp = stopped_and_resumed(config, 12, tmp_path)
    assert_same(state(comp), state(result))
    assert (tmp_path / "summary.json").exists()


def test_early_stopping_counts_from_the_best_epoch():
    # A learning rate of next to nothing: epochs differ by noise only.
    config = CONFIG.replace(epochs=30, patience=2, lr=1e-9, lr_codebook=0, lr_curvature=0)
    result = train(NoisyViews(), config, progress=False)
    assert len(result.history) == max(result.best_epoch, config.warmup) + 2 < 30
    losses = [row["val_loss"] for row in result.history]
    assert result.best_epoch == 1 + int(np.argmin(losses))


def test_refit_lowers_the_error_of_codes_and_happens_once(tmp_path):
    plain = train(NoisyViews(), CONFIG, progress=False)
    refit = train(NoisyViews(), CONFIG.replace(refit=True), tmp_path, progress=False)
    rows, _ = _split(N, CONFIG)
    x = plain.model.encode(NoisyViews().features())[rows]
    assert refit.model.quantization_error(x) < 0.9 * plain.model.quantization_error(x)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, refit.model.state_dict()[name]) == (name != "codewords")
    again = train(NoisyViews(), None, tmp_path, resume=True, progress=False)
    assert_same(state(again), state(refit))
    with pytest.raises(InvalidParameterError, match="refit is for HiHPQ on manifolds, got 'spq'"):
        CONFIG.replace(refit=True, method="spq")


def test_without_labels_and_patience_the_last_epoch_is_kept():
    result = train(NoisyViews(), CONFIG.replace(epochs=2), progress=False)
    assert result.best_epoch == 2
    assert result.history[-1]["val_map"] is None
    assert result.history[-1]["val_loss"] > 0


def test_labels_choose_the_epoch_and_nothing_else(undisturbed):
    blind = train(NoisyViews(), CONFIG, progress=False)
    for row, other in zip(blind.history, undisturbed.history, strict=True):
        assert row["total"] == other["total"]
        assert row["val_loss"] == other["val_loss"]


def test_validation_items_are_held_out():
    source = NoisyViews()
    seen = []
    views = source.views
    source.views = lambda indices, rng: (seen.append(indices), views(indices, rng))[1]
    train(source, CONFIG.replace(epochs=1), progress=False)
    train_rows, val_rows = _split(N, CONFIG)
    assert set(np.concatenate(seen[:4])) <= set(train_rows)
    np.testing.assert_array_equal(seen[4], val_rows)
    assert len(seen) == 5
    assert not set(train_rows) & set(val_rows)


def test_too_few_items_to_validate_are_all_trained_on():
    train_rows, val_rows = _split(50, CONFIG)
    assert len(train_rows) == 50
    assert len(val_rows) == 0
    with pytest.raises(InvalidVectorsError, match="at least 2 items to train on, got 1"):
        _split(1, CONFIG)


def test_refuses_what_it_would_spoil(tmp_path):
    config = CONFIG.replace(epochs=1)
    train(NoisyViews(), config, tmp_path, progress=False)
    with pytest.raises(InvalidParameterError, match="holds a run already"):
        train(NoisyViews(), config, tmp_path, progress=False)
    with pytest.raises(InvalidParameterError, match=r"lr = 0\.05 \(asked: 0\.1\)"):
        train(NoisyViews(), config.replace(lr=0.1), tmp_path, resume=True, progress=False)
    with pytest.raises(InvalidParameterError, match="other data"):
        train(NoisyViews(seed=1), config, tmp_path, resume=True, progress=False)
    with pytest.raises(InvalidParameterError, match="resume needs out"):
        train(NoisyViews(), config, resume=True, progress=False)
    with pytest.raises(InvalidVectorsError, match=r"labels must have shape \(160,\)"):
        train(NoisyViews(), config, labels=LABELS[1:], progress=False)


def test_divergence_is_an_error():
    with pytest.raises(HyperfaissError, match=r"loss became (nan|inf) in epoch 1, step \d+: try a lower lr than 1e\+30"):
        train(NoisyViews(), CONFIG.replace(lr=1e30, lr_warmup=0), progress=False)


def test_broken_checkpoints_are_named(tmp_path):
    path = tmp_path / "best.pt"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Checkpoint.load(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(CorruptFileError, match="not a whole checkpoint"):
        Checkpoint.load(path)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(FileFormatError, match="no checkpoint of this library"):
        Checkpoint.load(path)
    result = train(NoisyViews(), CONFIG.replace(epochs=1), progress=False)
    result.checkpoint.save(path)
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CorruptFileError):
            Checkpoint.load(path)


def test_parameter_groups():
    result = train(NoisyViews(), CONFIG.replace(epochs=1), progress=False)
    groups = _groups(result.model, CONFIG.replace(weight_decay=0.1, lr=0.3, lr_codebook=0.2, lr_curvature=0.1))
    assert [(g["peak"], g["weight_decay"]) for g in groups] == [(0.3, 0.1), (0.2, 0.0), (0.1, 0.0)]
    assert groups[1]["params"] == [result.model.codewords]
    assert [g["weight_decay"] for g in _groups(result.model, CONFIG.replace(weight_decay=0.1, quirks=["decay-all"]))] == [
        0.1
    ] * 3


def test_schedule_warms_up_and_cools_down():
    config = CONFIG.replace(epochs=10, lr_warmup=1)
    rates = [_schedule(step, 20, config) for step in range(200)]
    assert rates[0] < 0.06
    assert np.argmax(rates) == 20
    assert max(rates) == 1
    assert (np.diff(rates[:20]) > 0).all()
    assert (np.diff(rates[20:]) < 0).all()
    assert 0 <= rates[-1] < 1e-3
    assert _schedule(0, 20, CONFIG.replace(lr_warmup=0)) == 1


def test_signals_are_restored_and_a_second_one_acts_at_once():
    before = signal.getsignal(signal.SIGINT)
    with deferred_signals() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_trains_in_another_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(train(NoisyViews(), CONFIG.replace(epochs=1), progress=False)))
    thread.start()
    thread.join()
    assert len(results) == 1
