"""Checkpoints: a model in training, with all that it takes to build it again, in a file of plain tensors and values."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hyperfaiss.errors import CorruptFileError, FileFormatError, UnsupportedVersionError
from hyperfaiss.io import atomic_path
from hyperfaiss.model import PrototypeLevel
from training.config import TrainConfig
from training.hierarchy import Hierarchy
from training.methods import build
from training.model import Quantizer

__all__ = ["Checkpoint", "load_state", "state_of"]

_FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A model in training.

    config, d_in : what it takes to build the model; backbone : its name, or None for embeddings.
    features : what else is known of the backbone that made the features (see ``Backbone.facts``).
    model : state dict without frozen backbone weights.
    epoch : number of finished epochs; step : of finished steps in the next one.
    history : a row per finished epoch (see ``TrainResult``).
    hierarchy : the latest clusters, None before there were any.
    optimizer, sums, data : for going on (``last.pt``): the optimiser's state, the sums of the losses of the unfinished
        epoch, and a fingerprint of the training data.
    card : what a model card says of the training: "data" and "versions".
    """

    config: TrainConfig
    d_in: int
    backbone: str | None
    model: dict[str, Tensor]
    epoch: int
    step: int
    history: list[dict[str, Any]]
    hierarchy: Hierarchy | None
    optimizer: dict[str, Any] | None = None
    sums: list[float] | None = None
    data: str | None = None
    features: dict[str, Any] | None = None
    card: dict[str, Any] | None = None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it, all or nothing."""
        fields = dict(self.__dict__) | {"format": _FORMAT, "config": self.config.to_dict(), "hierarchy": None}
        if self.hierarchy is not None:
            fields["hierarchy"] = {
                "assignments": torch.from_numpy(self.hierarchy.assignments),
                "centroids": [torch.from_numpy(level.centroids) for level in self.hierarchy.levels],
                "parents": [torch.from_numpy(level.parents) for level in self.hierarchy.levels],
            }
        with atomic_path(path) as temporary:
            torch.save(fields, temporary)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read one, from a ``.pt`` file or (its ``best.pt``, else ``last.pt``) a run's folder. No code in it is run.

        Raises FileNotFoundError, CorruptFileError, UnsupportedVersionError, FileFormatError.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "best.pt" if (path / "best.pt").exists() else path / "last.pt"
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint {str(path)!r}")
        try:
            fields = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise CorruptFileError(f"{path} is not a whole checkpoint: {_first_line(error)}") from error
        if not isinstance(fields, dict) or "format" not in fields:
            raise FileFormatError(f"{path} is a torch file, but no checkpoint of this library")
        version = fields.pop("format")
        if version != _FORMAT:
            raise UnsupportedVersionError(f"{path} has checkpoint format {version}, this version reads {_FORMAT}")
        try:
            fields["config"] = TrainConfig.from_dict(fields["config"])
            if (stored := fields["hierarchy"]) is not None:
                levels = [
                    PrototypeLevel(centroids.numpy(), parents.numpy())
                    for centroids, parents in zip(stored["centroids"], stored["parents"], strict=True)
                ]
                fields["hierarchy"] = Hierarchy(stored["assignments"].numpy(), levels)
            return cls(**fields)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CorruptFileError(f"{path} is not a usable checkpoint: {error!r}") from error

    def build(self, backbone: nn.Module | None = None) -> Quantizer:
        """The model in evaluation mode. Without its ``backbone`` module it takes features only."""
        model = build(self.d_in, self.config, backbone)
        load_state(model, self.model)
        return model.eval()


def state_of(model: Quantizer) -> dict[str, Tensor]:
    """A copy of the state on the CPU, without the backbone's frozen parameters, which its own weights file has."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return {name: t.detach().cpu().clone() for name, t in model.state_dict().items() if name not in frozen}


def load_state(model: Quantizer, state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`state_of` gave; a backbone's state is ignored by a model without one.

    Raises CorruptFileError for a state of another model.
    """
    has_backbone = model.backbone is not None
    kept = {name: t for name, t in state.items() if has_backbone or not name.startswith("backbone.")}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    try:
        missing, unexpected = model.load_state_dict(kept, strict=False)
    except RuntimeError as error:
        raise CorruptFileError(f"the checkpoint does not fit its own configuration: {error}") from error
    if unexpected or set(missing) - frozen:
        wrong = sorted(set(missing) - frozen) + sorted(unexpected)
        raise CorruptFileError(f"the checkpoint does not fit this model (another backbone?): {', '.join(wrong[:5])}")


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
