"""DeepMAD: a network designed by a mathematical program, without training any.

Shen et al., "DeepMAD: Mathematical Architecture Design for Deep Convolutional Neural Network" (CVPR 2023): equations 1 to 5 for
entropy and effectiveness, section 3.3 for the program. Facts from the official repository.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import VitreousError
from ...models.deepmad import Stage
from .evolve import Genes, evolve

WEIGHTS = (1, 1, 1, 1, 8)  # of the entropies of the five stages
UNEVEN = 10.0  # what the spread of depths costs
KERNELS = (3, 5, 7)
DEEPEST = 14
WIDEST = 1280, 256  # channels of a stage, and between its 1 × 1 convolutions, at most; in steps of 8


@dataclass(frozen=True)
class Structure:
    """What `DeepMAD` is built from, for images of `size` pixels a side."""

    stages: tuple[Stage, ...]
    stem: int = 32
    depthwise: bool = False
    last: int | None = None
    size: int = 224

    def arguments(self) -> dict[str, Any]:
        """For `models.deepmad.DeepMAD`, and for timm's `create_model("deepmad_r18", …)`."""
        stages = [[s.out, s.btn, s.kernel, s.depth, s.stride] for s in self.stages]
        return dict(stem=self.stem, stages=stages, depthwise=self.depthwise, last=self.last)


@dataclass(frozen=True)
class Figures:
    """entropies: H_i of the five stages, weighted. effectiveness: ρ, depth over mean width. penalty: of uneven depths. flops:
    multiply-accumulates and what norms and activations do, of one image; params: without the classifier. Both as the official
    counters have them, which leave out what squeeze-and-excitation computes."""

    entropies: tuple[float, ...]
    effectiveness: float
    penalty: float
    flops: float
    params: float

    @property
    def entropy(self) -> float:
        return sum(self.entropies)

    @property
    def score(self) -> float:
        """What the program makes large."""
        return self.entropy - self.penalty


def figures(net: Structure, weights: Sequence[float] = WEIGHTS, as_published: bool = False) -> Figures:
    """Entropy, effectiveness and cost of a structure, in closed form.

    as_published: as the released code, where a depthwise block reports that its maps have one place, so that log r² vanishes
    behind it; the rank within one space is nearly the same. Else r is the side of the maps.
    """
    depthwise = net.depthwise
    layers, entropy, log_width = 1, 0.5 * math.log(3 * 9), math.log(3 * 9)
    side, inputs = net.size // 2, net.stem
    per_place = 27 * net.stem + 3 * net.stem
    flops, params = per_place * side**2, 27.0 * net.stem + 2 * net.stem
    found: list[tuple[float, float, int]] = []  # of each stage: entropy; log of the product of widths, layers: of all so far

    def closed() -> None:
        seen = 1 if as_published and depthwise and layers > 1 else side
        found.append(((math.log(inputs) + 2 * math.log(seen)) * entropy, log_width, layers))

    for stage in net.stages:
        if stage.stride == 2:
            closed()
        k2, b, out = stage.kernel**2, stage.btn, stage.out
        middle = b * k2 if depthwise else b * b * k2
        for first, count in ((True, 1), (False, stage.depth - 1)):
            stride = stage.stride if first else 1
            smaller = side // stride
            width = math.log(inputs) + math.log(k2 if depthwise else b * k2) + math.log(b)
            entropy, log_width, layers = entropy + count * width / 2, log_width + count * width, layers + 3 * count
            reads, mixes, writes = inputs * b + 2 * b, middle + 2 * b, b * out + 2 * out
            flops += count * ((reads + b) * side**2 + (mixes + b + writes + out) * smaller**2)
            params += count * (reads + mixes + writes)
            if depthwise:
                squeezed = 8 * max(1, round(b / 4) // 8)
                params += count * (2 * b * squeezed + 2 * (b + squeezed))
            if stride == 2 and (not depthwise or inputs == out):
                flops += count * inputs * side**2
            if first and not depthwise:
                flops, params = flops + (inputs * out + 3 * out) * smaller**2, params + inputs * out + 2 * out
            side, inputs = smaller, out
    if net.last:
        entropy, log_width, layers = entropy + 0.5 * math.log(inputs), log_width + math.log(inputs), layers + 1
        flops += (inputs * net.last + 3 * net.last) * side**2
        params += inputs * net.last + 2 * net.last
        inputs = net.last
    closed()
    if len(found) != len(weights):
        raise VitreousError(f"DeepMAD weighs the entropies of {len(weights)} stages, and this structure has {len(found)}")
    depths = [s.depth for s in net.stages]
    if as_published and not depthwise:
        depths = depths[2:]
    rho = max(n * math.exp(-w / n) for _, w, n in found)
    entropies = tuple(a * h for a, (h, _, _) in zip(weights, found, strict=True))
    return Figures(entropies, rho, UNEVEN * math.exp(float(np.std(depths))), flops, params)


def design(
    flops: float,
    params: float = math.inf,
    rho: float = 0.3,
    *,
    size: int = 224,
    generations: int = 200,
    population: int = 100,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> Structure:
    """The structure of most entropy, less the penalty for uneven depths, within `flops`, `params` (without a classifier) and an
    effectiveness of at most `rho`: equation 5 (published: ρ ≤ 0.3).

    Five stages of blocks 1 × 1, k × k, 1 × 1, of strides 2, 2, 2, 1, 2. Raises `VitreousError` where nothing so small is found.
    """
    if not (flops > 0 and params > 0 and rho > 0):
        raise VitreousError("give flops, params and rho above 0")
    choices = [n for _ in range(5) for n in (WIDEST[0] // 8, WIDEST[1] // 8, len(KERNELS), DEEPEST)]

    def structure(genes: Genes) -> Structure:
        parts = [genes[i : i + 4] for i in range(0, 20, 4)]
        strides = (2, 2, 2, 1, 2)
        stages = (Stage(8 * o + 8, 8 * b + 8, KERNELS[k], d + 1, s) for (o, b, k, d), s in zip(parts, strides, strict=True))
        return Structure(tuple(stages), size=size)

    known: dict[Genes, Figures] = {}

    def of(genes: Genes) -> Figures:
        if genes not in known:
            known[genes] = figures(structure(genes))
        return known[genes]

    def over(genes: Genes) -> float:
        f = of(genes)
        return sum(max(0.0, value / limit - 1) for value, limit in ((f.flops, flops), (f.params, params), (f.effectiveness, rho)))

    progress("designing", 0.0)
    small = tuple(g for out in (3, 5, 7, 9, 11) for g in (out, 3, 0, 0))
    evolution = evolve(
        choices,
        lambda genes: (-of(genes).score,),
        over=over,
        generations=generations,
        population=population,
        mutation=0.1,
        ordered=True,
        start=[small],
        seed=seed,
    )
    return structure(evolution.best())
