"""How flat the loss lies round a model: the largest eigenvalue of its Hessian, and the loss on a sphere round it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def largest_eigenvalue(model: nn.Module, loss: Callable[[nn.Module], Tensor], products: int = 20, seed: int = 0) -> float:
    """The Hessian's largest eigenvalue in size, by `products` steps of power iteration (Yao et al., "PyHessian", 2020).

    `loss(model)` is a differentiable scalar on fixed images; attention must not run in a fused kernel that has no second
    derivative, so it is computed with torch's plain one.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    g = torch.Generator().manual_seed(seed)
    v = [torch.randn(p.shape, generator=g).to(p) for p in parameters]
    value = 0.0
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        first = torch.autograd.grad(loss(model), parameters, create_graph=True)
        for _ in range(products):
            norm = torch.stack([x.norm() for x in v]).norm().clamp_min(1e-30)
            v = [x / norm for x in v]
            product = torch.autograd.grad(first, parameters, grad_outputs=v, retain_graph=True)
            value = float(sum((a * b).sum() for a, b in zip(product, v, strict=True)))
            v = [x.detach() for x in product]
    return value


@torch.no_grad()
def neighbourhood_loss(
    model: nn.Module, loss: Callable[[nn.Module], Tensor], rho: float = 0.05, directions: int = 8, seed: int = 0
) -> float:
    """Mean of `loss(model)` at w + ρ u over random unit directions u; the weights are put back exactly."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in parameters]
    g = torch.Generator().manual_seed(seed)
    total = 0.0
    try:
        for _ in range(directions):
            u = [torch.randn(p.shape, generator=g).to(p) for p in parameters]
            norm = torch.stack([x.norm() for x in u]).norm()
            for p, was, x in zip(parameters, kept, u, strict=True):
                p.copy_(was + rho * x / norm)
            total += float(loss(model))
    finally:
        for p, was in zip(parameters, kept, strict=True):
            p.copy_(was)
    return total / directions
