"""Hierarchical side-tuning: a small pyramid beside a frozen backbone, fed by what passes through its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from types import MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..blocks import PlainBlock, Tokens, plain_blocks
from ..errors import VitreousError
from ..steps import Step, step
from .frozen import after_integers, learn_only

WIDTHS, HEADS = (32, 48, 64, 72), (2, 4, 8, 12)
Passed = list[tuple[Tensor, Tensor]]
# What the blocks of the pass that this thread is in have given so far; nothing is kept in the model.
_PASS: ContextVar[Passed | None] = ContextVar("pass", default=None)


class MetaBlock(PlainBlock):
    """A plain block with `meta` tokens of its own `[M, C]` before all others, which leave after it for the side network."""

    def __init__(self, block: PlainBlock, meta: int, width: int, prefix: int) -> None:
        super().__init__(block, block.name, block.last)
        self.meta, self.prefix = nn.Parameter(torch.empty(1, meta, width)), prefix
        nn.init.xavier_uniform_(self.meta)

    def forward(self, x: Tensor | Tokens, *mask: Any, **given: Any) -> Tensor | Tokens:
        x = Tokens.of(x).x
        n = self.meta.shape[1]
        y = Tokens.of(super().forward(torch.cat([self.meta.expand(x.shape[0], -1, -1), x], 1), *mask, **given)).x
        passed = _PASS.get()
        if passed is not None:
            passed.append((y[:, :n], y[:, n + self.prefix :]))
        return y[:, n:]


class Stem(nn.Module):
    """Images `[B, 3, H, W]` to `[B, C, H/4, W/4]`."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 2, 2)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Halve(nn.Module):
    """`[B, C, H, W]` to `[B, C', H/2, W/2]`."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        self.proj, self.norm = nn.Conv2d(before, width, 3, 2, 1), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Reader(nn.Module):
    """Tokens `[B, N, C]` read a few others `[B, M, C]`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, few: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q(x), self.k(few), self.v(few)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SideBlock(nn.Module):
    """Section 3.3: read meta tokens and the mean patch, add the patches of the backbone, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.read = Reader(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, meta: Tensor, patches: Tensor) -> Tensor:
        few = torch.cat([meta, patches.mean(1, keepdim=True)], 1)
        x = x + self.read(self.norm1(x), few) + patches
        return x + self.mlp(self.norm2(x))


class SideStage(nn.Module):
    """One resolution: its share of the backbone's blocks comes over one bridge."""

    def __init__(self, entry: nn.Module, width: int, heads: int, blocks: int, backbone: int) -> None:
        super().__init__()
        self.entry, self.bridge = entry, nn.Linear(backbone, width)
        self.meta_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.blocks = nn.ModuleList(SideBlock(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, passed: Passed, grid: tuple[int, int]) -> Tensor:
        x = self.entry(x)
        size = x.shape[-2:]
        x = x.flatten(2).mT
        for block, norm, (meta, patches) in zip(self.blocks, self.meta_norms, passed, strict=True):
            patches = F.interpolate(patches.mT.unflatten(2, grid), size=size, mode="bilinear", align_corners=False)
            x = block(x, norm(self.bridge(meta)), self.bridge(patches.flatten(2).mT))
        return self.norm(x).mT.unflatten(2, size)


class SideNetwork(nn.Module):
    """Images and what passed through the backbone's blocks to classes: four stages, the mean, a batch norm, a linear layer."""

    def __init__(self, channels: int, backbone: int, depth: int, grid: tuple[int, int], classes: int) -> None:
        super().__init__()
        self.grid, self.shares = grid, [len(t) for t in torch.arange(depth).tensor_split(len(WIDTHS))]
        entries = [Stem(channels, WIDTHS[0]), *(Halve(a, b) for a, b in pairwise(WIDTHS))]
        self.stages = nn.ModuleList(
            SideStage(e, w, h, n, backbone) for e, w, h, n in zip(entries, WIDTHS, HEADS, self.shares, strict=True)
        )
        self.fc_norm = nn.BatchNorm1d(WIDTHS[-1], eps=1e-6, affine=False)
        self.head = nn.Linear(WIDTHS[-1], classes)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(cast(Tensor, m.bias))

    def forward(self, images: Tensor, passed: Passed) -> Tensor:
        if self.training and len(images) == 1:
            raise VitreousError("adapt.HST ends in a batch norm, which cannot learn from one image at a time: use a larger batch")
        x, first = images, 0
        for stage, share in zip(self.stages, self.shares, strict=True):
            x = stage(x, passed[first : first + share], self.grid)
            first += share
        return self.head(self.fc_norm(x.mean((2, 3))))


def _beside(self: Any, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward pass of a model with a side network: the backbone runs for what passes through it."""
    passed: Passed = []
    token = _PASS.set(passed)
    try:
        type(self).forward(self, images, *args, **kwargs)
    finally:
        _PASS.reset(token)
    return self.side(images, passed)


@step("adapt")
@dataclass(frozen=True)
class HST(Step):
    """Lin et al., "Hierarchical Side-Tuning for Vision Transformers" (HST, 2023): `meta` learned tokens a block, and a pyramid of
    four stages that reads them and the patches, and gives the `classes` (0: as many as the model has).

    The meta tokens, all norms of the blocks and the side network learn, 0.77 M parameters beside a ViT-B; the rest is frozen.
    Published for twelve blocks, three a stage; other depths of at least four are shared out evenly. What is learnt is small, but
    gradients still pass through the whole backbone: it saves parameters, no memory. New parts are random, from a fixed seed,
    until they are trained. The backbone's final norm and classifier are not used. Comes before quantization; deployable.
    """

    meta: int = 1
    classes: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.meta <= 100 or not 0 <= self.classes <= 2**20:
            raise VitreousError(f"adapt.HST: meta must lie in 1 to 100, and classes in 0 to {2**20}, not {self}")

    def refuse_after(self, done: Sequence[Step]) -> str:
        if any(s.family in ("tokens", "adapt") for s in done):
            return "the side network reads every patch in its place: it works on the whole sequence, and alone"
        return after_integers(done)

    def refuse_before(self, following: Step) -> str:
        alone = following.family in ("tokens", "adapt")
        return "the side network reads every patch in its place, so none may go or join" if alone else ""

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        anatomy = read(model)
        grid, width = anatomy.require_grid(self.name), cast(int, anatomy.width)
        blocks = plain_blocks(model, self.name)
        if len(blocks) < len(WIDTHS):
            raise VitreousError(
                f"{self.name} shares the blocks out to {len(WIDTHS)} stages, and {anatomy.kind} has {len(blocks)}"
            )
        if any(cast(Any, b.attn).position is not None for b in blocks):
            raise VitreousError(f"{self.name}: attention of {anatomy.kind} knows places, and meta tokens have none")
        head = model.get_submodule(anatomy.classifier) if anatomy.classifier else None
        classes = self.classes or (cast(Any, head).out_features if head is not None else 0)
        if not classes:
            raise VitreousError(f"{self.name}: {anatomy.kind} has no classes: say how many by classes=")
        if anatomy.classifier:
            parent, _, child = anatomy.classifier.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Identity())
        reference, learns = next(blocks[0].parameters()), []
        for block in blocks:
            new = MetaBlock(block, self.meta, width, anatomy.prefix).to(reference)
            parent, _, child = block.name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
            learns += [new.meta, *cast(nn.Module, new.norm1).parameters(), *cast(nn.Module, new.norm2).parameters()]
        channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
        side = SideNetwork(channels, width, len(blocks), grid, classes).to(reference)
        learn_only(model, [*learns, *side.parameters()])
        cast(Any, model).side = side
        cast(Any, model).forward = MethodType(_beside, model)
        read(model, classifier="side.head")
