"""Generic, then specific distillation of masked autoencoders."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError
from ..models.masked_autoencoder import MaskedAutoencoder, MaskedDecoder, encode_visible, masked_order
from .long_tail import deit_lt, two_answers
from .objective import Batch, Now, Objective, Seen, final, need_teacher, objective, same_classes


def generic(student: Tensor, teacher: Tensor, beta: float = 2.0) -> Tensor:
    """Smooth L1 between the student's prediction and the teacher's tokens `[B, N, C]`, which are normalised first (eq. 2)."""
    return F.smooth_l1_loss(student, F.layer_norm(teacher, teacher.shape[-1:], eps=1e-6), beta=beta)


def _autoencoder(model: nn.Module | None, name: str) -> MaskedAutoencoder:
    if not isinstance(model, MaskedAutoencoder):
        raise VitreousError(f"{name} needs a masked autoencoder with its decoder, such as mae_vit_base_patch16_dec512d8b")
    return model


def _noise(model: MaskedAutoencoder, images: Tensor) -> Tensor:
    return torch.rand(len(images), model.patch_embed.num_patches).to(images.device)


@objective
@dataclass(frozen=True)
class GenericDistillation(Objective):
    """Huang et al., "Generic-to-Specific Distillation of Masked Autoencoders" (CVPR 2023), first stage: a ViT learns what a
    pretrained `MaskedAutoencoder` has inside its decoder, hidden patches or not. It wants no labels.

    Both see the same quarter of the patches (`mask` hidden). A decoder of the student's own (`width`, `depth`, `heads`; 256, 4, 8
    for ViT-S, 128, 4, 4 for ViT-Ti) and two linear layers predict the teacher's tokens after `layer` of its blocks, at all
    places; they are thrown away. A student with a distillation token (timm's `deit_*_distilled_*`) keeps it out until the second
    stage, `SpecificDistillation`. Published: AdamW (0.9, 0.95), 1.5e-4 · batch / 256, only crops and flips.
    """

    wants = ()
    teacher: nn.Module | None = field(default=None, compare=False)
    mask: float = 0.75
    layer: int = 4
    width: int = 256
    depth: int = 4
    heads: int = 8
    beta: float = 2.0

    def parts(self, model: nn.Module) -> nn.Module:
        teacher = _autoencoder(need_teacher(self.teacher, "GenericDistillation"), "GenericDistillation: the teacher")
        depth = len(teacher.decoder.decoder_blocks)
        ours, theirs = read(model), read(teacher)
        if ours.grid is None or ours.width is None or ours.grid != theirs.grid:
            raise VitreousError(
                f"GenericDistillation: the teacher has a grid of {theirs.grid} patches and the student {ours.grid}: "
                "give models that cut the picture alike"
            )
        if not 1 <= self.layer <= depth or self.width % self.heads:
            raise VitreousError(
                f"GenericDistillation: the teacher's decoder has {depth} blocks, there is no layer {self.layer}"
                if not 1 <= self.layer <= depth
                else f"GenericDistillation: a decoder of width {self.width} cannot have {self.heads} heads"
            )
        target = teacher.decoder.decoder_embed.out_features
        decoder = MaskedDecoder(ours.width, ours.grid, self.width, self.depth, self.heads)
        return nn.ModuleDict({"decoder": decoder, "predict": Mlp(self.width, target, target)})

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        teacher, parts = _autoencoder(self.teacher, "GenericDistillation: the teacher"), now.parts
        assert isinstance(parts, nn.ModuleDict)
        noise = _noise(teacher, batch.images)
        with torch.no_grad():
            theirs = teacher.masked(batch.images, noise, self.mask, self.layer)
        shown, place = masked_order(noise, self.mask)
        tokens = encode_visible(now.model, batch.images, shown, final(now.model))
        ours = parts["predict"](parts["decoder"](tokens, place))
        return {"generic": generic(ours.float(), theirs.float(), self.beta)}


@objective
@dataclass(frozen=True)
class SpecificDistillation(Objective):
    """The second stage of the same paper: (1 − α) CE(class token, label) + α CE(distillation token, argmax teacher), as DeiT's.

    For a student with both tokens, timm's `deit_*_distilled_*`; the teacher is the fine-tuned one, and sees the same picture,
    mixed or not. The answer is the mean of both heads. In the paper the distillation token has no position and comes last; here
    it has one, which is the same function with two names for one vector. Published: layer decay 0.75, drop path 0.1.
    """

    wants = ("logits", "prefix")
    teacher: nn.Module | None = field(default=None, compare=False)
    alpha: float = 0.5

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        theirs = now.teach(need_teacher(self.teacher, "SpecificDistillation"), batch.images).logits
        cls, dist = two_answers(seen, now.model, "SpecificDistillation")
        same_classes(dist, theirs, "SpecificDistillation")
        ours, taught = deit_lt(cls, dist, theirs, batch.one_each, alpha=self.alpha)
        return {"cls": ours, "dist": taught}
