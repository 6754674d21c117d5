"""DualToken-ViT: a few tokens that know the whole image and their places go along through all stages. Chu et al.,
"DualToken-ViT: Position-Aware Efficient Vision Transformer with Dual Token Fusion" (SDM 2024).

No code was found. From the abstract and summaries: local information comes from convolutions; global information from attention
to a map that is made small in steps, to which position-aware global tokens are added that all stages enrich. Ours are the form of
the mixing (a token and a channel MLP), the widths, and the depths, chosen for the published 1.0 GMACs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import DropPath, LayerNorm2d, Mlp, calculate_drop_path_rates
from torch import Tensor, nn

from ..mixers import conv_norm, patch_grid, require_size
from .classifier import Pyramid, init_weights
from .maformer import CrossAttention
from .official import publish

norm1d, norm2d = partial(nn.LayerNorm, eps=1e-6), partial(LayerNorm2d, eps=1e-6)


class ConvEncoder(nn.Module):
    """x + pointwise MLP(norm(depthwise 3 × 3 (x))) on maps `[B, C, H, W]`: what is near."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm, self.mlp = norm2d(channels), Mlp(channels, 2 * channels, use_conv=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(self.conv(x)))


class TokenMixer(nn.Module):
    """An MLP over tokens and one over channels, each with a residual; `[B, N, C]`.

    Tolstikhin et al., "MLP-Mixer" (NeurIPS 2021), equation 1.
    """

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.norm1, self.tokens = norm1d(channels), Mlp(tokens, 2 * tokens)
        self.norm2, self.channels = norm1d(channels), Mlp(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


class DualTokenBlock(nn.Module):
    """A map `[B, C, H, W]` and the global tokens `[B, grid², C]`, to the same.

    The map is made small by `steps` strided convolutions. Its tokens and the global ones, added place by place and mixed, are
    what every place attends to, beside the convolutions around it, and what goes on as the global tokens.
    """

    def __init__(self, channels: int, num_heads: int, tokens: int, steps: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        down = ((conv_norm(channels, channels, 3, 2, groups=channels), nn.GELU()) for _ in range(steps))
        self.down = nn.Sequential(*(layer for layers in down for layer in layers))
        self.mixer, self.local, self.norm1 = TokenMixer(tokens, channels), ConvEncoder(channels), norm1d(channels)
        self.attn = CrossAttention(channels, num_heads)
        self.norm2, self.mlp = norm2d(channels), Mlp(channels, int(channels * mlp_ratio), use_conv=True)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        known = self.mixer(known + self.down(x).flatten(2).mT)
        asked = self.attn(self.norm1(x.flatten(2).mT), known).mT.reshape(x.shape)
        x = self.local(x) + self.drop_path(asked)
        return x + self.drop_path(self.mlp(self.norm2(x))), known


class Stage(nn.Module):
    """A map and global tokens, brought to this stage's width and size, through its blocks."""

    def __init__(self, narrower: nn.Module, wider: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.narrower, self.wider, self.blocks = narrower, wider, nn.ModuleList(blocks)

    def forward(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, known = self.narrower(given[0]), self.wider(given[1])
        for block in self.blocks:
            x, known = block(x, known)
        return x, known


class Start(nn.Module):
    """Images to the first map, half as wide as the first stage, and the global tokens as they are learned."""

    def __init__(self, in_chans: int, channels: int, tokens: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv_norm(in_chans, channels // 2, 3, 2), nn.GELU())
        self.tokens = nn.Parameter(0.02 * torch.randn(1, tokens, channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), self.tokens.expand(x.shape[0], -1, -1)


class DualTokenViT(Pyramid):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`; a global token for each place of the last map."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int = 224,
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (1, 2, 5, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16, 32), drop_rate)
        self.size = (img_size, img_size)
        rows, columns = patch_grid(self.size, 32, "DualToken-ViT")
        self.stem = cast(Any, Start(in_chans, embed_dims[0], rows * columns))
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, width in enumerate(embed_dims):
            before = embed_dims[i - 1] if i else width // 2
            blocks = [DualTokenBlock(width, num_heads[i], rows * columns, 3 - i, mlp_ratio, rate) for rate in rates[i]]
            self.stages.append(Stage(conv_norm(before, width, 3, 2), nn.Linear(before, width) if i else nn.Identity(), blocks))
        self.norm = norm2d(embed_dims[-1])
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        require_size(x, self.size, "DualToken-ViT")
        return super().forward_features(x)


publish(
    DualTokenViT,
    "dualtoken_vit_small",
    {},
    variant="dualtoken-vit--small",
    doc="DualToken-ViT, its sizes ours: the published could not be had.",
    first_conv="stem.conv.0",
)
