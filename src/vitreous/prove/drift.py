"""Attention drift: how far a slimmed model's explanation moved from the original's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from torch import Tensor, nn

from ..errors import VitreousError
from .statistics import Interval, bootstrap_mean
from .subject import Model

Explain = Callable[[nn.Module, Tensor], Tensor]
CHUNK = 16


@dataclass(frozen=True)
class Drift:
    """Distance between the heatmaps of a model and of the reference, over `images` images."""

    images: int
    total_variation: Interval
    """Mean share of the attention that lies elsewhere, 0 (same place) to 1 (nowhere in common)."""
    rank_correlation: Interval | None
    """Mean Spearman correlation of the patches' ranks; None where a heatmap is constant, which has no ranks."""
    samples: list[float]
    """Total variation of each image."""


def total_variation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Total variation distance `[B]` between heatmaps `[B, h, w]` ≥ 0, each first made to sum to 1."""
    return np.abs(as_shares(a) - as_shares(b)).sum((1, 2)) / 2


def as_shares(maps: np.ndarray) -> np.ndarray:
    """Heatmaps `[B, h, w]` made to sum to 1; one that is zero everywhere says nothing, so it becomes uniform."""
    maps = np.asarray(maps, float)
    sums = maps.sum((1, 2), keepdims=True)
    return np.where(sums > 0, maps / np.where(sums > 0, sums, 1), 1 / (maps.shape[1] * maps.shape[2]))


def drifts(
    models: Mapping[str, Model],
    images: Tensor,
    explain: Explain | None = None,
    seed: int = 0,
    tick: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Drift | str]:
    """For each model but the first (the reference) its `Drift`, or in a sentence why there is none.

    `explain` takes a model and images `[B, C, H, W]` and gives heatmaps `[B, h, w]`; the default is attention rollout.
    """
    if explain is None:
        from ..see import rollout  # here, so that proving needs nothing of `see` when it is given an explain

        explain = rollout
    maps: dict[str, np.ndarray | str] = {}
    for i, (name, model) in enumerate(models.items()):
        try:
            maps[name] = _heatmaps(model, images, explain)
        except VitreousError as error:
            maps[name] = str(error)
        tick((i + 1) / len(models))
    (reference, before), *others = maps.items()
    return {name: _compare(reference, before, after, seed) for name, after in others}


def _heatmaps(model: Model, images: Tensor, explain: Explain) -> np.ndarray:
    if not isinstance(model, nn.Module):
        raise VitreousError("a shipped file has no attention to look into")
    images = images.to(next((p.device for p in model.parameters()), images.device))
    found = torch.cat([explain(model, x).detach().float().cpu() for x in images.split(CHUNK)]).numpy()
    if not np.isfinite(found).all() or (found < 0).any():
        raise VitreousError("the explanation has negative or non-finite values")
    return found


def _compare(reference: str, before: np.ndarray | str, after: np.ndarray | str, seed: int) -> Drift | str:
    if isinstance(before, str):
        return f"{reference}: {before}"
    if isinstance(after, str):
        return after
    if before.shape != after.shape:
        return f"heatmaps of {list(after.shape[1:])} patches cannot be compared with {list(before.shape[1:])}"
    moved = total_variation(before, after)
    flat = zip(before.reshape(len(before), -1), after.reshape(len(after), -1), strict=True)
    rank = scipy.stats.rankdata
    ranks = [float(np.corrcoef(rank(b), rank(a))[0, 1]) if np.ptp(b) and np.ptp(a) else np.nan for b, a in flat]
    known = np.array(ranks)[~np.isnan(ranks)]
    return Drift(
        images=len(moved),
        total_variation=bootstrap_mean(moved, seed),
        rank_correlation=bootstrap_mean(known, seed) if len(known) else None,
        samples=moved.tolist(),
    )
