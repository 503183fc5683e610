"""HiHPQ: product quantisation in hyperbolic space, learnt without labels (Qiu et al., AAAI 2024). Needs the ``train`` extra.

::

    from training.recipes import recipe
    from training.export import export
    from training.train import train
    from training.views import EmbeddingViews

    train(EmbeddingViews(x, neighbours=10), recipe(bits=32), "runs/x")
    export("runs/x", "x.safetensors")

The classes and the recipe can be had from here, too; ``train`` and ``export`` can't, because their modules have these names.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.checkpoint import Checkpoint
    from training.config import TrainConfig
    from training.model import HiHPQ
    from training.recipes import recipe
    from training.train import TrainingInterrupted, TrainResult

__all__ = ["Checkpoint", "HiHPQ", "TrainConfig", "TrainResult", "TrainingInterrupted", "recipe"]

_HOMES = {
    "Checkpoint": "checkpoint",
    "HiHPQ": "model",
    "TrainConfig": "config",
    "TrainResult": "train",
    "TrainingInterrupted": "train",
    "recipe": "recipes",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for: configurations need no torch, and torch takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
