"""Pyramids whose stages attend over tokens, with a class token in the last stage alone: what PVT and CvT share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .classifier import Pyramid

Grid = tuple[int, int]


class TokenStage(nn.Module):
    """A map `[B, C, H, W]` to a map `[B, C', h, w]`: a convolution and a LayerNorm, then blocks on tokens.

    blocks: each takes tokens `[B, N, C']` and their grid (h, w). class_token: the stage puts one before its tokens and gives
    tokens, `[B, 1 + h · w, C']`.
    """

    def __init__(self, proj: nn.Conv2d, blocks: Iterable[nn.Module], class_token: bool = False) -> None:
        super().__init__()
        width = proj.out_channels
        self.proj, self.norm, self.blocks = proj, nn.LayerNorm(width), nn.ModuleList(blocks)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if class_token else None
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def place(self, x: Tensor, grid: Grid) -> Tensor:
        """The tokens with what the paper adds to say where they are."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        grid = (x.shape[2], x.shape[3])
        x = self.norm(x.flatten(2).mT)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        x = self.place(x, grid)
        for block in self.blocks:
            x = block(x, grid)
        return x if self.cls_token is not None else x.mT.unflatten(2, grid)


class TokenPyramid(Pyramid):
    """A pyramid of `TokenStage`s whose head reads the last one's class token; its features are tokens `[B, 1 + h · w, C]`."""

    global_pool = "token"

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As any pyramid's; the last map is without the class token."""
        out = super().forward_intermediates(x, *args, **kwargs)
        maps = out if isinstance(out, list) else out[1]
        if maps and maps[-1].ndim == 3:
            maps[-1] = maps[-1][:, 1:].mT.unflatten(2, self.last_grid(x))
        return out

    def last_grid(self, images: Tensor) -> Grid:
        """(h, w) of the last stage's tokens."""
        h, w = images.shape[2:]
        for stage in cast(Iterable[TokenStage], self.stages):
            (kernel, _), (stride, _), pad = stage.proj.kernel_size, stage.proj.stride, cast(Grid, stage.proj.padding)[0]
            h, w = ((side + 2 * pad - kernel) // stride + 1 for side in (h, w))
        return h, w
