"""One pass over some images, and every attention layer of it told in patches: what the maps on a screen are cut from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..blocks import Reduction, traced
from ..copies.own import exact, run, still
from ..errors import VitreousError
from ..glass import View, glass
from ..outputs import answer
from .patches import Reading, before, grid_of, on_grid, places, shares

Query = Literal["class"] | int


@dataclass(frozen=True)
class Layer:
    """The attention of one layer: `attention` `[B, heads, queries, tokens]` as it is, and `maps` over the patches."""

    name: str
    attention: Tensor
    grid: tuple[int, int]
    prefix: int
    read: Tensor  # [B, prefix + 1]: the shares of each prefix token and of all patches in what the model reads
    reductions: list[Reduction]
    problem: str = ""

    @exact
    def maps(self, query: Query = "class") -> Tensor:
        """`[B, heads, h, w]`: what "class", or a patch by its number row by row, pays to each patch.

        A token's attention is divided among the patches in it by their shares; what was dropped gets 0, and so does the
        whole map of a patch that was given up. A model that does not read its class token alone is shown by what it reads: the
        mean over all queries of patches, or over its pooling queries. Raises `VitreousError` for unknown
        patches, and for layers that do not attend over the whole grid (windows).
        """
        if self.problem:
            raise VitreousError(self.problem)
        (h, w), a, first = self.grid, self.attention, self.prefix + self.grid[0] * self.grid[1]
        pooling = a.shape[2] < a.shape[3]
        if query == "class":
            read = self.read[:, -self.prefix - 1 :].to(a)
            read = (read / read.sum(1, keepdim=True).clamp_min(1e-12))[:, None, :, None]
            asked = torch.cat([a[:, :, : self.prefix], a[:, :, self.prefix :].mean(2, keepdim=True)], 2)
            rows = a.mean(2) if pooling else (read * asked).sum(2)
        elif pooling or not 0 <= query < h * w:
            raise VitreousError(f"layer '{self.name}' has no query {query}: choose 'class' or, in a block, 0 to {h * w - 1}")
        else:
            at = places(self.reductions, a, first)[-1][:, self.prefix + query]
            rows = a[torch.arange(len(a)), :, at.clamp_min(0)] * (at >= 0)[:, None, None]
        if self.reductions:
            rows = rows @ shares(self.reductions, a, first)
        return on_grid(rows.flatten(0, 1), (h, w)).unflatten(0, rows.shape[:2])


@dataclass(frozen=True)
class Look:
    """`out` `[B, K]`, what the model answered, its patch `grid`, and its attention `layers` in the order in which they ran."""

    out: Tensor
    grid: tuple[int, int]
    layers: list[Layer]


def look(model: nn.Module, x: Tensor, layers: Sequence[int | str] | None = None, purpose: str = "see.look") -> Look:
    """Run `model` once on `x` `[B, C, H, W]` and keep the attention of its `layers` (numbers or names; all by default).

    Raises `VitreousError` for models without attention or without one grid of patches, and for unknown layers.
    """
    anatomy, grid = grid_of(model, x, purpose)
    with (
        torch.no_grad(),
        still(model) as own,
        traced(own) as trace,
        glass(own, layers=layers) as g,
        Reading(own, anatomy) as reading,
    ):
        out = run(own, x)
        read = reading.groups(out)
    return Look(answer(out).detach(), grid, [_layer(view, anatomy, grid, read, trace, len(x)) for view in g.views])


def _layer(view: View, anatomy: Anatomy, grid: tuple[int, int], read: Tensor, trace: Sequence[Reduction], images: int) -> Layer:
    assert view.attention is not None
    name, a, (h, w) = view.name, view.attention.float(), grid
    done = before(trace, anatomy, next((b.name for b in anatomy.blocks if b.attention.name == name), name))
    # The class token of CaiT is no prefix: it joins the patches after their blocks.
    prefix = anatomy.prefix if done else a.shape[-1] - h * w
    left = done[-1].tokens if done else prefix + h * w
    whole = a.ndim == 4 and len(a) == images and a.shape[3] == left and a.shape[2] in (1, left)
    problem = ""
    if not whole or prefix not in (anatomy.prefix, int(anatomy.class_token)):
        problem = (
            f"layer '{name}' of {anatomy.kind} attends over {a.shape[-1]} tokens (windows, pooling or channels), "
            f"not over its {h} × {w} patches: use see.grad_cam"
        )
    return Layer(name, a, grid, prefix, read, done, problem)
