"""Distillation from a teacher's answers and from its features."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError
from ..score import two
from .objective import Batch, Now, Objective, Seen, need_teacher, objective, positive, same_classes


@objective
@dataclass(frozen=True)
class KD(Objective):
    """Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network" (2015): T² KL(teacher ‖ student).

    With `multi_label`, and of one logit, each class is a yes or no of its own, and the mean over them is taken.
    """

    teacher: nn.Module | None = field(default=None, compare=False)
    temperature: float = 1.0
    weight: float = 1.0
    multi_label: bool = False

    def __post_init__(self) -> None:
        positive(self, "temperature")

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        theirs = now.teach(need_teacher(self.teacher, "KD"), batch.images).logits
        same_classes(seen.logits, theirs, "KD")
        t = self.temperature
        ours, theirs = seen.logits.float() / t, theirs.float() / t
        if self.multi_label or ours.shape[1] == 1:
            ours, theirs = two(ours.reshape(-1, 1)), two(theirs.reshape(-1, 1))
        ours, theirs = ours.log_softmax(1), theirs.log_softmax(1)
        return {"kd": self.weight * t * t * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)}


@objective
@dataclass(frozen=True)
class FeatureMatch(Objective):
    """Answer with the teacher's features: (1 − cosine) and the squared error relative to the features' own size.

    For models that embed and have no classes.
    """

    teacher: nn.Module | None = field(default=None, compare=False)
    weight: float = 1.0

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        theirs, ours = now.teach(need_teacher(self.teacher, "FeatureMatch"), batch.images).logits, seen.logits
        if ours.shape != theirs.shape:
            raise VitreousError(
                f"FeatureMatch: the teacher gives features {list(theirs.shape[1:])}, the student {list(ours.shape[1:])}"
            )
        ours, theirs = ours.float(), theirs.float()
        apart = (ours - theirs).square().sum(-1).mean() / theirs.square().sum(-1).mean().clamp_min(1e-12)
        return {"cosine": self.weight * (1 - F.cosine_similarity(ours, theirs, dim=-1)).mean(), "error": self.weight * apart}
