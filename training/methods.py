"""Every trainable method by name, and the variants that tables compare."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from training.config import TrainConfig
from training.distillation import Student, Teacher
from training.model import HiHPQ, Quantizer

__all__ = ["VARIANTS", "build", "tuned"]

# Modules and classes of config.method; a baseline is imported when it is asked for.
_BASELINES = {
    "spq": ("training.baselines.spq", "SPQ"),
    "mecoq": ("training.baselines.mecoq", "MeCoQ"),
    "cibhash": ("training.baselines.cibhash", "CIBHash"),
    "bihalf": ("training.baselines.bihalf", "BiHalfNet"),
}

_VANILLA: dict[str, Any] = {"lambda1": 0.0, "lambda2": 0.0}
_INSTANCE: dict[str, Any] = {"lambda1": 0.0, "lambda2": 1.0}
_PROTOTYPE: dict[str, Any] = {"lambda1": 1.0, "lambda2": 0.0}
# Codebooks as training left them.
_AS_LEARNT: dict[str, Any] = {"refit": False, "finish_steps": 0}
# As the paper's ablation has them: its Euclidean variants quantise and compare as MeCoQ does.
_COSINE: dict[str, Any] = {"geometry": "cosine", "asymmetric": False, **_AS_LEARNT}

# What each method of Tables 1 and 2 of the paper, and some more, is: changes of a recipe. They are compared without teachers,
# which would help any; "hihpq-distilled" has them.
_ALONE: dict[str, dict[str, Any]] = {
    "hihpq": {},
    "hihpq-euclidean": {"geometry": "euclidean"},
    "hihpq-cosine": _COSINE,
    "vanilla-hyperbolic": _VANILLA,
    "vanilla-euclidean": _VANILLA | _COSINE,
    "instance-hyperbolic": _INSTANCE,
    "instance-euclidean": _INSTANCE | _COSINE,
    "prototype-hyperbolic": _PROTOTYPE,
    "prototype-euclidean": _PROTOTYPE | _COSINE,
    "spq": {"method": "spq", **_AS_LEARNT},
    "mecoq": {"method": "mecoq", **_AS_LEARNT},
    "cibhash": {"method": "cibhash", **_AS_LEARNT},
    "bihalf": {"method": "bihalf", **_AS_LEARNT},
}

VARIANTS: dict[str, dict[str, Any]] = {name: {"teachers": 0} | changes for name, changes in _ALONE.items()}
VARIANTS["hihpq-distilled"] = {"teachers": 1}

# What suits those that are not HiHPQ on manifolds, in place of the recipe's: the best of a few settings tried on CIFAR-10 with
# the library's views (training/NOTES.md). Their papers' temperatures gave less.
_TUNED: dict[str, dict[str, Any]] = {
    "cosine": {"tau": 0.1, "tau_qc": 0.25, "lr_codebook": 0.1, "epochs": 20},
    "spq": {"tau": 0.5, "tau_qc": 0.3, "lr_codebook": 0.1, "epochs": 20},
    "mecoq": {"tau": 0.1, "tau_qc": 0.25, "lr_codebook": 0.1, "epochs": 20},
    "cibhash": {"tau_qc": 0.3, "lr": 0.3, "epochs": 20},
    "bihalf": {"lr": 0.03, "epochs": 20},
}


def tuned(variant: str) -> dict[str, Any]:
    """Changes of a recipe that a variant does well with but is not defined by."""
    changes = VARIANTS[variant]
    return dict(_TUNED.get(changes.get("method", changes.get("geometry", "")), {}))


def build(d_in: int, config: TrainConfig, backbone: nn.Module | None = None, teachers: Sequence[Teacher] = ()) -> Quantizer:
    """An untrained model of ``config.method``; see :class:`training.model.Quantizer` for the parameters.

    With ``teachers`` one that learns from them, which is needed to train it, not to load it.
    """
    if teachers:
        return Student(d_in, config, backbone, teachers=teachers)
    if config.method == "hihpq":
        return HiHPQ(d_in, config, backbone)
    module, name = _BASELINES[config.method]
    model: Quantizer = getattr(importlib.import_module(module), name)(d_in, config, backbone)
    return model
