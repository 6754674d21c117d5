"""Sparse then Prune: the smallest weights of the whole model go, by one threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError
from ..steps import step
from .zeros import Zeros


def smallest(weights: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks of bool by name: the `share` of all entries of `weights` together with the smallest magnitude goes."""
    sizes = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    kept = torch.ones(len(sizes), dtype=torch.bool, device=sizes.device)
    kept[sizes.topk(round(share * len(sizes)), largest=False).indices] = False
    parts = kept.split([w.numel() for w in weights.values()])
    return {name: part.view_as(w) for (name, w), part in zip(weights.items(), parts, strict=True)}


@step("prune")
@dataclass(frozen=True)
class SparseThenPrune(Zeros):
    """Prasetyo, Yudistira & Widodo, "Sparse then Prune: Toward Efficient Vision Transformers" (2023).

    The `share` of the weights with the smallest magnitude is set to zero, one threshold for the whole model: those of the layer
    that embeds patches, of each block's norms, queries, keys, values, projection and MLP, and of the classifier. Biases,
    positions, tokens and the final norm stay. The paper trains the model before with `learn.AttentionSparsity`, and not after.

    Simulated: single zeros are skipped by no runtime; speed and size are those of the dense model.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise VitreousError(f"{self.name}: share must lie in [0, 1), not {self.share}")

    def masks(self, model: nn.Module, calibration: Tensor | None) -> tuple[dict[str, Tensor], str]:
        anatomy = read(model)
        inside = tuple(f"{b.name}." for b in anatomy.blocks)
        weights: dict[str, Tensor] = {}
        for name, m in model.named_modules():
            layer = isinstance(m, (nn.Linear, nn.Conv2d)) or name.startswith(inside)
            w: Any = getattr(m, "weight", None)
            if layer and isinstance(w, nn.Parameter):
                weights[f"{name}.weight"] = cast(Tensor, w)
        if not weights:
            return {}, ""
        masks = smallest(weights, self.share)
        gone = sum(int((~m).sum()) for m in masks.values())
        return masks, f"{gone} of {sum(m.numel() for m in masks.values())} weights set to zero in {len(masks)} layers"
