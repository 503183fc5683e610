"""From a checkpoint to the model file that serves: see :mod:`hyperfaiss.model`. The result needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from hyperfaiss.errors import InvalidParameterError
from hyperfaiss.model import Model, Projector, PrototypeLevel
from training.checkpoint import Checkpoint
from training.hierarchy import Hierarchy
from training.model import HiHPQ, Quantizer

__all__ = ["export", "to_model"]


@torch.no_grad()
def to_model(
    module: Quantizer,
    hierarchy: Hierarchy | None = None,
    *,
    backbone: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Model:
    """The serving model of a trained module: preprocessing, projector, codebooks as points, curvatures, prototypes.

    A trained backbone is not part of it: the model starts from that backbone's features. Raises InvalidParameterError for a
    baseline, or cosine geometry: a model's projector ends in its last layer, theirs in more.
    """
    if not isinstance(module, HiHPQ) or module.config.geometry == "cosine":
        got = f"method {module.config.method!r}, geometry {module.config.geometry!r}"
        raise InvalidParameterError(f"only hyperbolic and Euclidean HiHPQ can be exported, got {got}")
    preprocessing = module.preprocessing
    layers = [(layer.weight, layer.bias) for layer in module.head if isinstance(layer, torch.nn.Linear)]
    layers[0] = (layers[0][0] * module.gain, layers[0][1])
    projector = Projector(
        [(_array(weight), _array(bias)) for weight, bias in layers],
        power=preprocessing.power,
        mean=_array(preprocessing.mean) if preprocessing.center else None,
        normalize=preprocessing.normalize,
    )
    levels = [PrototypeLevel(level.centroids, level.parents) for level in hierarchy.levels] if hierarchy else []
    return Model(projector, module.codec(), levels, backbone, dict(metadata or {}))


def export(
    run: str | os.PathLike[str] | Checkpoint,
    path: str | os.PathLike[str] | None = None,
    *,
    backbone: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Model:
    """Write the model file of a run's folder (its best epoch), a ``.pt`` file or a loaded checkpoint; returns the model.

    Args:
        path: where to; None only returns the model.
        backbone: name of what made the features, if the checkpoint does not know it.
        metadata: more JSON-able fields of the model card, which holds "data" and "versions" of the training, "config"
            (the recipe as resolved), "epoch" (the log's row of the exported epoch, with what was measured) and "features"
            (what is known of the backbone, see ``Backbone.facts``).

    Raises:
        FileNotFoundError, CorruptFileError, UnsupportedVersionError, FileFormatError: as Checkpoint.load.
        InvalidParameterError: another ``backbone`` than the checkpoint's.
    """
    checkpoint = run if isinstance(run, Checkpoint) else Checkpoint.load(run)
    if backbone is not None and checkpoint.backbone not in (None, backbone):
        raise InvalidParameterError(f"the checkpoint was trained on {checkpoint.backbone!r}, not on {backbone!r}")
    facts: dict[str, Any] = {
        **(checkpoint.card or {}),
        "config": checkpoint.config.to_dict(),
        "epoch": checkpoint.history[-1] if checkpoint.history else None,
    }
    if checkpoint.features is not None:
        facts["features"] = checkpoint.features
    model = to_model(
        checkpoint.build(),
        checkpoint.hierarchy,
        backbone=backbone or checkpoint.backbone,
        metadata=facts | dict(metadata or {}),
    )
    if path is not None:
        model.save(path)
    return model


def _array(tensor: torch.Tensor) -> Any:
    return tensor.detach().float().cpu().numpy()
