"""A vision transformer as a supernet: every prefix of its channels, heads, hidden units and blocks is a network of its own.

One set of weights, the largest; a sub-network is the first rows and columns of each layer, as in Cai et al., "Once-for-All" (ICLR
2020), and Chen et al., "AutoFormer" (ICCV 2021). `sliced` runs one in place, for training; `Subnet` is the step that makes it an
ordinary, smaller model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..blocks import merged, plain_blocks
from ..errors import VitreousError
from ..steps import Step, step
from .cut import cut_heads, cut_units, keep, layers_of, units_stand_alone
from .heads import importance

Genes = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """Blocks, and of each the heads and hidden units, that a sub-network has; the first of each."""

    depth: int
    heads: tuple[int, ...]
    mlp: tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """What may be chosen: a depth for all, heads and hidden units for each of the `blocks` blocks; each from small to large."""

    blocks: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp: tuple[int, ...]

    @staticmethod
    def of(model: nn.Module, depth: int | None = None, least: float = 0.5, levels: int = 3) -> Space:
        """Depths from `depth` (by default two less than all), and `levels` numbers of heads and of hidden units from the share
        `least` to all of a timm ViT. Raises `VitreousError` where the blocks are no timm blocks, or not all alike."""
        found = blocks_of(model)
        sizes = {(b.attn.num_heads, b.mlp.fc2.in_features) for b in found}
        if len(sizes) > 1:
            raise VitreousError("a supernet starts from blocks that are all alike, and this model's differ: take it unpruned")
        (h, m), n = next(iter(sizes)), len(found)
        if not 0 < least <= 1 or levels < 1 or (depth is not None and not 0 < depth <= n):
            raise VitreousError(f"give a least share from 0 to 1, at least one level, and a depth from 1 to {n}")
        shares = [least + (1 - least) * i / max(levels - 1, 1) for i in range(levels)] if levels > 1 else [1.0]
        some = lambda size: tuple(sorted({max(1, round(s * size)) for s in shares}))
        return Space(n, tuple(range(depth or max(1, n - 2), n + 1)), some(h), some(m))

    @property
    def choices(self) -> list[int]:
        """How many each gene has: depth, heads of each block, hidden units of each block."""
        return [len(self.depths)] + [len(self.heads)] * self.blocks + [len(self.mlp)] * self.blocks

    def decode(self, genes: Sequence[int]) -> Choice:
        """Genes of blocks beyond the depth count for nothing."""
        depth, n = self.depths[genes[0]], self.blocks
        return Choice(
            depth, tuple(self.heads[g] for g in genes[1 : 1 + depth]), tuple(self.mlp[g] for g in genes[1 + n :][:depth])
        )

    def encode(self, choice: Choice) -> Genes:
        rest = (0,) * (self.blocks - choice.depth)
        heads, mlp = (self.heads.index(h) for h in choice.heads), (self.mlp.index(m) for m in choice.mlp)
        return (self.depths.index(choice.depth), *heads, *rest, *mlp, *rest)

    @property
    def largest(self) -> Choice:
        return self.decode([c - 1 for c in self.choices])

    @property
    def smallest(self) -> Choice:
        return self.decode([0] * len(self.choices))

    def draw(self, generator: random.Random | None = None) -> Choice:
        """Every gene evenly, by `generator`, or by torch's where that is None."""
        below = generator.randrange if generator else lambda n: int(torch.randint(n, ()))
        return self.decode([below(c) for c in self.choices])


def blocks_of(model: nn.Module) -> list[Any]:
    """The blocks of a timm ViT. Raises `VitreousError` where they are others."""
    found = list(cast(Any, getattr(model, "blocks", ())))
    for block in found:
        attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
        if (
            not isinstance(getattr(attn, "qkv", None), nn.Linear)
            or not hasattr(mlp, "fc1")
            or layers_of(cast(nn.Module, mlp)) is None
        ):
            found = []
            break
    if not found or not units_stand_alone(found[0].mlp):
        raise VitreousError(
            f"a supernet is made of a plain ViT of timm's, with blocks of qkv, proj, fc1 and fc2, not of {type(model).__name__}"
        )
    return found


def macs(model: nn.Module, choice: Choice, tokens: int) -> float:
    """Multiply-accumulates of an image of so many tokens in the blocks of a sub-network."""
    block = blocks_of(model)[0]
    width, d = block.attn.proj.out_features, block.attn.proj.in_features // block.attn.num_heads
    return float(
        sum(tokens * width * (4 * h * d + 2 * m) + 2 * tokens**2 * h * d for h, m in zip(choice.heads, choice.mlp, strict=True))
    )


@contextmanager
def _shaped(blocks: list[Any], choice: Choice) -> Iterator[None]:
    """Blocks that know how many heads they have; those beyond the depth hand on what they get."""
    kept = [(b.attn.num_heads, b.attn.attn_dim) for b in blocks]
    try:
        for i, b in enumerate(blocks):
            if i < choice.depth:
                b.attn.attn_dim = b.attn.attn_dim // b.attn.num_heads * choice.heads[i]
                b.attn.num_heads = choice.heads[i]
            else:
                b.forward = lambda x, *rest, **given: x
        yield
    finally:
        for b, (heads, dim) in zip(blocks, kept, strict=True):
            b.attn.num_heads, b.attn.attn_dim = heads, dim
            vars(b).pop("forward", None)


