"""Normalised knowledge distillation, and its form without a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError
from ..score import two
from .objective import Batch, Now, Objective, Seen, need_teacher, objective, positive, same_classes


def nkd(student: Tensor, teacher: Tensor, target: Tensor, gamma: float = 1.5, tau: float = 1.0) -> Tensor:
    """−mean T_t log S_t − γ τ² mean Σ_{i≠t} T̂_i log Ŝ_i (eq. 7), of logits `[B, K]` and class numbers `[B]`."""
    student, teacher, column = two(student), two(teacher), target[:, None]
    certain = teacher.softmax(1).gather(1, column) * student.log_softmax(1).gather(1, column)
    theirs, ours = (_others(z, target) / tau for z in (teacher, student))
    others = (theirs.softmax(1) * ours.log_softmax(1)).sum(1)
    return -certain.mean() - gamma * tau**2 * others.mean()


def uskd(logits: Tensor, weak: Tensor, shares: Tensor, alpha: float = 1.0, beta: float = 0.1, mu: float = 0.005) -> Tensor:
    """α L_target + β L_non-target + L_weak of the logits and those of the weak head `[B, K]`, and labels as shares `[B, K]`."""
    logits, weak = two(logits), two(weak)
    classes, target = logits.shape[1], shares.argmax(1)
    log_s, log_w = logits.log_softmax(1), weak.log_softmax(1)
    value, place = shares.topk(min(2, classes), 1)
    squared = log_s.detach().exp().square().gather(1, place)
    soft = torch.where(value > 0, squared + value - squared.mean(0), 0.0)
    on_target = -(soft * log_s.gather(1, place)).sum(1).mean()
    by_weak = -mu * ((0.9 * shares + 0.1 / classes) * log_w).sum(1).mean()
    with torch.no_grad():
        # The released code ranks by log S where the formula has S; its order is what was published.
        w, s = log_w.exp(), log_s
        w_t, s_t = w.gather(1, target[:, None]), s.gather(1, target[:, None])
        rank = (w / (1 - w_t + 1e-6) + s / (1 - s_t + 1e-6)).argsort(1, descending=True).argsort(1)
        zipf = 1 / (rank + 1).to(logits.dtype)
        zipf = _others(zipf / zipf.sum(1, keepdim=True), target)
        zipf = zipf / zipf.sum(1, keepdim=True)
    on_others = -(zipf * _others(logits, target).log_softmax(1)).sum(1).mean()
    return alpha * on_target + beta * on_others + by_weak


def _others(z: Tensor, target: Tensor) -> Tensor:
    """`[B, K]` without the target's column: `[B, K − 1]`."""
    keep = torch.arange(z.shape[1], device=z.device) != target[:, None]
    return z[keep].view(len(z), -1)


@objective
@dataclass(frozen=True)
class NKD(Objective):
    """Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and
    Customized Soft Labels" (ICCV 2023): the target's probability, and the others' normalised among themselves.

    Added to cross-entropy. `gamma` 1.5 for ResNets, 1.0 for DeiT; of mixed labels the largest share is the target.
    """

    teacher: nn.Module | None = field(default=None, compare=False)
    gamma: float = 1.5
    tau: float = 1.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "tau")

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        theirs = now.teach(need_teacher(self.teacher, "NKD"), batch.images).logits
        same_classes(seen.logits, theirs, "NKD")
        return {"nkd": self.weight * nkd(seen.logits.float(), theirs.float(), batch.classes, self.gamma, self.tau)}


@objective
@dataclass(frozen=True)
class USKD(Objective):
    """Of the same paper, self-distillation: soft labels from the student's own target score, from a weak head on the class token
    that leaves the middle block, and from the order of the other classes (Zipf's law).

    Added to cross-entropy. The published weights: α, β, μ = 1, 0.1, 0.005 on ImageNet; 0.1, 0.1, 0.1 on CIFAR-100. The other
    classes are ordered as in the released code, by the logarithm of the student's probability.
    """

    alpha: float = 1.0
    beta: float = 0.1
    mu: float = 0.005

    def blocks(self, model: nn.Module) -> Sequence[int]:
        return (self._middle(model),)

    def _middle(self, model: nn.Module) -> int:
        depth = len(read(model).blocks)
        if not depth:
            raise VitreousError(f"USKD's weak head reads the middle block, and {type(model).__name__} has no blocks of attention")
        return depth // 2 - 1 if depth > 1 else 0

    def parts(self, model: nn.Module) -> nn.Module:
        self._middle(model)
        anatomy = read(model)
        outputs = getattr(model, "num_classes", None)
        if not outputs or not anatomy.width:
            raise VitreousError(f"USKD needs a classifier of known width, {type(model).__name__} tells none")
        return nn.Linear(anatomy.width, outputs)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        assert now.parts is not None
        tokens, anatomy = seen.blocks[self._middle(now.model)], read(now.model)
        weak = now.parts(tokens[:, 0] if anatomy.class_token else tokens.mean(1))
        shares = replace(batch, labels=batch.one_each).shares(max(2, seen.logits.shape[1]))
        return {"uskd": uskd(seen.logits.float(), weak.float(), shares, self.alpha, self.beta, self.mu)}
