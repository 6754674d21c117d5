"""MAE: the encoder sees what is not hidden, a narrow decoder answers for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...anatomy import read
from ...models.masked_autoencoder import MaskedAutoencoder, MaskedDecoder, encode_visible, masked_order
from ..objective import Batch, Now, Objective, Seen, final, objective, positive, share
from .encode import shape
from .patches import normalised, over_hidden, patchify, unpatchify


@objective
@dataclass(frozen=True)
class MAE(Objective):
    """He, Chen, Xie, Li, Dollár, Girshick, "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022); no labels.

    mask: share that is hidden, so that ⌊N (1 − mask)⌋ patches are seen. normalise: whether patches are predicted by their own
    mean and unbiased variance, so that one of a single colour is all zeros. width, depth, heads: of the decoder; a
    `MaskedAutoencoder` trains its own instead. Positions are the model's: learned, where the paper's are fixed sines and cosines.

    Xiao, Bai, Yuille, Zhou, "Delving into Masked Autoencoders for Multi-Label Thorax Disease Classification" (WACV 2023) is
    `MAE(mask=0.9, normalise=False, depth=2)` on ViT-S with crops of (0.5, 1), 800 epochs of AdamW (0.9, 0.95) at 1.5 · 10⁻⁴ ·
    batch / 256; fine-tuned with layer decay 0.55 and binary cross-entropy. Its released code cannot weight masks by a heat map,
    which the text mentions: only random masks are built here.
    """

    wants = ()
    official: ClassVar[tuple[tuple[str, str], ...]] = ((r"^(decoder_|mask_token)", r"parts.\1"),)
    mask: float = 0.75
    normalise: bool = True
    width: int = 512
    depth: int = 8
    heads: int = 16

    def __post_init__(self) -> None:
        share(self, "mask")
        positive(self, "width", "depth", "heads")

    def parts(self, model: nn.Module) -> nn.Module | None:
        if isinstance(model, MaskedAutoencoder):
            return None
        s, anatomy = shape(model, "MAE"), read(model)
        pixels = s.patch[0] * s.patch[1] * s.channels
        masked_order(torch.zeros(1, s.grid[0] * s.grid[1]), self.mask)
        prefix = int(anatomy.class_token)
        return MaskedDecoder(s.width, s.grid, self.width, self.depth, self.heads, pixels, prefix=prefix)

    def predict(self, model: nn.Module, parts: nn.Module | None, images: Tensor, noise: Tensor) -> Tensor:
        """`[B, N, values]` of every patch, of those with the least `noise [B, N]`."""
        decoder = model.decoder if isinstance(model, MaskedAutoencoder) else parts
        assert isinstance(decoder, MaskedDecoder)
        shown, place = masked_order(noise, self.mask)
        tokens = encode_visible(model, images, shown, final(model))
        return decoder.decoder_pred(decoder.decoder_norm(decoder(tokens, place)))[:, decoder.prefix :]

    def hidden(self, noise: Tensor) -> Tensor:
        """`[B, N]`, True where hidden."""
        return masked_order(noise, self.mask)[1] >= int(noise.shape[1] * (1 - self.mask))

    def loss(self, images: Tensor, pixels: Tensor, mask: Tensor, patch: tuple[int, int]) -> Tensor:
        target = patchify(images, patch)
        target = normalised(target) if self.normalise else target
        return over_hidden((pixels - target).square().mean(-1), mask)

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        s = shape(now.model, "MAE")
        noise = torch.rand(len(batch.images), s.grid[0] * s.grid[1]).to(batch.images.device)
        pixels = self.predict(now.model, now.parts, batch.images, noise)
        return {"mae": self.loss(batch.images, pixels, self.hidden(noise), s.patch)}

    def reconstruct(self, model: nn.Module, parts: nn.Module | None, images: Tensor) -> tuple[Tensor, Tensor]:
        """What is hidden, `[B, 1, H, W]`, and the picture as it is answered, in the scale of `images`."""
        s = shape(model, "MAE")
        noise = torch.rand(len(images), s.grid[0] * s.grid[1]).to(images.device)
        pixels, target = self.predict(model, parts, images, noise), patchify(images, s.patch)
        if self.normalise:
            pixels = pixels * (target.var(-1, keepdim=True) + 1e-6).sqrt() + target.mean(-1, keepdim=True)
        cover = self.hidden(noise)[:, :, None].expand(-1, -1, s.patch[0] * s.patch[1])
        return unpatchify(cover, s.patch, s.grid), unpatchify(pixels, s.patch, s.grid)
