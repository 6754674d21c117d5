"""A vision transformer as a supernet: every prefix of its channels, heads, hidden units and blocks is a network of its own.

One set of weights, the largest; a sub-network is the first rows and columns of each layer, as in Cai et al., "Once-for-All" (ICLR
2020), and Chen et al., "AutoFormer" (ICCV 2021). `sliced` runs one in place, for training; `Subnet` is the step that makes it an
ordinary, smaller model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..blocks import merged, plain_blocks
from ..errors import VitreousError
from ..steps import Step, step
from ..store.expects import expectations
from .cut import cut_heads, cut_units, cut_width, keep, layers_of, units_stand_alone
from .heads import importance
from .units import around

Genes = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """Blocks, and of each the heads and hidden units, that a sub-network has, and the channels of its tokens (None: all); the
    first of each."""

    depth: int
    heads: tuple[int, ...]
    mlp: tuple[int, ...]
    width: int | None = None


@dataclass(frozen=True)
class Space:
    """What may be chosen: a depth for all, heads and hidden units for each of the `blocks` blocks, a width of the tokens for all
    (none to choose: that of the model); each from small to large."""

    blocks: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp: tuple[int, ...]
    widths: tuple[int, ...] = ()

    @staticmethod
    def of(model: nn.Module, depth: int | None = None, least: float = 0.5, levels: int = 3, width: float = 1.0) -> Space:
        """Depths from `depth` (by default two less than all), and `levels` numbers of heads and of hidden units from the share
        `least`, and of channels from the share `width`, to all of a timm ViT. Raises `VitreousError` where the blocks are no timm
        blocks, or not all alike."""
        found = blocks_of(model)
        sizes = {(b.attn.num_heads, b.mlp.fc2.in_features) for b in found}
        if len(sizes) > 1:
            raise VitreousError("a supernet starts from blocks that are all alike, and this model's differ: take it unpruned")
        (h, m), n = next(iter(sizes)), len(found)
        if not 0 < least <= 1 or levels < 1 or (depth is not None and not 0 < depth <= n):
            raise VitreousError(f"give a least share from 0 to 1, at least one level, and a depth from 1 to {n}")
        if not 0 < width <= 1:
            raise VitreousError(f"give a least share of the width above 0 and at most 1, not {width:g}")

        def some(size: int, share: float) -> tuple[int, ...]:
            shares = [share + (1 - share) * i / (levels - 1) for i in range(levels)] if levels > 1 else [1.0]
            return tuple(sorted({max(1, round(s * size)) for s in shares}))

        channels = some(found[0].attn.proj.out_features, width) if width < 1 else ()
        return Space(n, tuple(range(depth or max(1, n - 2), n + 1)), some(h, least), some(m, least), channels)

    @property
    def choices(self) -> list[int]:
        """How many each gene has: depth, heads of each block, hidden units of each block, and the width, if it may be chosen."""
        counts = [len(self.depths)] + [len(self.heads)] * self.blocks + [len(self.mlp)] * self.blocks
        return counts + ([len(self.widths)] if self.widths else [])

    def decode(self, genes: Sequence[int]) -> Choice:
        """Genes of blocks beyond the depth count for nothing."""
        depth, n = self.depths[genes[0]], self.blocks
        heads, mlp = (self.heads[g] for g in genes[1 : 1 + depth]), (self.mlp[g] for g in genes[1 + n :][:depth])
        return Choice(depth, tuple(heads), tuple(mlp), self.widths[genes[-1]] if self.widths else None)

    def encode(self, choice: Choice) -> Genes:
        rest = (0,) * (self.blocks - choice.depth)
        heads, mlp = (self.heads.index(h) for h in choice.heads), (self.mlp.index(m) for m in choice.mlp)
        width = () if choice.width is None else (self.widths.index(choice.width),)
        return (self.depths.index(choice.depth), *heads, *rest, *mlp, *rest, *width)

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
            or not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity)  # over all heads, which then cannot go
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
    width, d = choice.width or block.attn.proj.out_features, block.attn.proj.in_features // block.attn.num_heads
    return float(
        sum(tokens * width * (4 * h * d + 2 * m) + 2 * tokens**2 * h * d for h, m in zip(choice.heads, choice.mlp, strict=True))
    )


def outside(model: nn.Module, image: Tensor | None = None) -> dict[str, int]:
    """What belongs to the channels of the tokens beside the blocks, as `units.around`; `image` `[1, C, H, W]`, by default an
    empty one of the size that the model is made for. Raises `VitreousError` where channels cannot go."""
    if image is None:
        embed, weight = cast(Any, getattr(model, "patch_embed", None)), next(model.parameters())
        size = getattr(embed, "img_size", None) or (expectations(model).get("input_size") or [3, 224, 224])[1:]
        channels = getattr(getattr(embed, "proj", None), "in_channels", 3)
        image = torch.zeros(1, channels, *size, dtype=weight.dtype, device=weight.device)
    found = around(model, cast(Any, blocks_of(model)), image)
    if not found:
        raise VitreousError(
            f"the width of {type(model).__name__} cannot be less: more than norms, tokens and linear layers reads its channels"
        )
    return found


@contextmanager
def _shaped(blocks: list[Any], choice: Choice, norms: Sequence[Any]) -> Iterator[None]:
    """Blocks that know how many heads they have, and `norms` how many channels; blocks beyond the depth hand on what they get."""
    kept = [(b.attn.num_heads, b.attn.attn_dim) for b in blocks]
    shapes = [norm.normalized_shape for norm in norms]
    try:
        for norm in norms:
            norm.normalized_shape = (choice.width,)
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
        for norm, shape in zip(norms, shapes, strict=True):
            norm.normalized_shape = shape


def _narrowed(model: nn.Module, blocks: list[Any], held: dict[str, Tensor], width: int, image: Tensor) -> list[nn.Module]:
    """Narrow to the first `width` channels what `held` has of `blocks`, and add to it what else belongs to channels; the norms
    among that."""
    modules, axes = dict(model.named_modules()), outside(model, image)
    names = {m: n for n, m in modules.items()}
    found: dict[str, int] = {}
    for name, axis in axes.items():
        parts = modules[name].named_parameters(recurse=False) if name in modules else []
        found |= {f"{name}.{n}": axis for n, p in parts if p.ndim > axis} if name in modules else {name: axis}
    for b in blocks:
        first, last = cast(Any, layers_of(b.mlp))
        found |= {f"{names[layer]}.weight": 1 for layer in (b.attn.qkv, *first)}
        found |= {f"{names[layer]}.{n}": 0 for layer in (b.attn.proj, last) for n, _ in layer.named_parameters()}
        found |= {f"{names[b]}.{n}": 0 for n, _ in b.named_parameters() if not n.startswith(("attn.", "mlp."))}
    for name, axis in found.items():
        held[name] = held.get(name, model.get_parameter(name)).narrow(axis, 0, width)
    owners = {modules[name.rpartition(".")[0]] for name in found}
    return [m for m in owners if isinstance(getattr(m, "normalized_shape", None), tuple)]


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
    norms = [] if choice.width is None else _narrowed(model, blocks[: choice.depth], held, choice.width, images[:1])
    with _shaped(blocks, choice, norms):
        return functional_call(model, held, (images,))


@torch.no_grad()
def sort_units(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """Put the heads and hidden units of each block, and the channels of the tokens, in place, into the order of their importance,
    so that prefixes hold the best; the model answers as before.

    Hidden units and channels by the L1 norm of what makes and reads them (Cai et al., 2020); heads by |∂L/∂ξ| on `images`
    `[N, C, H, W]` (`prune.Heads`), without images by the L1 norm of their values and output. Channels that cannot go stay.
    """
    blocks = blocks_of(model)
    with suppress(VitreousError):
        _sort_channels(model, blocks, outside(model, None if images is None else images[:1]))
    scores = importance(model, images) if images is not None else [None] * len(blocks)
    for b, score in zip(blocks, scores, strict=True):
        attn, (first, last) = b.attn, cast(Any, layers_of(b.mlp))
        h = attn.num_heads
        if score is None:
            value, out = attn.qkv.weight.unflatten(0, (3, h, -1))[2], attn.proj.weight.unflatten(1, (h, -1))
            score = value.abs().sum((1, 2)) * out.abs().sum((0, 2))
        order = score.argsort(descending=True, stable=True)
        size = attn.proj.in_features // h
        rows = (order[:, None] * size + torch.arange(size, device=order.device)).flatten()
        keep(attn.qkv, torch.cat([rows + i * attn.proj.in_features for i in range(3)]), 0)
        keep(attn.proj, rows, 1)
        made = sum(layer.weight.unflatten(0, (-1, last.in_features)).abs().sum((0, 2)) for layer in first)
        order = (made * last.weight.abs().sum(0)).argsort(descending=True, stable=True)
        for layer in first:
            times = layer.out_features // last.in_features
            keep(layer, torch.cat([order + i * last.in_features for i in range(times)]), 0)
        keep(last, order, 1)
    return model


def _sort_channels(model: nn.Module, blocks: list[Any], axes: dict[str, int]) -> None:
    """By the L1 norm of what the blocks' layers write into each channel and read of it."""
    score: Any = 0.0
    for b in blocks:
        first, last = cast(Any, layers_of(b.mlp))
        score += sum(layer.weight.abs().sum(0) for layer in (b.attn.qkv, *first))
        score += sum(layer.weight.abs().sum(1) for layer in (b.attn.proj, last))
    cut_width(model, blocks, score.argsort(descending=True, stable=True).tolist(), axes)


