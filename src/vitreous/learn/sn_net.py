"""How SN-Net v2 trains: each step takes one route, its cost drawn before the route."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError
from ..models.sn_net import SNNet
from .objective import Batch, Now, Objective, Seen, objective, share

SPAN = 1 / 57  # of the range of costs: 1 GFLOP between S of 4.6 and L of 61.6, as published


@objective
@dataclass(frozen=True)
class Stitched(Objective):
    """Pan et al., "Stitched ViTs are Flexible Vision Backbones" (ECCV 2024), section 3.3: cross-entropy on one route a step.

    Routes are cut into groups of like cost, from the cheapest on, a new one where the cost exceeds the group's first by more than
    `span` of the range; a group is drawn evenly, then a route in it. So the few cheap and dear routes train as much as the many
    between. `smoothing`: of the labels (published: 0.1).
    """

    span: float = SPAN
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        share(self, "span", "smoothing")

    def parts(self, model: nn.Module) -> None:
        if not isinstance(model, SNNet) or model.only is not None:
            raise VitreousError(f"Stitched trains a stitched net, not {type(model).__name__}: make one by vitreous stitch")

    def around(self, now: Now) -> AbstractContextManager[Any]:
        model: Any = now.model
        model.route = draw(groups(model, self.span))
        return nullcontext()

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        return {"stitched": F.cross_entropy(seen.logits, batch.shares(seen.logits.shape[1], self.smoothing))}


def groups(model: SNNet, span: float) -> list[list[int]]:
    """The usable routes by cost, cut into groups."""
    order = sorted(model.usable, key=lambda i: (model.macs(i), i))
    wide = span * (model.macs(order[-1]) - model.macs(order[0]))
    found: list[list[int]] = []
    for i in order:
        if not found or model.macs(i) - model.macs(found[-1][0]) > wide:
            found.append([])
        found[-1].append(i)
    return found


def draw(groups: list[list[int]]) -> int:
    """A group, then a route in it, by torch's generator."""
    group = groups[int(torch.randint(len(groups), ()))]
    return group[int(torch.randint(len(group), ()))]
