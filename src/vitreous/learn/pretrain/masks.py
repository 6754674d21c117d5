"""Which patches are hidden: the rules of the papers, each with the count as its authors round it. True is hidden.

They draw from `random`, `numpy.random` or torch's generator as the released code does, which the engine seeds at every step; a
generator of one's own can be given as `rng`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import VitreousError

Grid = tuple[int, int]


def some(hidden: int, patches: int, what: str) -> None:
    """Raise `VitreousError` where a mask hides nothing, or leaves nothing to see."""
    if not 0 < hidden < patches:
        raise VitreousError(f"{what} hides {hidden} of {patches} patches: it must hide some and leave some")


def aligned(grid: Grid, cell: int, ratio: float, rng: Any = np.random) -> Tensor:
    """`[H, W]`, hidden in squares of `cell` × `cell` patches, ⌈ratio · cells⌉ of them (Xie et al., "SimMIM", CVPR 2022).

    Raises `VitreousError` where the squares do not fill the grid, and where all or none would be hidden.
    """
    if any(n % cell for n in grid):
        raise VitreousError(f"a grid of {grid[0]} × {grid[1]} patches cannot be cut into squares of {cell} × {cell}")
    h, w = (n // cell for n in grid)
    count = math.ceil(ratio * h * w)
    some(count * cell**2, h * w * cell**2, f"a mask of {ratio} in squares of {cell} × {cell} patches")
    coarse = np.zeros(h * w, bool)
    coarse[rng.permutation(h * w)[:count]] = True
    return torch.from_numpy(coarse.reshape(h, w).repeat(cell, 0).repeat(cell, 1))


def blocks(grid: Grid, target: int, least: int = 16, most: int | None = None, rng: Any = random) -> Tensor:
    """`[H, W]`, hidden in rectangles until `target` patches are, or ten draws in a row found no place: so at most `target`.

    Bao et al., "BEiT" (ICLR 2022), algorithm 1, as released: area from U(`least`, what is left or `most`), aspect from exp U(log
    0.3, -log 0.3), and a rectangle may not be as high or as wide as the grid.
    """
    mask = np.zeros(grid, bool)
    while (count := int(mask.sum())) < target:
        room = min(target - count, most or target)
        for _ in range(10):
            area = rng.uniform(least, room)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= grid[0] or w >= grid[1]:
                continue
            top, left = rng.randint(0, grid[0] - h), rng.randint(0, grid[1] - w)
            place = mask[top : top + h, left : left + w]
            if 0 < h * w - place.sum() <= room:
                place[:] = True
                break
        else:
            break
    return torch.from_numpy(mask)


def rectangles(size: Grid, most: float, align: int = 1, share: float = 0.3, rng: Any = np.random) -> Tensor:
    """Pixels `[H, W]` under rectangles until U(min(½, `most`), `most`) of them are (Atito et al., "GMML", 2022).

    Sides go from `align` to `share` of the picture, in steps of `align` pixels; as released, none starts in the last `align` rows
    or columns, so a border is hidden less.
    """
    h, w = size
    most_h, most_w = _sides(size, most, align, share)
    mask, wanted = np.zeros(size, bool), rng.uniform(min(0.5, most), most) * h * w
    rng.choice(1)  # the released code draws the kind of corruption here
    while mask.sum() < wanted:
        top, left = (rng.randint(0, n - align) // align * align for n in size)
        tall = round(min(rng.randint(align, most_h), h - top) / align) * align
        wide = round(min(rng.randint(align, most_w), w - left) / align) * align
        mask[top : top + tall, left : left + wide] = True
    return torch.from_numpy(mask)


def _sides(size: Grid, most: float, align: int, share: float) -> Grid:
    """The longest sides of a rectangle. Raises `VitreousError` where `most` cannot be hidden with them."""
    most_h, most_w = (int(n * share) for n in size)
    if align >= min(most_h, most_w):
        raise VitreousError(
            f"rectangles of {align} pixels and more do not fit into {share} of a picture of {size[0]} × {size[1]}"
        )
    reached = (
        max(first + round(min(m - 1, n - first) / align) * align for first in range(0, n - align, align))
        for n, m in zip(size, (most_h, most_w), strict=True)
    )
    if (ends := math.prod(reached) / math.prod(size)) < most:
        raise VitreousError(
            f"rectangles in multiples of {align} pixels that do not start at the far border reach {ends:.2f} of a picture of "
            f"{size[0]} × {size[1]}: they cannot hide {most} of it; give a smaller align or mask"
        )
    return most_h, most_w


def tube(frames: int, patches: int, ratio: float, rng: Any = np.random) -> Tensor:
    """`[frames, patches]`: the same ⌊ratio · patches⌋ in every frame (Tong et al., "VideoMAE", NeurIPS 2022)."""
    hidden = int(ratio * patches)
    some(hidden, patches, f"a mask of {ratio}")
    one = np.hstack([np.zeros(patches - hidden), np.ones(hidden)]).astype(bool)
    rng.shuffle(one)
    return torch.from_numpy(one).expand(frames, -1)


def running_cell(frames: int, grid: Grid, ratio: float = 0.5, start: int | None = None, rng: Any = np.random) -> Tensor:
    """`[frames, patches]`, True where the decoder does not answer: of each 2 × 2 cell ⌊4 · ratio⌋, turning by one a frame.

    Wang et al., "VideoMAE V2" (CVPR 2023), section 3.2. `start` (0 to 3) is all that is drawn.
    """
    hidden = int(4 * ratio)
    some(hidden, 4, f"a decoder's mask of {ratio}")
    if any(n % 2 for n in grid):
        raise VitreousError(f"running cells of 2 × 2 do not fill a grid of {grid[0]} × {grid[1]} patches")
    start = int(rng.randint(4)) if start is None else start
    turn = (torch.arange(4) + start + 1 + torch.arange(frames)[:, None]) % 4 < hidden
    return turn.view(frames, 2, 2).repeat(1, grid[0] // 2, grid[1] // 2).flatten(1)


def clusters(grid: Grid, count: int, most: int = 3, rng: Any = random) -> Tensor:
    """Places `[count]` of a spectrogram's patches, hidden in squares of 3 to 2 + `most` a side (Gong et al., "SSAST", AAAI 2022).

    As released: squares wrap around the end of a row, place 0 is never hidden, and what is too many is cut from the end.
    """
    patches = grid[0] * grid[1]
    some(count, patches - 1, f"a mask of {count}")
    side, found = rng.randrange(most) + 3, set[int]()
    while len(found) <= count:
        first = rng.randrange(patches)
        found |= {p for i in range(side) for j in range(side) if 0 < (p := first + grid[1] * i + j) < patches}
        if len(found) == patches - 1:
            break
    return torch.tensor(sorted(found)[:count])


GROUPS = ((2, 3), (4, 5), (6,), (7, 8, 9), None, (10,), (1,), (0,))  # brows, eyes, nose, mouth, boundary, hair, skin, background


def facial_groups(parsing: Tensor, patch: int) -> list[Tensor]:
    """Of a face parsing `[H, W]` with 11 classes, the patches `[N]` that hold any pixel of each of the eight groups.

    Brows, eyes, nose, mouth, boundary (skin beside hair or background), hair, skin, background: Wang et al., "FSFM" (CVPR 2025).
    """
    h, w = (n // patch for n in parsing.shape)
    cut = parsing[: h * patch, : w * patch].reshape(h, patch, w, patch).transpose(1, 2).reshape(h * w, -1)
    holds = [(cut == c).any(1) for c in range(11)]
    made = [torch.stack([holds[c] for c in g]).any(0) if g else torch.zeros(h * w, dtype=torch.bool) for g in GROUPS]
    made[4] = made[6] & (made[5] | made[7])
    return made


def facial_regions(parsing: Tensor, patch: int, ratio: float = 0.75, rng: Any = random) -> tuple[Tensor, Tensor]:
    """Hidden patches and those of the region that is hidden whole, `[B, N]` each, of parsings `[B, H, W]` (FSFM's CRFR-P).

    One of the first six groups is drawn for the whole batch and hidden; of each other group the same share; then patches are
    added or taken at random outside of the region, to ⌊ratio · N⌋ exactly. A region of more than that is shown in part.
    """
    chosen = rng.choice(range(6))
    drawn = [_facial(facial_groups(p, patch), chosen, ratio) for p in parsing]
    return torch.stack([m for m, _ in drawn]), torch.stack([r for _, r in drawn])


def _facial(groups: Sequence[Tensor], chosen: int, ratio: float) -> tuple[Tensor, Tensor]:
    n = len(groups[0])
    total = int(ratio * n)
    some(total, n, f"a mask of {ratio}")
    region = groups[chosen].clone()
    if (over := int(region.sum()) - total) >= 0:
        region[_any(region, over)] = False
        return region.clone(), region
    mask, met = region.clone(), region.clone()
    share = (total - int(region.sum())) / (n - int(region.sum()))
    for i, group in enumerate(groups):
        if i != chosen:
            new = group & ~met
            mask[_any(new, round(share * int(new.sum())))] = True
            met |= new
    more = total - int(mask.sum())
    mask[_any(~mask if more > 0 else mask & ~region, abs(more))] = more > 0
    return mask, region


def _any(of: Tensor, count: int) -> Tensor:
    """`count` of the places where `of` is True."""
    places = of.nonzero()[:, 0]
    return places[torch.randperm(len(places))[:count]]
