"""How MPCViT learns which heads need a softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError
from ..models.mpcvit import heads_of
from .objective import Batch, Now, Objective, Seen, objective


@objective
@dataclass(frozen=True)
class MPCSearch(Objective):
    """Zeng et al., "MPCViT" (ICCV 2023), equation 6: cross-entropy and `strength` · Σ |α| over all heads.

    α is trained with the weights and begins at 1, every head with its ReLU softmax. `prune.MPCHeads` makes it 1 or 0; what it
    leaves is trained anew.
    """

    strength: float = 1e-5

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise VitreousError(f"MPCSearch: strength must be at least 0, not {self.strength}")

    def parts(self, model: nn.Module) -> None:
        if not heads_of(model):
            raise VitreousError(
                f"MPCSearch looks for the heads of an MPCViT, as mpcvit_7_4_32_search, not of {type(model).__name__}"
            )

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        alphas = torch.cat([m.alpha.flatten() for m in heads_of(now.model)])
        labels = batch.shares(seen.logits.shape[1])
        return {"classes": F.cross_entropy(seen.logits, labels), "alpha": self.strength * alphas.abs().sum()}
