"""Every trainable method by name, and the variants that tables compare."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from training.config import TrainConfig
from training.model import HiHPQ, Quantizer

__all__ = ["VARIANTS", "build"]

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
# As the paper's ablation has them: its Euclidean variants quantise and compare as MeCoQ does.
_COSINE: dict[str, Any] = {
    "geometry": "cosine",
    "asymmetric": False,
    "tau": 0.1,
    "tau_qc": 0.25,
    "lr_codebook": 0.1,
    "epochs": 20,
    "refit": False,
}

# Tables 1 and 2 of the paper and more, as changes of a recipe. What the baselines have of their own is what did best of a few
# settings tried on CIFAR-10 with the library's views (training/NOTES.md); their papers' temperatures gave less.
VARIANTS: dict[str, dict[str, Any]] = {
    "hihpq": {},
    "hihpq-euclidean": {"geometry": "euclidean"},
    "hihpq-cosine": _COSINE,
    "vanilla-hyperbolic": _VANILLA,
    "vanilla-euclidean": _VANILLA | _COSINE,
    "instance-hyperbolic": _INSTANCE,
    "instance-euclidean": _INSTANCE | _COSINE,
    "prototype-hyperbolic": _PROTOTYPE,
    "prototype-euclidean": _PROTOTYPE | _COSINE,
    "spq": {"method": "spq", "tau": 0.5, "tau_qc": 0.3, "lr_codebook": 0.1, "epochs": 20, "refit": False},
    "mecoq": {"method": "mecoq", "tau": 0.1, "tau_qc": 0.25, "lr_codebook": 0.1, "epochs": 20, "refit": False},
    "cibhash": {"method": "cibhash", "tau_qc": 0.3, "lr": 0.3, "epochs": 20, "refit": False},
    "bihalf": {"method": "bihalf", "lr": 0.03, "epochs": 20, "refit": False},
}


def build(d_in: int, config: TrainConfig, backbone: nn.Module | None = None) -> Quantizer:
    """An untrained model of ``config.method``; see :class:`training.model.Quantizer` for the parameters."""
    if config.method == "hihpq":
        return HiHPQ(d_in, config, backbone)
    module, name = _BASELINES[config.method]
    model: Quantizer = getattr(importlib.import_module(module), name)(d_in, config, backbone)
    return model
