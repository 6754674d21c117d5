"""NViT's criterion: how much each unit matters, how much time it takes, and which groups go first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .units import Structure

# What makes the kinds comparable: κ in (κ · Σ w·g)². Of channels it is one over the blocks, 12 as published.
KAPPA = {"heads": 1 / 12, "qk": 1 / 2, "v": 1 / 2, "mlp": 1.0}
GROUPS = {
    "embedding": 16,
    "heads": 2,
    "qk": 8,
    "v": 8,
    "mlp": 16,
}  # units of a structure that go together, and the least that stay


def criterion(structure: Structure, depth: int) -> Tensor:
    """`[units]`: (κ · Σ w·g)² of one batch, the sum before the square: ½ΔwᵀHΔw for Δw = −w and the empirical Fisher H = ggᵀ."""
    kappa = KAPPA.get(structure.kind, 1 / depth)
    return (kappa * structure.first_order()) ** 2


class Latency:
    """Time of one plain block as a function of its widths: `costs` of each multiply-accumulate of the projections, of the MLP
    and of the products of attention, of each number of the attention map, and of each of the tokens.

    tokens: of each block. least: units of a kind from which on another one less saves nothing.
    """

    def __init__(self, costs: Sequence[float], tokens: Sequence[int], least: Mapping[str, int] = GROUPS) -> None:
        self.costs, self.tokens, self.least = np.array(costs, float), tokens, least

    def block(self, i: int, embedding: float, heads: float, qk: float, v: float, mlp: float) -> float:
        n, width = self.tokens[i], heads * (2 * qk + v)
        kinds = (
            n * embedding * (width + heads * v),
            2 * n * embedding * mlp,
            n * n * heads * (qk + v),
            heads * n * n,
            n * (2 * embedding + mlp),
        )
        return float(self.costs @ np.array(kinds))

    def total(self, dims: Sequence[dict[str, int]]) -> float:
        return sum(self.block(i, **d) for i, d in enumerate(dims))

    def gain(self, kind: str, block: int | None, dims: Sequence[dict[str, int]]) -> float:
        """What one unit less saves; of residual channels, in all blocks. Nothing where a block has its least already."""
        if block is None:
            return sum(self.gain(kind, i, dims) for i in range(len(dims)))
        if kind != "embedding" and dims[block][kind] <= self.least[kind]:
            return 0.0
        less = {**dims[block], kind: dims[block][kind] - 1}
        return self.block(block, **dims[block]) - self.block(block, **less)


def adjusted(values: Sequence[Tensor], alive: Sequence[Tensor], gains: Sequence[float], strength: float) -> list[Tensor]:
    """c̃ = c̄ · gate − λ · gain, of each structure `[units]`; λ is `strength`."""
    return [c * gate - strength * gain for c, gate, gain in zip(values, alive, gains, strict=True)]


def after_removal(values: Sequence[Tensor], groups: Sequence[int], count: int) -> tuple[list[Tensor], float]:
    """Which units are left (`[units]` of bool for each structure) when the `count` least groups are gone, and their threshold.

    In each structure units are sorted by value and cut into groups of so many; a group's value is the sum. All groups are ranked
    together, but each structure keeps one.
    """
    orders = [v.argsort(stable=True).split(g) for v, g in zip(values, groups, strict=True)]
    sums = [torch.stack([v[chunk].sum() for chunk in order]) for v, order in zip(values, orders, strict=True)]
    ranked = torch.cat(sums).sort().values
    threshold = float(ranked[min(max(count, 1), len(ranked)) - 1])
    left = []
    for v, order, total in zip(values, orders, sums, strict=True):
        keep = torch.ones(len(v), dtype=torch.bool)
        gone = total <= threshold if count else torch.zeros(len(total), dtype=torch.bool)
        gone[int(total.argmax())] = False
        for chunk, leaves in zip(order, gone.tolist(), strict=True):
            if leaves:
                keep[chunk] = False
        left.append(keep)
    return left, threshold
