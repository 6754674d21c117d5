"""PLeaS: match the units of two models, merge those that agree, and fit each merged layer by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import scipy
import torch
from torch import Tensor

from ..errors import VitreousError
from .matching import aligned
from .merging import Kitchen, MergingRule, State, rule


@dataclass
class Split:
    """Units of two models along one axis: pairs that are merged, then those of each that stay apart."""

    merged1: Tensor
    merged2: Tensor
    own1: Tensor
    own2: Tensor

    def __len__(self) -> int:
        return len(self.merged1) + len(self.own1) + len(self.own2)

    def columns(self) -> tuple[slice, slice, slice]:
        a, b = len(self.merged1), len(self.own1)
        return slice(a), slice(a, a + b), slice(a + b, a + 2 * b)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """`[n, n]`: minus the distance of each unit of `a [samples, n]` to each of `b`."""
    return -torch.cdist(a.mT, b.mT)


def match(similar: Tensor) -> Tensor:
    """`[n]`: the unit of the second model for each of the first, so that the sum of `similar [n, n]` is largest."""
    return torch.as_tensor(scipy.optimize.linear_sum_assignment(similar.double().cpu().numpy(), maximize=True)[1])


def split(similar: Tensor, units: Tensor, ratio: float) -> Split:
    """Matched pairs stay apart where they are less alike than the `ratio`-quantile of all pairs (section 3.1)."""
    value = similar[torch.arange(len(units)), units]
    kept = value >= torch.quantile(value, ratio)
    first = torch.arange(len(units))
    return Split(first[kept], units[kept], first[~kept], units[~kept])


def joined(w1: Tensor, w2: Tensor, out: Split | None, into: Split | None = None) -> Tensor:
    """Weights of the merged layer from those of both, `[out, in]` or `[out]`; an axis without a split is the same in both.

    Merged to merged, the mean; what reads merged units alone is copied; what own units give to merged ones is halved; own units
    of the one do not reach own units of the other. (Where the outputs have no split, the released code does
    not halve, and keeps the first model's bias.)
    """
    rows = [(w1, w2)] if out is None else [(w1[out.merged1], w2[out.merged2])]
    rows += [] if out is None else [(w1[out.own1], None), (None, w2[out.own2])]
    if into is None:
        return torch.cat([torch.stack([w for w in pair if w is not None]).mean(0) for pair in rows])
    made = []
    for a, b in rows:
        some = a if a is not None else b
        assert some is not None
        nothing = some.new_zeros(len(some), len(into.own1))
        if a is not None and b is not None:
            made.append(torch.cat([(a[:, into.merged1] + b[:, into.merged2]) / 2, a[:, into.own1] / 2, b[:, into.own2] / 2], 1))
        elif a is not None:
            made.append(torch.cat([a[:, into.merged1], a[:, into.own1], nothing], 1))
        else:
            made.append(torch.cat([some[:, into.merged2], nothing, some[:, into.own2]], 1))
    return torch.cat(made)


def together(a: Tensor, b: Tensor, units: Split) -> Tensor:
    """Activations `[samples, n]` of both as those of the merged layer: the means, then each one's own."""
    return torch.cat([(a[:, units.merged1] + b[:, units.merged2]) / 2, a[:, units.own1], b[:, units.own2]], 1)


def least_squares(x: Tensor, z: Tensor, weight: Tensor, bias: Tensor, free: Tensor | None = None, ridge: float = 0.0) -> State:
    """Weight `[out, in]` and bias of the linear layer from `x [samples, in]` nearest to `z [samples, out]`, in closed form.

    free: which weights may differ from zero, `[out, in]`, alike in groups of rows. ridge: how much staying near the `weight` and
    `bias` given counts, as a share of the mean square of `x`: where samples leave directions open, what was there stays.
    """
    ones = torch.cat([x, torch.ones_like(x[:, :1])], 1).double()
    start = torch.cat([weight, bias[:, None]], 1).double()
    left = z.double() - ones @ start.mT
    gram, cross = ones.mT @ ones, ones.mT @ left
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    mask = torch.ones_like(start, dtype=torch.bool)
    if free is not None:
        mask[:, :-1] = free
    change = torch.zeros_like(start)
    for pattern in mask.unique(dim=0):
        rows = (mask == pattern).all(1)
        found = torch.linalg.lstsq(gram[pattern][:, pattern], cross[pattern][:, rows], driver="gelsd").solution
        change[rows.nonzero(), pattern.nonzero()[:, 0]] = found.mT
    made = (start + change).to(weight.dtype)
    return {"weight": made[:, :-1], "bias": made[:, -1]}


@rule
@dataclass(frozen=True)
class PLeaS(MergingRule):
    """Nasery, Hayase, Koh & Oh, "PLeaS: Merging Models with Permutations and Least Squares" (2024): two models of one
    architecture, also from different starts.

    The second model's units are put into the order of the first's by their activations on `images` of the data, which changes
    none of its answers; then each linear layer of the blocks gets the weights whose outputs, from the mean of both models'
    inputs, are nearest to the mean of their outputs (`squares`). With `ratio` that share of the hidden units of each MLP is kept
    twice, and the merged model is as much wider there.

    The paper's code handles ResNets. For transformers the groups are ours: one permutation of the residual stream, where
    norms forbid to keep anything apart; whole heads and the channels in them; hidden units. So are the closed form in place of
    Adam, and a ridge of 1e-3 towards the mean of the weights. Batch norms are counted anew.
    """

    needs_data: ClassVar[bool] = True
    ratio: float = 0.0
    squares: bool = True
    images: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1 or self.images < 1:
            raise VitreousError(f"PLeaS: ratio must lie in [0, 1) and images be at least 1, not {self.ratio} and {self.images}")

    def __call__(self, states: Sequence[State], kitchen: Kitchen) -> State:
        if len(states) != 2:
            raise VitreousError(f"PLeaS merges two models, not {len(states)}: merge the result with the next one")
        return aligned(states, kitchen, self)