def sliced(model: nn.Module, choice: Choice, images: Tensor) -> Any:
    """What the sub-network of `model` answers to `images`; gradients reach the rows and columns that it has."""
    blocks = blocks_of(model)
    names = {m: n for n, m in model.named_modules()}
    held: dict[str, Tensor] = {}
    for b, h, m in zip(blocks, choice.heads, choice.mlp, strict=False):
        attn, at = b.attn, names[b]
        rows = lambda t, heads=attn.num_heads, h=h: t.unflatten(0, (3, heads, -1))[:, :h].flatten(0, 2)
        held[f"{at}.attn.qkv.weight"] = rows(attn.qkv.weight)
        if attn.qkv.bias is not None:
            held[f"{at}.attn.qkv.bias"] = rows(attn.qkv.bias)
        held[f"{at}.attn.proj.weight"] = attn.proj.weight[:, : attn.proj.in_features // attn.num_heads * h]
        first, last = cast(Any, layers_of(b.mlp))
        for name, layer in ((n, layer) for n, layer in b.mlp.named_modules() if layer in first):
            part = lambda t, m=m, size=last.in_features: t.unflatten(0, (-1, size))[:, :m].flatten(0, 1)
            held[f"{at}.mlp.{name}.weight"] = part(layer.weight)
            if layer.bias is not None:
                held[f"{at}.mlp.{name}.bias"] = part(layer.bias)
        held[f"{at}.mlp.fc2.weight"] = last.weight[:, :m]
    with _shaped(blocks, choice):
        return functional_call(model, held, (images,))


@torch.no_grad()
def sort_units(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """Put the heads and hidden units of each block, in place, into the order of their importance, so that prefixes hold the best;
    the model answers as before.

    Hidden units by the L1 norm of what makes and reads them; heads by |∂L/∂ξ| on `images` `[N, C, H, W]` (`prune.Heads`), without
    images by the L1 norm of their values and output.
    """
    blocks = blocks_of(model)
    scores = importance(model, images) if images is not None else [None] * len(blocks)
    for b, score in zip(blocks, scores, strict=True):
        attn, (first, last) = b.attn, cast(Any, layers_of(b.mlp))
        h = attn.num_heads
        if score is None:
            value, out = attn.qkv.weight.unflatten(0, (3, h, -1))[2], attn.proj.weight.unflatten(1, (h, -1))
            score = value.abs().sum((1, 2)) * out.abs().sum((0, 2))
        order = score.argsort(descending=True, stable=True)
        size = attn.proj.in_features // h
        rows = (order[:, None] * size + torch.arange(size)).flatten()
        keep(attn.qkv, torch.cat([rows + i * attn.proj.in_features for i in range(3)]), 0)
        keep(attn.proj, rows, 1)
        made = sum(layer.weight.unflatten(0, (-1, last.in_features)).abs().sum((0, 2)) for layer in first)
        order = (made * last.weight.abs().sum(0)).argsort(descending=True, stable=True)
        for layer in first:
            times = layer.out_features // last.in_features
            keep(layer, torch.cat([order + i * last.in_features for i in range(times)]), 0)
        keep(last, order, 1)
    return model


@step("prune")
@dataclass(frozen=True)
class Subnet(Step):
    """A sub-network of a supernet, cut out: the first `depth` blocks, and of each the first so many heads and hidden units.

    heads, mlp: one number for each block that is left. What is left is an ordinary model: it saves, explains, quantizes and
    ships. Meant for models trained as supernets (`learn.InstaTune`), whose prefixes answer well; after `sort_units` those of any
    model lose less.
    """

    depth: int
    heads: tuple[int, ...]
    mlp: tuple[int, ...]

    plans: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        if not self.depth == len(self.heads) == len(self.mlp) or self.depth < 1 or min(*self.heads, *self.mlp) < 1:
            raise VitreousError(f"{self.name}: give a number of heads and of hidden units for each of the {self.depth} blocks")

    @staticmethod
    def of(choice: Choice) -> Subnet:
        return Subnet(choice.depth, choice.heads, choice.mlp)

    def refuse_after(self, done: Sequence[Step]) -> str:
        quantized = any(s.family == "quant" for s in done)
        return "the scales were calibrated with all units: cut first" if quantized else ""

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        blocks = plain_blocks(merged(model), self.name)
        if self.depth > len(blocks):
            raise VitreousError(f"{self.name}: the model has {len(blocks)} blocks, not {self.depth}")
        owner, _, first = blocks[0].name.rpartition(".")
        row = model.get_submodule(owner)
        if not isinstance(row, nn.Sequential | nn.ModuleList) or len(row) != len(blocks) or first != "0":
            raise VitreousError(
                f"{self.name}: the blocks of {type(model).__name__} do not stand in one row: none can be left out"
            )
        del row[self.depth :]
        blocks[self.depth - 1].last = True
        for block, h, m in zip(blocks, self.heads, self.mlp, strict=False):
            cut_heads(block.attn, range(h), self.name, block.name)
            cut_units(cast(nn.Module, block.mlp), range(m), self.name, block.name)
