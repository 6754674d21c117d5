"""Gradient rollout: attention multiplied through the layers, each weighted by what it does for a class."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..blocks import traced
from ..errors import VitreousError
from ..glass import glass
from ..relevance import explained
from .patches import grid_of, run, still
from .rollout import multiply


def grad_rollout(model: nn.Module, x: Tensor, target: int | Tensor | None = None, discard: float = 0.0) -> Tensor:
    """Heatmaps `[B, h, w]`: rollout that follows only the attention which raises the score of the target class.

    As `rollout`, with the positive part of attention times its gradient, averaged over heads, in place of the attention.
    After vit-explain (Gildenblat 2020), which takes the gradients of the scores before the softmax, last layer first, beside
    attentions first layer first, and divides columns by the sums of rows; here the gradients are those of the probabilities in
    the order of the layers, and rows are divided by their own sums, as Abnar & Zuidema (2020) do. Gradients weigh against the
    identity of the residual, so the map depends on the scale of the scores.

    Args:
        x: images `[B, C, H, W]`. All maps and their gradients are kept at once: some hundred megabytes an image in a ViT-S.
        target: class index for all images, or `[B]`; the predicted class by default. A model without a classifier is
            explained by the squared norm of its features.
        discard: as in `rollout`, of the weighted attention.

    Raises `VitreousError` for unknown targets, and where `rollout` does.
    """
    anatomy, grid = grid_of(model, x, "see.grad_rollout")
    with torch.inference_mode(False), torch.enable_grad(), still(model), traced(model) as trace, glass(model, grad=True) as g:
        out = run(model, x.detach().clone().requires_grad_())
        score, _ = explained(getattr(out, "logits", out), target, anatomy)
        # nn.MultiheadAttention tells of its probabilities by a view that its output does not pass through.
        used = [a if a._base is None else a._base for a in g.attention]
        if not used or not score.requires_grad:
            raise VitreousError(f"no attention of {anatomy.kind} was seen on the way to its scores: use see.grad_cam")
        slopes = torch.autograd.grad(score.sum(), used, materialize_grads=True)
    with torch.no_grad():
        weighted = [(s.view_as(a) * a).float() for s, a in zip(slopes, g.attention, strict=True)]
        layers = [(v.name, a.mean(1).relu()) for v, a in zip(g.views, weighted, strict=True)]
        return multiply(x, layers, trace, anatomy, grid, discard, "see.grad_rollout")
