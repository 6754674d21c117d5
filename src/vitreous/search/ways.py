"""Token steps to try on a model, from the strongest to the gentlest, one ladder a family."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from ..anatomy import Anatomy
from ..steps import Step
from ..tokens import EViT, ToMe

EARLY = (0.2, 0.3, 0.4)  # shares kept in the first block, for models trained with EViT there
SPREAD = (0.5, 0.6, 0.7, 0.8, 0.9)  # shares kept in each of the paper's three blocks
MERGED = (0.75, 0.6, 0.45, 0.35, 0.25, 0.15, 0.1, 0.05)  # shares of all tokens that are gone in the end
FEW = 0.01  # share kept in the last block, behind whose attention only the class token is read; earlier, features suffer
ATTENTION = 1 / 3  # share of a block's linear layers that comes before tokens go


@dataclass(frozen=True)
class Way:
    """A token step and about which share of the work remains with it; `last`: in a recipe too, for it loses nothing, and integers
    are fitted best where no tokens go."""

    step: Step
    work: float
    last: bool = False


def ladders(anatomy: Anatomy) -> list[list[Way]]:
    """EViT in the first block; of a model with a class token, in the last; EViT in the paper's blocks; ToMe in every block."""
    rows, columns = anatomy.grid or (0, 0)
    tokens, depth = rows * columns, len(anatomy.blocks)
    merging: dict[int, Way] = {}
    for share in MERGED:
        r = max(1, round(share * tokens / depth))
        merging.setdefault(r, Way(ToMe(r=r), _work([max(1 - r * i / tokens, 0.0) for i in range(depth + 1)])))
    paper = (depth // 4, depth // 2, 3 * depth // 4)
    behind = [Way(EViT(keep=FEW, at=(depth - 1,)), _evit(FEW, (depth - 1,), depth), last=True)]
    return [
        [Way(EViT(keep=k, at=(0,)), _evit(k, (0,), depth)) for k in EARLY],
        *([behind] if anatomy.class_token else []),
        [Way(EViT(keep=k), _evit(k, paper, depth)) for k in SPREAD],
        list(merging.values()),
    ]


def _evit(keep: float, at: Iterable[int], depth: int) -> float:
    left = [1.0]
    for i in range(depth):
        left.append(left[-1] * (keep if i in at else 1))
    return _work(left)


def _work(left: list[float]) -> float:
    """From the share of tokens that each block reads, and the last gives."""
    depth = len(left) - 1
    return sum(ATTENTION * before + (1 - ATTENTION) * after for before, after in pairwise(left)) / depth
