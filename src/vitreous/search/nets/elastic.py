"""The search in a trained ElasticViT supernet: evolution below a limit of multiply-accumulates.

Tang et al., "ElasticViT" (ICCV 2023), section 4.1. Facts from the official repository, microsoft/Moonlit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from ...data import Data
from ...models.elasticvit import ElasticViT
from ...prune.elastic import WIDTHS, between, choice, cost, cut, options, recalibrate, row
from .evolve import Genes, evolve

CLOSE = 0.8  # share of the limit from which the first networks are drawn


def search_elastic(
    model: ElasticViT,
    data: Data,
    macs: float,
    images: Tensor,
    *,
    generations: int = 40,
    population: int = 128,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> tuple[ElasticViT, float, float]:
    """The sub-network, cut out, with fewest errors on `data` of those of at most `macs`; its share of errors and its
    multiply-accumulates. Before each is measured its batch norms are, on `images [N, C, H, W]`.

    Raises `VitreousError` where no network is so small.
    """
    torch.manual_seed(seed)
    net, batches, given = copy.deepcopy(model), list(data.batches(64)), options(model)
    seen: list[int] = []
    decode = lambda genes: choice([values[g] for values, g in zip(given, genes, strict=True)])

    @torch.inference_mode()
    def measure(genes: Genes) -> tuple[float]:
        seen.append(1)
        progress(f"{len(seen)} sub-networks measured", min(len(seen) / (generations * population), 1.0))
        net.run(decode(genes))
        recalibrate(net, images.split(64))
        return (sum(int((net(x).argmax(1) != y).sum()) for x, y in batches) / sum(len(y) for _, y in batches),)

    def over(genes: Genes) -> float:
        numbers = row(decode(genes))
        widths = [numbers[i] for i in WIDTHS]
        return max(cost(model, decode(genes)) / macs - 1, 0.0 if widths == sorted(widths) else 1.0)

    first = [
        tuple(v.index(n) for v, n in zip(given, row(c), strict=True)) for c in between(model, CLOSE * macs, macs, population)
    ]
    found = evolve(
        [len(values) for values in given],
        measure,
        over=over,
        generations=generations,
        population=population,
        mutation=0.2,
        start=list(dict.fromkeys(first)),
        seed=seed,
    )
    best = found.best()
    net.run(decode(best))
    recalibrate(net, images.split(64))
    return cut(net, decode(best)), found.found[best][0], cost(model, decode(best))
