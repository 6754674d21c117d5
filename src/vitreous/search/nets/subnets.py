"""Search the sub-networks of a supernet: what each loses on images, against its multiply-accumulates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...data import Data
from ...errors import VitreousError
from ...outputs import answer, embeds
from ...prune.subnet import Choice, Genes, Space, Subnet, macs, sliced
from .evolve import evolve
from .simq import linas

BATCH = 64


@dataclass(frozen=True)
class Measured:
    """A sub-network, its multiply-accumulates in the blocks, and the share of images that it has wrong (without labels: that it
    answers otherwise than the whole net)."""

    choice: Choice
    macs: float
    wrong: float

    def cut(self, model: nn.Module) -> nn.Module:
        """The ordinary model."""
        return Subnet.of(self.choice).apply(model)


class Judge:
    """Says what sub-networks of `model` have wrong on the images of `data`, which it holds."""

    def __init__(self, model: nn.Module, data: Data) -> None:
        self.model = model.eval()
        batches = [(x, y) for x, y in data.batches(BATCH)]
        if embeds(model, batches[0][0][:1]):
            raise VitreousError("the model gives features: sub-networks are compared by their classes, so give it a classifier")
        with torch.inference_mode():
            known = data.labels is not None
            self.batches = [(x, y if known else answer(model(x)).argmax(1)) for x, y in batches]
        self.tokens = _tokens(model, batches[0][0][:1])

    @torch.no_grad()
    def __call__(self, choice: Choice) -> float:
        wrong = sum(int((answer(sliced(self.model, choice, x)).argmax(1) != y).sum()) for x, y in self.batches)
        return wrong / sum(len(y) for _, y in self.batches)

    def macs(self, choice: Choice) -> float:
        return macs(self.model, choice, self.tokens)


def search_subnets(
    model: nn.Module,
    data: Data,
    space: Space | None = None,
    *,
    limit: float | None = None,
    measured: int = 100,
    predictor: bool = True,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> list[Measured]:
    """The front of sub-networks, from the cheapest, of about `measured` that ran on the images of `data`.

    predictor: fit one to what was measured and search by it (LINAS, `simq.linas`), else measure every child of the evolution.
    limit: multiply-accumulates at most.
    """
    space = space or Space.of(model)
    judge = Judge(model, data)
    found: dict[Genes, tuple[float, float]] = {}

    def measure(genes: Genes) -> tuple[float, float]:
        choice = space.decode(genes)
        key = space.encode(choice)
        if key not in found:
            progress(f"{len(found)} sub-networks measured", min(len(found) / measured, 1.0))
            found[key] = judge.macs(choice), judge(choice)
        return found[key]

    def over(genes: Genes) -> float:
        if limit is None:
            return 0.0
        return judge.macs(space.decode(genes)) / limit - 1

    if limit is not None and judge.macs(space.smallest) > limit:
        raise VitreousError(
            f"the smallest sub-network takes {judge.macs(space.smallest):.3g} multiply-accumulates: allow as many"
        )
    if limit is not None and judge.macs(space.largest) < limit:
        limit = None
    population = max(4, measured // 5)
    if predictor:
        linas(
            space.choices,
            measure,
            encode=lambda g: space.encode(space.decode(g)),
            over=over,
            population=population,
            rounds=4,
            seed=seed,
        )
    else:
        evolve(space.choices, measure, over=over, population=population, generations=5, seed=seed)
    every = [Measured(space.decode(g), cost, wrong) for g, (cost, wrong) in found.items()]
    every.sort(key=lambda m: (m.macs, m.wrong))
    best = np.minimum.accumulate([m.wrong for m in every])
    return [m for i, m in enumerate(every) if i == 0 or m.wrong < best[i - 1]]


def _tokens(model: nn.Module, x: Tensor) -> int:
    found: list[int] = []
    block = cast(Sequence[Any], model.blocks)[0]
    handle = block.register_forward_pre_hook(lambda _, given: found.append(given[0].shape[1]))
    try:
        with torch.inference_mode():
            model(x)
    finally:
        handle.remove()
    return found[0]
