"""MCTF: fuse tokens that are alike, uninformative and small, by the attention of the block that they are about to enter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..blocks import Fused, PlainBlock, Reduction, Tokens, note, places, plain_blocks
from ..errors import VitreousError
from ..steps import Step, step

FEWEST = 10  # tokens, prefix included, below which the official code fuses no more


def sides(x: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """The patches of `[B, N, …]` at even and at odd places of the sequence."""
    return x[:, prefix + prefix % 2 :: 2], x[:, prefix + 1 - prefix % 2 :: 2]


def attraction(
    x: Tensor, received: Tensor, size: Tensor | None, prefix: int, tau_sim: float, tau_info: float, tau_size: float
) -> Tensor:
    """W = W^sim · W^info · W^size between patches at even and at odd places, `[B, even, odd]` (section 3.2).

    `x` is `[B, N, C]`, `received` the attention that each token is paid `[B, N]`, `size` `[B, N, 1]`. A τ of 0 leaves its
    criterion out. Informativeness and size are not divided by their maxima: one factor an image changes no order.
    """
    even, odd = sides(F.normalize(x, dim=-1), prefix)
    w = received.new_ones(x.shape[0], even.shape[1], odd.shape[1])
    if tau_sim:
        w = (((even @ odd.mT).float() + 1) / 2).clamp_min(0) ** (1 / tau_sim)
    for per_token, tau in ((received[..., None], tau_info), (size, tau_size)):
        if tau and per_token is not None:
            a, b = sides(1 / per_token.float(), prefix)
            w = w * (a * b.mT) ** (1 / tau)
    return w


@dataclass
class Pairs:
    """Who moves where. Old places are those in the sequence `[B, N]` that comes in, new ones those among the N − r that leave."""

    kept: Tensor  # [B, N − r], for each new place the old place of the token that stays there
    moved: Tensor  # [B, r], old places
    target: Tensor  # [B, r], new places

    def into(self) -> Tensor:
        """`[B, N]`: the new place of every token."""
        new = torch.cat([_count(self.kept, 0, self.kept.shape[1]), self.target], 1)
        return new.gather(1, torch.cat([self.kept, self.moved], 1).argsort(-1))

    def merge(self, x: Tensor) -> Tensor:
        """`[B, N, C]` to `[B, N − r, C]`: what moves is added to what stays."""
        # By one-hot rows: a small matrix product, which every runtime does faster than a scatter.
        onto = self.target[:, None] == torch.arange(self.kept.shape[1], device=x.device)[:, None]
        return pick(x, self.kept) + onto.to(x.dtype) @ pick(x, self.moved)


def bidirectional_matching(scores: Tensor, r: int, prefix: int, bidirectional: bool) -> Pairs:
    """Choose `r` pairs by their scores `[B, even, odd]` (section 3.2, "Bidirectional bipartite soft matching").

    Half of them go from even places to their best odd ones, then, by the same scores, the other half from odd places, with
    what they took in, to the even ones that are left. New places are given as in the official code, for they decide who can
    meet in the next block: prefix, even tokens by place, odd ones by falling score (by place when not `bidirectional`).
    """
    even, odd = scores.shape[1:]
    there = r // 2 if bidirectional else r
    first_even, first_odd, new_odd = prefix + prefix % 2, prefix + 1 - prefix % 2, prefix + even - there
    kept_even = _count(scores, 0, even)
    if there:  # runtimes stumble over empty tensors
        go, to_odd, kept_even = _best(scores, there)
        kept_even = kept_even.sort(-1).values
    kept_odd, into_odd, moved, target = _count(scores, 0, odd), _count(scores, new_odd, odd), [], []
    if bidirectional:
        back, to_even, kept_odd = _best(pick(scores, kept_even).mT, r - there)
        moved, target = [2 * back + first_odd], [to_even + prefix]
        into_odd = torch.cat([target[0], _count(scores, new_odd, odd - (r - there))], 1)
        into_odd = into_odd.gather(1, torch.cat([back, kept_odd], 1).argsort(-1))
    if there:
        moved, target = [*moved, 2 * go + first_even], [*target, into_odd.gather(1, to_odd)]
    kept = torch.cat([_count(scores, 0, prefix), 2 * kept_even + first_even, 2 * kept_odd + first_odd], 1)
    return Pairs(kept, torch.cat(moved, 1), torch.cat(target, 1))


def _best(scores: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of `[B, G, T]`: the `r` givers with the highest scores, the taker of each, and the other givers by falling score."""
    highest, taker = scores.max(-1)
    order = highest.argsort(-1, descending=True)
    return order[:, :r], taker.gather(1, order[:, :r]), order[:, r:]