@step("prune")
@dataclass(frozen=True)
class Subnet(Step):
    """A sub-network of a supernet, cut out: the first `depth` blocks, of each the first so many heads and hidden units, and of
    the tokens the first `width` channels (None: all).

    heads, mlp: one number for each block that is left. What is left is an ordinary model: it saves, explains, quantizes and
    ships. Meant for models trained as supernets (`learn.InstaTune`), whose prefixes answer well; after `sort_units` those of any
    model lose less.
    """

    depth: int
    heads: tuple[int, ...]
    mlp: tuple[int, ...]
    width: int | None = None

    plans: ClassVar[dict[str, Any]] = {"around": dict[str, int] | None}

    def __post_init__(self) -> None:
        if not self.depth == len(self.heads) == len(self.mlp) or self.depth < 1 or min(*self.heads, *self.mlp) < 1:
            raise VitreousError(f"{self.name}: give a number of heads and of hidden units for each of the {self.depth} blocks")
        if self.width is not None and self.width < 1:
            raise VitreousError(f"{self.name}: width must be at least 1, not {self.width}")

    @staticmethod
    def of(choice: Choice) -> Subnet:
        return Subnet(choice.depth, choice.heads, choice.mlp, choice.width)

    def refuse_after(self, done: Sequence[Step]) -> str:
        quantized = any(s.family == "quant" for s in done)
        return "the scales were calibrated with all units: cut first" if quantized else ""

    def plan(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any]:
        """Of a narrower one, what belongs to the tokens' channels beside the blocks."""
        if self.width is None:
            return {}
        if self.width > (all_ := blocks_of(model)[0].attn.proj.out_features):
            raise VitreousError(f"{self.name}: the tokens of this model have {all_} channels, not {self.width}")
        return {"around": outside(model, None if calibration is None else calibration[:1].to(next(model.parameters())))}

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
        if self.width is not None:
            try:
                cut_width(model, blocks[: self.depth], range(self.width), plan["around"])
            except (AttributeError, IndexError, KeyError) as error:
                raise VitreousError(f"{self.name}: the plan is of another model: {error}") from error
