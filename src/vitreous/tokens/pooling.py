"""Average patches two by two: the least that a fusion of tokens must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..blocks import PlainBlock, Reduction, Tokens, note, places, plain_blocks
from ..errors import VitreousError
from ..steps import Step, step


class PoolGrid(nn.Module):
    """`[B, P + h·w, C]` to `[B, P + ⌈h/2⌉·⌈w/2⌉, C]`; a last odd row or column is pooled with itself."""

    def __init__(self, grid: tuple[int, int], prefix: int) -> None:
        super().__init__()
        self.grid, self.prefix = grid, prefix

    def forward(self, tokens: Tokens, q: Tensor, k: Tensor, bias: Tensor | None, block: PlainBlock) -> Tokens:
        (x, size, place), (h, w), p = tokens, self.grid, self.prefix
        if x.shape[1] != p + h * w:
            raise VitreousError(
                f"tokens.UniformPooling: {x.shape[1] - p} patches enter block '{block.name}' and not a grid of {h} × {w}: "
                "keep to the image size, and let no other step shorten the tokens before"
            )
        if h * w == 1:
            return tokens
        size = torch.ones_like(x[..., :1]) if size is None else size
        pooled = self._sum(size)
        note(block, lambda: self._reduction(size[..., 0], block.name))
        if place is not None:
            first = place[:, p:].unflatten(1, (h, w))[:, ::2, ::2].flatten(1)
            place = torch.cat([place[:, :p], first], 1)
        return Tokens(self._sum(x * size) / pooled, pooled, place)

    def _sum(self, x: Tensor) -> Tensor:
        h, w = self.grid
        patches = F.pad(x[:, self.prefix :].unflatten(1, (h, w)), (0, 0, 0, w % 2, 0, h % 2))
        pooled = patches.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).sum((2, 4))
        return torch.cat([x[:, : self.prefix], pooled.flatten(1, 2)], 1)

    def _reduction(self, size: Tensor, layer: str) -> Reduction:
        (h, w), p = self.grid, self.prefix
        rows, columns = (torch.arange(n, device=size.device) // 2 for n in (h, w))
        wide = (w + 1) // 2
        into = torch.cat([torch.arange(p, device=size.device), (rows[:, None] * wide + columns).flatten() + p])
        return Reduction(layer, into.expand(len(size), -1), size, p + (h + 1) // 2 * wide)


@step("tokens")
@dataclass(frozen=True)
class UniformPooling(Step):
    """A peer for methods that fuse tokens: 2 × 2 average pooling of the patch grid in each of the blocks `at`.

    `at` is by default the middle of the depth. A pooled token counts in attention as often as the patches it stands for, as
    in ToMe; at odd edges these are two or one. Where attention knows places, it
    stands where the first of them stood. Prefix tokens stay. `at=()` is the identity. Deployable.

    Needs the whole grid: it cannot follow a step that has shortened the sequence in an earlier block.
    """

    at: tuple[int, ...] | None = None

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        anatomy = read(model)
        blocks = plain_blocks(model, self.name)
        grid = anatomy.require_grid(self.name)
        at = places(self, len(blocks), (len(blocks) // 2,))
        (h, w), last = grid, -1
        for i in at:
            if shortened := [j for j in range(last + 1, i + 1) if len(blocks[j].reducers)]:
                raise VitreousError(
                    f"{self.name}: block {shortened[0]} already shortens its tokens, and block {i} has no grid to pool any more"
                )
            blocks[i].reducers.append(PoolGrid((h, w), anatomy.prefix))
            h, w, last = (h + 1) // 2, (w + 1) // 2, i
