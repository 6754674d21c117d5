"""Pictures, clips and volumes as patches, and what is predicted of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import VitreousError

P = ParamSpec("P")
R = TypeVar("R")


def full(x: Tensor) -> Tensor:
    """Float32 of what is narrower."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def in_full(call: Callable[P, R]) -> Callable[P, R]:
    """Decorator: views, targets and losses are computed in float32 at least, whatever precision the engine runs the model in;
    the first tensor tells the device."""

    @wraps(call)
    def precisely(*given: P.args, **named: P.kwargs) -> R:
        wide = [full(t) if isinstance(t, Tensor) else t for t in given]
        device = next(t.device.type for t in given if isinstance(t, Tensor))
        with torch.autocast(device, enabled=False):
            return cast(Any, call)(*wide, **named)

    return precisely


def patchify(x: Tensor, patch: Sequence[int]) -> Tensor:
    """`[B, N, values]` of `[B, C, *sides]`: patches in the order of the axes, and inside of each so too, the channel last.

    Raises `VitreousError` where `patch` does not divide the sides.
    """
    b, c, *sides = x.shape
    if len(sides) != len(patch) or any(s % p for s, p in zip(sides, patch, strict=True)):
        said = [" × ".join(map(str, n)) for n in (sides, patch)]
        raise VitreousError(f"an input of {said[0]} cannot be cut into patches of {said[1]}: give one that they divide")
    n = len(patch)
    cut = x.reshape(b, c, *(v for s, p in zip(sides, patch, strict=True) for v in (s // p, p)))
    order = (0, *range(2, 2 + 2 * n, 2), *range(3, 3 + 2 * n, 2), 1)
    return cut.permute(order).reshape(b, math.prod(s // p for s, p in zip(sides, patch, strict=True)), -1)


def unpatchify(patches: Tensor, patch: Sequence[int], grid: Sequence[int]) -> Tensor:
    """`patchify`'s inverse: `[B, C, *sides]`."""
    n, b = len(patch), len(patches)
    cut = patches.reshape(b, *grid, *patch, -1)
    order = (0, 2 * n + 1, *(v for i in range(n) for v in (1 + i, 1 + n + i)))
    return cut.permute(order).reshape(b, -1, *(g * p for g, p in zip(grid, patch, strict=True)))


def normalised(target: Tensor) -> Tensor:
    """Patches `[B, N, values]` by their own mean and unbiased variance (He et al., "MAE", CVPR 2022); of one colour: zeros."""
    return (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()


def normalised_cubes(target: Tensor, channels: int) -> Tensor:
    """Each cube and channel of `[B, N, pixels · channels]` by its own, the 10⁻⁶ outside of the root (VideoMAE's)."""
    t = target.unflatten(-1, (-1, channels))
    return ((t - t.mean(-2, keepdim=True)) / (t.var(-2, keepdim=True).sqrt() + 1e-6)).flatten(-2)


def over_hidden(error: Tensor, mask: Tensor) -> Tensor:
    """Σ error · mask / Σ mask over the whole batch, of `[B, N]` each: an image that hides more counts more."""
    return (error * mask).sum() / mask.sum()


@in_full
def blurred(x: Tensor, side: int = 9, sigma: float = 1.0) -> Tensor:
    """`[B, C, H, W]` through a Gaussian of `side` × `side` pixels, zeros beyond the border."""
    at = torch.arange(side, dtype=x.dtype, device=x.device) - (side - 1) / 2
    wave = (-at.square() / (2 * sigma**2)).exp()
    kernel = (wave[:, None] * wave / (wave[:, None] * wave).sum()).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(x, kernel, padding=side // 2, groups=x.shape[1])


@in_full
def sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives along columns and rows, `[B, C, H, W]` each, by Sobel's 5 × 5; the border mirrors without its edge."""
    smooth, rise = (images.new_tensor(v) for v in ((1.0, 4, 6, 4, 1), (-1.0, -2, 0, 2, 1)))
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    kernels = [(a[:, None] * b).expand(images.shape[1], 1, 5, 5) for a, b in ((smooth, rise), (rise, smooth))]
    along, down = (F.conv2d(padded, k, groups=images.shape[1]) for k in kernels)
    return along, down


def gradients(images: Tensor) -> Tensor:
    """½ |∂x| + ½ |∂y| of images on a scale of 0 to 255, each saturated at 255 and the sum rounded to an integer (Uni4Eye)."""
    along, down = sobel(images)
    return (0.5 * along.abs().clamp(max=255) + 0.5 * down.abs().clamp(max=255)).round()
