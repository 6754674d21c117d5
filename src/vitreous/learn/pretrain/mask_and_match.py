"""Mask & Match: features that agree as a whole and place by place, and attention that finds the ink under more and more masks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import VitreousError
from ..objective import Batch, Now, Objective, Seen, objective, positive, share
from .encode import patch_tokens, shape
from .patches import in_full


@in_full
def info_nce(a: Tensor, b: Tensor, tau: float) -> Tensor:
    """Cross-entropy of matching rows `[M, D]` among all, by cosine / tau."""
    scores = F.normalize(a, dim=1) @ F.normalize(b, dim=1).mT / tau
    return F.cross_entropy(scores, torch.arange(len(a), device=a.device))


@in_full
def tilted(images: Tensor, most: float = 0.15) -> tuple[Tensor, Tensor]:
    """Images under a mild affine map each, and the map `[B, 2, 3]` from places in the output to the input, in [−1, 1]."""
    b = len(images)
    angle, scale = (torch.empty(b).uniform_(-most, most) for _ in range(2))
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = (1 + scale) * angle.cos()
    theta[:, 0, 1], theta[:, 1, 0] = -angle.sin(), angle.sin()
    theta[:, :, 2] = torch.empty(b, 2).uniform_(-most, most)
    theta = theta.to(images)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False, padding_mode="border"), theta


@objective
@dataclass(frozen=True)
class MaskAndMatch(Objective):
    """Mitra, Chakraborty, Sahu, "Mask & Match: Learning to Recognize Handwritten Math with Self-Supervised Attention" (2025).

    **No code, equation or table was to be had; beyond the abstract all is ours.** The abstract: a global and a local contrastive
    loss, then a self-supervised attention network under progressively more masking. Here in one run: InfoNCE of the mean patch
    tokens of two tilted views; InfoNCE of patch tokens with those at the matching place of the other view, other places and
    images as negatives; and a map of attention, one layer on the tokens, so that the attended mean of a masked picture matches
    that of the whole one, while the share that is masked grows from `first` to `last`. The map is kept to `budget` on average,
    and smooth. The decoder to LaTeX is not part of it.
    """

    wants = ()
    whole_batch: ClassVar[bool] = True
    tau: float = 0.1
    first: float = 0.1
    last: float = 0.6
    budget: float = 0.3

    def __post_init__(self) -> None:
        share(self, "first", "last", "budget")
        positive(self, "tau")
        if max(self.first, self.last) == 1:
            raise VitreousError("MaskAndMatch: a mask of 1 leaves nothing to see")

    def parts(self, model: nn.Module) -> nn.Module:
        return nn.ModuleDict({"attention": nn.Linear(shape(model, "MaskAndMatch").width, 1)})

    def masked(self, now: Now) -> float:
        """The share that is hidden at this point of the run."""
        return self.first + (self.last - self.first) * now.share

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        parts: Any = now.parts
        model, images, s = now.model, batch.images, shape(now.model, "MaskAndMatch")
        grid = (images.shape[2] // s.stride, images.shape[3] // s.stride)
        view, theta = tilted(images)
        whole, other = patch_tokens(model, images), patch_tokens(model, view)
        at = F.affine_grid(theta, [len(images), 1, *grid], align_corners=False)
        there = F.grid_sample(whole.mT.unflatten(2, grid), at, align_corners=False).flatten(2).mT
        inside = (at.abs() < 1).all(-1).flatten(1)
        few = inside.flatten().nonzero()[:, 0]
        few = few[torch.randperm(len(few))[:256]]
        found = {"global": info_nce(whole.mean(1), other.mean(1), self.tau)}
        if len(few) > 1:
            found["local"] = info_nce(other.flatten(0, 1)[few], there.flatten(0, 1)[few], self.tau)

        hidden = torch.rand(len(images), 1, *grid).flatten(1).argsort(1) < math.floor(self.masked(now) * grid[0] * grid[1])
        cover = hidden.view(-1, 1, *grid).repeat_interleave(s.stride, 2).repeat_interleave(s.stride, 3).to(images.device)
        dimmed = patch_tokens(model, torch.where(cover, images.mean((2, 3), keepdim=True), images))
        attention = parts["attention"](dimmed).sigmoid()
        ours = (attention * dimmed).sum(1) / attention.sum(1)
        found["match"] = 1 - F.cosine_similarity(ours, whole.mean(1).detach(), dim=1).mean()
        maps = attention.mT.unflatten(2, grid)
        rough = maps.diff(dim=2).abs().mean() + maps.diff(dim=3).abs().mean() if min(grid) > 1 else maps.new_zeros(())
        found["budget"] = (attention.mean() - self.budget).square() + 0.1 * rough
        return found
