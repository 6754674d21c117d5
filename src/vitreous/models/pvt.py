"""PVT: a pyramid of transformers whose keys and values come from a smaller map.

Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without Convolutions" (ICCV 2021). Facts from
the official repository, whai362/PVT. PVT v2 of the same repository is in timm.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models.pvt_v2 import Attention as SpatialReductionAttention
from torch import Tensor, nn

from ..mixers import MetaBlock
from .classifier import init_weights
from .official import publish, renamed
from .token_pyramid import Grid, TokenPyramid, TokenStage

norm_layer = partial(nn.LayerNorm, eps=1e-6)


class Stage(TokenStage):
    """Figure 3: patches, their learned positions, and blocks.

    grid: what the positions are for. For tokens of another grid they are interpolated, as in the official code.
    """

    def __init__(self, proj: nn.Conv2d, blocks: Sequence[nn.Module], class_token: bool, grid: Grid, drop: float) -> None:
        super().__init__(proj, blocks, class_token)
        self.grid, self.drop = grid, nn.Dropout(drop)
        self.pos_embed = nn.Parameter(torch.zeros(1, int(class_token) + grid[0] * grid[1], proj.out_channels))
        trunc_normal_(self.pos_embed, std=0.02)

    def place(self, x: Tensor, grid: Grid) -> Tensor:
        positions = self.pos_embed
        if grid != self.grid:
            first = positions.shape[1] - self.grid[0] * self.grid[1]
            table = F.interpolate(positions[:, first:].mT.unflatten(2, self.grid), size=grid, mode="bilinear")
            positions = torch.cat([positions[:, :first], table.flatten(2).mT], 1)
        return self.drop(x + positions)


class PVT(TokenPyramid):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`; sides that are no multiples of 32 lose what is over.

    img_size: what the learned positions are for; other sizes interpolate them. sr_ratios: R_i of section 3.3, how many times
    smaller a side the map of keys and values is.
    """

    def __init__(
        self,
        img_size: int | Grid = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[int] = (8, 8, 4, 4),
        depths: Sequence[int] = (3, 4, 6, 3),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16, 32), drop_rate)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        height, width = cast(Grid, to_2tuple(img_size))
        for i, (channels, heads, ratio, sr) in enumerate(zip(embed_dims, num_heads, mlp_ratios, sr_ratios, strict=True)):
            patch = 2 if i else 4
            height, width = height // patch, width // patch
            blocks = [
                MetaBlock(
                    channels,
                    SpatialReductionAttention(channels, heads, sr, attn_drop=attn_drop_rate, proj_drop=drop_rate),
                    Mlp(channels, channels * ratio, drop=drop_rate),
                    norm_layer,
                    drop_path=rate,
                )
                for rate in rates[i]
            ]
            embed = nn.Conv2d(in_chans, channels, patch, patch)
            self.stages.append(Stage(embed, blocks, i == len(depths) - 1, (height, width), drop_rate))
            in_chans = channels
        self.norm = norm_layer(embed_dims[-1])
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def no_weight_decay(self) -> set[str]:
        return {"stages.3.cls_token"}


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: what belongs to a stage lies in it, and stages count from 0."""
    rules = [(rf"^(patch_embed|block|pos_embed){i + 1}", rf"stages.{i}.\1") for i in range(4)]
    return renamed(
        state,
        *rules,
        (r"^cls_token", "stages.3.cls_token"),
        (r"\.patch_embed\.", "."),
        (r"\.block\.", ".blocks."),
    )


VARIANTS = {
    "pvt_tiny": dict(depths=(2, 2, 2, 2)),
    "pvt_small": dict(depths=(3, 4, 6, 3)),
    "pvt_medium": dict(depths=(3, 4, 18, 3)),
    "pvt_large": dict(depths=(3, 8, 27, 3)),
    "pvt_huge_v2": dict(embed_dims=(128, 256, 512, 768), num_heads=(2, 4, 8, 12), depths=(3, 10, 60, 3)),
}
for _name, _arguments in VARIANTS.items():
    publish(PVT, _name, _arguments, variant=f"pvt--{_name}", convert=convert, first_conv="stages.0.proj")
