"""The search of ViT-ResNAS in a trained supernet: evolution just below a limit of multiply-accumulates.

Liao, Karaman and Sze, "Searching for Efficient Multi-Stage Vision Transformers" (2021), section 3.3. Facts from the official
repository.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ...data import Data
from ...errors import VitreousError
from ...learn.vit_resnas import levels
from ...models.vit_resnas import PATCH, Sizes, ViTResNAS
from ...store import open_model
from ...store.expects import expectations, restore
from .evolve import Genes, evolve

FLOOR = 0.975  # share of the limit below which a network is not looked at


class Supernet:
    """Genes of a trained `ViTResNAS`: widths of the stages, then of each block heads, hidden units, and presence of every
    second one; 0 is all. The numbers in `sizes` are for each image of a batch, the same for all."""

    def __init__(self, model: ViTResNAS, least: float = 0.5, count: int = 3) -> None:
        self.model, self.shares = model, levels(least, count)
        self.stages = model.staged
        self.blocks = [b for stage in self.stages for b in stage]

    @property
    def choices(self) -> list[int]:
        n = len(self.shares)
        return [n] * (3 + 2 * len(self.blocks)) + [2 if s else 1 for s in self.model.removable]

    def decode(self, genes: Genes) -> tuple[list[int], list[int], list[int], list[int]]:
        """Widths, heads, hidden units and presence."""
        n, some = len(self.blocks), lambda g, size: max(1, round(self.shares[g] * size))
        widths = [some(g, width) for g, width in zip(genes, self.model.widths, strict=False)]
        heads = [some(g, b.attn.heads) for g, b in zip(genes[3:], self.blocks, strict=False)]
        hidden = [some(g, b.fc1.out_features) for g, b in zip(genes[3 + n :], self.blocks, strict=False)]
        return widths, heads, hidden, [1 - g for g in genes[3 + 2 * n :]]

    def sizes(self, genes: Genes, images: int) -> Sizes:
        full = lambda values: tuple(torch.full((images,), v) for v in values)
        return Sizes(*map(full, self.decode(genes)))

    def macs(self, genes: Genes) -> float:
        """Multiply-accumulates of an image in blocks and reductions."""
        widths, heads, hidden, present = self.decode(genes)
        total, n = 0.0, 0
        for i, (stage, c) in enumerate(zip(self.stages, widths, strict=True)):
            side = self.model.img_size[0] // PATCH // 2**i
            tokens = side * side + 1
            for b in stage:
                inner = heads[n] * (b.attn.proj.in_features // b.attn.heads)
                total += present[n] * tokens * (4 * c * inner + 2 * tokens * inner + 2 * c * hidden[n])
                n += 1
            if i < 2:
                total += (side * side // 4 * 9 + 1) * c * widths[i + 1]
        return total

    @torch.no_grad()
    def cut(self, genes: Genes) -> nn.Module:
        """The ordinary, smaller ViTResNAS; in eval mode."""
        widths, heads, hidden, present = self.decode(genes)
        if sorted(widths) != widths:
            raise VitreousError(f"the widths of the stages must not fall, and {widths} do")
        kept = [i for i, there in enumerate(present) if there]
        starts = [sum(len(s) for s in self.stages[:i]) for i in range(4)]
        depths = [sum(a <= k < b for k in kept) for a, b in pairwise(starts)]
        dims = [stage[0].attn.proj.in_features // stage[0].attn.heads for stage in self.stages]
        side = self.model.img_size[0]
        stem: Any = self.model.patch_embed
        made: Any = open_model(
            "vit_resnas_tiny",
            img_size=side,
            in_chans=stem.conv1[0].in_channels,
            num_classes=self.model.num_classes,
            widths=widths,
            head_dims=dims,
            depths=depths,
            heads=[heads[i] for i in kept],
            hidden=[hidden[i] for i in kept],
            middle=stem.conv1[0].out_channels,
        )
        restore(made, {**expectations(self.model), "input_size": [stem.conv1[0].in_channels, side, side]})
        names, place = {}, [0, 0, 0]
        for i in kept:
            stage = sum(i >= s for s in starts[1:3])
            names[f"stages.{stage}.{place[stage]}."] = f"stages.{stage}.{i - starts[stage]}."
            place[stage] += 1
        mine = self.model.state_dict()
        state: dict[str, Tensor] = {}
        for name, wanted in made.state_dict().items():
            start = next((n for n in names if name.startswith(n)), "")
            full = mine[names.get(start, "") + name[len(start) :]]
            if ".attn.qkv." in name:
                full = full.unflatten(0, (3, -1))[:, : wanted.shape[0] // 3].flatten(0, 1)
            state[name] = full[tuple(slice(n) for n in wanted.shape)]
        made.load_state_dict(state)
        return made.eval()


def search_resnas(
    model: ViTResNAS,
    data: Data,
    macs: float,
    *,
    least: float = 0.5,
    levels: int = 3,
    generations: int = 20,
    population: int = 75,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> tuple[Genes, float, Supernet]:
    """The sub-network with fewest errors on the images of `data` of those between 97.5 % of `macs` and all of it; its share of
    errors, and the supernet that can cut it out.

    Published: 500 networks at random, then 19 times 75 mutations and 75 crossovers of the best 75 of all.
    """
    net, batches = Supernet(model.eval(), least, levels), list(data.batches(64))
    seen: list[int] = []

    @torch.inference_mode()
    def measure(genes: Genes) -> tuple[float]:
        seen.append(1)
        progress(f"{len(seen)} sub-networks measured", min(len(seen) / (generations * population), 1.0))
        answers = lambda x: model.forward_head(model.forward_features(x, net.sizes(genes, len(x))))
        wrong = sum(int((answers(x).argmax(1) != y).sum()) for x, y in batches)
        return (wrong / sum(len(y) for _, y in batches),)

    def over(genes: Genes) -> float:
        share, widths = net.macs(genes) / macs, net.decode(genes)[0]
        return max(share - 1, FLOOR - share, 0.0 if sorted(widths) == widths else 1.0)

    found = evolve(
        net.choices, measure, over=over, generations=generations, population=population, mutation=0.3, seed=seed
    )  # fmt: skip
    best = found.best()
    return best, found.found[best][0], net
