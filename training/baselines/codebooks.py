"""What the product quantisers among the baselines share: codebooks that are parameters, and an index over them."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from hyperfaiss.codec import HyperbolicProductQuantizer, Metric
from training.config import TrainConfig
from training.model import Quantizer

__all__ = ["CodebookQuantizer"]


class CodebookQuantizer(Quantizer):
    """A product quantiser in flat space, whose codes are the nearest codewords.

    Attributes
    ----------
    codewords : (M, ksub, dsub), a parameter.
    metric : how queries are compared with codewords, see ``HyperbolicProductQuantizer``.
    """

    metric: ClassVar[Metric]

    def __init__(self, d_in: int, config: TrainConfig, backbone: nn.Module | None = None) -> None:
        super().__init__(d_in, config, backbone)
        # Unit vectors, as HiHPQ's codewords start.
        self.codewords = nn.Parameter(F.normalize(torch.empty(config.M, config.ksub, config.dsub).uniform_(-1, 1), dim=-1))

    def parts(self, vectors: Tensor) -> Tensor:
        """Vectors (n, d) as subvectors (n, M, dsub)."""
        return vectors.view(len(vectors), self.config.M, self.config.dsub)

    @torch.no_grad()
    def codec(self) -> HyperbolicProductQuantizer:
        """The codec as it stands: these codewords at curvature 0. It takes what ``encode`` gives."""
        flat = np.zeros(self.config.M, np.float32)
        return HyperbolicProductQuantizer.from_codebooks(self.codewords.float().cpu().numpy(), flat, metric=self.metric)
