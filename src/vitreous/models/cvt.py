"""CvT: a transformer whose patches and projections are convolutions.

Wu et al., "CvT: Introducing Convolutions to Vision Transformers" (ICCV 2021). Facts from the official repository, microsoft/CvT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp, QuickGELU, calculate_drop_path_rates
from torch import Tensor, nn

from ..mixers import MetaBlock, conv_norm
from .classifier import init_weights
from .official import publish, renamed
from .token_pyramid import Grid, TokenPyramid, TokenStage


class ConvolutionalAttention(nn.Module):
    """Section 3.2, on tokens `[B, N, C]` of a grid (h, w): q, k and v each have a depthwise 3 × 3 convolution and a BatchNorm
    before their linear layer, those of k and v with a stride of 2. A class token, when there is one, passes by the convolutions.

    Scores are divided by √C, not by the root of a head's width, as in the official code.
    """

    def __init__(self, channels: int, heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.scale, self.dropout = heads, channels**-0.5, attn_drop
        self.conv_q = conv_norm(channels, channels, 3, groups=channels)
        self.conv_k = conv_norm(channels, channels, 3, 2, groups=channels)
        self.conv_v = conv_norm(channels, channels, 3, 2, groups=channels)
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in "qkv")
        self.proj, self.proj_drop = nn.Linear(channels, channels), nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        first = x.shape[1] - grid[0] * grid[1]
        token, image = x[:, :first], x[:, first:].mT.unflatten(2, grid)

        def project(conv: nn.Module, linear: nn.Module) -> Tensor:
            tokens = torch.cat([token, conv(image).flatten(2).mT], 1)
            return linear(tokens).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

        q, k, v = project(self.conv_q, self.q), project(self.conv_k, self.k), project(self.conv_v, self.v)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class CvT(TokenPyramid):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`; it has no position embedding (section 4.3)."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 192, 384),
        num_heads: Sequence[int] = (1, 3, 6),
        depths: Sequence[int] = (1, 2, 10),
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16), drop_rate)
        # Stochastic depth in the last stage alone, from 0 at its first block.
        rates = [[0.0] * n for n in depths[:-1]] + [cast(list[float], calculate_drop_path_rates(drop_path_rate, depths[-1]))]
        for i, (width, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            blocks = [
                MetaBlock(
                    width,
                    ConvolutionalAttention(width, heads, attn_drop_rate, drop_rate),
                    Mlp(width, int(width * mlp_ratio), act_layer=QuickGELU, drop=drop_rate),
                    nn.LayerNorm,
                    drop_path=rate,
                )
                for rate in rates[i]
            ]
            embed = nn.Conv2d(in_chans, width, 3, 2, 1) if i else nn.Conv2d(in_chans, width, 7, 4, 2)
            self.stages.append(TokenStage(embed, blocks, class_token=i == len(depths) - 1))
            in_chans = width
        self.norm = nn.LayerNorm(embed_dims[-1])
        self.apply(init_weights)
        self.reset_classifier(num_classes)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours."""
    return renamed(
        state,
        (r"^stage(\d)\.", r"stages.\1."),
        (r"\.patch_embed\.", "."),
        (r"\.conv_proj_(\w)\.conv\.", r".conv_\1.0."),
        (r"\.conv_proj_(\w)\.bn\.", r".conv_\1.1."),
        (r"\.proj_([qkv])\.", r".\1."),
    )


DEEP = dict(depths=(1, 4, 16))
WIDE = dict(embed_dims=(192, 768, 1024), num_heads=(3, 12, 16), depths=(2, 2, 20))
VARIANTS = {
    "cvt_13": (224, {}),
    "cvt_21": (224, DEEP),
    "cvt_13_384": (384, {}),
    "cvt_21_384": (384, DEEP),
    "cvt_w24": (384, WIDE),
}
for _name, (_size, _arguments) in VARIANTS.items():
    publish(CvT, _name, _arguments, variant=f"cvt--{_name}", convert=convert, size=_size, maps=3, first_conv="stages.0.proj")
