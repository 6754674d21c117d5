"""The sanity check of explanations: what is left of a heatmap when the model's weights are random?"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from torch import Tensor, nn

from ..anatomy import read
from ..copies.own import run
from ..outputs import embeds
from .statistics import Interval, bootstrap_mean

SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Stage:
    """The parameters are random from the top down to here."""

    name: str
    correlation: Interval
    """Mean Spearman correlation of the heatmaps with those of the whole model."""


def stages(
    model: nn.Module,
    explain: Callable[[nn.Module], np.ndarray],
    images: Tensor,
    seed: int,
    tick: Callable[[float], None] = lambda share: None,
) -> list[Stage]:
    """How alike the heatmaps `explain(model)` `[B, h, w]` of `images` stay while the model is randomised from the top.

    Adebayo et al., "Sanity Checks for Saliency Maps" (NeurIPS 2018), section 3, cascading: first the classifier, then the upper
    quarter of all parameters in the order in which the model uses them, half of them, three quarters, all. There layers
    are drawn anew as before training; what that was no finished model tells, so here the entries of every parameter are
    shuffled: its scale stays, what it has learned goes. A constant heatmap is like none: correlation 0.
    """
    before, found = explain(model), []
    for i, (name, random) in enumerate(randomised(model, images, seed)):
        found.append(Stage(name, bootstrap_mean(rank_correlation(before, explain(random)), seed)))
        tick((i + 1) / (len(SHARES) + 1))
    return found


def randomised(model: nn.Module, images: Tensor, seed: int) -> Iterator[tuple[str, nn.Module]]:
    """A copy of `model` whose parameters are shuffled further and further down, each time with the name of the stage.

    What is up and down is seen by running `images` `[B, C, H, W]`, whatever the order in which the model holds its parts; what
    did not run is shuffled last.
    """
    copied = copy.deepcopy(model)
    ran = _order(copied, images)
    held = {id(p): p for m in reversed(ran) for p in m.parameters(recurse=False)}
    held |= {id(p): p for p in reversed(list(copied.parameters())) if id(p) not in held}
    head = _classifier(model, copied, images, ran)
    top = {id(p) for p in head.parameters()} if head is not None else set()
    parameters = sorted(held.values(), key=lambda p: id(p) not in top)  # stable: all others stay in their order
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for name, end in [("classifier", len(top)), *((f"{s:.0%}", round(s * len(parameters))) for s in SHARES)]:
        for p in parameters[done:end]:
            order = torch.randperm(p.numel(), generator=generator).to(p.device)
            p.data = p.data.flatten()[order].view_as(p)
        done = max(done, end)
        if end:  # a model that only embeds has no classifier
            yield name, copied


def _order(model: nn.Module, images: Tensor) -> list[nn.Module]:
    """The modules in the order in which they begin to run."""
    ran: dict[nn.Module, None] = {}
    handles = [m.register_forward_pre_hook(lambda m, _: ran.setdefault(m)) for m in model.modules()]
    try:
        with torch.no_grad():
            run(model, images[:1])
    finally:
        for handle in handles:
            handle.remove()
    return list(ran)


def _classifier(model: nn.Module, copied: nn.Module, images: Tensor, ran: list[nn.Module]) -> nn.Module | None:
    """What gives the classes: by the anatomy, else the last with weights that ran; None of a model of features."""
    if embeds(model, images[:1]):
        return None
    if head := read(model).classifier:
        return copied.get_submodule(head)
    return next((m for m in reversed(ran) if any(p.ndim > 1 for p in m.parameters(recurse=False))), None)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation `[B]` of heatmaps `[B, h, w]`; 0 where one is constant."""
    ranks = [scipy.stats.rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (a, b)]
    x, y = (r - r.mean(1, keepdims=True) for r in ranks)
    size = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    return np.where(size > 0, (x * y).sum(1) / np.where(size > 0, size, 1), 0.0)
