"""One run of training, an epoch at a time: what :func:`training.train.train` makes of a source and a configuration.

Every random choice comes from a generator seeded with (seed, purpose, epoch, step), so that a run which was stopped, at
whatever step, goes on exactly as if it had not been.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import hyperfaiss
from hyperfaiss import lorentz
from hyperfaiss.errors import HyperfaissError, InvalidParameterError, InvalidVectorsError
from hyperfaiss.io import atomic_path
from hyperfaiss.progress import progress_bar
from training.backbones import Backbone
from training.checkpoint import Checkpoint, load_state, state_of
from training.config import TrainConfig
from training.distillation import Teacher, finish_codewords
from training.evaluate import mean_average_precision
from training.hierarchy import Hierarchy, build_hierarchy, fitting_sizes
from training.methods import build
from training.model import BatchHierarchy, HiHPQ, Quantizer

if TYPE_CHECKING:
    from training.views import Views, ViewSource

__all__ = ["Display", "TrainResult", "TrainingInterrupted", "TrainingRun", "teacher_seed"]

# Results that the validation MAP looks at.
_MAP_AT = 1000
_MIN_VALIDATION = 16
# Training items, about, that the quantisation error looks at.
_ERROR_ITEMS = 5000

# What a generator is for; with the seed, the epoch and the step it is the generator's seed.
_SPLIT, _INIT, _ORDER, _STEP, _CLUSTER, _VALIDATE, _TEACHER, _FINISH = range(8)


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM stopped a run; the message says what was saved and how to go on."""


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` returns.

    model : the best epoch's, in evaluation mode; hierarchy : clusters of the training items by this model.
    history : per epoch: epoch (from 1), the mean losses by name ("total" first), lr (of the head), theta (list), val_loss,
        val_map, quantization_error of the training items (None where not measured), seconds.
    best_epoch : 1-based.
    checkpoint : ``best.pt``, or what would be in it if nothing was written.
    """

    model: Quantizer
    hierarchy: Hierarchy | None
    config: TrainConfig
    history: list[dict[str, Any]]
    best_epoch: int
    checkpoint: Checkpoint
    out: Path | None


class TrainingRun:
    """A run between two epochs; the arguments are those of ``train``, ``stored`` what there is to go on from."""

    def __init__(
        self,
        source: ViewSource,
        config: TrainConfig,
        out: Path | None,
        stored: Checkpoint | None,
        teachers: Sequence[Teacher] = (),
        *,
        labels: npt.ArrayLike | None,
        backbone: str | Backbone | None,
        data: str | None,
        device: torch.device,
    ) -> None:
        self.source, self.config, self.out, self.device, self.teachers = source, config, out, device, teachers
        self.backbone = backbone.name if isinstance(backbone, Backbone) else backbone
        self.features = backbone.facts() if isinstance(backbone, Backbone) else None
        self.data = _fingerprint(source)
        if stored and self.features is None:
            self.features = stored.features
        if stored and stored.data != self.data:
            raise InvalidParameterError(f"{self.out} was trained on other data: resume with the same, or start anew")
        self.card = stored.card if stored else _card(data, source, self.data)
        self.labels = _checked_labels(labels, source.n)
        self.train_rows, self.val_rows = _split(source.n, config)
        self.batch_size = min(config.batch_size, len(self.train_rows))
        self.steps = len(self.train_rows) // self.batch_size

        torch.manual_seed(_torch_seed(config.seed, _INIT))
        self.model = build(source.d_in, config, source.backbone, teachers)
        if stored is None:
            self.model.fit_inputs(source.features(), config.seed)
        else:
            load_state(self.model, stored.model)
        self.model.to(device)
        self.optimizer = torch.optim.SGD(_groups(self.model, config), lr=config.lr, momentum=config.momentum)
        self.finished, self.step, self.sums = 0, 0, [0.0] * len(self.model.loss_names)
        self.history: list[dict[str, Any]] = []
        self.hierarchy: Hierarchy | None = None
        if stored is not None:
            self.optimizer.load_state_dict(stored.optimizer or {})
            self.finished, self.step, self.sums = stored.epoch, stored.step, list(stored.sums or self.sums)
            self.history, self.hierarchy = stored.history, stored.hierarchy
        self._encoded: npt.NDArray[np.float32] | None = None
        self.best: Checkpoint | None = None
        if stored and self.out and (self.out / "best.pt").exists():
            self.best = Checkpoint.load(self.out / "best.pt")

    # ------------------------------------------------------------------------------------------ one epoch

    @property
    def done(self) -> bool:
        """Whether all epochs are over, or too many have passed without a better one."""
        if self.finished >= self.config.epochs:
            return True
        if self.config.patience is None or not self.history or not self._measured:
            return False
        # The clusters change the loss: waiting starts with them.
        since = max(self._best_row()["epoch"], self.config.warmup)
        return self.step == 0 and self.finished - since >= self.config.patience

    def epoch(self, interrupted: Callable[[], bool], display: Display) -> None:
        """The next epoch, or the rest of an interrupted one."""
        start, epoch, config = time.perf_counter(), self.finished, self.config
        if self.step == 0 and epoch >= config.warmup and self.model.uses_clusters:
            display.say("clustering")
            self.hierarchy = self._cluster(epoch)
        prototypes = [self._tensor(level.centroids) for level in self.hierarchy.levels] if self.hierarchy else []
        order = _rng(config.seed, _ORDER, epoch).permutation(self.train_rows)
        self._encoded = None
        self.model.train(not (self.hierarchy and "eval-after-warmup" in config.quirks))
        self.model.start_epoch(epoch)
        for step in range(self.step, self.steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            losses = self._step(epoch, step, np.sort(batch), prototypes)
            self.sums = [total + loss for total, loss in zip(self.sums, losses, strict=True)]
            self.step = step + 1
            display.advance(self.sums[0] / self.step)
            if interrupted():
                self.interrupt(f"in epoch {epoch + 1}, step {self.step} of {self.steps}")
        means = {name: total / self.steps for name, total in zip(self.model.loss_names, self.sums, strict=True)}
        self.finished, self.step, self.sums = epoch + 1, 0, [0.0] * len(self.model.loss_names)
        self.history.append(
            {
                "epoch": epoch + 1,
                **means,
                "lr": self.optimizer.param_groups[0]["lr"],
                "theta": self.model.theta.detach().cpu().tolist(),
                **self._validate(),
                "quantization_error": self._quantization_error(),
                "seconds": time.perf_counter() - start,
            }
        )
        if self._best_row() is self.history[-1]:
            self.best = self._checkpoint(resumable=False)
            if self.out:
                self.best.save(self.out / "best.pt")
        if self.out:
            self._write_log()
            self._checkpoint(resumable=True).save(self.out / "last.pt")

    def _step(self, epoch: int, step: int, batch: npt.NDArray[np.int64], prototypes: list[Tensor]) -> list[float]:
        config = self.config
        rng = _rng(config.seed, _STEP, epoch, step)
        torch.manual_seed(int(rng.integers(2**63)))  # of a backbone's own dropout
        hierarchy = None
        if self.hierarchy is not None:
            position = np.searchsorted(self.train_rows, batch)
            assignments = self.hierarchy.assignments[:, position]
            keys = rng.random((*assignments.shape, len(batch)), dtype=np.float32)
            hierarchy = BatchHierarchy(prototypes, self._tensor(assignments), self._tensor(keys))
        rate = _schedule(epoch * self.steps + step, self.steps, config)
        for group in self.optimizer.param_groups:
            peak = group["peak"]
            group["lr"] = peak and min(peak, config.lr_min) + (peak - min(peak, config.lr_min)) * rate
        losses = self._losses(batch, self.source.views(batch, rng), hierarchy)
        values = torch.stack([losses[name].detach() for name in self.model.loss_names]).tolist()
        if not math.isfinite(values[0]):
            where = f"epoch {epoch + 1}, step {step + 1}"
            raise HyperfaissError(
                f"the loss became {values[0]} in {where}: try a lower lr than {config.lr}, or a smaller clip_radius"
            )
        self.optimizer.zero_grad()
        losses["total"].backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.model.after_step()
        return values

    def _losses(self, batch: npt.NDArray[np.int64], views: Views, hierarchy: BatchHierarchy | None = None) -> dict[str, Tensor]:
        items = self._tensor(np.concatenate([batch, views.partners]))
        losses: dict[str, Tensor] = self.model(views.view1.to(self.device), views.view2.to(self.device), hierarchy, items)
        return losses

    def _cluster(self, epoch: int) -> Hierarchy:
        """The hierarchy of the training items by the model as it stands."""
        vectors = self._clipped(self._vectors()[self.train_rows])
        levels, subclusters = fitting_sizes(self.config.levels, self.config.subclusters, len(vectors))
        seed = int(_rng(self.config.seed, _CLUSTER, epoch).integers(2**31))
        if "ward-on-all" in self.config.quirks:
            subclusters = len(vectors)
        return build_hierarchy(vectors, levels, subclusters=subclusters, seed=seed)

    def _vectors(self) -> npt.NDArray[np.float32]:
        """Vectors (n, d) of all items by the model as it stands, between two epochs: one pass serves both."""
        if self._encoded is None:
            self._encoded = self.model.encode(self.source.features())
        return self._encoded

    def _clipped(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        if self.config.geometry == "cosine":  # unit subvectors, which there is nothing to clip of
            return vectors
        parts = vectors.reshape(len(vectors), self.config.M, self.config.dsub)
        clipped: npt.NDArray[np.float32] = lorentz.clip(parts, self.config.clip_radius).reshape(vectors.shape)
        return clipped

    # ------------------------------------------------------------------------------------------ choosing the epoch

    @property
    def _measured(self) -> bool:
        return len(self.val_rows) > 0

    def _best_row(self) -> dict[str, Any]:
        """The history's best row: by validation MAP, else by validation loss, the earlier on a draw; else the last."""
        if self._measured and self.labels is not None:
            return max(self.history, key=lambda row: row["val_map"])
        if self._measured and self.config.patience is not None:
            return min(self.history, key=lambda row: row["val_loss"])
        return self.history[-1]

    def _quantization_error(self) -> float | None:
        """Of training items spread over all; None of a method without codewords as points."""
        if not isinstance(self.model, HiHPQ):
            return None
        vectors = self._vectors()[self.train_rows]
        return self.model.quantization_error(vectors[:: max(1, len(vectors) // _ERROR_ITEMS)])

    def _validate(self) -> dict[str, float | None]:
        if not self._measured:
            return {"val_loss": None, "val_map": None}
        self.model.eval()
        losses = []
        rng = _rng(self.config.seed, _VALIDATE)  # the same views each time
        with torch.no_grad():
            for rows in np.array_split(self.val_rows, max(1, len(self.val_rows) // self.batch_size)):
                loss = self._losses(rows, self.source.views(rows, rng))["total"]  # without clusters: the contrastive loss
                losses.append(float(loss) * len(rows))
        val_map = None
        if self.labels is not None:
            vectors = self._vectors()
            index = self.model.index()
            index.add(vectors[self.train_rows])
            _, found = index.search(vectors[self.val_rows], min(_MAP_AT, index.ntotal))
            val_map = float(mean_average_precision(found, self.labels[self.val_rows], self.labels[self.train_rows]))
        return {"val_loss": sum(losses) / len(self.val_rows), "val_map": val_map}

    # ------------------------------------------------------------------------------------------ files

    def _checkpoint(self, *, resumable: bool) -> Checkpoint:
        more: dict[str, Any] = {}
        if resumable:
            more = {"optimizer": self.optimizer.state_dict(), "sums": self.sums, "data": self.data}
        return Checkpoint(
            config=self.config,
            d_in=self.source.d_in,
            backbone=self.backbone,
            features=self.features,
            card=self.card,
            model=state_of(self.model),
            epoch=self.finished,
            step=self.step,
            history=list(self.history),
            hierarchy=self.hierarchy,
            **more,
        )

    def interrupt(self, where: str) -> NoReturn:
        """Save the state, which after an epoch has been done, and say so."""
        if self.out is None:
            raise TrainingInterrupted(f"stopped {where}; nothing was saved (out is None)")
        if self.step:
            self._checkpoint(resumable=True).save(self.out / "last.pt")
        raise TrainingInterrupted(f"stopped {where}; saved {self.out / 'last.pt'}: run again with resume to go on")

    def _write_log(self) -> None:
        assert self.out is not None
        text = io.StringIO()
        thetas = [f"theta_{m}" for m in range(len(self.history[0]["theta"]))]
        names = [name for name in self.history[0] if name != "theta"]
        writer = csv.DictWriter(text, [*names, *thetas], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | dict(zip(thetas, row["theta"], strict=True)) for row in self.history)
        with atomic_path(self.out / "log.csv") as temporary:
            temporary.write_text(text.getvalue())

    def finish(self, interrupted: Callable[[], bool], display: Display) -> TrainResult:
        """Back to the best epoch, its codewords fitted, its clusters, the last files.

        What a run has that was finished before stays as it is.
        """
        finished = self.best is not None and self.out is not None and (self.out / "summary.json").exists()
        best = self.best or self._checkpoint(resumable=False)  # last.pt outlived best.pt
        load_state(self.model, best.model)
        self.model.eval()
        row = self._best_row()
        if finished:
            self.hierarchy = best.hierarchy
        else:
            self._encoded = None
            if self.config.refit and isinstance(self.model, HiHPQ) and len(self.train_rows) >= self.config.ksub:
                self._fit_codewords(self.model, interrupted, display)
            self.hierarchy = self._cluster(self.config.epochs) if isinstance(self.model, HiHPQ) else None
            best = replace(best, model=state_of(self.model), hierarchy=self.hierarchy)
            if self.out:
                self._write_results(best, row, self.out)
        return TrainResult(self.model, self.hierarchy, self.config, self.history, row["epoch"], best, self.out)

    def _fit_codewords(self, model: HiHPQ, interrupted: Callable[[], bool], display: Display) -> None:
        """To the training items' vectors: k-means, then the steps of the last phase."""
        vectors, config = self._vectors()[self.train_rows], self.config
        model.refit(vectors)
        if not config.finish_steps:
            return

        def after_step(loss: float) -> None:
            display.advance(loss)
            if interrupted():
                self.interrupt("in the last phase, which will start anew")

        teachers = self.teachers or [Teacher.of(model, self.source.features())]
        rng = _rng(config.seed, _FINISH)
        finish_codewords(model, teachers, vectors, self.train_rows, steps=config.finish_steps, rng=rng, after_step=after_step)

    def _write_results(self, best: Checkpoint, row: dict[str, Any], out: Path) -> None:
        """What a finished run has, the summary last."""
        from training.plots import plot_curves

        best.save(out / "best.pt")
        plot_curves(self.history, out / "curves.png", best_epoch=row["epoch"])
        summary = {
            "best_epoch": row["epoch"],
            "best": row,
            "epochs": self.finished,
            "stopped_early": self.finished < self.config.epochs,
            "seconds": sum(r["seconds"] for r in self.history),
            "items": {"train": len(self.train_rows), "validation": len(self.val_rows)},
            "levels": self.hierarchy.sizes if self.hierarchy else None,
            "backbone": self.backbone,
            "config": self.config.to_dict(),
        }
        with atomic_path(out / "summary.json") as temporary:
            temporary.write_text(json.dumps(summary, indent=2) + "\n")

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


class Display:
    """A bar over all steps on stderr, or nothing where that is no terminal."""

    def __init__(self, run: TrainingRun, title: str, *, shown: bool) -> None:
        from rich.progress import MofNCompleteColumn

        self._run, self._title = run, title
        self._progress = progress_bar(MofNCompleteColumn(), shown=shown)
        done = run.finished * run.steps + run.step
        total = run.config.epochs * run.steps + run.config.finish_steps
        self._task = self._progress.add_task("training", total=total, completed=done)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, what: str) -> None:
        run = self._run
        where = "last phase" if run.done else f"epoch {run.finished + 1}/{run.config.epochs}"
        self._progress.update(self._task, description=f"{self._title}{where}  {what}")

    def advance(self, loss: float) -> None:
        measured = next((row for row in reversed(self._run.history) if row["val_map"] is not None), None)
        quality = f"  validation MAP {measured['val_map']:.3f}" if measured else ""
        self.say(f"loss {loss:.3f}{quality}")
        self._progress.advance(self._task)


# ---------------------------------------------------------------------------------------------- pieces


def _card(name: str | None, source: ViewSource, fingerprint: str) -> dict[str, Any]:
    """What the model card says of the training that its configuration does not."""
    return {
        "data": {"name": name, "items": source.n, "dimensions": source.d_in, "fingerprint": fingerprint},
        "versions": {
            "hyperfaiss": hyperfaiss.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),  # a subclass of str, which checkpoints can't hold
            "numpy": np.__version__,
        },
    }


def teacher_seed(seed: int, number: int) -> int:
    """The seed of a run's teacher, from 0."""
    return int(_rng(seed, _TEACHER, number).integers(2**31))


def _rng(seed: int, *purpose: int) -> np.random.Generator:
    return np.random.default_rng([seed, *purpose])


def _torch_seed(seed: int, purpose: int) -> int:
    return int(_rng(seed, purpose).integers(2**63))


def _split(n: int, config: TrainConfig) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sorted rows to train on and to validate with; too few to validate with are none."""
    held_out = round(n * config.val_fraction)
    if held_out < _MIN_VALIDATION:
        held_out = 0
    if n - held_out < 2:
        raise InvalidVectorsError(f"need at least 2 items to train on, got {n}")
    order = _rng(config.seed, _SPLIT).permutation(n)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _checked_labels(labels: npt.ArrayLike | None, n: int) -> npt.NDArray[Any] | None:
    if labels is None:
        return None
    array = np.asarray(labels)
    if array.shape != (n,) and not (array.ndim == 2 and len(array) == n and array.dtype == bool):
        raise InvalidVectorsError(
            f"labels must have shape ({n},), one for each item, or be bool ({n}, L), got {array.dtype} {array.shape}"
        )
    return array


def _fingerprint(source: ViewSource) -> str:
    """Changes with the shape of the features and, unless training changes them, with a thousand rows spread over them."""
    digest = hashlib.sha256(repr((source.n, source.d_in)).encode())
    if source.backbone is None:
        digest.update(np.ascontiguousarray(source.features()[:: max(1, source.n // 1000)]).tobytes())
    return digest.hexdigest()


def _groups(model: Quantizer, config: TrainConfig) -> list[dict[str, Any]]:
    """The optimiser's parameter groups, the head first; ``peak`` is what the schedule scales."""
    flat = config.weight_decay if "decay-all" in config.quirks else 0.0
    rules = {
        "head": (config.lr, config.weight_decay),
        "codebook": (config.lr_codebook, flat),
        "curvature": (config.lr_curvature, flat),
        "backbone": (config.lr_backbone, config.weight_decay),
    }
    members: dict[str, list[torch.nn.Parameter]] = {name: [] for name in rules}
    for name, parameter in model.groups():
        members[name].append(parameter)
    one = "one-learning-rate" in config.quirks
    return [
        {"params": members[name], "peak": peak, "lr": peak, "weight_decay": decay}
        for name, peak, decay in ((name, config.lr if one else lr, decay) for name, (lr, decay) in rules.items())
        if members[name]
    ]


def _schedule(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to 0 at the end."""
    total, warmup = config.epochs * steps_per_epoch, config.lr_warmup * steps_per_epoch
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
