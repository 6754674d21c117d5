"""As-ViT: find a topology, then depth and width for it, by two measures of an untrained network.

Chen et al., "Auto-scaling Vision Transformers without Training" (ICLR 2022), sections 3 and 4, algorithm 1. Facts from the
official repository. In its search a branch marks bad conditions as failures, which is always overwritten: left out here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import VitreousError
from ...models.as_vit import AsViT, init, parse

KERNELS, MERGES, EXPANSIONS, HEADS = (4, 5, 6, 7, 8), (2, 3, 4), (2, 3, 4, 5, 6), (16, 32, 64)
SPLITS = ((2, 4, 8), (1, 2, 4), (1, 2), (1,))
WIDER = (1.05, 1.1, 1.15, 1.2)
SCALED = 4  # times the width of the search is the width that is counted, and built
HISTORY = 20  # samples whose range scales a reward

Progress = Callable[[str, float], None]


def features(model: AsViT, x: Tensor) -> Tensor:
    """What enters the final norm, averaged over tokens: `[B, C, H, W]` to `[B, C']`."""
    return model.tokens(x).mean(1)


def ntk(model: AsViT, images: Tensor) -> Tensor:
    """The neural tangent kernel `[N, N]` of images `[N, C, H, W]`: products of the gradients of the summed features by all
    weights, those of norms and convolutions among them and no bias (equation 4)."""
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    model.train()
    out, rows = features(model, images).sum(1), []
    for value in out:
        found = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([g.flatten() for g in found if g is not None]))
    gradients = torch.stack(rows)
    return gradients @ gradients.T


def condition(model: AsViT, images: Tensor) -> float:
    """κ, the largest over the smallest eigenvalue of the kernel; smaller is easier to train. Infinite where it is singular."""
    values = torch.linalg.eigvalsh(ntk(model, images))
    return float(values[-1] / values[0]) if values[0] > 0 else math.inf


def length_distortion(model: AsViT, plane: Tensor, points: int = 10) -> float:
    """How long a great circle becomes (equation 3): Σ ‖∂f / ∂θ‖ over `points` from 0 to 2π, both ends among them, without norms.

    plane: two orthonormal directions of images, `[2, C, H, W]`. Larger is more expressive.
    """
    model = without_norms(model).train()
    theta = torch.linspace(0, 2 * math.pi, points, dtype=plane.dtype, device=plane.device)
    cos, sin = theta.cos()[:, None, None, None], theta.sin()[:, None, None, None]
    circle, speed = cos * plane[0] + sin * plane[1], cos * plane[1] - sin * plane[0]
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        slope = jvp(lambda x: features(model, x), (circle,), (speed,))[1]
    return float(slope.norm(dim=1).sum())


def without_norms(model: AsViT) -> AsViT:
    """A copy whose layer norms do nothing."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, nn.Identity())
    return model


@dataclass(frozen=True)
class Complexity:
    """κ of the kernel and length distortion, each the mean over initialisations."""

    kappa: float
    length: float


def complexity(genotype: str, *, size: int = 32, images: int = 16, inits: int = 5, seed: int = 0) -> Complexity:
    """Of a network that nobody trained, on images of noise `[images, 3, size, size]`."""
    draw = torch.Generator().manual_seed(seed)
    kappas, lengths = [], []
    with torch.random.fork_rng(devices=[]):
        for i in range(inits):
            torch.manual_seed(seed + i)
            model = AsViT(size, genotype=genotype, num_classes=0).apply(init)
            kappas.append(condition(model, torch.randn(images, 3, size, size, generator=draw)))
            plane = torch.linalg.qr(torch.randn(3 * size * size, 2, generator=draw))[0].T
            lengths.append(length_distortion(model, plane.unflatten(1, (3, size, size))))
    return Complexity(sum(kappas) / inits, sum(lengths) / inits)


def choices() -> list[tuple[int, ...]]:
    """What each gene of a topology may be: K, S, E of the four stages, then heads."""
    return [c for i in range(4) for c in (KERNELS if i == 0 else MERGES, SPLITS[i], EXPANSIONS)] + [HEADS]


