"""Token steps to try on a model, from the strongest to the gentlest, one ladder a family."""

from __future__ import annotations

from dataclasses import dataclass

from ..anatomy import Anatomy
from ..steps import Step
from ..tokens import EViT, ToMe

EARLY = (0.2, 0.3, 0.4)  # shares kept in the first block, for models trained with EViT there
SPREAD = (0.5, 0.6, 0.7, 0.8, 0.9)  # shares kept in each of the paper's three blocks
MERGED = (0.75, 0.6, 0.45, 0.35, 0.25, 0.15, 0.1, 0.05)  # shares of all tokens that are gone in the end


@dataclass(frozen=True)
class Way:
    """A token step and about which share of the work remains with it."""

    step: Step
    work: float


def ladders(anatomy: Anatomy) -> list[list[Way]]:
    """EViT in the first block, EViT in the paper's blocks, and ToMe in every block."""
    rows, columns = anatomy.grid or (0, 0)
    tokens, depth = rows * columns, len(anatomy.blocks)
    merging: dict[int, Way] = {}
    for share in MERGED:
        r = max(1, round(share * tokens / depth))
        merging.setdefault(r, Way(ToMe(r=r), 1 - min(r * (depth + 1) / (2 * tokens), 0.9)))
    return [
        [Way(EViT(keep=k, at=(0,)), k) for k in EARLY],
        [Way(EViT(keep=k), (1 + k + k**2 + k**3) / 4) for k in SPREAD],
        list(merging.values()),
    ]
