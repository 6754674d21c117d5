"""SimMIM: a token stands for what is hidden, and one linear layer answers with pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...errors import VitreousError
from ..objective import Batch, Now, Objective, Seen, objective, positive, share
from .encode import hiding, patch_tokens, shape
from .masks import aligned


class PixelDecoder(nn.Module):
    """A mask token, and a 1 × 1 convolution whose channels are the pixels of `stride` × `stride` (PixelShuffle)."""

    def __init__(self, embedded: int, width: int, stride: int, channels: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embedded))
        self.decoder = nn.Sequential(nn.Conv2d(width, stride**2 * channels, 1), nn.PixelShuffle(stride))
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, grid: Sequence[int]) -> Tensor:
        """Pixels `[B, channels, H, W]` of tokens `[B, N, width]`."""
        return self.decoder(tokens.mT.unflatten(2, tuple(grid)))


def hidden_l1(images: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
    """Σ |x − x̂| M / (Σ M + 10⁻⁵) / channels, of `mask [B, h, w]` blown up to the pixels."""
    cover = mask.to(images.dtype)[:, None]
    for axis in (2, 3):
        cover = cover.repeat_interleave(images.shape[axis] // mask.shape[axis - 1], axis)
    return ((images - pixels).abs() * cover).sum() / (cover.sum() + 1e-5) / images.shape[1]


@objective
@dataclass(frozen=True)
class SimMIM(Objective):
    """Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu, "SimMIM: A Simple Framework for Masked Image Modeling" (CVPR 2022); no labels.

    mask: share of the squares that is hidden, rounded up. cell: side of the squares in pixels; 32 as published when None, and of
    pictures below 128 pixels, or where 32 is no multiple of the patch, two patches. norm: whether the decoder reads tokens after
    the final norm, as the released configuration does. It works on pyramids (Swin) too.

    Published recipe of ViT-B: 800 epochs, AdamW, lr 10⁻⁴ · batch / 512, decay 0.05, clip 5, crops of (0.67, 1), flips.
    """

    wants = ()
    official: ClassVar[tuple[tuple[str, str], ...]] = (
        (r"^encoder\.mask_token", "parts.mask_token"), (r"^encoder\.", ""), (r"^decoder\.", "parts.decoder."),
    )  # fmt: skip
    crop: ClassVar[tuple[float, float]] = (0.67, 1.0)
    mask: float = 0.6
    cell: int | None = None
    norm: bool = True

    def __post_init__(self) -> None:
        share(self, "mask")
        if self.cell is not None:
            positive(self, "cell")

    def parts(self, model: nn.Module) -> nn.Module:
        s = shape(model, "SimMIM")
        if s.patch[0] != s.patch[1]:
            raise VitreousError(f"SimMIM: patches must be square, not {s.patch[0]} × {s.patch[1]}")
        self.draw(model, 1)
        return PixelDecoder(s.embedded, s.width, s.stride, s.channels)

    def draw(self, model: nn.Module, images: int) -> Tensor:
        """A mask `[B, h, w]` for each of so many images."""
        s = shape(model, "SimMIM")
        side, cell = s.patch[0], self.cell
        if cell is None:
            cell = 32 if min(s.grid) * side >= 128 and 32 % side == 0 else 2 * side
            cell = side if any(n * side % cell for n in s.grid) else cell
        if cell % side:
            raise VitreousError(f"SimMIM: squares of {cell} pixels are no multiple of the patch, {side} pixels")
        return torch.stack([aligned(s.grid, cell // side, self.mask) for _ in range(images)])

    def predict(self, model: nn.Module, parts: nn.Module, images: Tensor, mask: Tensor) -> Tensor:
        """The picture `[B, C, H, W]` as it is answered, of those under a mask `[B, h, w]`."""
        assert isinstance(parts, PixelDecoder)
        with hiding(model, mask, parts.mask_token):
            tokens = patch_tokens(model, images, self.norm)
        stride = shape(model, "SimMIM").stride
        return parts(tokens, (images.shape[2] // stride, images.shape[3] // stride))

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        assert now.parts is not None
        mask = self.draw(now.model, len(batch.images)).to(batch.images.device)
        return {"pixels": hidden_l1(batch.images, self.predict(now.model, now.parts, batch.images, mask), mask)}

    def reconstruct(self, model: nn.Module, parts: nn.Module | None, images: Tensor) -> tuple[Tensor, Tensor]:
        """What is hidden, `[B, 1, H, W]`, and the picture as it is answered."""
        assert parts is not None
        mask, side = self.draw(model, len(images)).to(images.device), shape(model, "SimMIM").patch[0]
        cover = mask.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, None]
        return cover, self.predict(model, parts, images, mask)
