"""Drop patches from a state space model, whose memory goes on fading where they stood."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..blocks import places
from ..errors import VitreousError
from ..mixers import MetaBlock
from ..mixers.mamba import CausalMixer
from ..steps import Step, step

SCORES = ("clipped", "signed", "random")


class Left(NamedTuple):
    """What one block hands to the next: the tokens that are left, the class token last, and the patches that were dropped."""

    x: Tensor  # [B, N + 1, C]
    place: Tensor  # [B, N]: where each patch stood among all
    gone: Tensor | None = None  # [B, M, C]: what was dropped, as it last was
    gone_place: Tensor | None = None  # [B, M]


def importance(y: Tensor, score: str) -> Tensor:
    """How much each token `[B, N, E]` of a scan's gated output says: the mean over channels, "clipped" of max(0, y)."""
    return (y.clamp(min=0) if score == "clipped" else y).mean(-1)


def select(score: Tensor, number: int) -> Tensor:
    """The places `[B, number]` of the highest of `[B, N]`, in the order in which they stand."""
    return score.topk(number, 1).indices.sort(1).values


def select_around_class(score: Tensor, keep: float) -> Tensor:
    """As the released code chooses for Vim, whose class token stands in the middle of `[B, N]`: an even number of patches.

    The middle is left out of the choice in every image; in the release in the first of a batch alone.
    """
    number = math.ceil((score.shape[1] - 1) * keep)
    middle = torch.arange(score.shape[1], device=score.device) == score.shape[1] // 2
    return select(score.masked_fill(middle, -torch.inf), number - 1 + (number % 2 == 0))


def fading(mixer: CausalMixer, place: Tensor, gone: Tensor, gone_place: Tensor) -> Tensor:
    """The sum of Δ that each token `[B, N + 1]` must add for the patches dropped between it and what is read before it."""
    after = torch.cat([place, torch.full_like(place[:, :1], torch.iinfo(place.dtype).max)], 1)[..., None]
    before = torch.cat([torch.full_like(place[:, :1], -1), place], 1)[..., None]
    between = (gone_place[:, None] > before) & (gone_place[:, None] < after)  # [B, N + 1, M]
    delta = mixer.delta(gone)
    sums = between.to(delta.dtype) @ delta
    return torch.cat([sums[:, 1:], sums[:, :1]], 1) if mixer.flip else sums


class PruningBlock(nn.Module):
    """A block of a Mamba that may drop patches between its mixer and its MLP; tokens `[B, N + 1, C]` or what `Left` says.

    It has the parts of the block that it replaces, under their names. number: how many patches it leaves, 0 for all. last:
    whether the model goes on with a plain tensor. order: scores of the places, where they do not depend on the image.
    """

    def __init__(self, block: MetaBlock, step: SSMPruning, number: int, last: bool, order: Tensor | None) -> None:
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self.align, self.score, self.number, self.last = step.align, step.score, number, last
        self.register_buffer("order", order, persistent=False)

    def forward(self, given: Tensor | tuple[Any, ...]) -> Tensor | Left:
        x, place, gone, gone_place = self.entering(given)
        mixer, norm1, norm2, mlp = (cast(Any, part) for part in (self.attn, self.norm1, self.norm2, self.mlp))
        passed = None if gone is None or gone_place is None else fading(mixer, place, norm1(gone), gone_place)
        mixed, y = mixer.read(norm1(x), passed)
        x = x + self.branch(self.ls1, mixed)
        if self.number:
            score = importance(y[:, :-1], self.score) if self.order is None else cast(Tensor, self.order)[place]
            ranked = score.argsort(1, descending=True)
            stay, go = (part.sort(1).values for part in (ranked[:, : self.number], ranked[:, self.number :]))
            if self.align:
                gone = join(gone, taken(x, go))
                gone_place = join(gone_place, place.gather(1, go))
            x, place = torch.cat([taken(x, stay), x[:, -1:]], 1), place.gather(1, stay)
        x = x + self.branch(self.ls2, mlp(norm2(x)))
        return x if self.last else Left(x, place, gone, gone_place)

    def entering(self, given: Tensor | tuple[Any, ...]) -> Left:
        if not isinstance(given, Tensor):
            return Left(*given)
        return Left(given, torch.arange(given.shape[1] - 1, device=given.device).expand(given.shape[0], -1))

    def branch(self, scale: Any, x: Tensor) -> Tensor:
        return cast(nn.Module, self.drop_path)(scale(x))


def taken(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of `[B, N, C]` at `[B, M]`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def join(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else torch.cat([first, second], 1)


def readers(model: nn.Module, name: str) -> nn.Sequential:
    """The blocks of `model` that read its patches one after the other."""
    for module in model.modules():
        if isinstance(module, PruningBlock):
            raise VitreousError(f"{name}: this model already drops patches; start from the one before")
        if isinstance(module, nn.Sequential) and len(module) and all(_reads(block) for block in module):
            return module
    raise VitreousError(f"{name} is for state space models whose blocks read tokens in a row (adventurer_*): this model has none")


def _reads(block: nn.Module) -> bool:
    return isinstance(block, MetaBlock) and isinstance(block.attn, CausalMixer)


@step("tokens")
@dataclass(frozen=True)
class SSMPruning(Step):
    """Zhan et al., "Exploring Token Pruning in Vision State Space Models" (NeurIPS 2024), for Adventurer's Mamba-2.

    In each of the blocks `at` (default: after 5, 10 and 15 of 24, as released) the `ceil(keep · N)` patches stay whose gated scan
    says most, the mean over its channels of max(0, y). With `align`, hidden state alignment, the memory of every later scan
    fades where a dropped patch stood as if it were there, h ← Ā h without input, so that the distances of the others stay what
    they were: Δ of a dropped patch is read from the patch as it last was, one small product.

    score: "clipped" as the paper; "signed", without max, as the released code (ZLKong/ToP-ViM), which has no alignment; "random",
    places drawn with `seed`, which a choice must beat. The mean of all tokens that Adventurer puts ahead is that of those left;
    the short convolutions see the tokens that are left as neighbours.

    Fine-tune behind it: without, a random choice can be better (docs/tokens.md). Deployable: exports with a fixed number of
    tokens. `keep=1` is the identity.
    """

    keep: float = 0.8
    at: tuple[int, ...] | None = None
    align: bool = True
    score: str = "clipped"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise VitreousError(f"{self.name}: keep must lie in (0, 1], not {self.keep}")
        if self.score not in SCORES:
            raise VitreousError(f"{self.name}: score must be one of {', '.join(SCORES)}, not {self.score!r}")

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        blocks = readers(model, self.name)
        depth, patches = len(blocks), cast(Any, model).pos_embed.shape[1]
        device = next(model.parameters()).device
        order = None
        if self.score == "random":
            order = torch.rand(patches, generator=torch.Generator().manual_seed(self.seed)).to(device)
        at = places(self, depth, (5 * depth // 24, 10 * depth // 24, 15 * depth // 24))
        for i in range(depth):
            left = math.ceil(self.keep * patches) if i in at else patches
            number, patches = left if left < patches else 0, left
            blocks[i] = PruningBlock(cast(MetaBlock, blocks[i]), self, number, i == depth - 1, order if number else None)
