"""Layer-wise relevance propagation: how much of a class's score came through each patch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..relevance import Relevance, relevance
from .patches import check_images, grid_of, on_grid

BATCH = 4  # images at a time: what a backward pass through a ViT-S keeps of an image is some hundred megabytes


def transformer_attribution(model: nn.Module, x: Tensor, target: int | Tensor | None = None) -> Tensor:
    """Heatmaps `[B, h, w]`: attention rollout in which each attention counts by what it did for the class.

    Chefer, Gur & Wolf, "Transformer Interpretability Beyond Attention Visualization" (CVPR 2021), section 3.2: of each
    layer the positive part of gradient times relevance of its probabilities, averaged over heads, plus the identity, not
    normalised; the product over the layers, and of it the row of what the model reads: the class token, or the tokens by
    their relevance behind the last block where more than one is read (averaged patches, distillation token, pooling by
    attention). The relevance itself is told in `vitreous.relevance`, with the one rule that differs from the paper's.

    Args:
        x: images `[B, C, H, W]`.
        target: class index for all images, or `[B]`; the predicted class by default. A model without a classifier is
            explained by the squared norm of its features.

    `benchmarks/see.py cost` counts its forward passes.

    Raises `VitreousError` for models whose blocks are not plain or shorten the sequence, and for unknown targets.
    """
    return in_parts(_attribution, model, x, target, "see.transformer_attribution")


def lrp(model: nn.Module, x: Tensor, target: int | Tensor | None = None) -> Tensor:
    """Heatmaps `[B, h, w]`: the share of the class's score that came through the pixels of each patch.

    Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation" (2015),
    by the rules of Chefer, Gur & Wolf (CVPR 2021) as `vitreous.relevance` tells them. What is missing to 1 came through
    the prefix tokens and the position embedding. Costs some five forward passes; arguments and errors as in
    `transformer_attribution`. For single pixels use `vitreous.relevance.relevance`.
    """
    return in_parts(_pixels, model, x, target, "see.lrp")


Map = Callable[[Relevance, tuple[int, int]], Tensor]


def in_parts(draw: Map, model: nn.Module, x: Tensor, target: int | Tensor | None, purpose: str) -> Tensor:
    check_images(x)
    anatomy, grid = grid_of(model, x, purpose)
    parts, targets = x.split(BATCH), [target] * -(-len(x) // BATCH)
    if isinstance(target, Tensor) and target.ndim == 1:
        if len(target) != len(x):  # before it is cut: a part of it could fit a part of the images
            raise VitreousError(f"{purpose}: target must be one class or one for each of the {len(x)} images, not {len(target)}")
        targets = list(target.split(BATCH))
    each = zip(parts, targets, strict=True)
    found = (relevance(model, part, wanted, draw is _attribution, anatomy) for part, wanted in each)
    return torch.cat([draw(part, grid) for part in found])


def _attribution(found: Relevance, grid: tuple[int, int]) -> Tensor:
    row = found.leaving[:, None]
    for name, r in reversed(found.attention.items()):
        if r.shape[-2] != r.shape[-1]:  # pooling by attention: `leaving` has it
            continue
        cam = (found.gradients[name] * r).relu().mean(1)
        row = row + row @ cam
    return on_grid(row[:, 0], grid)


def _pixels(found: Relevance, grid: tuple[int, int]) -> Tensor:
    b, c, height, width = found.pixels.shape
    h, w = grid
    return found.pixels.reshape(b, c, h, height // h, w, width // w).sum((1, 3, 5)).relu()
