"""A model learns from others trained before it: similarity distillation (as SEED, Fang et al., ICLR 2021, between networks).

Few codewords learn poorly from pairs, most of which are no true ones. Models of more subspaces average over them, and several
models over each other: they know better which items are near, and how near. :class:`Student` learns that, in place of pairs and
clusters; :func:`finish_codewords` teaches it to codewords once more, as searches use them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from training.config import TrainConfig
from training.losses import distillation_loss
from training.model import BatchHierarchy, HiHPQ
from training.spaces import Space

__all__ = ["Student", "Teacher", "finish_codewords"]

# Of the last phase: items of a step, and the learning rate that it starts with.
_FINISH_ITEMS, _FINISH_RATE = 512, 0.01


@dataclass(frozen=True)
class Teacher:
    """How far a trained model finds the training items from each other, un-augmented and unquantised.

    space : where its points live; points : of all items, (n, M, dsub).
    """

    space: Space
    points: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: HiHPQ, features: npt.NDArray[np.float32]) -> Teacher:
        """A model's view of items with features (n, d_in)."""
        vectors = torch.from_numpy(model.encode(features)).to(model.codewords)
        return cls(model.space, model.points(vectors))

    def distances(self, items: Tensor) -> Tensor:
        """(k, k) between items, int64 (k,)."""
        points = self.points[items]
        return self.space.distances(points, points)


def _mean_distances(teachers: Sequence[Teacher], items: Tensor) -> Tensor:
    """What teachers together say: the mean of their distances between items, int64 (k,); (k, k)."""
    return torch.stack([teacher.distances(items) for teacher in teachers]).mean(0)


class Student(HiHPQ):
    """HiHPQ whose loss is how far its distances between a batch's views are from its teachers' between what they show.

    ``teachers`` are on the model's device. The mean of their distances counts.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("total",)

    def __init__(
        self, d_in: int, config: TrainConfig, backbone: nn.Module | None = None, *, teachers: Sequence[Teacher]
    ) -> None:
        super().__init__(d_in, config, backbone)
        self._teachers = tuple(teachers)

    @property
    def uses_clusters(self) -> bool:
        """No: the teachers have seen them."""
        return False

    def forward(
        self,
        view1: Tensor,
        view2: Tensor,
        hierarchy: BatchHierarchy | None = None,  # noqa: ARG002
        items: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``losses.distillation_loss`` over both views of all items, as "total"; needs ``items``."""
        assert items is not None
        _, distances = self.compare(torch.cat([view1, view2]))
        theirs = _mean_distances(self._teachers, items)
        return {"total": distillation_loss(distances, theirs, self.config.tau_qc, self.config.tau_teacher)}


def finish_codewords(
    model: HiHPQ,
    teachers: Sequence[Teacher],
    vectors: npt.NDArray[np.float32],
    items: npt.NDArray[np.int64],
    *,
    steps: int,
    rng: np.random.Generator,
    after_step: Callable[[float], None],
) -> None:
    """Let codewords alone learn from teachers, of hard codes: these a search compares with, where training has soft ones.

    Each step draws items, finds each one's nearest codewords, and lowers ``losses.distillation_loss`` between the items'
    points and these codewords, by Adam with a rate that falls along half a cosine.

    Args:
        vectors: (n, d) of ``model.encode`` of the items to learn from.
        items: (n,) their numbers among the teachers' points.
        after_step: called with the step's loss.
    """
    with torch.no_grad():
        space = model.space  # of curvatures that stay
        points = model.points(torch.from_numpy(vectors).to(model.codewords))
    config = model.config
    optimizer = torch.optim.Adam([model.codewords], lr=_FINISH_RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = _FINISH_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = rng.choice(len(items), min(len(items), _FINISH_ITEMS), replace=False)
        drawn, numbers = points[rows], torch.from_numpy(items[rows]).to(points.device)
        codebooks = space.codebooks(model.codewords)
        with torch.no_grad():
            theirs = _mean_distances(teachers, numbers)
            codes = space.to_codewords(drawn, codebooks).argmin(-1)
        found = torch.stack([book[code] for book, code in zip(codebooks, codes, strict=True)], dim=1)
        loss = distillation_loss(space.distances(drawn, found), theirs, config.tau_qc, config.tau_teacher)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        after_step(float(loss.detach()))
