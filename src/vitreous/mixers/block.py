"""The block that nearly all of these architectures repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class Scale(nn.Module):
    """Channels multiplied by learned numbers that start at `initial`; maps `[B, C, H, W]` or tokens `[B, N, C]`."""

    def __init__(self, channels: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gamma[:, None, None] if x.ndim == 4 else self.gamma)


class MetaBlock(nn.Module):
    """x + mixer(norm1(x)), then x + mlp(norm2(x)); maps `[B, C, H, W]` or tokens `[B, N, C]`, as its parts take them.

    Yu et al., "MetaFormer Is Actually What You Need for Vision" (CVPR 2022), equations 2 and 3. Its parts have the names that
    timm gives them.

    layer_scale: what LayerScale starts at (Touvron et al., "Going Deeper with Image Transformers", 2021); None for none.
    `forward` hands on to the mixer whatever else it is given, as the grid of its tokens.
    """

    def __init__(
        self,
        channels: int,
        mixer: nn.Module,
        mlp: nn.Module,
        norm: Callable[[int], nn.Module],
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        scale = (lambda: nn.Identity()) if layer_scale is None else (lambda: Scale(channels, layer_scale))
        self.norm1, self.attn, self.ls1 = norm(channels), mixer, scale()
        self.norm2, self.mlp, self.ls2 = norm(channels), mlp, scale()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, *also: Any) -> Tensor:
        x = x + self.drop_path(self.ls1(self.attn(self.norm1(x), *also)))
        return x + self.drop_path(self.ls2(self.mlp(self.norm2(x))))
