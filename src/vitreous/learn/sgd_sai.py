"""SGD-SaI: momentum whose learning rate is scaled once, for each tensor, by its first gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class SGDSaIOptimizer(torch.optim.Optimizer):
    """Xu et al., "No More Adam: Learning Rate Scaling at Initialization is All You Need" (2024), algorithm 1.

    At its first step a tensor's g-SNR is fixed: G = ‖g‖ / (σ(g) + eps), σ with n − 1. Then m ← μ m + (1 − μ) g (the first m is g
    whole) and w ← (1 − lr λ) w − lr G m. For gradients of mean zero G is √(n − 1), whatever they are.

    Where the released code fails this one differs: a tensor waits for its first gradient that is not zero (there G is 0 for
    ever), a tensor of one element has G = 1 (there 10⁸ times its gradient), and gradients that are not finite fix nothing.
    """

    def __init__(
        self, params: Any, lr: float = 1e-2, momentum: float = 0.9, eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, state = p.grad, self.state[p]
                if not state:
                    if not g.isfinite().all() or not g.any():
                        continue
                    state["gsnr"] = g.norm() / (g.std() + group["eps"]) if g.numel() > 1 else torch.ones_like(g.sum())
                    state["momentum"] = g.clone()
                else:
                    state["momentum"].lerp_(g, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * state["gsnr"] * state["momentum"])
        return loss