def topology(
    steps: int = 500,
    *,
    width: int = 32,
    size: int = 32,
    inits: int = 5,
    seed: int = 0,
    progress: Progress = lambda what, share: None,
) -> str:
    """A seed topology by policy gradient (section 3.3): one block a stage, reward ΔLE / range − Δκ / range, each the change from
    the sample before over the range of the last 20."""
    torch.manual_seed(seed)
    options = choices()
    logits = [(1e-3 * torch.randn(len(o))).requires_grad_() for o in options]
    optimiser, baseline = torch.optim.Adam(logits, lr=0.08), 0.0
    seen: list[tuple[float, float]] = []
    for step in range(steps):
        progress("looking for a topology", step / steps)
        policies = [torch.distributions.Categorical(logits=row) for row in logits]
        drawn = [p.sample() for p in policies]
        found = complexity(_written(options, [int(d) for d in drawn], width), size=size, inits=inits, seed=seed + step)
        seen.append((-found.kappa, found.length))
        last = seen[-HISTORY:]
        if len(last) < 2 or not all(map(math.isfinite, seen[-1] + seen[-2])):
            continue
        ranges = [max(max(column) - min(column), 1e-12) for column in zip(*last, strict=True)]
        reward = sum((a - b) / r for a, b, r in zip(last[-1], last[-2], ranges, strict=True))
        baseline = 0.9 * baseline + 0.1 * reward
        loss = -(reward - baseline) * torch.stack([p.log_prob(d) for p, d in zip(policies, drawn, strict=True)]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return _written(options, [int(row.argmax()) for row in logits], width)


def scale(
    genotype: str,
    params: float,
    *,
    size: int = 32,
    inits: int = 5,
    seed: int = 0,
    progress: Progress = lambda what, share: None,
) -> list[tuple[str, float, Complexity]]:
    """Networks from small to large, each with its parameters and measures, the last the first of at least `params` (section 4).

    From width 8 and one block a stage; a step adds a block to one of the stages and 5, 10, 15 or 20 % to the width, whichever
    gives the least sum of ranks by κ and by length. Measured at a quarter of the width that is counted and returned.
    """
    stages, heads, _ = parse(genotype)
    depths, width = [1, 1, 1, 1], 8
    found = []
    while not found or found[-1][1] < params:
        wider = sorted({max(width + 1, round(width * factor)) for factor in WIDER})
        tried = [([d + (j == i) for j, d in enumerate(depths)], w) for i in range(4) for w in wider]
        measured = []
        for i, (deeper, w) in enumerate(tried):
            progress(f"scaling: {found[-1][1] / 1e6:.1f} M parameters" if found else "scaling", i / len(tried))
            measured.append(complexity(_deep(stages, deeper, heads, w), size=size, inits=inits, seed=seed))
        best = least(measured)
        depths, width = tried[best]
        large = _deep(stages, depths, heads, SCALED * width)
        found.append((large, count(large), measured[best]))
    return found


def least(measured: Sequence[Complexity]) -> int:
    """Which has the least sum of its ranks by κ, ascending, and by length, descending; of equal ones that with the smaller value
    of the measure whose relative range is larger, as the official code has it, of length too."""
    kappas, lengths = [m.kappa for m in measured], [m.length for m in measured]
    by_kappa, by_length = sorted(kappas), sorted(lengths, reverse=True)
    ranks = [by_kappa.index(k) + by_length.index(v) for k, v in zip(kappas, lengths, strict=True)]
    spread = lambda values: (max(values) - min(values)) / max(abs(sum(values) / len(values)), 1e-12)
    decides = kappas if spread(kappas) > spread(lengths) else lengths
    return min(range(len(measured)), key=lambda i: (ranks[i], decides[i]))


def count(genotype: str, size: int = 224, num_classes: int = 1000) -> float:
    """Parameters of the network."""
    with torch.device("meta"):
        return float(sum(p.numel() for p in AsViT(size, genotype=genotype, num_classes=num_classes).parameters()))


def design(
    params: float,
    *,
    steps: int = 100,
    size: int = 32,
    inits: int = 3,
    seed: int = 0,
    progress: Progress = lambda what, share: None,
) -> str:
    """The genotype of an As-ViT of at most `params` parameters: a topology by `steps` samples, scaled."""
    seed_genotype = topology(steps, size=size, inits=inits, seed=seed, progress=progress)
    found = scale(seed_genotype, params, size=size, inits=inits, seed=seed, progress=progress)
    within = [g for g, n, _ in found if n <= params]
    if not within:
        raise VitreousError(f"the smallest As-ViT scaled has {found[0][1] / 1e6:.1f} M parameters: allow as many")
    return cast(str, within[-1])


def numbers(genotype: str) -> list[list[int]]:
    """The genotype as a list of lists, as which a saved model keeps it."""
    return [[int(n) for n in part.split(",")] for part in genotype.split("|")]


def _written(options: Sequence[Sequence[int]], genes: Sequence[int], width: int) -> str:
    *values, heads = [o[g] for o, g in zip(options, genes, strict=True)]
    return "|".join([*(f"{values[i]},{values[i + 1]},{values[i + 2]},1" for i in range(0, 12, 3)), f"{heads},{width}"])


def _deep(stages: Sequence[Sequence[int]], depths: Sequence[int], heads: int, width: int) -> str:
    return "|".join([*(f"{k},{s},{e},{d}" for (k, s, e, _), d in zip(stages, depths, strict=True)), f"{heads},{width}"])
