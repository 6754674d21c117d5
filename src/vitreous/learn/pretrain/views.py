"""Two large views of a picture and several small ones, drawn on tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.transform import preparation
from ...errors import VitreousError
from .encode import shape
from .patches import in_full

GREY = (0.299, 0.587, 0.114)


@in_full
def cropped(images: Tensor, side: tuple[int, int], share: tuple[float, float]) -> Tensor:
    """`[B, C, *side]`: of each image a part of that share, of an aspect from ¾ to 4⁄3, perhaps mirrored; bilinear."""
    b = len(images)
    area = torch.empty(b).uniform_(*share)
    aspect = torch.empty(b).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    wide, tall = ((area * a).sqrt().clamp(max=1) for a in (aspect, 1 / aspect))
    mirrored = torch.where(torch.rand(b) < 0.5, -1.0, 1.0)
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = wide * mirrored, tall
    theta[:, 0, 2], theta[:, 1, 2] = (torch.rand(b) * 2 - 1) * (1 - wide), (torch.rand(b) * 2 - 1) * (1 - tall)
    grid = F.affine_grid(theta.to(images), [b, images.shape[1], *side], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border")


@in_full
def coloured(
    images: Tensor, mean: Tensor, std: Tensor, strength: float, blur: float, solarise: float, grey: float = 0.2
) -> Tensor:
    """Brightness, contrast and saturation changed by up to `strength` (with probability 0.8), greyed, blurred and solarised with
    these probabilities; of normalised images `[B, C, H, W]`. Colour is changed of three channels only."""
    x, b = images * std + mean, len(images)
    some = lambda p: (torch.rand(b) < p).view(-1, 1, 1, 1).to(x.device)
    factor = lambda: torch.empty(b, 1, 1, 1).uniform_(1 - strength, 1 + strength).to(x)
    jittered = x * factor()
    middle = jittered.mean((1, 2, 3), keepdim=True)
    jittered = (jittered - middle) * factor() + middle
    luma = None
    if x.shape[1] == 3:
        weights = x.new_tensor(GREY).view(1, 3, 1, 1)
        luma = (jittered * weights).sum(1, keepdim=True)
        jittered = luma + (jittered - luma) * factor()
    x = torch.where(some(0.8), jittered.clamp(0, 1), x)
    if x.shape[1] == 3:
        x = torch.where(some(grey), (x * x.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True).expand_as(x), x)
    if blur:
        sigma = float(torch.empty(()).uniform_(0.1, 2.0))
        at = torch.arange(-3, 4, device=x.device, dtype=x.dtype)
        line = (-at.square() / (2 * sigma**2)).exp()
        line = (line / line.sum()).expand(x.shape[1], 1, -1)
        soft = F.conv2d(F.pad(x, (3, 3, 3, 3), mode="replicate"), line[:, :, None], groups=x.shape[1])
        x = torch.where(some(blur), F.conv2d(soft, line[..., None], groups=x.shape[1]), x)
    x = torch.where(some(solarise) & (x > 0.5), 1 - x, x)
    return (x - mean) / std


def multi_crop(model: nn.Module, images: Tensor, small: int, name: str) -> list[Tensor]:
    """Two large views `[B, C, H, W]` at the size of `images`, of a quarter of the picture and more, and `small` ones of 3/7 of
    its side, of 5 to 25 % (Caron et al., DINO), with the published strengths of colour, made of what the model takes."""
    s = shape(model, name)
    sides: Sequence[int] = [max(p * 2, round(3 / 7 * n / p) * p) for n, p in zip(images.shape[2:], s.patch, strict=True)]
    if small and any(a >= b for a, b in zip(sides, images.shape[2:], strict=True)):
        raise VitreousError(
            f"{name}: pictures of {images.shape[2]} × {images.shape[3]} have no room for small crops: give local=0"
        )
    config = preparation(model).config
    mean, std = (images.new_tensor(config[k]).view(-1, 1, 1) for k in ("mean", "std"))
    large = (images.shape[2], images.shape[3])
    views = [
        coloured(cropped(images, large, (0.25, 1.0)), mean, std, 0.4, 1.0, 0.0),
        coloured(cropped(images, large, (0.25, 1.0)), mean, std, 0.4, 0.1, 0.2),
    ]
    side = (sides[0], sides[1])
    return views + [coloured(cropped(images, side, (0.05, 0.25)), mean, std, 0.4, 0.5, 0.0) for _ in range(small)]
