"""The sanity check of explanations: what is left of a heatmap when the model's weights are random?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from ..anatomy import read
from .statistics import Interval, bootstrap_mean

SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Stage:
    """The parameters are random from the top down to here."""

    name: str
    correlation: Interval
    """Mean Spearman correlation of the heatmaps with those of the whole model."""


def stages(
    model: nn.Module, explain: Callable[[nn.Module], np.ndarray], seed: int, tick: Callable[[float], None] = lambda share: None
) -> list[Stage]:
    """How alike the heatmaps `explain(model)` `[B, h, w]` stay while the model is randomised from the top.

    Adebayo et al., "Sanity Checks for Saliency Maps" (NeurIPS 2018), section 3, cascading: first the classifier, then the upper
    quarter of all parameters in the order in which the model holds them, half of them, three quarters, all. There layers
    are drawn anew as before training; what that was no finished model tells, so here the entries of every parameter are
    shuffled: its scale stays, what it has learned goes. A constant heatmap is like none: correlation 0.
    """
    before, found = explain(model), []
    for i, (name, random) in enumerate(randomised(model, seed)):
        found.append(Stage(name, bootstrap_mean(rank_correlation(before, explain(random)), seed)))
        tick((i + 1) / (len(SHARES) + 1))
    return found


def randomised(model: nn.Module, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """A copy of `model` whose parameters are shuffled further and further down, each time with the name of the stage."""
    copied = copy.deepcopy(model)
    parameters = list(copied.parameters())[::-1]
    head = read(model).classifier
    top = {id(p) for p in copied.get_submodule(head).parameters()} if head else set()
    parameters.sort(key=lambda p: id(p) not in top)  # stable: all others stay in their order
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for name, end in [("classifier", len(top)), *((f"{s:.0%}", round(s * len(parameters))) for s in SHARES)]:
        for p in parameters[done:end]:
            order = torch.randperm(p.numel(), generator=generator).to(p.device)
            p.data = p.data.flatten()[order].view_as(p)
        done = max(done, end)
        if end:  # a model that only embeds has no classifier
            yield name, copied


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation `[B]` of heatmaps `[B, h, w]`; 0 where one is constant."""
    ranks = [rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (a, b)]
    x, y = (r - r.mean(1, keepdims=True) for r in ranks)
    size = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.where(size > 0, (x * y).sum(1) / np.where(size > 0, size, 1), 0.0)
