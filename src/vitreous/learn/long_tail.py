"""Long-tailed data: subsets, weights of rare classes, and DeiT-LT's distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError
from ..score import two
from .objective import Batch, Now, Objective, Seen, need_teacher, objective, same_classes, share


def exponential_counts(largest: int, classes: int, ratio: float) -> list[int]:
    """Images a class, from `largest` down to `ratio · largest`: ⌊largest · ratio^(c/(C − 1))⌋ (Cui et al., CVPR 2019)."""
    return [int(largest * ratio ** (c / max(classes - 1, 1))) for c in range(classes)]


def long_tailed(labels: Tensor, ratio: float, seed: int = 0) -> Tensor:
    """Places `[n]` of a long-tailed subset of balanced `labels [N]`: class 0 whole, the last with the share `ratio`."""
    classes = int(labels.max()) + 1
    counts = exponential_counts(int(torch.bincount(labels).min()), classes, ratio)
    draw = np.random.default_rng(seed)
    kept = [draw.permutation(np.flatnonzero(labels.numpy() == c))[:n] for c, n in enumerate(counts)]
    return torch.from_numpy(np.sort(np.concatenate(kept)))


def effective_weights(counts: Tensor, beta: float = 0.9999) -> Tensor:
    """Weights `[C]` by the effective number of images, (1 − β)/(1 − βⁿ), that sum to C (Cui et al., "Class-Balanced Loss Based on
    Effective Number of Samples", CVPR 2019)."""
    weights = (1 - beta) / (1 - beta ** counts.double().clamp_min(1))
    return weights / weights.sum() * len(counts)


def deit_lt(
    cls: Tensor, dist: Tensor, teacher: Tensor, labels: Tensor, weights: Tensor | None = None, alpha: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(1 − α) CE(cls, label) and α CE(dist, argmax teacher), the latter weighted by the teacher's class; logits `[B, C]`."""
    cls, dist = two(cls), two(dist)
    hard = two(teacher).argmax(1)
    weights = None if weights is None else weights.to(dist)
    return (1 - alpha) * F.cross_entropy(cls, labels), alpha * F.cross_entropy(dist, hard, weight=weights)


def two_answers(seen: Seen, student: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    """Logits `[B, C]` of the class token and of the distillation token. Raises `VitreousError` for a model without either."""
    heads = [getattr(student, n, None) for n in ("head", "head_dist")]
    if seen.prefix is None or read(student).prefix < 2 or not all(isinstance(h, nn.Module) for h in heads):
        raise VitreousError(
            f"{name} needs a student with a class and a distillation token, each with a head: {type(student).__name__} "
            "has not; choose one of timm's deit_*_distilled models"
        )
    cls, dist = (cast(nn.Module, h)(seen.prefix[:, i]).float() for i, h in enumerate(heads))
    return cls, dist


@objective
@dataclass(frozen=True)
class DeiTLT(Objective):
    """Rangwani et al., "DeiT-LT: Distillation Strikes Back for Vision Transformer Training on Long-Tailed Datasets" (CVPR 2024).

    For a student with a class and a distillation token (timm's `deit_*_distilled_*`): the first learns the labels, the second the
    classes that a CNN sees in the student's own strongly augmented picture, shrunk to `size`. From the share `defer` of the run
    on the second loss is weighted by the effective numbers of `counts`, images a class; mix pictures until then alone
    (`mix_until=defer`). The weighted mean divides by the weights in the batch, as torch does.
    """

    wants = ("logits", "prefix")
    teacher: nn.Module | None = field(default=None, compare=False)
    counts: tuple[int, ...] | None = None
    size: int | None = None
    defer: float = 11 / 12
    alpha: float = 0.5

    def __post_init__(self) -> None:
        share(self, "defer", "alpha")

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        cls, dist = two_answers(seen, now.model, "DeiTLT")
        shown = batch.images
        if self.size is not None and shown.shape[-1] != self.size:
            shown = F.interpolate(shown, size=(self.size, self.size), mode="bicubic", antialias=True)
        theirs = now.teach(need_teacher(self.teacher, "DeiTLT"), shown).logits
        same_classes(dist, theirs, "DeiTLT")
        late = self.counts is not None and now.share >= self.defer
        weights = effective_weights(torch.tensor(self.counts)) if late else None
        ours, taught = deit_lt(cls, dist, theirs, batch.one_each, weights, self.alpha)
        return {"cls": ours, "dist": taught}
