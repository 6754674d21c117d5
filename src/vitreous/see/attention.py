"""Attention as it is: one layer's map over the patches."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ..errors import VitreousError
from .look import Query, look


def attention(
    model: nn.Module,
    x: Tensor,
    layer: int | None = None,
    heads: Literal["mean"] | int = "mean",
    query: Query = "class",
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
    found = look(model, x, [-1 if layer is None else layer], "see.attention")
    if not found.layers:
        raise VitreousError(f"the attention of {type(model).__name__}'s layer {layer} was not seen: use see.grad_cam")
    maps, name = found.layers[-1].maps(query), found.layers[-1].name
    if heads == "mean":
        return maps.mean(1)
    if not -maps.shape[1] <= heads < maps.shape[1]:
        raise VitreousError(f"layer '{name}' has heads 0 to {maps.shape[1] - 1}, there is no head {heads}")
    return maps[:, heads]
