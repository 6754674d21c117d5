"""The two-dimensional discrete cosine transform as products of matrices, which every runtime has."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosines(n: int, like: Tensor) -> Tensor:
    """The orthonormal DCT-II, `[frequencies, places]`: row k holds k half waves."""
    precise = torch.promote_types(like.dtype, torch.float32)  # for the angles; the waves are as exact as `like`
    places = torch.arange(n, device=like.device, dtype=precise)
    waves = (torch.outer(places, places + 0.5) * (math.pi / n)).cos() * (2 / n) ** 0.5
    return torch.where(places[:, None] == 0, waves * 0.5**0.5, waves).to(like.dtype)


def dct2(x: Tensor, rows: int | None = None, columns: int | None = None) -> Tensor:
    """Maps `[…, H, W]` to their lowest `[…, rows, columns]` frequencies, all of them by default."""
    height, width = x.shape[-2:]
    return cosines(height, x)[:rows] @ x @ cosines(width, x)[:columns].mT


def idct2(x: Tensor, height: int, width: int) -> Tensor:
    """The maps `[…, height, width]` whose lowest frequencies are `[…, rows, columns]`, and whose others are 0."""
    rows, columns = x.shape[-2:]
    return cosines(height, x)[:rows].mT @ x @ cosines(width, x)[:columns]
