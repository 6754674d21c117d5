"""Token survival: which patches a slimmed model still tells apart."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..blocks import traced
from ..copies.own import run, still
from .patches import grid_of, on_grid, places


def survival(model: nn.Module, x: Tensor) -> list[tuple[str, np.ndarray]]:
    """For each layer that shortens the sequence: its name, and `[B, h, w]` int64, the token that each patch is then in.

    Patches that share a number were merged; -1 stands for those that were dropped or fused into the token of the rest.
    Empty for a model that keeps all its tokens. Raises `VitreousError` for a model without one grid of patches.
    """
    anatomy, (h, w) = grid_of(model, x, "see.survival")
    with torch.no_grad(), still(model) as own, traced(own) as trace:
        run(own, x)
    after = places(trace, x, anatomy.prefix + h * w)[1:]
    return [(r.layer, on_grid(p, (h, w)).cpu().numpy()) for r, p in zip(trace, after, strict=True)]
