"""What labels teach: cross-entropy, and a yes or no for each class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import VitreousError
from ..score import two
from .objective import Batch, Now, Objective, Seen, objective, several, share


@objective
@dataclass(frozen=True)
class CrossEntropy(Objective):
    """−Σ y log softmax(z), labels smoothed by `smoothing`, the mean over the batch. One logit is taken for two classes."""

    smoothing: float = 0.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        share(self, "smoothing")

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        logits = two(seen.logits.float())
        return {"ce": self.weight * F.cross_entropy(logits, batch.one_each, label_smoothing=self.smoothing)}


@objective
@dataclass(frozen=True)
class BinaryCrossEntropy(Objective):
    """A sigmoid for each class: for labels `[B, K]` of which several hold; Wightman et al., "ResNet strikes back" (2021)."""

    smoothing: float = 0.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        share(self, "smoothing")

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        target = batch.shares(seen.logits.shape[1], self.smoothing)
        if target.shape != seen.logits.shape:
            raise VitreousError(f"the labels have {target.shape[1]} columns and the model {seen.logits.shape[1]} outputs")
        return {"bce": self.weight * F.binary_cross_entropy_with_logits(seen.logits.float(), target.float())}


def by_labels(labels: Any) -> Objective:
    """What such labels are learnt by where nothing else is asked for."""
    return BinaryCrossEntropy() if labels is not None and several(torch.as_tensor(labels)) else CrossEntropy()
