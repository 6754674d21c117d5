"""Where tokens are: computed tables, and the size of images that a learned one is for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import VitreousError


def sinusoid(positions: int, channels: int) -> Tensor:
    """`[1, positions, channels]`: sin and cos in turn, of the position over 10000**(2i / channels).

    Vaswani et al., "Attention Is All You Need" (NeurIPS 2017), section 3.5; computed in double precision.
    """
    i = torch.arange(channels, dtype=torch.float64)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (i // 2) / channels)
    return torch.where(i % 2 == 0, angles.sin(), angles.cos()).float()[None]


def require_size(x: Tensor, size: tuple[int, int], model: str) -> None:
    """Raise VitreousError unless the images `[B, C, H, W]` have the `size` that the model's positions are for."""
    if (x.shape[2], x.shape[3]) != size:
        raise VitreousError(
            f"{model} has positions for images of {size[0]} × {size[1]}, not {x.shape[2]} × {x.shape[3]}: "
            "create it with img_size set to the size of your images"
        )


def patch_grid(size: tuple[int, int], side: int, model: str) -> tuple[int, int]:
    """Rows and columns of patches `side` pixels wide in images of `size`. Raises VitreousError where they do not fit."""
    if any(pixels % side for pixels in size):
        raise VitreousError(f"{model}: img_size {size[0]} × {size[1]} does not divide into patches of {side} pixels")
    return size[0] // side, size[1] // side


def resample_position(table: Tensor, h: int, w: int) -> Tensor:
    """A square table `[1, side · side, C]` for a grid of `h × w` tokens, `[1, h · w, C]`, as DINO does it.

    Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021). Bicubic, by factors of a tenth of a
    token more than the grids have, so that rounding takes none away; the table of the same grid is resampled a little, too.
    """
    side = round(table.shape[1] ** 0.5)
    rows, columns = (bicubic(n, side, side / (n + 0.1)).to(table) for n in (h, w))
    square = table.unflatten(1, (side, side))
    return torch.einsum("hi,bijc,wj->bhwc", rows, square, columns).flatten(1, 2)


def bicubic(n: int, side: int, step: float) -> Tensor:
    """The matrix `[n, side]` by which bicubic interpolation, `step` apart, makes n values of `side`.

    Products with it are `F.interpolate(..., mode="bicubic")`. As an operator ONNX Runtime and OpenVINO leave it out where the
    grid keeps its size, whatever the step.
    """
    at = (torch.arange(n) + 0.5) * step - 0.5
    first, a, found = at.floor(), -0.75, torch.zeros(n, side)
    for tap in range(-1, 3):
        d = (at - first - tap).abs()
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        where = (first + tap).clamp(0, side - 1)[:, None] == torch.arange(side)
        found = found + torch.where(d <= 1, near, far)[:, None] * where
    return found