def _count(like: Tensor, first: int, number: int) -> Tensor:
    """`[B, number]`: first, first + 1, …"""
    return torch.arange(first, first + number, device=like.device).expand(like.shape[0], -1)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of `[B, N, C]` at the places `[B, M]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class FuseByCriteria(nn.Module):
    """`[B, N, C]` to `[B, N − r, C]`, averages weighted by size and by the attention that each token is paid.

    `place` "ahead" uses the attention of the block that it works in, and lends it on; "after" works behind the block.
    """

    def __init__(self, step: MCTF, prefix: int) -> None:
        super().__init__()
        self.r, self.prefix, self.bidirectional = step.r, prefix, step.bidirectional
        self.taus = (step.tau_sim, step.tau_info, step.tau_size)
        self.place = "ahead" if step.one_step_ahead else "after"

    def forward(self, tokens: Tokens, *given: Any) -> Any:
        if self.place == "ahead":
            probs, block = given
            return self.fuse(tokens, probs, block)
        q, k, bias, block = given
        scores = q * cast(float, block.attn.scale) @ k.mT
        return self.fuse(tokens, (scores if bias is None else scores + bias).softmax(-1), block)[0]

    def number(self, n: int) -> int:
        """How many of `n` tokens go."""
        if n <= FEWEST:
            return 0
        r = int((n - self.prefix) * self.r) if self.r < 1 else min(int(self.r), n - FEWEST)
        return min(r, (n - self.prefix) // 2)

    def fuse(self, tokens: Tokens, probs: Tensor, block: PlainBlock) -> Fused:
        x, size, _ = tokens
        r = self.number(x.shape[1])
        if r == 0:
            return tokens, lambda t: t, lambda t: t
        with torch.no_grad():  # who goes where is no function to learn
            received = probs.float().mean((1, 2)).clamp_min(1e-12)  # [B, N]
            scores = attraction(x, received, size, self.prefix, *self.taus)
            pairs = bidirectional_matching(scores, r, self.prefix, self.bidirectional)
            into = pairs.into()
            size = torch.ones_like(x[..., :1]) if size is None else size
            weight = received[..., None] * size.float()
            share = (weight / pick(pairs.merge(weight), into)).to(x.dtype)  # of each token in its new one
            size = pairs.merge(size)
        note(block, lambda: Reduction(block.name, into, share[..., 0], x.shape[1] - r))
        left = Tokens(pairs.merge(x * share), size, tokens.standing(pairs.kept))
        return left, lambda t: pairs.merge(t * share), lambda t: pick(t, into)


@step("tokens")
@dataclass(frozen=True)
class MCTF(Step):
    """Lee, Choi & Kim, "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers" (CVPR 2024).

    In each of the blocks `at` (default: all but the first) the `r` pairs of tokens with the highest product of similarity,
    lack of information and smallness fuse; τ are their temperatures, and 0 leaves a criterion out. A fused token is the average
    weighted by size and by the attention that its parts are paid; attention counts it as often as the patches it stands for.

    With `one_step_ahead` (section 3.3) informativeness is read from the very attention that the fused tokens are about to
    enter: the block's map is computed first, the tokens fuse, and the same map, fused alike, is applied to the values of what
    is left. Without it, tokens fuse behind the block, by its map. `bidirectional=False` moves tokens from even places only.

    r: tokens to fuse in each block, or, below 1, the share of the patches there. At most half of the patches go, and none
        once 10 tokens are left, as in the official code. `r=0` is the identity.

    Needs no training and no data; deployable: exports with a fixed number of tokens. Official `mctf_type` beyond these
    parameters is as in all published scripts: proportional attention on, tokens pooled by attention and size. Prefix tokens
    neither move nor take anything in; the official code has one.

    Fine-tune with `learn.token_reduction_consistency`.
    """

    r: int | float = 16
    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0
    one_step_ahead: bool = True
    bidirectional: bool = True
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.r < 1 or (self.r >= 1 and isinstance(self.r, int))):
            raise VitreousError(f"tokens.MCTF: r must be a whole number of tokens, or a share in [0, 1), not {self.r}")
        for name in ("tau_sim", "tau_info", "tau_size"):
            if not getattr(self, name) >= 0:
                raise VitreousError(f"tokens.MCTF: {name} must be 0 (criterion off) or more, not {getattr(self, name)}")

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        prefix = read(model).prefix
        blocks = plain_blocks(model, self.name)
        at = places(self, len(blocks), range(1, len(blocks)))
        for i in at if self.r else ():  # without a reducer the fused attention kernel stays
            if len(blocks[i].reducers):
                raise VitreousError(f"{self.name}: block {i} already shortens its tokens; choose other blocks with at=")
            blocks[i].reducers.append(FuseByCriteria(self, prefix))
