"""Salient relevance: from single relevant pixels to the areas that a model attends to."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..relevance import Relevance
from ..score import Target
from .lrp import in_parts

SIDE = 48  # pixels of the longer side on which the areas are found
UNIT = 7  # pixels of the side of what is compared
SIMILAR = 64  # of the units most alike, K in the paper
NEAR = 3.0  # how much more alike near units must be, c in the paper
SCALES = (1.0, 0.8, 0.5, 0.3)
FOCUS = 0.8  # of the greatest saliency: what is above attracts its surroundings


def salient_relevance(model: nn.Module, x: Tensor, target: Target = None) -> Tensor:
    """Heatmaps `[B, h, w]`: the areas around what is relevant and unlike its surroundings, 0 to 1.

    Li, Tian, Mueller & Chen, "Beyond saliency: understanding convolutional neural networks from saliency prediction on
    layer-wise relevance propagation" (Image and Vision Computing 2019): the relevance of the pixels, as in `lrp`, is taken for
    a picture, and of that the saliency by Goferman, Zelnik-Manor & Tal, "Context-Aware Saliency Detection" (TPAMI 2012), eq. 1
    to 6 without face detection. A unit of 7 × 7 is salient when even the 64 units most alike, at three scales, differ from it;
    what lies near the foci counts more. Differences from the papers: the picture is at most 48 pixels wide and high, not
    250, and each scale's saliency is divided by its greatest before the foci are told.

    Takes vision transformers, where the paper has AlexNet and VGG-16. Arguments, cost (and some seconds for ten images) and
    errors as in `lrp`.
    """
    return in_parts(_salient, model, x, target, "see.salient_relevance")


def _salient(found: Relevance, grid: tuple[int, int]) -> Tensor:
    maps = found.pixels.float().sum(1, keepdim=True).relu()
    shrink = max(1.0, max(maps.shape[2:]) / SIDE)
    maps = F.adaptive_avg_pool2d(maps, (round(maps.shape[2] / shrink), round(maps.shape[3] / shrink)))
    maps = maps / maps.amax((1, 2, 3), keepdim=True).clamp_min(1e-30)
    return F.adaptive_avg_pool2d(torch.stack([context_aware(m) for m in maps]), grid)


def context_aware(picture: Tensor) -> Tensor:
    """The context-aware saliency `[h, w]`, 0 to 1, of a grey picture `[1, h, w]` of values 0 to 1."""
    h, w = picture.shape[1:]
    total = picture.new_zeros(h, w)
    for scale in SCALES:
        units, at = _units(picture, scale)
        others = [_units(picture, scale * part) for part in (1.0, 0.5, 0.25) if scale * part >= 0.2]
        there, their_at = (torch.cat(parts) for parts in zip(*others, strict=True))
        apart = torch.cdist(units, there) / UNIT / (1 + NEAR * torch.cdist(at, their_at))
        alike = apart.topk(min(SIMILAR + 1, len(there)), largest=False).values[:, 1:]  # the first is the unit itself
        salient = 1 - (-alike.mean(1)).exp()
        greatest = salient.max()
        foci = torch.cdist(at, at[salient >= FOCUS * greatest]).amin(1)
        salient = salient / greatest.clamp_min(1e-12) * (1 - foci / foci.max().clamp_min(1e-12))
        small = salient.view(1, 1, *_size(picture, scale))
        total += F.interpolate(small, (h, w), mode="bilinear", align_corners=False)[0, 0]
    return total / len(SCALES)


def _size(picture: Tensor, scale: float) -> tuple[int, int]:
    h, w = (max(1, round(s * scale)) for s in picture.shape[1:])
    return h, w


def _units(picture: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The units of a picture at a scale, `[n, 49]`, and where they are, `[n, 2]` in shares of the longer side."""
    h, w = _size(picture, scale)
    small = F.adaptive_avg_pool2d(picture[None], (h, w))
    padded = F.pad(small, [UNIT // 2] * 4, mode="replicate")
    rows, columns = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    at = torch.stack([rows * (picture.shape[1] / h), columns * (picture.shape[2] / w)], -1).flatten(0, 1)
    return F.unfold(padded, UNIT)[0].mT, at.to(picture) / max(picture.shape[1:])
