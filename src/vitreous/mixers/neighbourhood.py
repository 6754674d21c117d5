"""Places around a place, and pooling to any size, in operators that every runtime has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adaptive_avg_pool(x: Tensor, size: Sequence[int]) -> Tensor:
    """`F.adaptive_avg_pool2d` as two products: `[…, H, W]` to `[…, *size]`."""

    def means(n: int, to: int) -> Tensor:
        i, place = torch.arange(to, device=x.device)[:, None], torch.arange(n, device=x.device)
        inside = ((place >= i * n // to) & (place * to < (i + 1) * n)).to(x.dtype)
        return inside / inside.sum(1, keepdim=True)

    return means(x.shape[-2], size[0]) @ x @ means(x.shape[-1], size[1]).mT


def neighbourhoods(height: int, width: int, kernel: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every place of a map the `kernel` × `kernel` places around it, `[H · W, kernel²]`, and their relative positions.

    At the border the square stays inside of the map, so that the place is no longer in its middle. Relative positions count in a
    table of (2 · kernel − 1)² entries. Hassani et al., "Neighborhood Attention Transformer" (CVPR 2023).
    """
    places, offsets = [], []
    for side in (height, width):
        i = torch.arange(side, device=device)[:, None]
        near = (i - kernel // 2).clamp(0, side - kernel) + torch.arange(kernel, device=device)
        places.append(near)
        offsets.append(near - i + kernel - 1)

    def pairs(rows: Tensor, columns: Tensor, width: int) -> Tensor:
        return (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)

    return pairs(places[0], places[1], width), pairs(offsets[0], offsets[1], 2 * kernel - 1)
