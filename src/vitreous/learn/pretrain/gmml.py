"""GMML: groups of pixels are corrupted, and the picture is asked for as it was."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...anatomy import read
from ...errors import VitreousError
from ..objective import Batch, Now, Objective, Seen, final, look, objective, positive
from .encode import shape
from .masks import rectangles


class PixelHead(nn.Module):
    """Three layers with GELU, and a transposed convolution from a token `[B, N, width]` to its patch."""

    def __init__(self, width: int, patch: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(width, width), nn.GELU())))
        self.convTrans = nn.ConvTranspose2d(width, channels, patch, patch)

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        return self.convTrans(self.mlp(tokens).mT.unflatten(2, tuple(grid)))


@objective
@dataclass(frozen=True)
class GMML(Objective):
    """Atito, Awais, Kittler, "GMML is All you Need" (2022): group masked model learning; no labels, no mask token.

    By a coin a picture gets rectangles of noise over 0.5 to `mask` of it, or over `foreign` of it the same place of another
    picture of the batch. The final norm of the mean of the outputs of `blocks` (counted from 1; the last of each sixth of the
    upper half when None, 6, 8, 10, 12 of 12) is decoded to pixels, and L1 is taken where the picture was changed. align: sides
    and corners of rectangles in multiples of so many pixels; 1 as trained, while the text speaks of groups of whole patches.
    Rectangles as `masks.rectangles`.

    Published recipe: 800 epochs, AdamW, lr 5 · 10⁻⁴ · batch / 256, decay 0.04 to 0.4, clip 3, crops of (0.05, 1).
    """

    wants = ()
    crop: ClassVar[tuple[float, float]] = (0.05, 1.0)
    official: ClassVar[tuple[tuple[str, str], ...]] = ((r"^backbone\.", ""), (r"^head_recons\.", "parts."))
    mask: float = 0.75
    foreign: float = 0.3
    align: int = 1
    after: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        positive(self, "mask", "foreign", "align")
        if max(self.mask, self.foreign) >= 1:
            raise VitreousError("GMML: a mask that hides the whole picture leaves nothing to learn from: give shares below 1")

    def parts(self, model: nn.Module) -> nn.Module:
        s, depth = shape(model, "GMML"), len(read(model).blocks)
        if wrong := [i for i in self.after or () if not 1 <= i <= depth]:
            raise VitreousError(f"GMML: the model has blocks 1 to {depth}, there is no block {wrong[0]}")
        if self.after == ():
            raise VitreousError("GMML: name at least one block in after=")
        return PixelHead(s.width, s.patch, s.channels)

    def predict(self, model: nn.Module, parts: nn.Module, corrupted: Tensor) -> Tensor:
        """The picture `[B, C, H, W]` as it is answered."""
        assert isinstance(parts, PixelHead)
        depth, prefix = len(read(model).blocks), read(model).prefix
        after = self.after or sorted({max(1, round(depth * k / 6)) for k in (3, 4, 5, 6)})
        blocks = look(model, corrupted, (), [i - 1 for i in after]).blocks
        norm = model.get_submodule(final(model))
        mean = torch.stack(list(blocks.values())).mean(0)
        tokens = norm(mean) if isinstance(norm, nn.LayerNorm) else mean
        return parts(tokens[:, prefix:], shape(model, "GMML").grid)

    def corrupt(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The pictures with rectangles painted over, and where, `[B, 1, H, W]`."""
        changed, masks = [], []
        for i, image in enumerate(images):
            other = len(images) > 1 and random.random() < 0.5
            mask = rectangles((image.shape[1], image.shape[2]), self.foreign if other else self.mask, self.align)
            paint = images[(i + random.randrange(1, len(images))) % len(images)] if other else torch.randn(image.shape).to(image)
            masks.append(mask.to(image.device)[None])
            changed.append(torch.where(masks[-1], paint, image))
        return torch.stack(changed), torch.stack(masks)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        assert now.parts is not None
        corrupted, mask = self.corrupt(batch.images)
        return {"pixels": changed_l1(batch.images, self.predict(now.model, now.parts, corrupted), mask)}

    def reconstruct(self, model: nn.Module, parts: nn.Module | None, images: Tensor) -> tuple[Tensor, Tensor]:
        """What is hidden, `[B, 1, H, W]`, and the picture as it is answered."""
        assert parts is not None
        corrupted, mask = self.corrupt(images)
        return mask, self.predict(model, parts, corrupted)


def changed_l1(images: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
    """Mean |x − x̂| over the pixels and channels under `mask [B, 1, H, W]`."""
    return (images - pixels).abs()[mask.expand_as(images)].mean()
