"""Sharpness-aware minimization round any optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from .optimisers import AdamW, Optimiser


@dataclass(frozen=True)
class SAM:
    """Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization" (ICLR 2021), as Chen, Hsieh & Gong,
    "When Vision Transformers Outperform ResNets without Pretraining or Strong Data Augmentations" (ICLR 2022), train ViTs.

    Each step takes two gradients of the same batch: the first leads to w + e, e = ρ g/‖g‖ over all parameters together, where
    the second is taken; then w is put back as it was, and `base` steps with the second. `adaptive` is ASAM (Kwon et al., ICML
    2021): e = ρ w²g/‖w g‖. The paper's ρ: 0.05 for ViT-S/32, 0.1 S/16, 0.15 B/32, 0.2 B/16.

    Both passes draw the same dropout, see every piece of an accumulated batch, and batch norms count once. A loss scale cancels
    in e. On several processes the ascent follows the mean gradient (the paper's own: each its own).
    """

    base: Optimiser = field(default_factory=AdamW)
    rho: float = 0.05
    adaptive: bool = False

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise VitreousError(f"SAM: rho must be above 0, not {self.rho}")


@torch.no_grad()
def ascend(parameters: Iterable[nn.Parameter], rho: float, adaptive: bool = False) -> Callable[[], None]:
    """Move `parameters` to w + e by their gradients; returns what puts them back exactly.

    Nothing moves where the gradients are zero or not finite.
    """
    pairs = [(p, p.grad) for p in parameters if p.grad is not None]
    with_grad = [p for p, _ in pairs]
    wide = [g.to(torch.promote_types(p.dtype, torch.float32)) for p, g in pairs]  # half precision would overflow
    norm = torch.stack([(p.abs() * g if adaptive else g).norm() for p, g in zip(with_grad, wide, strict=True)]).norm()
    kept: list[tuple[nn.Parameter, Tensor]] = []
    if norm.isfinite() and norm > 0:
        for p, g in zip(with_grad, wide, strict=True):
            kept.append((p, p.detach().clone()))
            p.add_(((p.square() * g if adaptive else g) * (rho / (norm + 1e-12))).to(p.dtype))

    @torch.no_grad()
    def restore() -> None:
        for p, was in kept:
            p.copy_(was)

    return restore
