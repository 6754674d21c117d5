"""How far heads look: attention by distance, head by head and layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor, nn

from .patches import grid_of
from .stream import Images, Means, batches, heads_seen, interval, side_by_side, tell

MEASURES = ("distance", "entropy", "prefix")


@dataclass(frozen=True)
class AttentionDistance:
    """Attention of patches by distance, means over images and querying patches; NaN for heads that a layer does not have."""

    images: int
    grid: tuple[int, int]
    layers: tuple[str, ...]
    hops: np.ndarray
    """`[layers, heads, K + 1]`: the share of attention among patches that goes k hops away; k = 0 is the patch itself."""
    uniform: np.ndarray
    """`[K + 1]`: the same for a head that attends to all patches alike."""
    measures: np.ndarray
    """`[3, layers, heads]`: mean attention distance in pixels, entropy in nats, share on prefix tokens."""
    low: np.ndarray
    high: np.ndarray
    by_layer: np.ndarray
    """`[3, layers]`: the same, averaged over the heads of a layer, and its 95 % interval."""
    by_layer_low: np.ndarray
    by_layer_high: np.ndarray
    trend: np.ndarray
    """`[3, 3]`: Spearman's correlation of a layer's number with each measure of its heads, and its 95 % interval over images."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a head: layer, head, each measure with the ends of its interval, and the share at each number of hops."""
        rows = []
        for layer, head in np.argwhere(~np.isnan(self.measures[0])):
            row: dict[str, Any] = {"layer": int(layer), "name": self.layers[layer], "head": int(head)}
            for m, measure in enumerate(MEASURES):
                row[measure] = float(self.measures[m, layer, head])
                row[f"{measure}_low"] = float(self.low[m, layer, head])
                row[f"{measure}_high"] = float(self.high[m, layer, head])
            row |= {f"hops_{k}": float(share) for k, share in enumerate(self.hops[layer, head])}
            rows.append(row)
        return rows


def distance(model: nn.Module, images: Images, batch: int = 16, seed: int = 0) -> AttentionDistance:
    """For every head how its attention falls with distance on the grid of patches, over a data set.

    - The *k-hop profile*: after "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt" (Li et al., 2023).
      Hops are rings around the querying patch (Chebyshev distance, so the eight neighbours are one hop away).
    - The *mean attention distance* in pixels of the input: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), figure 7:
      distances between the centres of patches, weighted by attention.
    - Both among patches alone: each patch's attention to patches is first made to sum to 1. What it pays to the class and
      other prefix tokens is `prefix`; `entropy` is that of its whole attention.

    Prefix tokens ask nothing here. In slimmed models a patch asks as the token that it is part of, and none once it is given up.

    Args:
        images: `[N, C, H, W]`, or a data set of `vt.data`.

    Raises `VitreousError` for a model without one grid of patches, or a layer that does not attend over all of it.
    """
    means = Means(seed)
    anatomy = grid = rings = away = None
    for x, _ in batches(images, None, batch, model):
        if anatomy is None or grid is None or rings is None or away is None:
            anatomy, grid = grid_of(model, x[:1], "see.distance")
            rings, away = hops_and_pixels(grid, (x.shape[-2] / grid[0], x.shape[-1] / grid[1]))
            rings, away = rings.to(x.device), away.to(x.device)
        weights = torch.cat([torch.eye(int(rings.max()) + 1, device=x.device)[rings], away[..., None]], -1).flatten(0, 1)
        prefix = anatomy.prefix

        def note(a: Tensor, asks: Tensor, weights: Tensor = weights, prefix: int = prefix) -> Tensor:
            asking = asks[:, prefix:].float()
            rows = a[:, :, prefix:]
            among = rows[..., prefix:]
            among = among / among.sum(-1, keepdim=True).clamp_min(1e-12)  # 0 where a patch was given up
            count = asking.sum(1)[:, None]
            profile = among.flatten(2) @ weights / count[..., None]
            entropy = torch.special.entr(rows).sum((2, 3)) / count
            on_prefix = rows[..., :prefix].sum((2, 3)) / count
            return torch.cat([profile, entropy[..., None], on_prefix[..., None]], -1)

        found, _, _ = heads_seen(model, x, anatomy, grid, note)
        means.add(side_by_side(found))
        tell(means.n, images)
    assert anatomy is not None and grid is not None and rings is not None
    values, drawn = means.mean(), means.resamples()
    measures, drawn = np.moveaxis(values[..., -3:], -1, 0), np.moveaxis(drawn[..., -3:], -1, 1)
    low, high = interval(drawn)
    by_layer = np.nanmean(drawn, -1)
    return AttentionDistance(
        means.n, grid, tuple(b.attention.name for b in anatomy.blocks),
        values[..., :-3], np.bincount(rings.cpu().numpy().ravel()) / rings.numel(),
        measures, low, high, np.nanmean(measures, -1), *interval(by_layer),
        np.stack([_trend(measures[None])[0], *interval(_trend(drawn))], 1),
    )  # fmt: skip


def hops_and_pixels(grid: tuple[int, int], patch: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """For every pair of patches, row by row, `[h·w, h·w]`: the hops between them, and the pixels between their centres."""
    at = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).view(-1, 2)
    apart = (at[:, None] - at[None]).abs()
    return apart.amax(-1), (apart * torch.tensor(patch, dtype=torch.float32)).norm(dim=-1)


def _trend(measures: np.ndarray) -> np.ndarray:
    """Spearman's correlation `[n, 3]` of the layer's number with `[n, 3, layers, heads]`; NaN where either is constant."""
    exist = ~np.isnan(measures[0, 0])
    ranks = scipy.stats.rankdata(measures[..., exist], axis=-1)
    number = scipy.stats.rankdata(np.nonzero(exist)[0])
    ranks, number = ranks - ranks.mean(-1, keepdims=True), number - number.mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        return ranks @ number / np.sqrt((ranks**2).sum(-1) * (number**2).sum())
