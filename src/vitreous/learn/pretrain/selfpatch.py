"""SelfPatch: DINO on whole pictures, and on each patch with its neighbours as target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...anatomy import read
from ...errors import VitreousError
from ..objective import Batch, Now, Objective, Seen, objective, positive
from .cross import CrossBlock
from .dino import DINOHead, cross_entropy, follow, rising, twin
from .encode import at_size, patch_tokens, shape
from .views import multi_crop


def neighbours(grid: tuple[int, int]) -> Tensor:
    """Places `[N, 8]` around each patch; beyond a border lie the patches of the opposite one, as released."""
    at = torch.arange(grid[0] * grid[1]).view(grid)
    around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    return torch.stack([at.roll(shift, (0, 1)).flatten() for shift in around], 1)


class Aggregate(nn.Module):
    """A class token that gathers patches in two blocks: all of them, or for every patch its `k` most similar neighbours."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_blocks = nn.ModuleList(CrossBlock(width, heads) for _ in range(2))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)

    def gathered(self, tokens: Tensor) -> Tensor:
        """`[B, 1, C]`, before the norm."""
        cls = self.cls_token.expand(len(tokens), -1, -1)
        for block in self.cls_blocks:
            cls = block(cls, torch.cat([cls, tokens], 1))
        return cls

    def forward(self, tokens: Tensor, grid: tuple[int, int] | None = None, k: int = 4) -> Tensor:
        """`[B, 1 + N, C]`: the class token, and the patches as they are, or with `grid` as their neighbours tell."""
        cls, patches = self.gathered(tokens), tokens
        if grid is not None:
            b, n, c = tokens.shape
            near = tokens[:, neighbours(grid).to(tokens.device)]  # [B, N, 8, C]
            alike = F.cosine_similarity(near, tokens[:, :, None], dim=-1).topk(k, -1).indices
            near = near.gather(2, alike[..., None].expand(-1, -1, -1, c))
            rows = near.view(b * n, k, c).split(2**15)  # of more at once a GPU's kernels of attention cannot be launched
            patches = torch.cat([self.gathered(r) for r in rows]).view(b, n, c)
        return self.norm(torch.cat([cls, patches], 1))


class Side(nn.Module):
    """What student and teacher have besides their backbone."""

    def __init__(self, width: int, heads: int, prototypes: int, patch_prototypes: int) -> None:
        super().__init__()
        self.ca_head = Aggregate(width, heads)
        self.c_head, self.p_head = DINOHead(width, prototypes), DINOHead(width, patch_prototypes)


@objective
@dataclass(frozen=True)
class SelfPatch(Objective):
    """Yun, Lee, Kim, Shin, "Patch-level Representation Learning for Self-supervised Vision Transformers" (CVPR 2022); no labels.

    DINO between two large views and `local` small ones. Beside it every patch of every view learns, from a teacher that sees the
    same view, what the `k` most similar of its eight neighbours tell when a class token gathers them: a target that never holds
    the patch itself. loss = DINO + `weight` · patches. The teacher follows with momentum 0.996 to 1. The backbone's tokens before
    its final norm are used, and its own class token is not.

    prototypes, patch_prototypes: published 65,536 and 4,096 for ImageNet, batch 1024. Views are drawn from the picture as the
    model takes it, on tensors; give `augment="none"`.
    """

    wants = ()
    whole_batch: ClassVar[bool] = True
    official: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^student\.backbone\.", ""), (r"^teacher\.backbone\.", "parts.backbone."), (r"^(student|teacher)\.", r"parts.\1."),
    )  # fmt: skip
    local: int = 4
    k: int = 4
    weight: float = 0.1
    prototypes: int = 4096
    patch_prototypes: int = 1024
    momentum: float = 0.996

    def __post_init__(self) -> None:
        positive(self, "k", "prototypes", "patch_prototypes", "momentum")
        if self.k > 8:
            raise VitreousError(f"SelfPatch: a patch has 8 neighbours, k cannot be {self.k}")

    def parts(self, model: nn.Module) -> nn.Module:
        s, anatomy = shape(model, "SelfPatch"), read(model)
        anatomy.require_plain("SelfPatch")
        student = Side(s.width, anatomy.blocks[0].attention.heads or 1, self.prototypes, self.patch_prototypes)
        backbone, teacher = twin(model, student)
        made = nn.ModuleDict({"student": student, "teacher": teacher, "backbone": backbone})
        made.register_buffer("center", torch.zeros(1, 1, self.prototypes))
        made.register_buffer("patch_center", torch.zeros(1, self.patch_prototypes))
        return made

    def outputs(self, backbone: nn.Module, side: Any, views: Tensor, grid: tuple[int, int] | None, frozen: bool) -> list[Tensor]:
        """Class logits `[B, 1, K]` and patch logits `[B, N, K']`; with `grid`, as the teacher has them."""
        tokens = at_size(backbone, partial(patch_tokens, norm=False), views)
        seen = side.ca_head(tokens, grid, self.k)
        return [side.c_head(seen[:, :1], frozen), side.p_head(seen[:, 1:], frozen)]

    def loss(
        self,
        student: Sequence[Sequence[Tensor]],
        teacher: Sequence[Sequence[Tensor]],
        centres: Sequence[Tensor],
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """The class term and the patch term; class and patch logits of each view, the two large ones first."""
        cls = [((t[0] - centres[0]) / temperature).softmax(-1) for t in teacher[:2]]
        pairs = [cross_entropy(s[0], q).mean() for i, q in enumerate(cls) for j, s in enumerate(student) if i != j]
        patches = [((t[1] - centres[1]) / temperature).softmax(-1) for t in teacher]
        same = [cross_entropy(s[1], q).mean() for s, q in zip(student, patches, strict=True)]
        return sum(pairs[1:], pairs[0]) / len(pairs), sum(same[1:], same[0]) / len(same)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        parts: Any = now.parts
        side = shape(now.model, "SelfPatch").patch
        views = multi_crop(now.model, batch.images, self.local, "SelfPatch")
        grids = [(v.shape[2] // side[0], v.shape[3] // side[1]) for v in views]
        student = [self.outputs(now.model, parts["student"], v, None, now.epoch < 1) for v in views]
        with torch.no_grad():
            both = zip(views, grids, strict=True)
            teacher = [self.outputs(parts["backbone"], parts["teacher"], v, g, False) for v, g in both]
        cls, patches = self.loss(student, teacher, (parts.center, parts.patch_center), 0.04)
        if now.model.training:
            recentred(parts.center, parts.patch_center, teacher)
        return {"class": cls, "patches": self.weight * patches}

    def after_step(self, now: Now) -> None:
        parts: Any = now.parts
        momentum = rising(self.momentum, 1.0, now.share)
        follow(parts["backbone"], now.model, momentum)
        follow(parts["teacher"], parts["student"], momentum)


@torch.no_grad()
def recentred(centre: Tensor, patch_centre: Tensor, teacher: Sequence[Sequence[Tensor]], momentum: float = 0.9) -> None:
    """Both centres a step on, after the loss: over the teacher's answers to all views, small ones too."""
    centre.lerp_(torch.cat([t[0] for t in teacher]).mean(0, keepdim=True), 1 - momentum)
    patch_centre.lerp_(torch.cat([t[1].flatten(0, 1) for t in teacher]).mean(0, keepdim=True), 1 - momentum)
