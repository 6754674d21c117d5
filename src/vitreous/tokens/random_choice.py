"""Keep patches drawn at random: the least that a choice of tokens must beat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..blocks import PlainBlock, Reduction, Tokens, note, places, plain_blocks
from ..errors import VitreousError
from ..steps import Step, step


class KeepDrawn(nn.Module):
    """`[B, P + N, C]` to `[B, P + ceil(keep·N), C]`: P prefix tokens, and patches in the order in which they came."""

    rank: Tensor

    def __init__(self, keep: float, prefix: int, patches: int, generator: torch.Generator) -> None:
        super().__init__()
        self.keep, self.prefix = keep, prefix
        # Integers, so that half precision draws the same; of fewer patches those that come first keep their order.
        self.register_buffer("rank", torch.randperm(patches, generator=generator))

    def forward(self, tokens: Tokens, q: Tensor, k: Tensor, bias: Tensor | None, block: PlainBlock) -> Tokens:
        (x, size, place), p = tokens, self.prefix
        n = x.shape[1] - p
        left = math.ceil(self.keep * n)
        if left >= n:
            return tokens
        if n > len(self.rank):
            raise VitreousError(f"tokens.RandomChoice drew among {len(self.rank)} patches, the image has {n}: keep to the size")
        order = self.rank[:n].argsort()
        kept = torch.cat([torch.arange(p, device=x.device), order[:left].sort().values + p])
        note(block, lambda: self._reduction(kept, x, block.name))
        size, place = (None if t is None else t[:, kept] for t in (size, place))
        return Tokens(x[:, kept], size, place)

    def _reduction(self, kept: Tensor, x: Tensor, layer: str) -> Reduction:
        b, n, _ = x.shape
        left = len(kept)
        into = torch.full((n,), left, device=x.device)  # beyond the last token: given up
        into[kept] = torch.arange(left, device=x.device)
        weight = (into < left).to(x.dtype)
        return Reduction(layer, into.expand(b, -1), weight.expand(b, -1), left, rest=left)


@step("tokens")
@dataclass(frozen=True)
class RandomChoice(Step):
    """A peer for methods that choose tokens: `ceil(keep·N)` patches stay in each of the blocks `at`, drawn without looking.

    The draw depends on `seed` alone and is the same for all images. Prefix tokens always stay. `at` is by default after a
    quarter, a half and three quarters of the depth, as EViT's. `keep=1` is the identity. Deployable.
    """

    keep: float = 0.7
    at: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise VitreousError(f"tokens.RandomChoice: keep must lie in (0, 1], not {self.keep}")

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        anatomy = read(model)
        blocks = plain_blocks(model, self.name)
        grid = anatomy.require_grid(self.name)
        depth = len(blocks)
        at = places(self, depth, (depth // 4, depth // 2, 3 * depth // 4))
        generator = torch.Generator().manual_seed(self.seed)
        for i in at:
            if len(blocks[i].reducers):
                raise VitreousError(f"{self.name}: block {i} already shortens its tokens; choose other blocks with at=")
            device = next(blocks[i].parameters()).device
            patches = grid[0] * grid[1]
            blocks[i].reducers.append(KeepDrawn(self.keep, anatomy.prefix, patches, generator).to(device))
