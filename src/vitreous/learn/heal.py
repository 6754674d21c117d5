"""Teach a slimmed model to be what it was: the objectives of its own steps' papers, or distillation from the original."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Data
from ..errors import VitreousError
from ..outputs import embeds
from ..steps import history_of
from ..tokens.sparsifiner import ConnectivityPredictor
from .batches import Pair
from .classify import BinaryCrossEntropy, CrossEntropy, by_labels
from .consistency import token_reduction_consistency
from .distill import KD, FeatureMatch
from .engine import train
from .frd import patches_of_blocks, recalibration, reverse_modules
from .objective import Batch, Now, Objective, Seen, need_teacher, objective, positive
from .optimisers import AdamW, Optimiser
from .sam import SAM
from .schedule import keep_rate, set_keep
from .sparsifiner import connectivity_loss, sparsifiner_distillation
from .zeros import KeepZeros


@objective
@dataclass(frozen=True)
class FRD(Objective):
    """Feature recalibration distillation of token slimming; see `frd`."""

    wants = ()
    teacher: nn.Module | None = field(default=None, compare=False)
    tokens: float = 2.0
    logits: float = 2.0
    tau: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "tau")

    def parts(self, model: nn.Module) -> nn.Module:
        return reverse_modules(model)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        assert isinstance(now.parts, nn.ModuleList)
        with torch.no_grad():
            target, theirs = patches_of_blocks(need_teacher(self.teacher, "FRD"), batch.images)
        seen.logits, ours = patches_of_blocks(now.model, batch.images)
        error, divergence = recalibration(seen.logits, ours, target, theirs, now.parts, self.tau)
        terms = {"tokens": self.tokens * error, "kd": self.logits * divergence}
        return terms | (CrossEntropy()(seen, batch, now) if batch.labels is not None else {})


@objective
@dataclass(frozen=True)
class TokenReductionConsistency(Objective):
    """What MCTF is fine-tuned with; see `token_reduction_consistency`. Cross-entropy is part of it."""

    wants = ()
    r_max: float = 8
    weight: float = 3.0
    threshold: float = 0.4

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        r_max = int(self.r_max) if self.r_max >= 1 else self.r_max
        return {"trc": token_reduction_consistency(now.model, batch.images, batch.classes, r_max, self.weight, self.threshold)}


@objective
@dataclass(frozen=True)
class Connectivity(Objective):
    """Sparsifiner's first stage; see `connectivity_loss`. It has gradients for the predictors alone."""

    wants = ()

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        return {"connectivity": connectivity_loss(now.model, batch.images)}


@objective
@dataclass(frozen=True)
class SparsifinerDistillation(Objective):
    """Sparsifiner's second stage; see `sparsifiner_distillation`. Cross-entropy is part of it."""

    wants = ()
    teacher: nn.Module | None = field(default=None, compare=False)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        teacher = need_teacher(self.teacher, "SparsifinerDistillation")
        return {"sparsifiner": sparsifiner_distillation(now.model, teacher, batch.images, batch.classes)}


@objective
@dataclass(frozen=True)
class KeepRate(Objective):
    """EViT's schedule: from all tokens down to the share `keep` between epochs `start` and `end`; see `keep_rate`. No loss."""

    wants = ()
    keep: float = 0.7
    start: float = 0.0
    end: float = 1.0

    def before_step(self, now: Now) -> None:
        set_keep(now.model, keep_rate(now.epoch, self.start, self.end, self.keep))

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        return {}


def objectives_for(model: nn.Module, teacher: nn.Module, labels: Any, images: Tensor) -> list[Objective]:
    """What `heal` teaches `model` by: the objective of the last of its steps that has one, else cross-entropy where there are
    labels and distillation of the teacher's logits or features. Where labels mark several classes, each is a yes or no."""
    labelled = labels is not None
    steps = [type(s).__name__ for s in history_of(model).steps()]
    if embeds(teacher, images):
        return [FeatureMatch(teacher)]
    if labelled and isinstance(first := by_labels(labels), BinaryCrossEntropy):
        return [first, KD(teacher, multi_label=True)]
    for name in reversed(steps):
        if name == "TokenSlimming":
            return [FRD(teacher)]
        if name == "MCTF" and labelled:
            return [TokenReductionConsistency()]
        if name == "Sparsifiner" and labelled:
            return [SparsifinerDistillation(teacher)]
    return [CrossEntropy(), KD(teacher)] if labelled else [KD(teacher)]


def heal(
    model: nn.Module,
    teacher: nn.Module,
    data: Data | Pair,
    *,
    epochs: float = 1,
    optimiser: Optimiser | SAM | None = None,
    out: str | Path | None = None,
    **settings: Any,
) -> nn.Module:
    """A slimmed `model`, fine-tuned against the model that it was made of; returns a copy in eval mode, with the same recipe.

    Args:
        teacher: the original, at rest.
        data: training images, labelled or not (`train` says in what forms).
        optimiser: AdamW with a rate of 5e-5 when None.
        settings: the others of `train`.

    Sparsifiner's predictors learn alone in the first tenth of the epochs. Raises `VitreousError` for a model with quantized
    layers, whose integers would no longer be those that were fitted: quantize what is healed.
    """
    done = history_of(model).steps()
    if late := [s.name for s in done if s.family == "quant"]:
        raise VitreousError(f"heal comes before integers: this model went through {late[0]}; heal first, then quantize")
    labels = data.labels if isinstance(data, Data) else data[1]
    images = data.tensor([0]) if isinstance(data, Data) else data[0][:1]
    chosen = objectives_for(model, teacher, labels, images)
    if any(getattr(s, "zeros", False) for s in done):
        chosen.append(KeepZeros())
    optimiser = optimiser or AdamW(lr=5e-5)
    if any(isinstance(m, ConnectivityPredictor) for m in model.modules()):
        first = None if out is None else Path(out) / "predictors"
        model = train(model, data, Connectivity(), optimiser, epochs=epochs / 10, out=first, **settings)
        out = None if out is None else Path(out) / "model"
    return train(model, data, chosen, optimiser, epochs=epochs, out=out, **settings)
