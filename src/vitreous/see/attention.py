"""Attention as it is: one layer's map over the patches."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..blocks import traced
from ..errors import VitreousError
from ..glass import glass
from .patches import before, class_row, grid_of, on_grid, places, run, shares, still


def attention(
    model: nn.Module,
    x: Tensor,
    layer: int | None = None,
    heads: Literal["mean"] | int = "mean",
    query: Literal["class"] | int = "class",
) -> Tensor:
    """Heatmaps `[B, h, w]`: the attention that one token pays to the patches in one layer.

    By default that of the class token in the last attention layer, averaged over heads: Caron et al., "Emerging
    Properties in Self-Supervised Vision Transformers" (2021), figure 1. A model that does not read its class token
    (average or attention pooling) is shown by the mean over all patches' queries, or over its pooling queries.

    In a model slimmed by token steps, a token's attention is divided among the patches in it by their shares, so that
    the sum stays; what was dropped gets 0.

    Args:
        x: images `[B, C, H, W]`.
        layer: number of the attention layer, negative from the end.
        heads: "mean", or the number of one head.
        query: "class", or the number of a patch, row by row. A patch that was given up on the way asks nothing: its map
            is 0.

    Raises `VitreousError` for unknown layers, heads or patches, and for layers that do not attend over the whole grid
    (windows).
    """
    anatomy, (h, w) = grid_of(model, x, "see.attention")
    with (
        torch.no_grad(),
        still(model),
        traced(model) as trace,
        glass(model, layers=[-1 if layer is None else layer]) as g,
    ):
        run(model, x)
    if not g.attention or g.attention[-1].ndim != 4:
        raise VitreousError(f"the attention of {anatomy.kind}'s layer {layer} was not seen: use see.grad_cam")
    name, a = g.views[-1].name, g.attention[-1].float()
    done = before(trace, anatomy, next((b.name for b in anatomy.blocks if b.attention.name == name), name))
    # The class token of CaiT is no prefix: it joins the patches after their blocks.
    prefix = anatomy.prefix if done else a.shape[3] - h * w
    left = done[-1].tokens if done else prefix + h * w
    whole = len(a) == len(x) and a.shape[3] == left and a.shape[2] in (1, left)
    if not whole or prefix not in (anatomy.prefix, int(anatomy.class_token)):
        raise VitreousError(
            f"layer '{name}' of {anatomy.kind} attends over {a.shape[3]} tokens (windows, pooling or channels), "
            f"not over its {h} × {w} patches: use see.grad_cam"
        )
    if heads != "mean" and not -a.shape[1] <= heads < a.shape[1]:
        raise VitreousError(f"layer '{name}' has heads 0 to {a.shape[1] - 1}, there is no head {heads}")
    a = a.mean(1) if heads == "mean" else a[:, heads]  # [B, queries, tokens]
    pooling = a.shape[1] < left
    if query == "class":
        row = a[:, 0] if class_row(anatomy) or pooling else a[:, prefix:].mean(1)
    elif pooling or not 0 <= query < h * w:
        raise VitreousError(f"layer '{name}' has no query {query}: choose 'class' or, in a block, 0 to {h * w - 1}")
    else:
        at = places(done, x, prefix + h * w)[-1][:, prefix + query]
        row = a[torch.arange(len(a)), at.clamp_min(0)] * (at >= 0)[:, None]
    return on_grid((row[:, None] @ shares(done, row, prefix + h * w))[:, 0], (h, w))
