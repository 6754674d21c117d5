"""Layer-wise relevance propagation: how much of a class's score came through each patch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..copies.own import exact
from ..relevance import Relevance, relevance
from ..score import Target
from .patches import check_images, grid_of, on_grid, parts, per_patch

BATCH = 4  # images at a time at most: what a backward pass through a ViT-S keeps of an image is some hundred megabytes


def transformer_attribution(model: nn.Module, x: Tensor, target: Target = None, published: bool = False) -> Tensor:
    """Heatmaps `[B, h, w]`: attention rollout in which each attention counts by what it did for the class.

    Chefer, Gur & Wolf, "Transformer Interpretability Beyond Attention Visualization" (CVPR 2021), section 3.2: of each
    layer the positive part of gradient times relevance of its probabilities, averaged over heads, plus the identity, not
    normalised; the product over the layers, and of it the row of what the model reads: the class token, or the tokens by
    their relevance behind the last block where more than one is read (averaged patches, distillation token, pooling by
    attention). The relevance itself is told in `vitreous.relevance`, with the one rule that differs from the paper's.

    Args:
        x: images `[B, C, H, W]`.
        target: class index for all images, or one for each; the predicted class by default. Features are explained as
            `vitreous.score` tells.
        published: by the paper's own rule for what cancels, in float64: twice the memory.

    `benchmarks/see.py cost` counts its forward passes.

    Raises `VitreousError` for models whose blocks are not plain or shorten the sequence, and for unknown targets.
    """
    return in_parts(_attribution, model, x, target, "see.transformer_attribution", published)


def lrp(model: nn.Module, x: Tensor, target: Target = None, published: bool = False) -> Tensor:
    """Heatmaps `[B, h, w]`: the share of the class's score that came through the pixels of each patch.

    Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise Relevance Propagation" (2015),
    by the rules of Chefer, Gur & Wolf (CVPR 2021) as `vitreous.relevance` tells them. What is missing to 1 came through
    the prefix tokens and the position embedding. Where contributions cancel, the published rule gives another map than the
    stable one (`published`, see `docs/see.md`). Costs some five forward passes; arguments and errors as in
    `transformer_attribution`. For single pixels use `vitreous.relevance.relevance`.
    """
    return in_parts(_pixels, model, x, target, "see.lrp", published)


Map = Callable[[Relevance, tuple[int, int]], Tensor]


@exact
def in_parts(draw: Map, model: nn.Module, x: Tensor, target: Target, purpose: str, published: bool = False) -> Tensor:
    check_images(x)
    anatomy, grid = grid_of(model, x, purpose)
    found = []
    for part, wanted in parts(x, target, anatomy.prefix + grid[0] * grid[1], BATCH):
        found.append(draw(relevance(model, part, wanted, draw is _attribution, anatomy, published), grid))
    return torch.cat(found).to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _attribution(found: Relevance, grid: tuple[int, int]) -> Tensor:
    row = found.leaving[:, None]
    for name, r in reversed(found.attention.items()):
        if r.shape[-2] != r.shape[-1]:  # pooling by attention: `leaving` has it
            continue
        cam = (found.gradients[name] * r).relu().mean(1)
        row = row + row @ cam
    return on_grid(row[:, 0], grid)


def _pixels(found: Relevance, grid: tuple[int, int]) -> Tensor:
    return per_patch(found.pixels.sum(1), grid).relu()
