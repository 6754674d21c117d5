"""Patch Mixing: patches of one picture in another, to train for occlusion and to measure it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import VitreousError
from ..score import two


def replace_patches(images: Tensor, others: Tensor, share: float | Tensor, grid: int) -> tuple[Tensor, Tensor]:
    """`images [B, C, H, W]` with ⌊share · grid²⌉ of their `grid` × `grid` patches, drawn for each, taken from `others` at the
    same place; and the share really replaced, `[B]`. The grid need not be that of the model's patches."""
    b, _, h, w = images.shape
    n = grid * grid
    count = (torch.as_tensor(share, dtype=torch.float64).expand(b) * n).round().long()
    rank = torch.rand(b, n).argsort(1).argsort(1)
    mask = (rank < count[:, None]).view(b, 1, grid, grid).to(images.device, images.dtype)
    mask = F.interpolate(mask, size=(h, w), mode="nearest-exact")
    return torch.where(mask > 0, others, images), (count / n).to(images)


@dataclass(frozen=True)
class PatchMixing:
    """Lee et al., "Hardwiring ViT Patch Selectivity into CNNs using Patch Mixing" (2023): `train(…, mix=PatchMixing())`.

    With probability `probability` a batch is mixed with itself rolled by one: x̃ = (1 − M) x_A + M x_B, M constant on patches, and
    y = (1 − r) y_A + r y_B with the share r that was really replaced. r comes from Beta(α, α) for each image; how the paper draws
    it and how often it mixes is not published.
    """

    classes: int
    grid: int = 7
    alpha: float = 1.0
    probability: float = 0.5

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if len(images) < 2:
            raise VitreousError("PatchMixing needs at least two images at once")
        y = F.one_hot(labels, self.classes).float() if labels.ndim == 1 else labels
        if torch.rand(()) >= self.probability:
            return images, y
        share = torch.distributions.Beta(self.alpha, self.alpha).sample((len(images),))
        mixed, r = replace_patches(images, images.roll(1, 0), share, self.grid)
        return mixed, (1 - r[:, None]) * y + r[:, None] * y.roll(1, 0)


@torch.no_grad()
def replacement_curve(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, shares: Sequence[float], grid: int = 7, seed: int = 0
) -> list[float]:
    """Accuracy of `model` when a share of each picture's patches is another class's (the paper's patch replacement attack)."""
    found = []
    for share in shares:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            order = torch.randperm(len(images))
            partner = order.clone()
            for i, own in enumerate(order.tolist()):  # the next in a random order that is of another class
                later = (j for j in order.roll(-i).tolist() if labels[j] != labels[own])
                partner[own] = next(later, own)
            mixed, _ = replace_patches(images, images[partner], share, grid)
        right = [two(model(x)).argmax(1) == y for x, y in zip(mixed.split(64), labels.split(64), strict=True)]
        found.append(float(torch.cat(right).float().mean()))
    return found
