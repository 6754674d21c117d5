"""GMM-PiT: a pooling-based ViT with the mask of `gmm_attention` (Li and Zhang, 2024).

Facts from the official repository, CatworldLee/Gaussian-Mixture-Mask-Attention. Unlike the PiT of its paper (Heo et al., 2021)
and of timm, patches do not overlap, the class token has a position too, and a pointwise convolution follows the pooling one.
Scores from and to the class token are not masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn

from ...errors import VitreousError
from ...mixers import MetaBlock, require_size
from ..classifier import Pyramid, init_weights
from ..official import renamed
from .vit import NAMES, GaussianMaskAttention, computed, gaussian, publish_both


class Stem(nn.Module):
    """Images `[B, C, img_size, img_size]` to tokens `[B, 1 + N, width]` with positions, the class token first."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.size = (img_size, img_size)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, width)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (img_size // patch_size) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        require_size(x, self.size, "GMM-PiT")
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), self.patch_embed(x)], 1) + self.pos_embed


class Pool(nn.Module):
    """Tokens `[B, 1 + side², C]` to `[B, 1 + ⌈side / 2⌉², 2C]`: a depthwise and a pointwise convolution; a linear layer for the
    class token."""

    def __init__(self, side: int, channels: int) -> None:
        super().__init__()
        self.side = side
        self.conv = nn.Conv2d(channels, 2 * channels, 3, 2, 1, groups=channels)
        self.pointwise, self.fc = nn.Conv2d(2 * channels, 2 * channels, 1), nn.Linear(channels, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        token, x = x[:, :1], x[:, 1:].mT.unflatten(2, (self.side, self.side))
        return torch.cat([self.fc(token), self.pointwise(self.conv(x)).flatten(2).mT], 1)


class Stage(nn.Module):
    """Pooling, but for the first stage, then blocks that share the Gaussian of their grid of `side` × `side`."""

    def __init__(self, pool: nn.Module, blocks: Sequence[nn.Module], side: int) -> None:
        super().__init__()
        self.pool, self.blocks = pool, nn.ModuleList(blocks)
        self.mask = nn.Parameter(gaussian(side), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(x)
        for block in self.blocks:
            x = block(x, self.mask)
        return x


class GMMPiT(Pyramid):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`; its features are tokens, the class token first."""

    global_pool = "token"

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 2,
        in_chans: int = 3,
        num_classes: int = 100,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 6, 4),
        num_heads: Sequence[int] = (2, 4, 8),
        mlp_ratio: int = 2,
        num_kernals: int = 5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        widths = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(widths, [patch_size * 2**i for i in range(len(depths))], drop_rate)
        side, over = divmod(img_size, patch_size)
        if over:
            raise VitreousError(f"GMM-PiT: img_size {img_size} does not divide into patches of {patch_size} pixels")
        self.stem = Stem(img_size, patch_size, in_chans, embed_dim)
        for i, (width, depth, heads) in enumerate(zip(widths, depths, num_heads, strict=True)):
            blocks = [
                MetaBlock(
                    width,
                    GaussianMaskAttention(width, heads, num_kernals, prefix=1),
                    Mlp(width, width * mlp_ratio),
                    nn.LayerNorm,
                    drop_path=drop_path_rate,
                )
                for _ in range(depth)
            ]
            pool = Pool(side, widths[i - 1]) if i else nn.Identity()
            side = (side + 1) // 2 if i else side
            self.stages.append(Stage(pool, blocks, side))
        self.norm = nn.LayerNorm(widths[-1])
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As any pyramid's; the maps are without the class token."""
        out = super().forward_intermediates(x, *args, **kwargs)
        maps = out if isinstance(out, list) else out[1]
        for i, tokens in enumerate(maps):
            maps[i] = tokens[:, 1:].mT.unflatten(2, (math.isqrt(tokens.shape[1]), -1))
        return out


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours; a stage pools before its blocks, where the official list has pools between stages."""
    return renamed(
        computed(state),
        *((rf"^layers\.{i}\.", f"stages.{(i + 1) // 2}." + "pool." * (i % 2)) for i in range(5)),
        (r"\.downsample\.net\.0\.", ".conv."),
        (r"\.downsample\.net\.1\.", ".pointwise."),
        (r"\.cls_ff\.", ".fc."),
        (r"^mlp_head\.0\.", "norm."),
        *NAMES,
        (r"^(cls_token|pos_embed|patch_embed\..*)$", r"stem.\1"),
    )


publish_both(GMMPiT, "pit", convert, dict(patch_size=2), dict(patch_size=4), maps=3, first_conv="stem.patch_embed.proj")
