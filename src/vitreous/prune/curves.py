"""What a layer loses as blocks of its weights go, and how far each layer may go when all are to lose alike at the margin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

POWER_STEP = 10  # of the derivatives by which the power's weight is chosen
TILE = 16  # rows and columns of weights, and inputs, that the paper's hardware takes at once
NEAR = 0.02  # how close to the target is close enough, as released
ROUNDS, SLOPES = 40, (-100.0, 100.0)  # of the bisection, and the powers of two it begins between


def block_sums(x: Tensor, block: tuple[int, int]) -> Tensor:
    """`[out, in]` to the sum in each block, `[⌈out/b₁⌉, ⌈in/b₂⌉]`; the last blocks hold what there is."""
    (rows, columns), (b1, b2) = x.shape, block
    padded = F.pad(x, (0, -columns % b2, 0, -rows % b1))
    return padded.unflatten(0, (-1, b1)).unflatten(2, (-1, b2)).sum((1, 3))


def block_scores(w: Tensor, g: Tensor, block: tuple[int, int]) -> Tensor:
    """The mean of |w·g| over each block: what its removal changes, to first order."""
    return block_sums((w * g).abs(), block) / block_sums(torch.ones_like(w), block)


def kept_blocks(scores: Tensor, amount: float) -> Tensor:
    """Which blocks stay, of bool, when the share `amount` with the lowest scores goes."""
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().topk(int((1 - amount) * scores.numel())).indices] = True
    return kept.view_as(scores)


def spread(kept: Tensor, block: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """A mask over blocks as one over the weights, `[out, in]`."""
    whole = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return whole[: shape[0], : shape[1]]


@dataclass(frozen=True)
class Curve:
    """Of one layer, at each share of blocks removed `amounts`: `first`, the mean of (ΔW·g)²; `second`, ½ (gᵀΔW)², which is the
    second-order term with the Hessian ggᵀ; `power`, what its multiplications take."""

    amounts: np.ndarray
    first: np.ndarray
    second: np.ndarray
    power: np.ndarray


def curve(w: Tensor, g: Tensor, block: tuple[int, int], amounts: np.ndarray, inputs: int, released: bool = False) -> Curve:
    """The curve of a weight `[out, in]` with gradient `g`; `inputs`: channels that enter the layer.

    released: as the official code has it, whose sum of second-order terms takes the total change after each step where the
    expansion has it before, and whose power grows with the share that is gone. The paper's power is that of what is left.
    """
    scores = block_scores(w, g, block)
    order = scores.flatten().argsort(descending=True)
    gone = [scores.numel() - int((1 - a) * scores.numel()) if a > 0 else 0 for a in amounts.tolist()]
    total = lambda x: np.append(0.0, block_sums(x, block).flatten()[order].flip(0).double().cumsum(0).cpu().numpy())[gone]
    wg, squares = total(w * g), total((w * g) ** 2)
    if released:
        step, weights = np.diff(wg, prepend=0.0), np.diff(total(w), prepend=0.0)
        second = np.cumsum(0.5 * ((step + 2 * wg) * step - 1e-7 * 3 * weights))
    else:
        second = 0.5 * wg**2
    share = amounts if released else 1 - amounts
    power = share * w.numel() / (block[0] * block[1]) * (inputs // TILE)
    return Curve(amounts, squares / w.numel(), second, power)


def smoothed(values: np.ndarray, weight: float) -> np.ndarray:
    """Exponential smoothing, its beginning not drawn to zero."""
    made, last = [], 0.0
    for i, value in enumerate(values):
        last = last * weight + (1 - weight) * value
        made.append(last / (1 - weight ** (i + 1)))
    return np.array(made)


def slopes(x: np.ndarray, y: np.ndarray, h: int) -> np.ndarray:
    """Derivatives at all points but the last: by five points `h` apart, or fewer near the ends, where two must do."""
    found, n = [], len(x)
    for i in range(n - 1):
        step = min(h, i, n - i - 1)
        if step < 2:
            low = i - 1 if i >= 2 else i
            found.append((y[i + 1] - y[low]) / (x[i + 1] - x[low]))
        else:
            half = step // 2
            found.append((-y[i + step] + 8 * y[i + half] - 8 * y[i - half] + y[i - step]) / (6 * (x[i + step] - x[i])))
    return np.array(found)


def allot(
    curves: Sequence[Curve],
    left: Callable[[Sequence[float]], float],
    target: float,
    *,
    smooth: float,
    h: int = 4,
    power: bool = True,
    released: bool = False,
) -> tuple[list[float], float]:
    """The share of blocks that goes from each layer, and the exponent s of the slope 2^s that all of them share.

    left: which share of the multiplications stays with such shares, to be `target`. A layer gives up blocks to where its
    distortion (and power) rises by the common slope λ; s is found by bisection. Curves need not be convex: of the places with
    that slope it is the one that minimises loss − λ · share; released: the one whose derivative is nearest.
    """
    losses = [smoothed(c.first + c.second, smooth) for c in curves]
    if power:
        steepest = lambda rows: float(
            np.mean([slopes(c.amounts, y, POWER_STEP).max() for c, y in zip(curves, rows, strict=True)])
        )
        gain = steepest([c.power if released else -c.power for c in curves])
        weight = steepest(losses) / gain if gain > 0 else 0.0
        losses = [d + weight * c.power for d, c in zip(losses, curves, strict=True)]
    rises = [slopes(c.amounts, d, h) for c, d in zip(curves, losses, strict=True)]
    # With the paper's sign less power is a gain, and slopes may be below zero: 2^s is then told from the lowest.
    base = (
        0.0
        if released
        else min(0.0, *(float(np.diff(d).min() / np.diff(c.amounts)[0]) for c, d in zip(curves, losses, strict=True)))
    )
    most = 1 - min(0.05, target / 2)

    def at(s: float) -> list[float]:
        slope = base + 2.0**s
        if released:
            nearest = [int(np.abs(r - slope).argmin()) for r in rises]
        else:
            nearest = [int((d - slope * c.amounts).argmin()) for c, d in zip(curves, losses, strict=True)]
        return [min(most, float(c.amounts[i])) for c, i in zip(curves, nearest, strict=True)]

    (low, high), tried = SLOPES, list[tuple[float, float]]()
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        off = left(at(middle)) - target
        tried.append((abs(off), middle))
        if abs(off) <= NEAR:
            break
        low, high = (middle, high) if off > 0 else (low, middle)
    s = tried[-1][1] if released else min(tried)[1]
    return at(s), s
