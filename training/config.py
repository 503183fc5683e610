"""Everything that decides how a model is trained, in one typed value that travels with every checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hyperfaiss.errors import InvalidParameterError

__all__ = ["METHODS", "QUIRKS", "Geometry", "Method", "TrainConfig"]

Method = Literal["hihpq", "spq", "mecoq", "cibhash", "bihalf"]
METHODS: tuple[str, ...] = typing.get_args(Method)
Geometry = Literal["hyperbolic", "euclidean", "cosine"]

# What released code does beside its paper, by name; none is done unless ``TrainConfig.quirks`` asks for it.
QUIRKS: dict[str, str] = {
    "one-learning-rate": "HiHPQ: lr reaches every parameter, whatever lr_backbone, lr_codebook and lr_curvature say",
    "decay-all": "HiHPQ: weight decay reaches codebooks and curvatures, too",
    "raw-curvature": "HiHPQ: theta itself is learnt, clamped after each step, in place of its logarithm",
    "first-positive": "HiHPQ: the instance loss takes the first item of the batch with the same prototype, be it the anchor "
    "(which then stands in the denominator)",
    "self-negative": "HiHPQ: the anchor's own distance of 0 stands in the denominator of the instance loss",
    "batch-prototypes": "HiHPQ: the prototype loss compares with the prototypes of the batch's items, as often as they come",
    "ward-on-all": "HiHPQ: Ward's method starts from single items, without k-means; quadratic in the training set",
    "eval-after-warmup": "HiHPQ: from the first clustering on the model stays in evaluation mode",
    "mecoq-frozen-codebooks": "MeCoQ: the codebooks are never trained",
    "mecoq-broadcast": "MeCoQ: the debiased loss adds positives and negatives of wrong pairs, by a slip of broadcasting",
}


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of HiHPQ; immutable, checked when it is made.

    The recipes (:func:`training.recipes.recipe`) set the fields that they care about; the others are as below. Sizes that a
    small training set can't fill (batch, levels) shrink with it.

    Method:
        method: "hihpq", or one of the baselines that it is compared with, see :mod:`training.baselines`.
        geometry: of HiHPQ: "hyperbolic"; "euclidean", the same method at curvature 0; or "cosine", which quantises and
            compares as MeCoQ does: unit subvectors and codewords, inner products.
        quirks: names of what released code does beside its paper, see ``QUIRKS``.

    Codes:
        M: number of subspaces. bits = M * nbits.
        nbits: bits of one code, 4 to 8.
        dsub: dimensions of a subspace.

    Model:
        hidden: width of the projector's hidden layer; 0 is a single linear layer.
        power: exponent of the signed power that features go through first; 1 is none.
        center, normalize: whether features are centred and divided by their L2 norm.
        clip_radius: largest norm of a subspace's tangent vector; None for no limit.
        codebook_init: "random" (Xavier uniform, unit norm, as in the paper) or "data" (projected training vectors).
        curvature: theta at the start, 0.01 to 10.

    Losses:
        tau: softness of the quantiser, Eq. 12 (1/tau multiplies the distances).
        tau_qc: temperature of the contrastive losses, Eq. 15.
        contrast: what the losses compare by: "geodesic" distances, summed over subspaces as the paper does, or "squared"
            Lorentzian ones, their mean over subspaces, whose pull fades where items are near already. (Cosine geometry has
            its own.)
        asymmetric: whether the contrastive and the instance loss compare unquantised anchors with quantised others, as a
            search compares queries with codes; else both are quantised, as in the paper.
        lambda1, lambda2: weights of the prototype and of the instance loss, Eq. 21.
        levels: clusters of each level of the hierarchy, the finest first.
        subclusters: most k-means clusters that Ward's method starts from.
        warmup: epochs before the first clustering.

    Distillation:
        teachers: how many models are trained first by the losses above, each from a seed of its own; the distances that they
            see between items then are what the model itself learns, see :mod:`training.distillation`. 0 for none.
        teacher_bits: bits of a teacher's code, or the next multiple of nbits.
        tau_teacher: temperature of the teachers' distances.

    Views (of embeddings; sources of images have their own):
        neighbours: the second view is one of this many nearest neighbours; 0 for the vector itself.
        neighbour_probability: how often it is one of them.
        diffusion: steps of the random walk over neighbours by which they are near, 0 for the cosine of features.
        dropout: share of a view's features set to their mean.
        noise: spread of Gaussian noise, in units of each feature's own spread.
        mixup: parameter of the Beta distribution that mixes vector and neighbour; 0 does not mix.

    Optimisation:
        epochs, batch_size: the last incomplete batch of an epoch is left out.
        lr, lr_backbone, lr_codebook, lr_curvature: peaks of the learning rates of the four parameter groups.
        lr_min: where the linear warm-up starts and the cosine ends.
        lr_warmup: epochs of linear warm-up.
        momentum: of SGD.
        weight_decay: of projector and backbone.
        refit: whether the codebooks are fitted anew after the last epoch, by hyperbolic k-means of the training items.
        finish_steps: of a last phase after the refit, in which codewords alone learn, of hard codes, the teachers' distances
            (without teachers the model's own), see :func:`training.distillation.finish_codewords`. 0 for none.
        amp: bfloat16 autocast around backbone and projector; the geometry is float64 in any case.

    Run:
        val_fraction: share of the training set held out to choose the best epoch.
        patience: epochs without improvement before training stops; None never stops early.
        seed: of every random choice.
    """

    method: Method = "hihpq"
    geometry: Geometry = "hyperbolic"
    quirks: tuple[str, ...] = ()

    M: int = 4
    nbits: int = 8
    dsub: int = 16

    hidden: int = 512
    power: float = 0.5
    center: bool = True
    normalize: bool = True
    clip_radius: float | None = 1.0
    codebook_init: Literal["random", "data"] = "random"
    curvature: float = 1.0

    tau: float = 0.5
    tau_qc: float = 0.3
    contrast: Literal["geodesic", "squared"] = "geodesic"
    asymmetric: bool = False
    lambda1: float = 1.0
    lambda2: float = 1.0
    levels: tuple[int, ...] = (200, 100, 50)
    subclusters: int = 1000
    warmup: int = 3

    teachers: int = 0
    teacher_bits: int = 64
    tau_teacher: float = 0.2

    neighbours: int = 10
    neighbour_probability: float = 1.0
    diffusion: int = 0
    dropout: float = 0.1
    noise: float = 0.0
    mixup: float = 0.0

    epochs: int = 20
    batch_size: int = 128
    lr: float = 0.03
    lr_backbone: float = 1e-3
    lr_codebook: float = 1.0
    lr_curvature: float = 0.01
    lr_min: float = 1e-5
    lr_warmup: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-3
    refit: bool = False
    finish_steps: int = 0
    amp: bool = False

    val_fraction: float = 0.1
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, name, _coerce(name, getattr(self, name), hint))
        for name, (holds, expected) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise InvalidParameterError(f"{name} must be {expected}, got {value!r}")
        unknown = [quirk for quirk in self.quirks if quirk not in QUIRKS]
        if unknown:
            raise InvalidParameterError(f"no quirks {unknown}; there are {', '.join(QUIRKS)}")
        if self.refit and (self.method != "hihpq" or self.geometry == "cosine"):
            raise InvalidParameterError(f"refit is for HiHPQ on manifolds, got {self.method!r} in {self.geometry} geometry")
        if self.finish_steps and not self.refit:
            raise InvalidParameterError(f"finish_steps starts from a refit, got {self.finish_steps} with refit = False")
        if self.teachers and self.method != "hihpq":
            raise InvalidParameterError(f"teachers are for HiHPQ, got {self.teachers} of {self.method!r}")
        if self.levels[0] > self.subclusters:
            raise InvalidParameterError(f"levels {self.levels} can't be merged from subclusters = {self.subclusters}")

    @property
    def ksub(self) -> int:
        """Codewords of a subspace."""
        return 1 << self.nbits

    @property
    def d(self) -> int:
        """Dimension of a tangent vector."""
        return self.M * self.dsub

    @property
    def bits(self) -> int:
        """Bits of a vector's code."""
        return self.M * self.nbits

    def teacher(self, seed: int) -> TrainConfig:
        """The configuration of a teacher; the same for all models that differ in M alone."""
        return self.replace(M=-(-self.teacher_bits // self.nbits), teachers=0, finish_steps=0, seed=seed)

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed; an unknown field is an InvalidParameterError."""
        return self.from_dict(self.to_dict() | changes)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`; missing fields take their defaults.

        Raises InvalidParameterError for a field that is unknown, of the wrong type or out of its range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise InvalidParameterError(f"unknown fields {unknown}; a TrainConfig has {sorted(known)}")
        return cls(**fields)


def _at_least(low: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda v: v >= low), f">= {low}"


def _between(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    return (lambda v: low <= v <= high), f"from {low} to {high}"


_POSITIVE: tuple[Callable[[Any], bool], str] = (lambda v: v > 0), "positive"
_FRACTION: tuple[Callable[[Any], bool], str] = (lambda v: 0 <= v < 1), "in [0, 1)"

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "M": _at_least(1),
    "nbits": _between(4, 8),
    "dsub": _at_least(1),
    "hidden": _at_least(0),
    "power": ((lambda v: 0 < v <= 1), "in (0, 1]"),
    "clip_radius": _POSITIVE,
    "curvature": _between(0.01, 10),
    "tau": _POSITIVE,
    "tau_qc": _POSITIVE,
    "lambda1": _at_least(0),
    "lambda2": _at_least(0),
    "levels": (
        (lambda v: bool(v) and v[-1] >= 2 and all(a > b for a, b in itertools.pairwise(v))),
        "numbers of clusters >= 2, strictly decreasing",
    ),
    "subclusters": _at_least(2),
    "warmup": _at_least(0),
    "teachers": _at_least(0),
    "teacher_bits": _at_least(4),
    "tau_teacher": _POSITIVE,
    "neighbours": _at_least(0),
    "neighbour_probability": _between(0, 1),
    "diffusion": _at_least(0),
    "dropout": _FRACTION,
    "noise": _at_least(0),
    "mixup": _at_least(0),
    "epochs": _at_least(1),
    "batch_size": _at_least(2),
    "lr": _POSITIVE,
    "lr_backbone": _at_least(0),
    "lr_codebook": _at_least(0),
    "lr_curvature": _at_least(0),
    "lr_min": _at_least(0),
    "lr_warmup": _at_least(0),
    "momentum": _FRACTION,
    "weight_decay": _at_least(0),
    "finish_steps": _at_least(0),
    "val_fraction": _FRACTION,
    "patience": _at_least(1),
    "seed": _between(0, 2**63 - 1),
}


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the field's type, or InvalidParameterError: no number is read from a string, no int from 1.5."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = (h for h in typing.get_args(hint) if h is not type(None))
    wrong = InvalidParameterError(f"{name} must be {_spell(hint)}, got {value!r}")
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise wrong
        return value
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            raise wrong
        return tuple(_coerce(name, v, typing.get_args(hint)[0]) for v in value)
    return _scalar(value, hint, wrong)


def _scalar(value: Any, hint: type, wrong: InvalidParameterError) -> Any:
    if hint in (bool, str):
        if not isinstance(value, hint):
            raise wrong
        return value
    if isinstance(value, (bool, str)):
        raise wrong
    try:
        number = hint(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if number != value or not math.isfinite(number):
        raise wrong
    return number


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"a sequence, each {_spell(typing.get_args(hint)[0])}"
    return {bool: "True or False", int: "an integer", float: "a finite number", str: "a name"}[hint]
