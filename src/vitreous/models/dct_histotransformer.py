"""DCT-HistoTransformer: attention among low frequencies beside convolutions. Ranjbar, Mohebbi, Cherakhloo and Vahdat,
"DCT-HistoTransformer: Efficient Lightweight Vision Transformer with DCT Integration for Histopathological Image Analysis" (2024).

No code was found. From the abstract: two parallel branches, DCT-Attention and MobileConv, in a light network without pretraining.
Ours are the share of frequencies that is kept, how the branches meet (side by side, then one convolution), and all sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..mixers import conv_norm
from ..mixers.cosine import dct2, idct2
from .classifier import Pyramid, init_weights
from .official import publish

norm = partial(LayerNorm2d, eps=1e-6)


class DCTAttention(nn.Module):
    """Softmax attention among the lowest frequencies of a map `[B, C, H, W]`, `keep` of them along each side.

    keep² of the tokens, and keep⁴ of the products between them. The others are 0 in what it gives.
    """

    def __init__(self, channels: int, num_heads: int, keep: float) -> None:
        super().__init__()
        self.num_heads, self.keep = num_heads, keep
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        rows, columns = (max(1, round(self.keep * n)) for n in (height, width))
        tokens = dct2(x, rows, columns).flatten(2).mT
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        tokens = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return idct2(tokens.mT.unflatten(2, (rows, columns)), height, width)


class MobileConv(nn.Sequential):
    """An inverted residual without its shortcut: 1 × 1 to four times the channels, depthwise 3 × 3, and back; `[B, C, H, W]`.

    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (CVPR 2018).
    """

    def __init__(self, channels: int) -> None:
        wide = 4 * channels
        first, depthwise = conv_norm(channels, wide, 1), conv_norm(wide, wide, 3, groups=wide)
        super().__init__(first, nn.SiLU(), depthwise, nn.SiLU(), conv_norm(wide, channels, 1))


class HistoBlock(nn.Module):
    """x + fuse(DCTAttention(norm x), MobileConv(x)) on maps `[B, C, H, W]`."""

    def __init__(self, channels: int, num_heads: int, keep: float) -> None:
        super().__init__()
        self.norm1, self.attn = norm(channels), DCTAttention(channels, num_heads, keep)
        self.conv, self.fuse = MobileConv(channels), conv_norm(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fuse(torch.cat([self.attn(self.norm1(x)), self.conv(x)], 1))


class DCTHistoTransformer(Pyramid):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`. keep: of the frequencies along each side."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 8,
        embed_dims: Sequence[int] = (32, 64, 128, 192),
        depths: Sequence[int] = (1, 2, 2, 1),
        num_heads: Sequence[int] = (1, 2, 4, 6),
        keep: float = 0.5,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16, 32), drop_rate)
        self.stem = nn.Sequential(conv_norm(in_chans, embed_dims[0], 3, 2), nn.SiLU())
        for i, width in enumerate(embed_dims):
            narrower = conv_norm(embed_dims[max(i - 1, 0)], width, 3, 2)
            blocks = (HistoBlock(width, num_heads[i], keep) for _ in range(depths[i]))
            self.stages.append(nn.Sequential(narrower, *blocks))
        self.norm = norm(embed_dims[-1])
        self.apply(init_weights)
        self.reset_classifier(num_classes)


publish(
    DCTHistoTransformer,
    "dct_histotransformer",
    {},
    variant="dct-histotransformer--breakhis",
    doc="DCT-HistoTransformer, its sizes ours: the published could not be had. 8 classes, as BreakHis has them.",
    num_classes=8,
    first_conv="stem.0.0",
)
