"""What methods of self-distillation share: heads, losses, centres, and teachers that follow."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .patches import full, in_full


class Prototypes(nn.Module):
    """Cosines to `count` prototypes, as logits: a linear layer whose rows have unit length."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.empty(count, width))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return full(F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1)))


class DINOHead(nn.Module):
    """Three layers with GELU, unit length, prototypes (Caron et al., "Emerging Properties in Self-Supervised Vision
    Transformers", ICCV 2021). Of narrower tokens the first layer uses as many columns, scaled up by the ratio (POA)."""

    def __init__(self, width: int, prototypes: int, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        layers = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        self.mlp = nn.Sequential(*layers)
        for m in self.mlp:
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)
        self.last_layer = Prototypes(bottleneck, prototypes)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """`frozen`: no gradient for the prototypes, as in the first epoch."""
        first = self.mlp[0]
        assert isinstance(first, nn.Linear)
        ratio = first.in_features / x.shape[-1]
        hidden = F.linear(x * ratio, first.weight[:, : x.shape[-1]], first.bias)
        unit = F.normalize(self.mlp[1:](hidden), dim=-1)
        if not frozen:
            return self.last_layer(unit)
        return full(F.linear(unit, F.normalize(self.last_layer.weight_v.detach(), dim=1)))


def cross_entropy(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """−Σ q log softmax(s / temperature) of logits `[…, K]` and shares q, without a mean."""
    return -(teacher * (student / temperature).log_softmax(-1)).sum(-1)


def warm(start: float, end: float, epoch: float, epochs: float) -> float:
    """Linear from `start` to `end` over `epochs`, whole epochs at a time as the released code has it; then `end`."""
    if int(epoch) >= epochs or epochs < 2:
        return end
    return start + (end - start) * int(epoch) / (epochs - 1)


def sinkhorn(logits: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """Shares `[B, K]`, as even over the batch as over prototypes (Caron et al., "SwAV", NeurIPS 2020)."""
    q = ((logits - logits.max()) / temperature).exp().T
    q = q / q.sum()
    for _ in range(rounds):
        q = q / q.sum(1, keepdim=True).clamp_min(1e-300 if q.dtype == torch.float64 else 1e-30) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


@in_full
def koleo(tokens: Tensor) -> Tensor:
    """−mean log of the distance to the nearest other, of normalised `[B, C]` (Sablayrolles et al., ICLR 2019)."""
    z = F.normalize(tokens, dim=-1)
    scores = z @ z.mT
    scores = scores.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -2.0)
    return -((z - z[scores.argmax(1)] + 1e-8).norm(dim=-1) + 1e-8).log().mean()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """θ_t ← momentum θ_t + (1 − momentum) θ_s, matched by name; what the student lacks, and buffers, stay."""
    ours = dict(student.named_parameters())
    for name, p in teacher.named_parameters():
        if name in ours:
            p.lerp_(ours[name].detach().to(p.dtype), 1 - momentum)


def rising(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` to `end` as `share` goes from 0 to 1."""
    return end - (end - start) * (1 + math.cos(math.pi * share)) / 2


def twin(*modules: nn.Module) -> Sequence[nn.Module]:
    """Copies that get no gradient."""
    return [copy.deepcopy(m).requires_grad_(False) for m in modules]
