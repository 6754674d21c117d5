"""Which heads of an MPCViT keep their ReLU softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..steps import Step, step

SCALING, SOFTMAX = 44.6, 71.8  # seconds an image of CIFAR-10, published: no head with a ReLU softmax, and every head


@step("prune")
@dataclass(frozen=True)
class MPCHeads(Step):
    """Zeng et al., "MPCViT" (ICCV 2023), section 4.2: which heads keep their ReLU softmax.

    They are the share `mu` of all heads, over all layers, with the largest α; the others scale their scores and are linear. α is
    trained by `learn.MPCSearch`, and fixed from here on.

    `covers` tells the latency of the 7-layer net on CIFAR-10 between two parties by what was published, which is linear in the
    number of such heads; no protocol runs here.
    """

    mu: float = 0.3

    plans: ClassVar[dict[str, Any]] = {"softmax": list[list[int]]}

    def __post_init__(self) -> None:
        if not 0 <= self.mu <= 1:
            raise VitreousError(f"{self.name}: mu must lie in [0, 1], not {self.mu}")

    def plan(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any]:
        """`softmax`: of each layer the heads that keep it."""
        layers = self._layers(model)
        alphas = torch.cat([m.alpha.detach().flatten() for m in layers])
        kept = torch.zeros(len(alphas))
        kept[alphas.argsort(descending=True, stable=True)[: round(self.mu * len(alphas))]] = 1
        chosen = kept.split([m.heads for m in layers])
        share = float(kept.mean())
        said = f"{int(kept.sum())} of {len(kept)} heads have a softmax, {latency(share):.1f} s an image by the published table"
        return {"softmax": [c.nonzero().flatten().tolist() for c in chosen], "covers": said}

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        layers = self._layers(model)
        if len(layers) != len(plan["softmax"]) or any(
            h >= m.heads for m, c in zip(layers, plan["softmax"], strict=True) for h in c
        ):
            raise VitreousError(f"{self.name}: the plan is of other heads than this model has")
        for module, chosen in zip(layers, plan["softmax"], strict=True):
            alpha = torch.zeros_like(module.alpha)
            alpha[:, chosen] = 1
            module.alpha = nn.Parameter(alpha, requires_grad=False)

    def _layers(self, model: nn.Module) -> list[Any]:
        found = [m for m in model.modules() if isinstance(getattr(m, "alpha", None), nn.Parameter) and hasattr(m, "heads")]
        if not found:
            raise VitreousError(f"{self.name} chooses heads of an MPCViT, not of {type(model).__name__}")
        return found


def latency(share: float) -> float:
    """Seconds an image of CIFAR-10 of the published 7-layer net with that share of heads that have a softmax."""
    return SCALING + share * (SOFTMAX - SCALING)
