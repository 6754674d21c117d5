"""LPViT: blocks of weights set to zero, as many in each layer as harm alike and save power."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..steps import step
from .curves import TILE, allot, block_scores, block_sums, curve, kept_blocks, spread
from .zeros import Zeros, gradients, weighed

POINTS = 100  # shares of blocks at which each layer's curve is known


def power(model: nn.Module, image: Tensor) -> float:
    """What the layers of `model` take by the paper's model of power, counted, in no unit, for it is meant for shares: blocks of
    weights that are not all zero, times the tiles of inputs of the layer. It knows neither of tokens nor of bits. `image`
    `[1, C, H, W]` tells which layers run."""
    return float(
        sum(
            int((block_sums((layer.weight != 0).float(), (TILE, TILE)) > 0).sum()) * (layer.inputs // TILE)
            for layer in weighed(model, image)
        )
    )


@step("prune")
@dataclass(frozen=True)
class LPViT(Zeros):
    """Xu et al., "LPViT: Low-Power Semi-structured Pruning for Vision Transformers" (ECCV 2024).

    The weights of every linear layer and convolution, `[out, in·k·k]`, go in blocks of `block`. Which of a layer: those with the
    lowest mean |w·g|, g being the gradient of the mean squared output over the calibration images, so that no labels are needed.
    How many: as much of each layer as makes the second-order distortion, and with `power` the power that its blocks take, rise
    by one slope for all, until about the share `keep` of the multiplications of these layers is left.

    smooth: weight of what came before in the exponential smoothing of the curves; published 0.1 for small models, 0.9 for base.
    released: as the official code does it: power that grows with what is gone (so layers with many inputs lose less, the
        reverse of the paper), blocks ranked by mean |w|, and its sum of second-order terms.

    Simulated: the zeros stay in the weights, and no runtime here skips them. `vt.heal` keeps them zero while the rest learns, as
    the paper's 300 epochs do. Gradients are taken in eval mode.
    """

    keep: float = 0.5
    block: tuple[int, int] = (16, 16)
    smooth: float = 0.1
    power: bool = True
    released: bool = False

    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise VitreousError(f"{self.name}: keep must lie in (0, 1], not {self.keep}")
        if not 0 <= self.smooth < 1:
            raise VitreousError(f"{self.name}: smooth must lie in [0, 1), not {self.smooth}")
        if len(self.block) != 2 or min(self.block) < 1:
            raise VitreousError(f"{self.name}: block must be two numbers of at least 1, not {self.block}")

    def masks(self, model: nn.Module, calibration: Tensor | None) -> tuple[dict[str, Tensor], str]:
        assert calibration is not None
        layers = weighed(model, calibration[:1].to(next(model.parameters())))
        slopes = gradients(model, calibration, layers)
        grid = np.linspace(0.0, 1.0, POINTS + 1)
        curves = [
            curve(layer.weight.double(), g.double(), self.block, grid, layer.inputs, self.released)
            for layer, g in zip(layers, slopes, strict=True)
        ]
        scores = [
            block_scores(layer.weight, torch.ones_like(g) if self.released else g, self.block)
            for layer, g in zip(layers, slopes, strict=True)
        ]
        total = sum(layer.macs for layer in layers)

        def masked(amounts: Sequence[float]) -> list[Tensor]:
            return [
                spread(kept_blocks(s, a), self.block, layer.weight.shape)
                for layer, s, a in zip(layers, scores, amounts, strict=True)
            ]

        def left(amounts: Sequence[float]) -> float:
            shares = (m.float().mean().item() for m in masked(amounts))
            return sum(share * layer.macs for share, layer in zip(shares, layers, strict=True)) / total

        amounts = [0.0] * len(layers)
        if self.keep < 1 and layers:
            amounts, _ = allot(curves, left, self.keep, smooth=self.smooth, power=self.power, released=self.released)
        blocks = [(s.numel() * (layer.inputs // 16)) for s, layer in zip(scores, layers, strict=True)]
        power = sum(b * (1 - a) for b, a in zip(blocks, amounts, strict=True)) / max(sum(blocks), 1)
        said = f"left of {len(layers)} layers: {left(amounts):.0%} of the multiplications, {power:.0%} of the counted power"
        masks = {layer.name: m.view_as(layer.module.weight) for layer, m in zip(layers, masked(amounts), strict=True)}
        return masks, said
