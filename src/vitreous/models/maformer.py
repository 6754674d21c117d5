"""MAFormer: windows ask a learned summary of the whole map. Wang et al., "MAFormer: A Transformer Network with Multi-Scale
Attention Fusion for Visual Recognition" (2022).

No code was found. From the abstract and summaries: in the early stages a block attends within windows and to few coarse tokens,
which a learned map over all places makes (global learning with downsampling), and fuses both. Ours are that the fusion is cross
attention whose answer is added, which stages do so, that the last attends to all, and the sizes, near the published 23 M.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch.nn.functional as F
from timm.layers import LayerNorm2d, Mlp, calculate_drop_path_rates
from torch import Tensor, nn

from ..mixers import ConditionalPosition, MetaBlock, require_size
from .classifier import Pyramid, init_weights
from .l2vit import WindowAttention
from .official import publish

norm = partial(nn.LayerNorm, eps=1e-6)


class CrossAttention(nn.Module):
    """Softmax attention of tokens `[B, N, C]` to others `[B, M, C]`."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.kv, self.proj = (nn.Linear(channels, n * channels) for n in (1, 2, 1))

    def forward(self, x: Tensor, others: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(others).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class AttentionFusion(nn.Module):
    """MAF: local + attention of local to coarse, on `[B, H, W, C]`.

    local is attention in windows; the `coarse` tokens are a learned mixture of all `places` of the map, channel by channel.
    """

    def __init__(self, channels: int, num_heads: int, window: int, places: int, coarse: int) -> None:
        super().__init__()
        self.local = WindowAttention(channels, num_heads, window)
        self.down, self.cross = nn.Linear(places, coarse), CrossAttention(channels, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        local = self.local(x)
        coarse = self.down(x.flatten(1, 2).mT).mT
        return local + self.cross(local.flatten(1, 2), coarse).unflatten(1, x.shape[1:3])


class WholeAttention(nn.Module):
    """Softmax attention of every place of `[B, H, W, C]` to all."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.cross = CrossAttention(channels, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        return self.cross(tokens, tokens).unflatten(1, x.shape[1:3])


class Stage(nn.Module):
    """A convolution to this stage's size, where places are told by another, and blocks; `[B, C, H, W]`."""

    def __init__(self, inputs: int, channels: int, kernel: int, stride: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.embed, self.norm = nn.Conv2d(inputs, channels, kernel, stride, kernel // 2), norm(channels)
        self.position, self.blocks = ConditionalPosition(channels), nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).permute(0, 2, 3, 1))
        x = self.position(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.blocks(x).permute(0, 3, 1, 2)


class MAFormer(Pyramid):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`: the learned summaries are for one size."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int = 224,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 4, 14, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        window: int = 7,
        coarse: int = 49,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16, 32), drop_rate)
        self.size = (img_size, img_size)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        side = img_size
        for i, (width, heads) in enumerate(zip(embed_dims, num_heads, strict=True)):
            kernel, stride = (7, 4) if i == 0 else (3, 2)
            side = (side - 1) // stride + 1
            blocks = []
            for rate in rates[i]:
                last = i == len(embed_dims) - 1
                mixer = WholeAttention(width, heads) if last else AttentionFusion(width, heads, window, side * side, coarse)
                blocks.append(MetaBlock(width, mixer, Mlp(width, int(width * mlp_ratio), drop=drop_rate), norm, drop_path=rate))
            self.stages.append(Stage(embed_dims[i - 1] if i else in_chans, width, kernel, stride, blocks))
        self.norm = LayerNorm2d(embed_dims[-1], eps=1e-6)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        require_size(x, self.size, "MAFormer")
        return super().forward_features(x)


publish(
    MAFormer,
    "maformer_small",
    {},
    variant="maformer--small",
    doc="MAFormer, its sizes ours: the published could not be had.",
    first_conv="stages.0.embed",
)
