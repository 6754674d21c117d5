"""Token slimming (SiT): patches blend softly into fewer tokens, by weights that a small network gives each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..blocks import PlainBlock, Reduction, Tokens, note, places, plain_blocks
from ..errors import VitreousError
from ..steps import Step, step


@dataclass
class SoftReduction(Reduction):
    """Every patch is in every token: `shares` `[B, tokens, N]` say how much; `into` names the token that takes most of it."""

    shares: Tensor = field(default_factory=lambda: torch.empty(0), repr=False)

    def matrix(self) -> Tensor:
        return self.shares


class TokenSlimmingModule(nn.Module):
    """`[B, P + N, C]` to `[B, P + keep, C]`: P prefix tokens, and `keep` weighted means of the patches.

    Zong et al., section 3.2: the weights are LayerNorm, linear, GELU and linear of each patch, times one learned scale, through
    a softmax over the patches.
    Where attention knows places, each stands where the patch stood that is most in it. It works after the MLP of the block which
    it is a reducer of.
    """

    place = "after"

    def __init__(self, dim: int, keep: int, prefix: int) -> None:
        super().__init__()
        self.keep, self.prefix = keep, prefix
        self.weight = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, keep))
        self.scale = nn.Parameter(torch.ones(1, 1, 1))
        init_linears(self)

    def forward(self, tokens: Tokens, q: Tensor | None, k: Tensor | None, bias: Tensor | None, block: PlainBlock) -> Tokens:
        x = tokens.x
        prefix, patches = x[:, : self.prefix], x[:, self.prefix :]
        shares = (self.weight(patches) * self.scale).softmax(1).mT  # [B, keep, N]
        note(block, lambda: self._reduction(shares, block.name))
        most, p = shares.argmax(-1) + self.prefix, torch.arange(self.prefix, device=x.device)
        place = tokens.standing(torch.cat([p.expand(x.shape[0], -1), most], 1)) if tokens.place is not None else None
        return Tokens(torch.cat([prefix, shares @ patches], 1), place=place)

    def _reduction(self, shares: Tensor, layer: str) -> Reduction:
        (b, keep, n), p = shares.shape, self.prefix
        whole = shares.new_zeros(b, p + keep, p + n)
        whole[:, :p, :p] = torch.eye(p, device=shares.device)
        whole[:, p:, p:] = shares
        most, into = whole.max(1)
        return SoftReduction(layer, into, most, p + keep, shares=whole)


class ReverseSlimming(nn.Module):
    """The reverse module (section 3.3): from `keep` slimmed tokens a guess at all `patches` of them, `[B, patches, C]`.

    Only feature recalibration distillation uses it (`vitreous.learn.frd`); a deployed model never runs it.
    """

    def __init__(self, dim: int, keep: int, patches: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mlp1 = _mlp(keep, 4 * patches, patches)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp2 = _mlp(dim, 4 * dim, dim)
        init_linears(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp1(self.norm1(x).mT).mT
        return x + self.mlp2(self.norm2(x))


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def init_linears(module: nn.Module) -> None:
    """The official start: weights of standard deviation 0.02, no bias."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.trunc_normal_(m.weight, std=0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


@step("tokens")
@dataclass(frozen=True)
class TokenSlimming(Step):
    """Zong et al., "Self-slimmed Vision Transformer" (ECCV 2022): the token slimming module.

    After each of the blocks `at` the patches become `keep` times as many tokens, rounded down and counted from the grid: with
    `keep=0.5` of 196 patches 98, then 49, then 24. Each is a weighted mean of all patches. `at` is by default after 9, 12 and 14
    sixteenths of the depth, as in SiT-S. Prefix tokens are kept aside. The published models are this step on LV-ViT:
    `vitreous.models.sit`.

    **Useless before training.** The modules start, seeded, with nearly equal weights: every slimmed token is nearly the mean of
    all patches. Train the model, as published with `vitreous.learn.frd` and the whole model as teacher. `fit` does not train.

    Deployable: exports with a fixed number of tokens. Other token steps may follow, in later blocks; none may come before.
    `keep=1` is the identity.
    """

    keep: float = 0.5
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise VitreousError(f"{self.name}: keep must lie in (0, 1], not {self.keep}")

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        anatomy = read(model)
        blocks = plain_blocks(model, self.name)
        grid = anatomy.require_grid(self.name)
        depth = len(blocks)
        at = places(self, depth, (max(depth * part // 16, 1) - 1 for part in (9, 12, 14)))
        if shortened := [i for i in range(max(at, default=-1) + 1) if len(blocks[i].reducers)]:
            raise VitreousError(
                f"{self.name}: block {shortened[0]} already shortens the tokens, and its modules are sized for all the patches: "
                "apply it before other token steps, or choose earlier blocks with at="
            )
        if self.keep == 1:
            return
        patches = grid[0] * grid[1]
        reference = next(model.parameters())
        for stage, i in enumerate(at, start=1):
            keep = max(int(patches * self.keep**stage), 1)
            module = TokenSlimmingModule(cast(int, anatomy.width), keep, anatomy.prefix)
            blocks[i].reducers.append(module.to(reference.device, reference.dtype))
