"""Stitching: join two trained vision transformers, and pick the best route within a cost.

Pan et al., "Stitched ViTs are Flexible Vision Backbones" (ECCV 2024). The first solution of the stitching layers is Pan et al.,
"Stitchable Neural Networks" (CVPR 2023), equation 4. What trains them on is `vitreous.learn.Stitched`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...data import Data
from ...errors import VitreousError
from ...learn.batches import Pair
from ...learn.measure import accuracy_on
from ...models.sn_net import SNNet, arguments
from ...steps import history_of
from ...store import open_model
from ...store.expects import expectations, restore

NAME = "sn_net_s_l"  # the registered architecture that arguments make any other of
IMAGES = 100  # that stitching layers are fitted on, as published


@torch.no_grad()
def least_squares(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`W [C2, C1]` and `b [C2]` of the least ‖x Wᵀ + b − y‖, tokens `[B, N, C1]` to `[B, N, C2]`; in float64."""
    x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
    if len(x) != len(y):
        raise VitreousError(f"the two models have {len(x)} and {len(y)} tokens for the same images: they cannot be stitched")
    found = torch.linalg.pinv(torch.cat([x, torch.ones_like(x[:, :1])], 1)) @ y
    return found[:-1].T, found[-1]


@torch.no_grad()
def stitch(small: nn.Module, large: nn.Module, images: Tensor, rank: int = 64) -> SNNet:
    """One net of two plain vision transformers of timm's, its stitching layers fitted on `images` `[N, C, H, W]`; in eval mode.

    Each layer maps the tokens that leave a block of one to those that enter a block of the other. Raises `VitreousError` where
    the two do not see the same patches and classes, and where one is not plain.
    """
    for model in (small, large):
        if steps := history_of(model).steps():
            raise VitreousError(f"stitching takes models as they were trained, and one was changed by {steps[0]}: stitch first")
    given = {**arguments(small, large), "rank": rank}
    net = _built(given, small)
    for anchor, model in zip(net.anchors, (small, large), strict=True):
        anchor.load_state_dict(model.state_dict())
    net.eval()
    tokens = [_after(cast(Any, anchor), net.embed(images, i)) for i, anchor in enumerate(net.anchors)]
    for route in net.routes:
        if len(route.anchors) == 2:
            (left, right), layer = route.anchors, cast(Any, net.stitches)[route.anchors[0]][route.layers[0]]
            weight, bias = least_squares(tokens[left][route.blocks[0][1] - 1], tokens[right][route.blocks[1][0] - 1])
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    return net


def single(net: SNNet, route: int) -> nn.Module:
    """The ordinary model of one route: it saves, explains, quantizes and ships."""
    if net.only is not None:
        raise VitreousError(f"this is route {net.only} alone, of which there is no other")
    first, second = cast(Any, net.anchors)
    made = _built({**arguments(first, second), "only": route}, net)
    made.load_state_dict(net.merged_state(made.state_dict()))
    return made.to(next(net.parameters()).device)


def _built(given: dict[str, Any], like: nn.Module) -> SNNet:
    """As a saved file builds it again, for pictures as `like` wants them."""
    net = open_model(NAME, **given)
    restore(net, {**expectations(like), "input_size": [given["in_chans"], given["img_size"], given["img_size"]]})
    return cast(SNNet, net)


def _after(anchor: Any, x: Tensor) -> list[Tensor]:
    found = []
    for block in anchor.blocks:
        x = block(x)
        found.append(x)
    return found


@dataclass(frozen=True)
class Measured:
    """A route, its multiply-accumulates an image, and the share of images that it has right."""

    route: int
    macs: float
    accuracy: float


@torch.inference_mode()
def measure(
    net: SNNet, data: Data | Pair, limit: int | None = None, progress: Callable[[str, float], None] = lambda what, share: None
) -> list[Measured]:
    """Every usable route, or about `limit` of them evenly by cost, on labelled images; from the cheapest."""
    order = sorted(net.usable, key=net.macs)
    if limit is not None and limit < len(order):
        order = [order[round(i * (len(order) - 1) / max(limit - 1, 1))] for i in range(limit)]
    kept, found = net.route, []
    for i, route in enumerate(order):
        net.route = route
        progress(f"route {net.at(route)}", i / len(order))
        found.append(Measured(route, net.macs(route), accuracy_on(net, data) or 0.0))
    net.route = kept
    return found


def front(measured: list[Measured]) -> list[Measured]:
    """Those more accurate than all that cost less."""
    found: list[Measured] = []
    for m in sorted(measured, key=lambda m: (m.macs, -m.accuracy)):
        if not found or m.accuracy > found[-1].accuracy:
            found.append(m)
    return found
