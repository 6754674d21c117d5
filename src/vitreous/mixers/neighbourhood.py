"""Places around a place, and pooling to any size, in operators that every runtime has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def adaptive_avg_pool(x: Tensor, size: Sequence[int]) -> Tensor:
    """`F.adaptive_avg_pool2d` as two products: `[…, H, W]` to `[…, *size]`."""

    def means(n: int, to: int) -> Tensor:
        i, place = torch.arange(to, device=x.device)[:, None], torch.arange(n, device=x.device)
        inside = ((place >= i * n // to) & (place * to < (i + 1) * n)).to(x.dtype)
        return inside / inside.sum(1, keepdim=True)

    return means(x.shape[-2], size[0]) @ x @ means(x.shape[-1], size[1]).mT


def neighbourhoods(
    height: int, width: int, kernel: int, device: torch.device, dilation: int | Sequence[int] = 1
) -> tuple[Tensor, Tensor]:
    """For every place of a map the `kernel` × `kernel` places around it, `[H · W, kernel²]`, and their relative positions.

    At the border the square stays inside of the map, so that the place is no longer in its middle. With a dilation d every place
    sees those of its own group only, the places whose row and column are the same as its own modulo d. Relative positions count
    steps of d, in a table of (2 · kernel − 1)² entries. Both sides must be at least kernel · d; d may be one for rows and one for
    columns. Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023); Hassani and Shi, "Dilated Neighborhood Attention
    Transformer" (2022).
    """
    places, offsets = [], []
    dilations = (dilation, dilation) if isinstance(dilation, int) else dilation
    for side, apart in zip((height, width), dilations, strict=True):
        i = torch.arange(side, device=device)[:, None]
        group, step = i % apart, i // apart
        length = (side - group + apart - 1) // apart  # how many places this group has
        near = torch.minimum((step - kernel // 2).clamp(min=0), length - kernel) + torch.arange(kernel, device=device)
        places.append(group + apart * near)
        offsets.append(near - step + kernel - 1)

    def pairs(rows: Tensor, columns: Tensor, width: int) -> Tensor:
        return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)

    return pairs(places[0], places[1], width), pairs(offsets[0], offsets[1], 2 * kernel - 1)


class NeighbourhoodAttention(nn.Module):
    """Attention of every place to the `kernel` × `kernel` places around it, `dilation` apart; tokens `[B, H · W, C]` of a grid.

    Hassani and Shi, "Dilated Neighborhood Attention Transformer" (2022), equations 1 to 4, with a bias for each relative
    position. A grid with a side below kernel · dilation is filled up with zeros on the right and below, which take part.
    """

    def __init__(self, channels: int, num_heads: int, kernel: int = 7, dilation: int = 1) -> None:
        super().__init__()
        self.num_heads, self.kernel, self.dilation = num_heads, kernel, dilation
        self.scale = (channels // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel - 1, 2 * kernel - 1))
        nn.init.trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        (height, width), least = size, self.kernel * self.dilation
        high, wide = max(height, least), max(width, least)
        if (high, wide) != size:
            x = F.pad(x.unflatten(1, size), (0, 0, 0, wide - width, 0, high - height)).flatten(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [B, heads, N, d] each
        places, offsets = neighbourhoods(high, wide, self.kernel, x.device, self.dilation)
        bias = self.rpb.flatten(1)[:, offsets]
        if places.shape[0] == places.shape[1]:  # every place sees all of them, in order
            x = F.scaled_dot_product_attention(q, k, v, bias, scale=self.scale)
        else:
            scores = ((self.scale * q).unsqueeze(-2) @ k[:, :, places].mT).squeeze(-2) + bias
            x = (scores.softmax(-1).unsqueeze(-2) @ v[:, :, places]).squeeze(-2)
        x = x.transpose(1, 2).flatten(2)
        if (high, wide) != size:
            x = x.unflatten(1, (high, wide))[:, :height, :width].flatten(1, 2)
        return self.proj(x)
