"""Fast Progressive Combining Search: two parameters of a grid, found together by a search that narrows.

Wu et al., "AdaLog: Post-Training Quantization for Vision Transformers with Adaptive Logarithm Quantizer" (ECCV 2024): try
coarse pairs, keep the best, spread new values of the first parameter around each of them, and again.

The official code tries 128 pairs in each of 6 steps, and keeps 16. Here are 3 steps, of 128, 40 and 40 pairs, and 8 are
kept: each step narrows the spacing of scales to a quarter, so that further ones could change a scale by a thirty-second of
the coarse spacing. A kept pair is tried again among its neighbours, which the official code omits: so no result is worse
than any pair tried.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .layers import FLOOR

COARSE = 128  # pairs in the first step
KEPT = 8
AROUND = 5  # new values of the first parameter for each kept pair, itself among them
STEPS = 3

Error = Callable[[Tensor, Tensor], Tensor]
Range = tuple[Tensor, Tensor]


def fpcs(first: Tensor, second: Tensor, spacing: Tensor, error: Error) -> tuple[Tensor, Tensor]:
    """The pair with the least error, for each of the groups apart.

    Args:
        first, second: the coarse pairs, `[K, *G]` for groups of shape G (output channels, heads, or none). The first of
            the result is not less than the least of `first`.
        spacing: between the coarse values of `first`, `[*G]`.
        error: of one pair for each group, both `[*G]`, the error `[*G]`.
    """
    least = first.amin(0)
    for left in reversed(range(STEPS)):
        errors = torch.stack([error(a, b) for a, b in zip(first, second, strict=True)])
        best = errors.topk(min(KEPT, len(errors)) if left else 1, dim=0, largest=False).indices
        first, second = first.gather(0, best), second.gather(0, best)
        if left:
            offsets = torch.linspace(-0.5, 0.5, AROUND).to(first).view(-1, *[1] * spacing.ndim) * spacing
            first = torch.maximum(first[:, None] + offsets, least).flatten(0, 1)
            second = second.repeat_interleave(AROUND, dim=0)
            spacing = spacing / (AROUND - 1)
    return first[0], second[0]


def uniform_pairs(inner: Range, outer: Range, bits: int, floor: Tensor | float = FLOOR) -> tuple[Tensor, Tensor, Tensor]:
    """Coarse scales and zero points `[K, *G]` for ranges (low, high) from `inner` to `outer`, `[*G]` each; and the spacing.

    In the official code `inner` holds the values between the percentiles 10 and 90, `outer` all. Its zero points lie around
    the middle of the integers; here around the one that centres the range, which is the same where values are centred.
    """
    levels, zeros = 2**bits - 1, min(16, 2 ** (bits - 1))
    share = torch.linspace(0, 1, COARSE // zeros).to(outer[0]).view(-1, *[1] * outer[0].ndim)
    low, high = torch.lerp(inner[0], outer[0], share), torch.lerp(inner[1], outer[1], share)
    scale = ((high - low) / levels).clamp_min(floor)
    around = torch.arange(-(zeros // 2), zeros - zeros // 2).to(low).view(-1, *[1] * low.ndim)
    zero_point = (levels / 2 - (low + high) / 2 / scale).round() + around
    spacing = ((outer[1] - outer[0]) - (inner[1] - inner[0])).abs() / levels / (len(share) - 1)
    return scale.expand_as(zero_point).flatten(0, 1), zero_point.flatten(0, 1), spacing


def uniform(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """`x` on a uniform grid of 2^`bits` values; scale and zero point must broadcast to it."""
    q = (x * (1 / scale)).round_().add_(zero_point).clamp_(0, 2**bits - 1)
    return q.sub_(zero_point).mul_(scale)
