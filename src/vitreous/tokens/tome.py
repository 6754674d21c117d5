"""ToMe: merge the most similar tokens in every block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..blocks import PlainBlock, Reduction, Tokens, note, plain_blocks
from ..errors import VitreousError
from ..steps import Step, step

Merge = Callable[[Tensor], Tensor]


def bipartite_soft_matching(metric: Tensor, r: int, prefix: int) -> tuple[Merge, Callable[[], Tensor], Tensor]:
    """Merge the `r` most similar pairs between tokens at even and at odd places (section 3, "Bipartite Soft Matching").

    `metric` is `[B, N, d]`; the first `prefix` tokens are left alone. Returns `merge`, which sums `[B, N, C]` into
    `[B, N − r, C]`, `into`, which gives the new index of every token, `[B, N]`, and the old indices of those that stay,
    `[B, N − r]`.
    """
    b, n, _ = metric.shape
    even = torch.arange(prefix + prefix % 2, n, 2, device=metric.device)
    odd = torch.arange(prefix + 1 - prefix % 2, n, 2, device=metric.device)
    r = min(r, len(even), len(odd))
    unit = F.normalize(metric, dim=-1)
    best, match = (unit[:, even] @ unit[:, odd].mT).max(-1)  # [B, even]
    order = best.argsort(-1, descending=True)
    source, stay = order[:, :r], order[:, r:].sort(-1).values
    target = match.gather(1, source)  # [B, r], indices into odd
    # One-hot rows add each source to its target: a small matrix product instead of a scatter, which every runtime does fast.
    onto = (target[:, None] == torch.arange(len(odd), device=metric.device)[:, None]).to(metric.dtype)  # [B, odd, r]

    def merge(x: Tensor) -> Tensor:
        c = x.shape[-1]
        e, o = x[:, even], x[:, odd]
        kept = e.gather(1, stay[..., None].expand(-1, -1, c))
        moved = e.gather(1, source[..., None].expand(-1, -1, c))
        return torch.cat([x[:, :prefix], kept, o + onto.to(x.dtype) @ moved], 1)

    def into() -> Tensor:
        new = torch.empty(b, n, dtype=torch.long, device=metric.device)
        new[:, :prefix] = torch.arange(prefix, device=metric.device)
        first_odd = prefix + stay.shape[1]
        new[:, odd] = torch.arange(len(odd), device=metric.device) + first_odd
        of_even = torch.empty(b, len(even), dtype=torch.long, device=metric.device)
        of_even.scatter_(1, stay, (torch.arange(stay.shape[1], device=metric.device) + prefix).expand(b, -1))
        of_even.scatter_(1, source, target + first_odd)
        new[:, even] = of_even
        return new

    first = torch.arange(prefix, device=metric.device).expand(b, -1)
    return merge, into, torch.cat([first, even[stay], odd.expand(b, -1)], 1)


class MergeSimilar(nn.Module):
    """`[B, N, C]` to `[B, N − r, C]`, averages weighted by how many patches each token stands for."""

    def __init__(self, r: int, prefix: int) -> None:
        super().__init__()
        self.r, self.prefix = r, prefix

    def forward(self, tokens: Tokens, q: Tensor, k: Tensor, bias: Tensor | None, block: PlainBlock) -> Tokens:
        x, size, _ = tokens
        r = min(self.r, (x.shape[1] - self.prefix) // 2)
        if r <= 0:
            return tokens
        merge, into, stays = bipartite_soft_matching(k.mean(1), r, self.prefix)
        size = torch.ones_like(x[..., :1]) if size is None else size
        merged = merge(size)
        note(block, lambda: Reduction(block.name, into(), size[..., 0], x.shape[1] - r))
        return Tokens(merge(x * size) / merged, merged, tokens.standing(stays))


@step("tokens")
@dataclass(frozen=True)
class ToMe(Step):
    """Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023).

    Every block merges its `r` most similar pairs of tokens, by the cosine of their keys averaged over heads; attention counts a
    token as often as the patches it stands for (proportional attention). Class, distillation and register tokens never merge;
    at most half of the patches go in one block. Where attention knows places, a merged token stands where the one stood that the
    others went to.

    Needs no training and no data; deployable: exports with a fixed number of tokens. `r=0` is the identity.
    """

    r: int = 8

    def __post_init__(self) -> None:
        if self.r < 0:
            raise VitreousError(f"tokens.ToMe: r must be 0 or more, not {self.r}")

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        prefix = read(model).prefix
        for i, block in enumerate(plain_blocks(model, self.name)):
            if len(block.reducers):
                raise VitreousError(f"{self.name}: block {i} already shortens its tokens; ToMe works in every block")
            block.reducers.append(MergeSimilar(self.r, prefix))
