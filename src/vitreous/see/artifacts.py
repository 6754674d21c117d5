"""Artifacts: tokens of outlying norm, and tokens that draw attention whatever they show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import VitreousError
from .patches import grid_of, on_grid, places
from .stream import Images, Means, batches, heads_seen, interval, side_by_side, tell

TIMES_MEDIAN = 3.0
SINK = 10.0
BY_LAYER = ("outliers", "median_norm", "largest_norm")
BY_HEAD = ("sinks", "on_sinks", "on_prefix")


@dataclass(frozen=True)
class Artifacts:
    """High-norm outlier tokens by layer, and attention sinks by layer and head; means over images, NaN for absent heads."""

    images: int
    grid: tuple[int, int]
    layers: tuple[str, ...]
    """Dotted names of the attention modules."""
    norms: np.ndarray
    """`[3, layers]`: the share of patch tokens that are outliers after the block; the median and the largest norm of a patch."""
    norms_low: np.ndarray
    norms_high: np.ndarray
    where: np.ndarray
    """`[layers, h, w]`: the share of images in which that patch is an outlier."""
    sinks: np.ndarray
    """`[3, layers, heads]`: sinks an image; share of all attention that goes to them; share that goes to prefix tokens."""
    sinks_low: np.ndarray
    sinks_high: np.ndarray
    drawn: tuple[np.ndarray, np.ndarray] = field(repr=False)
    """The resamples behind the intervals of `norms` and `sinks`, with which `versus` compares."""

    def rows(self) -> list[dict[str, Any]]:
        """One row a head, with what its layer's tokens are."""
        rows = []
        for layer, head in np.argwhere(~np.isnan(self.sinks[0])):
            row: dict[str, Any] = {"layer": int(layer), "name": self.layers[layer], "head": int(head)}
            for name, values, low, high in (
                *zip(BY_LAYER, self.norms[:, layer], self.norms_low[:, layer], self.norms_high[:, layer]),
                *zip(BY_HEAD, self.sinks[:, layer, head], self.sinks_low[:, layer, head], self.sinks_high[:, layer, head]),
            ):
                row |= {name: float(values), f"{name}_low": float(low), f"{name}_high": float(high)}
            rows.append(row)
        return rows

    def versus(self, other: Artifacts) -> list[dict[str, Any]]:
        """What changes from this model to `other` on the same images, such as one with registers: one row a layer.

        The measures of both (those of heads as the layer's mean), and `other`'s minus this one's with its paired interval.
        Raises `VitreousError` when the layers or the numbers of images differ.
        """
        if len(self.layers) != len(other.layers) or self.images != other.images:
            raise VitreousError(
                f"artifacts of {len(self.layers)} layers on {self.images} images cannot be set against those of "
                f"{len(other.layers)} layers on {other.images}: compare models of one depth on the same images"
            )
        (norms, sinks), (norms_, sinks_) = self.drawn, other.drawn
        low, high = interval(np.concatenate([norms_ - norms, np.nanmean(sinks_, -1) - np.nanmean(sinks, -1)], 1))
        mine = np.concatenate([self.norms, np.nanmean(self.sinks, -1)])
        others = np.concatenate([other.norms, np.nanmean(other.sinks, -1)])
        return [
            {"layer": layer}
            | {
                f"{name}{end}": float(v)
                for m, name in enumerate((*BY_LAYER, *BY_HEAD))
                for end, v in (
                    ("", mine[m, layer]), ("_other", others[m, layer]), ("_change", others[m, layer] - mine[m, layer]),
                    ("_change_low", low[m, layer]), ("_change_high", high[m, layer]),
                )
            }
            for layer in range(len(self.layers))
        ]  # fmt: skip


def artifacts(model: nn.Module, images: Images, cutoff: float | None = None, batch: int = 16, seed: int = 0) -> Artifacts:
    """Outlier tokens and attention sinks of a model over a data set.

    *Outliers*: Darcet et al., "Vision Transformers Need Registers" (2024), section 2.1: patch tokens whose norm is above a
    cutoff. The paper reads a cutoff off the histogram of one model (150 for a DINOv2); norms of other models and layers have
    other scales, so here it is by default 3 times the median norm of the image's patches after that block. The stream after
    each block is measured, before any final norm.

    *Sinks*: tokens that receive more than 10 times the share 1 / T of a head's attention that each of T tokens would have of a
    uniform head, averaged over all queries. Prefix tokens can be sinks. (Below 11 tokens there can be none.)

    In slimmed models each patch is measured by the token that it is part of, and not at all once it is given up.

    Args:
        images: `[N, C, H, W]`, or a data set of `vt.data`.
        cutoff: a norm above which a token is an outlier, the same for all layers, as in the paper.

    Raises `VitreousError` for a model without one grid of patches, or a layer that does not attend over all of it.
    """
    if cutoff is not None and not cutoff > 0:
        raise VitreousError(f"cutoff must be a norm above 0, not {cutoff}")
    of_norms, of_places, of_sinks = Means(seed), Means(seed), Means(seed)
    anatomy = grid = None
    for x, _ in batches(images, None, batch, model):
        if anatomy is None or grid is None:
            anatomy, grid = grid_of(model, x[:1], "see.artifacts")
        prefix, order = anatomy.prefix, [b.name for b in anatomy.blocks]

        def note(a: Tensor, asks: Tensor, prefix: int = prefix) -> Tensor:
            received = a.sum(2) / asks.sum(1)[:, None, None]  # [B, heads, T]: each query pays 1 in all
            sink = received > SINK / received.shape[-1]
            return torch.stack([sink.float().sum(-1), (received * sink).sum(-1), received[..., :prefix].sum(-1)], -1)

        heads, streams, trace = heads_seen(model, x, anatomy, grid, note, record=("block",))
        of_sinks.add(side_by_side(heads))
        norms, spots = [], []
        for i, stream in enumerate(streams):
            done = [r for r in trace if order.index(r.layer) <= i]
            at = places(done, x, prefix + grid[0] * grid[1])[-1][:, prefix:]
            norm = stream.float().norm(dim=-1).gather(1, at.clamp_min(0)).masked_fill(at < 0, torch.nan)
            median = norm.nanmedian(1, keepdim=True).values
            out = (norm > (TIMES_MEDIAN * median if cutoff is None else cutoff)).float()
            share = out.sum(1) / (at >= 0).sum(1)
            norms.append(torch.stack([share, median[:, 0], norm.nan_to_num(0.0).amax(1)], 1))
            spots.append(on_grid(out, grid))
        of_norms.add(torch.stack(norms, 2))
        of_places.add(torch.stack(spots, 1))
        tell(of_norms.n, images)
    assert anatomy is not None and grid is not None
    drawn = of_norms.resamples(), np.moveaxis(of_sinks.resamples(), -1, 1)
    return Artifacts(
        of_norms.n, grid, tuple(b.attention.name for b in anatomy.blocks),
        of_norms.mean(), *interval(drawn[0]), of_places.mean(),
        np.moveaxis(of_sinks.mean(), -1, 0), *interval(drawn[1]), drawn,
    )  # fmt: skip
