"""EVA: what a teacher sees at hidden places is predicted from the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...anatomy import read
from ...errors import VitreousError
from ..objective import Batch, Now, Objective, Seen, need_teacher, objective, positive, share
from .encode import hiding, patch_tokens, shape
from .masks import blocks, some


class FeatureHead(nn.Module):
    """A mask token, and a linear layer from a token to the teacher's width."""

    def __init__(self, width: int, target: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.lm_head = nn.Linear(width, target)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.lm_head.weight, std=0.02)
        nn.init.zeros_(self.lm_head.bias)


@objective
@dataclass(frozen=True)
class EVA(Objective):
    """Fang et al., "EVA: Exploring the Limits of Masked Visual Representation Learning at Scale" (CVPR 2023); no labels.

    A mask token stands for `mask` of the patches, in rectangles of at least `least` (`masks.blocks`; 105 and 16 of 256); a linear
    layer predicts the teacher's patch tokens there, and −mean cosine is the loss. Teacher: any model with as many patches, CLIP's
    or DINO's; pictures are resized where it takes another size. project: whether its tokens go through its classifier too, as
    CLIP's projection to text in the paper.

    Published recipe: 150 epochs, batch 4096, AdamW (0.9, 0.98), 10⁻³ to 10⁻⁵, decay 0.05, clip 3, drop path 0.1. The released
    trainer of EVA-L minimises +cosine, a slip of sign that is not followed.
    """

    wants = ()
    official: ClassVar[tuple[tuple[str, str], ...]] = ((r"^(mask_token|lm_head)", r"parts.\1"),)
    teacher: nn.Module | None = field(default=None, compare=False)
    mask: float = 0.41
    least: int = 16
    project: bool = False

    def __post_init__(self) -> None:
        share(self, "mask")
        positive(self, "least")

    def parts(self, model: nn.Module) -> nn.Module:
        teacher, s = need_teacher(self.teacher, "EVA"), shape(model, "EVA")
        theirs = read(teacher)
        grid = (s.grid[0] * s.patch[0] // s.stride, s.grid[1] * s.patch[1] // s.stride)
        if theirs.grid != grid or theirs.width is None:
            raise VitreousError(
                f"EVA: the teacher has a grid of {theirs.grid} patches and the student {grid}: give models that cut the picture "
                "into as many"
            )
        self.draw(s.grid, 1)
        return FeatureHead(s.width, self._project(teacher).out_features if self.project else theirs.width)

    def _project(self, teacher: nn.Module) -> nn.Linear:
        name = read(teacher).classifier
        layer = teacher.get_submodule(name) if name is not None else None
        if not isinstance(layer, nn.Linear):
            raise VitreousError("EVA: this teacher has no projection: leave project out")
        return layer

    def draw(self, grid: tuple[int, int], images: int) -> Tensor:
        """`[B, H, W]`, at most ⌊mask · N⌉ hidden in each; ragged, as rectangles do not always fit."""
        n = grid[0] * grid[1]
        wanted = round(self.mask * n)
        some(wanted, n, f"EVA: a mask of {self.mask}")
        least = min(self.least, max(1, wanted // 2))
        drawn = [blocks(grid, wanted, least) for _ in range(images)]
        return torch.stack([m if m.any() else (torch.rand(n).argsort() < wanted).view(grid) for m in drawn])

    def predict(self, model: nn.Module, parts: nn.Module, images: Tensor, mask: Tensor) -> Tensor:
        """`[hidden, D]` of all hidden patches of `mask [B, h, w]`, one image after the other."""
        assert isinstance(parts, FeatureHead)
        with hiding(model, mask, parts.mask_token):
            tokens = patch_tokens(model, images)
        return parts.lm_head(tokens[mask.flatten(1)])

    def target(self, images: Tensor, now: Now) -> Tensor:
        """The teacher's patch tokens `[B, N, D]`."""
        teacher = need_teacher(self.teacher, "EVA")
        embed: Any = getattr(teacher, "patch_embed", None)
        size = getattr(embed, "img_size", None)
        if size is not None and tuple(size) != tuple(images.shape[2:]):
            images = F.interpolate(images, tuple(size), mode="bicubic", antialias=True)
        tokens = now.teach(teacher, images, ("patches",)).patches
        assert tokens is not None
        return self._project(teacher)(tokens) if self.project else tokens

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        assert now.parts is not None
        mask = self.draw(shape(now.model, "EVA").grid, len(batch.images)).to(batch.images.device)
        with torch.no_grad():
            target = self.target(batch.images, now).flatten(1, -2)[mask.flatten(1)]
        return {
            "cosine": -F.cosine_similarity(self.predict(now.model, now.parts, batch.images, mask).float(), target.float()).mean()
        }
