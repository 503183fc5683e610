"""Training of all methods: seeded, checkpointed, resumable to the bit, with teachers first where there are any.

Results repeat on the same machine with the same number of threads, also of a run that was stopped and resumed.

A run's folder holds ``config.json`` (which ``hihpq train --recipe`` takes, too), ``last.pt`` (to go on from), ``best.pt``
(to export), ``log.csv`` (a row per epoch), ``summary.json`` and ``curves.png``; ``teachers/`` holds the runs of its
teachers, if there are any. All are written beside their names and renamed: a kill leaves the former file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy.typing as npt
import torch

from hyperfaiss.errors import InvalidParameterError
from hyperfaiss.io import atomic_path
from training.backbones import Backbone
from training.checkpoint import Checkpoint
from training.config import TrainConfig
from training.distillation import Teacher
from training.locks import locked
from training.loop import Display, TrainingInterrupted, TrainingRun, TrainResult, teacher_seed
from training.model import HiHPQ
from training.recipes import recipe
from training.terminal import deferred_signals

if TYPE_CHECKING:
    from training.views import ViewSource

__all__ = ["TrainResult", "TrainingInterrupted", "train"]


def train(
    source: ViewSource,
    config: TrainConfig | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    labels: npt.ArrayLike | None = None,
    backbone: str | Backbone | None = None,
    data: str | None = None,
    teachers: str | os.PathLike[str] | None = None,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> TrainResult:
    """Train a quantiser, HiHPQ or what ``config.method`` names, on the views of ``source``.

    Choosing the epoch: ``config.val_fraction`` of the items is held out of training. Without ``labels`` the last epoch is
    taken, or with ``config.patience`` the one with the lowest loss (of HiHPQ the contrastive one) on two fixed views of the
    held-out items. With ``labels``, (n,) classes or bool (n, L), it is the one with the highest MAP of the held-out items as
    queries among the others; labels serve nothing else. A source that shows neighbours may show held-out ones.

    ``config.teachers`` models are trained first, each as a run of its own in a folder of ``teachers``.

    Args:
        source: the training items.
        config: default ``recipe()``; on resuming, the run's.
        out: the run's folder; None writes nothing.
        backbone: what made the features, or its name, for the exported model.
        data: what to call the training items in the model card.
        teachers: folder of teachers, which runs on the same data may share: a teacher that is there already is taken, whatever
            ``resume`` says. Default ``out / "teachers"``.
        resume: go on from ``out/last.pt``, or start if there is none.
        device: where to compute.
        progress: show a bar on stderr, if that is a terminal.

    Raises:
        InvalidParameterError: ``out`` holds a run already, or one of another configuration or other data.
        InvalidVectorsError: a source or labels that can't be trained on.
        HyperfaissError: the loss became infinite or nan.
        TrainingInterrupted: by Ctrl-C or SIGTERM, after the state was saved; a second one stops at once.
    """
    folder = None if out is None else Path(out)
    if folder is None and resume:
        raise InvalidParameterError("resume needs out, the folder of the run to go on with")
    school = Path(teachers) if teachers else folder and folder / "teachers"
    settled, stored = _opened(folder, config, resume)
    new = partial(TrainingRun, source, labels=labels, backbone=backbone, data=data, device=torch.device(device))
    with torch.random.fork_rng(devices=_cuda_devices(device)), deferred_signals() as interrupted:
        completed = partial(_completed, interrupted=interrupted, progress=progress)
        taught_by = []
        network = source.backbone
        untrained = copy.deepcopy(network.state_dict()) if network and settled.teachers else {}
        for i in range(settled.teachers):
            its = settled.teacher(teacher_seed(settled.seed, i))
            with _teachers_folder(school, its) as own:
                its, part = _opened(own, its, resume or teachers is not None)
                model = completed(new(its, own, part), f"teacher {i + 1} of {settled.teachers}, ").model
            assert isinstance(model, HiHPQ)
            taught_by.append(Teacher.of(model, source.features()))
            if network:  # there is but one, which each model trains from where it was
                network.load_state_dict(untrained)
        return completed(new(settled, folder, stored, taught_by))


def _completed(run: TrainingRun, title: str = "", *, interrupted: Callable[[], bool], progress: bool) -> TrainResult:
    """All epochs of a run, or of it what is left."""
    with Display(run, title, shown=progress) as display:
        while not run.done:
            run.epoch(interrupted, display)
        result = run.finish(interrupted, display)
    if interrupted():
        run.interrupt("after the last epoch")
    return result


def _opened(out: Path | None, config: TrainConfig | None, resume: bool) -> tuple[TrainConfig, Checkpoint | None]:
    """A run's configuration, which its folder now holds, and what there is to go on from."""
    if out is None:
        return config or recipe(), None
    out.mkdir(parents=True, exist_ok=True)
    if (out / "last.pt").exists():
        if not resume:
            raise InvalidParameterError(f"{out} holds a run already: resume it, or choose another folder")
        stored = Checkpoint.load(out / "last.pt")
        if config is not None and config != stored.config:
            mine, theirs = config.to_dict(), stored.config.to_dict()
            differing = ", ".join(f"{k} = {theirs[k]!r} (asked: {mine[k]!r})" for k in mine if mine[k] != theirs[k])
            raise InvalidParameterError(f"{out} was trained with {differing}: resume without changes")
        return stored.config, stored
    if config is None and resume and (out / "config.json").exists():  # stopped while a teacher was trained
        config = recipe(out / "config.json")
    config = config or recipe()
    (out / "summary.json").unlink(missing_ok=True)  # a former run's: this one's will say that it is finished
    with atomic_path(out / "config.json") as temporary:
        temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    return config, None


@contextmanager
def _teachers_folder(school: Path | None, config: TrainConfig) -> Iterator[Path | None]:
    """A teacher's own folder, named after its configuration: inside, for this process alone."""
    if school is None:
        yield None
        return
    own = school / hashlib.sha256(json.dumps(config.to_dict()).encode()).hexdigest()[:12]
    own.mkdir(parents=True, exist_ok=True)
    with locked(own / ".lock"):
        yield own


def _cuda_devices(device: str | torch.device) -> list[torch.device]:
    chosen = torch.device(device)
    return [chosen] if chosen.type == "cuda" else []
