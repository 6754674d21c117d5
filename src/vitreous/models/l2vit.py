"""L2ViT: linear attention beside windows. Zheng, "The Linear Attention Resurrection in Vision Transformer" (2025).

Facts from the official repository, ChuanyangZheng/L2ViT. Blocks alternate: softmax attention in windows, then linear attention
over the whole map with a *local concentration module*, which sharpens what linear attention spreads too evenly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, Mlp, calculate_drop_path_rates
from torch import Tensor, nn

from ..mixers import ConditionalPosition
from .classifier import Pyramid, init_weights
from .official import publish, renamed

norm = partial(nn.LayerNorm, eps=1e-5)


class WindowAttention(nn.Module):
    """Softmax attention in `window` × `window` places, without shift and bias; `[B, H, W, C]`.

    A map that the window does not divide is filled up with zeros on the right and below, which take part.
    """

    def __init__(self, channels: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        (height, width), s = x.shape[1:3], self.window
        x = F.pad(x, (0, 0, 0, -width % s, 0, -height % s))
        rows, columns = x.shape[1] // s, x.shape[2] // s
        qkv = self.qkv(x).unflatten(1, (rows, s)).unflatten(3, (columns, s)).unflatten(5, (3, self.num_heads, -1))
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3)  # [B · windows, heads, s · s, d] each
        x = F.scaled_dot_product_attention(q, k, v).unflatten(2, (s, s)).unflatten(0, (-1, rows, columns))
        x = self.proj(x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2))
        return x[:, :height, :width]


class LinearAttention(nn.Module):
    """relu(q) (relu(k)ᵀ v) τ / max(relu(q) · Σ relu(k), 100), with a learned τ for each head (equation 7); `[B, H, W, C]`.

    The bound of 100 is what keeps it stable, as the paper found. kᵀv is a sum over all places, never taken in half precision.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.full((num_heads, 1, 1), (channels // num_heads) ** -0.5))
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:3]
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.to(torch.promote_types(x.dtype, torch.float32))
        q, k = q.relu(), k.relu()
        most = (q @ k.sum(2).unsqueeze(-1)).clamp(min=100)
        out = (q @ (k.mT @ v * self.temperature) / most).to(x.dtype)
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, size))


class LocalConcentration(nn.Module):
    """LCM: two depthwise 7 × 7 convolutions with GELU and batch norm between them; `[B, H, W, C]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.act, self.bn = nn.GELU(), nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn(self.act(self.conv1(x.permute(0, 3, 1, 2))))).permute(0, 2, 3, 1)


class L2Block(nn.Module):
    """A block of windows (LWA), or of linear attention and local concentration (LGA); `[B, C, H, W]`.

    Positions by convolutions come before the attention, in LWA before the MLP too.
    """

    def __init__(self, channels: int, num_heads: int, window: int, mlp_ratio: float, drop: float, drop_path: float) -> None:
        super().__init__()
        self.cpe = nn.ModuleList(ConditionalPosition(channels) for _ in range(2 if window else 1))
        self.norm1 = norm(channels)
        self.attn = WindowAttention(channels, num_heads, window) if window else LinearAttention(channels, num_heads)
        if not window:
            self.norm3, self.local = norm(channels), LocalConcentration(channels)
        self.norm2, self.mlp = norm(channels), Mlp(channels, int(channels * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe[0](x).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.attn(self.norm1(x)))
        if len(self.cpe) > 1:
            x = self.cpe[1](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            x = x + self.drop_path(self.local(self.norm3(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x.permute(0, 3, 1, 2)


class L2ViT(Pyramid):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window: int = 7,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16, 32), drop_rate)
        half, first = embed_dims[0] // 2, embed_dims[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, half, 3, 2, 1),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, first, 3, 2, 1),
            nn.BatchNorm2d(first),
            LayerNorm2d(first, eps=1e-5),
        )
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, width in enumerate(embed_dims):
            before = embed_dims[i - 1]
            smaller = (LayerNorm2d(before, eps=1e-5), nn.Conv2d(before, width, 2, 2)) if i else ()
            blocks = (
                L2Block(width, num_heads[i], 0 if j % 2 else window, mlp_ratio, drop_rate, rate)
                for j, rate in enumerate(rates[i])
            )
            self.stages.append(nn.Sequential(*smaller, *blocks))
        self.norm = LayerNorm2d(embed_dims[-1], eps=1e-5)
        self.apply(init_weights)
        self.reset_classifier(num_classes)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: a stage begins with what makes its map smaller."""
    stage = re.compile(r"^stages\.([1-3])\.(\d+)\.")
    later = {k: stage.sub(lambda m: f"stages.{m[1]}.{int(m[2]) + 2}.", k) for k in state}
    return renamed(
        {later[k]: v for k, v in state.items()},
        (r"^downsample_layers\.0\.proj\.proj\.", "stem."),
        (r"^downsample_layers\.0\.norm\.", "stem.5."),
        (r"^downsample_layers\.(\d)\.norm\.", r"stages.\1.0."),
        (r"^downsample_layers\.(\d)\.proj\.", r"stages.\1.1."),
        (r"\.local_mp\.", ".local."),
    )


BASE = dict(embed_dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
for _name, _arguments in {
    "tiny": dict(),
    "small": dict(depths=(2, 2, 18, 2)),
    "base": BASE,
    "base_384": dict(BASE, window=12),
}.items():
    _size = 384 if "384" in _name else 224
    publish(L2ViT, f"l2vit_{_name}", _arguments, variant=f"l2vit--{_name}", convert=convert, size=_size, first_conv="stem.0")
