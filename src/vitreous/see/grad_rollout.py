"""Gradient rollout: attention multiplied through the layers, each weighted by what it does for a class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..blocks import traced
from ..copies.own import run, still
from ..errors import VitreousError
from ..glass import glass
from ..score import Target, criterion
from .patches import Reading, grid_of, parts
from .rollout import multiply


def grad_rollout(model: nn.Module, x: Tensor, target: Target = None, discard: float = 0.0) -> Tensor:
    """Heatmaps `[B, h, w]`: rollout that follows only the attention which raises the score of the target class.

    As `rollout`, with the positive part of attention times its gradient, averaged over heads, in place of the attention.
    After vit-explain (Gildenblat 2020), which takes the gradients of the scores before the softmax, last layer first, beside
    attentions first layer first, and divides columns by the sums of rows; here the gradients are those of the probabilities in
    the order of the layers, and rows are divided by their own sums, as Abnar & Zuidema (2020) do. Gradients weigh against the
    identity of the residual, so the map depends on the scale of the scores.

    Args:
        x: images `[B, C, H, W]`. All maps of one image and their gradients are kept at once.
        target: class index for all images, or one for each; the predicted class by default. Features are explained as
            `vitreous.score` tells.
        discard: as in `rollout`, of the weighted attention.

    Raises `VitreousError` for unknown targets, and where `rollout` does.
    """
    anatomy, grid = grid_of(model, x, "see.grad_rollout")
    explain, maps = criterion(model, x), []
    with torch.enable_grad(), still(model) as own:
        for part, wanted in parts(x, target, anatomy.prefix + grid[0] * grid[1]):
            with traced(own) as trace, glass(own, grad=True) as g, Reading(own, anatomy) as reading:
                out = run(own, part.detach().float().requires_grad_())
                score, _ = explain(out, wanted)
                used = g.attention
                if not used or not score.requires_grad:
                    raise VitreousError(f"no attention of {anatomy.kind} was seen on the way to its scores: use see.grad_cam")
                read = reading.groups(out)
                slopes = torch.autograd.grad(score.sum(), used, materialize_grads=True)
            with torch.no_grad():
                weighted = [(v.name, (s * a).float().mean(1).relu()) for v, s, a in zip(g.views, slopes, used, strict=True)]
                maps.append(multiply(part, weighted, trace, anatomy, grid, read, discard, "see.grad_rollout"))
    return torch.cat(maps)
