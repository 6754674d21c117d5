"""The joint search of SimQ-NAS on a vision transformer: its shape, and 8 bits or floats for each linear layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...data import Data
from ...outputs import answer
from ...prune.subnet import Choice, Genes, Space, Subnet
from ...quant import RepQ
from ...steps import Recipe, Step, slim
from .simq import linas
from .subnets import Judge

LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class Policy:
    """A sub-network with the names of its layers that stay in floats; `bytes` counted of its weights (8 or 32 bits each), `wrong`
    the share of images that it has wrong in the simulated integers."""

    choice: Choice
    floats: tuple[str, ...]
    bytes: int
    wrong: float

    @property
    def recipe(self) -> Recipe:
        """As `vitreous slim --recipe` takes it."""
        return Recipe(steps(self.choice, self.floats))


def steps(choice: Choice, floats: tuple[str, ...]) -> tuple[Step, ...]:
    """A sub-network cut out, then quantized but for `floats`; not at all where every layer is among them."""
    whole = len(floats) == len(LAYERS) * choice.depth
    return (Subnet.of(choice), *(() if whole else (RepQ(weights=8, activations=8, floats=floats),)))


def search_policy(
    model: nn.Module,
    data: Data,
    calibrate: Tensor,
    space: Space | None = None,
    *,
    population: int = 20,
    rounds: int = 3,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> list[Policy]:
    """The front of bytes and errors on the images of `data`, from the smallest; `calibrate` `[N, C, H, W]` sets the ranges.

    Genes are those of `space`, then one for each linear layer of the blocks (0: 8 bits, 1: floats): Sridhar et al. (2023). Static
    8-bit integers, a scale for each row of a weight. Each network costs a quantization, seconds on a small model.
    """
    space, judge = space or Space.of(model), Judge(model, data)
    shape = len(space.choices)
    choices = [*space.choices, *[2] * (len(LAYERS) * space.blocks)]
    known: dict[Genes, Policy] = {}

    def encode(genes: Genes) -> Genes:
        choice = space.decode(genes[:shape])
        bits = genes[shape:]
        used = len(LAYERS) * choice.depth
        return (*space.encode(choice), *bits[:used], *[0] * (len(bits) - used))

    def measure(genes: Genes) -> tuple[float, float]:
        genes = encode(genes)
        if genes not in known:
            progress(f"{len(known)} networks measured", min(len(known) / (population * (rounds + 1)), 1.0))
            choice = space.decode(genes[:shape])
            bits = genes[shape : shape + len(LAYERS) * choice.depth]
            floats = tuple(name for name, bit in zip(names(choice.depth), bits, strict=True) if bit)
            cut = Subnet.of(choice).apply(model)
            made = slim(model, steps(choice, floats), calibrate)
            with torch.no_grad():
                wrong = sum(int((answer(made(x)).argmax(1) != y).sum()) for x, y in judge.batches)
            share = wrong / sum(len(y) for _, y in judge.batches)
            known[genes] = Policy(choice, floats, size(cut, floats), share)
        return known[genes].bytes, known[genes].wrong

    found = linas(choices, measure, encode=encode, population=population, rounds=rounds, seed=seed)
    return [known[g] for g in found.front()]


def names(depth: int) -> list[str]:
    return [f"blocks.{i}.{layer}" for i in range(depth) for layer in LAYERS]


def size(cut: nn.Module, floats: tuple[str, ...]) -> int:
    """Bytes of a model whose linear layers in the blocks have weights of 8 bits but for `floats`."""
    modules: dict[str, Any] = dict(cut.named_modules())
    small = sum(cast(Tensor, modules[n].weight).numel() for n in modules if n.endswith(LAYERS) and n not in floats)
    return 4 * sum(p.numel() for p in cut.parameters()) - 3 * small
