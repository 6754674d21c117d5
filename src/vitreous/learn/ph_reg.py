"""PH-Reg: registers learn from what the model without them sees on average over shifted and flipped views."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import read
from ..data.transform import preparation
from ..errors import VitreousError
from .objective import Batch, Now, Objective, Seen, need_teacher, objective

POOL = 100  # offsets from which the views' are chosen


def farthest(pool: Tensor, n: int, first: int) -> Tensor:
    """Places `[n]` in `pool [M, 2]`: from `first` on, each time the point that is farthest from all chosen ones."""
    chosen, apart = [first], torch.full((len(pool),), torch.inf)
    while len(chosen) < n:
        apart = torch.minimum(apart, (pool - pool[chosen[-1]]).float().square().sum(1))
        chosen.append(int(apart.argmax()))
    return torch.tensor(chosen)


def draw_views(views: int, most: int) -> tuple[Tensor, Tensor]:
    """Offsets `[views, 2]` in patches (rows, columns) within ±`most`, and flips `[views]`; the first view is the picture."""
    pool = torch.randint(-most, most + 1, (POOL, 2))
    offsets = pool[farthest(pool, views, int(torch.randint(POOL, ())))]
    flips = torch.rand(views) < 0.5
    offsets[0], flips[0] = 0, False
    return offsets, flips


def shifted(x: Tensor, offset: tuple[int, int], outside: Tensor) -> Tensor:
    """`x [C, H, W]` whose content moves up and left by `offset`; what comes in is `outside [C]`."""
    h, w = x.shape[1:]
    (dy, dx), out = offset, outside[:, None, None].expand_as(x).clone()
    out[:, max(-dy, 0) : h - max(dy, 0), max(-dx, 0) : w - max(dx, 0)] = x[
        :, max(dy, 0) : h + min(dy, 0), max(dx, 0) : w + min(dx, 0)
    ]
    return out


def make_views(image: Tensor, offsets: Tensor, flips: Tensor, patch: tuple[int, int], outside: Tensor) -> Tensor:
    """`[views, C, H, W]` of `image [C, H, W]`: shifted by whole patches, then flipped left to right."""
    moved = []
    for (dy, dx), flip in zip(offsets.tolist(), flips.tolist(), strict=True):
        view = shifted(image, (dy * patch[0], dx * patch[1]), outside)
        moved.append(view.flip(2) if flip else view)
    return torch.stack(moved)


def denoised(features: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
    """The mean of what the views saw of each patch, `[h, w, C]`, from their features `[views, h, w, C]`."""
    total, seen = torch.zeros_like(features[0]), torch.zeros_like(features[0, ..., :1])
    for f, (dy, dx), flip in zip(features, offsets.tolist(), flips.tolist(), strict=True):
        f = torch.cat([f, torch.ones_like(f[..., :1])], -1).permute(2, 0, 1)
        back = shifted(f.flip(2) if flip else f, (-dy, -dx), f.new_zeros(len(f))).permute(1, 2, 0)
        total, seen = total + back[..., :-1], seen + back[..., -1:]
    return total / seen


@objective
@dataclass(frozen=True)
class PHReg(Objective):
    """Chen et al., "Vision Transformers with Self-Distilled Registers" (PH-Reg, NeurIPS 2025): for a student with
    `adapt.Registers`.

    The teacher is the model as it was. It sees `views` of each picture, shifted by up to `shift` of the grid in whole patches and
    flipped, white where the picture ends; each patch's features, after the final norm, are averaged over the views that see it.
    The student sees the picture once and learns that mean: (1 − cosine) and squared error, weighted alike. No labels.
    The official code trains at 518 pixels for up to 100 epochs, AdamW 1e-4 falling to 5e-6, decay 0.01.
    """

    wants = ("patches",)
    teacher: nn.Module | None = field(default=None, compare=False)
    views: int = 10
    shift: float = 0.15

    def __post_init__(self) -> None:
        if not 1 <= self.views <= POOL or not 0 <= self.shift < 1:
            raise VitreousError(f"PHReg: views must lie in 1 to {POOL} and shift in [0, 1), not {self.views} and {self.shift}")

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        assert seen.patches is not None
        target = self.targets(batch.images, now).to(seen.patches)
        if target.shape != seen.patches.shape:
            raise VitreousError(
                f"PHReg: the student gives patches {list(seen.patches.shape[1:])} and the teacher {list(target.shape[1:])}: "
                "the teacher must be the model that the registers were added to"
            )
        cosine, error = losses(seen.patches.float(), target.float())
        return {"cosine": cosine, "error": error}

    @torch.no_grad()
    def targets(self, images: Tensor, now: Now) -> Tensor:
        """`[B, patches, C]` for images `[B, 3, H, W]`."""
        teacher = need_teacher(self.teacher, "PHReg")
        grid = read(teacher).require_grid("PHReg")
        patch = images.shape[2] // grid[0], images.shape[3] // grid[1]
        config = preparation(teacher).config
        mean, std = (torch.tensor(config[k], dtype=images.dtype, device=images.device) for k in ("mean", "std"))
        drawn = [draw_views(self.views, round(self.shift * min(grid))) for _ in images]
        shown = [make_views(x, *d, patch, (1 - mean) / std) for x, d in zip(images, drawn, strict=True)]
        patches = now.teach(teacher, torch.cat(shown), ("patches",)).patches
        assert patches is not None
        each = patches.unflatten(1, grid).unflatten(0, (len(images), self.views))
        return torch.stack([denoised(f, *d).flatten(0, 1) for f, d in zip(each, drawn, strict=True)])


def losses(student: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """1 − mean cosine and mean squared error of patch features `[…, N, C]`."""
    return 1 - F.cosine_similarity(student, target, dim=-1).mean(), F.mse_loss(student, target)
