"""SoftCon: scenes are as alike as their labels, and a model for RGB goes on with other channels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from ...anatomy import read
from ...errors import VitreousError
from ...models.masked_autoencoder import encode_visible
from ...steps import history_of, remember
from ..objective import Batch, Now, Objective, Seen, final, objective, positive, share
from .dino import follow, rising, twin
from .encode import shape
from .patches import in_full
from .views import cropped


def with_channels(model: nn.Module, channels: int, inflate: bool = False, rgb: Sequence[int] = (0, 1, 2)) -> nn.Module:
    """A copy of a model of timm whose pictures have so many channels: its first layer drawn anew, as SoftCon found better, or
    with `inflate` the RGB kernels at the channels `rgb` (red, green, blue) and their mean at the others, times 3 / channels."""
    s = shape(model, "with_channels")
    if channels < 1 or (
        inflate and (s.channels != 3 or sorted({*rgb}) != sorted(rgb) or not all(0 <= c < channels for c in rgb))
    ):
        raise VitreousError(
            f"with_channels: {channels} channels cannot be made of {s.channels} with red, green, blue at {tuple(rgb)}"
        )
    made: Any = copy.deepcopy(model)
    old = made.patch_embed.proj
    new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None)
    if inflate:
        with torch.no_grad():
            new.weight.copy_(old.weight.mean(1, keepdim=True).expand_as(new.weight))
            for here, there in zip(rgb, range(3), strict=True):
                new.weight[:, here] = old.weight[:, there]
            new.weight.mul_(3 / channels)
            if old.bias is not None and new.bias is not None:
                new.bias.copy_(old.bias)
    made.patch_embed.proj = new.to(old.weight)
    made.in_chans = channels
    cfg = dict(getattr(model, "pretrained_cfg", {}) or {})
    if "input_size" in cfg:
        mean, std = (sum(cfg[k]) / len(cfg[k]) for k in ("mean", "std"))
        made.pretrained_cfg = {
            **cfg,
            "input_size": (channels, *cfg["input_size"][1:]),
            "mean": (mean,) * channels,
            "std": (std,) * channels,
        }
    history = history_of(model)
    if history.base is not None:
        remember(made, replace(history, base={**history.base, "kwargs": {**history.base["kwargs"], "in_chans": channels}}))
    return made


def alike(labels: Tensor) -> Tensor:
    """Cosines `[B, B]` of multi-hot labels; 1 on the diagonal, 0 beside it where a scene has none."""
    unit = F.normalize(labels.float(), dim=1)
    return (unit @ unit.mT).fill_diagonal_(1.0)


@in_full
def soft_contrast(query: Tensor, key: Tensor, labels: Tensor, tau: float, mix: float, sharpness: Tensor) -> tuple[Tensor, Tensor]:
    """InfoNCE of `[B, D]` rows, (1 − mix) of it; and mix · binary cross-entropy of their scaled cosines to those of the labels,
    rows without a label left out."""
    cosines = F.normalize(query, dim=1) @ F.normalize(key, dim=1).mT
    same = torch.arange(len(query), device=query.device)
    nce = F.cross_entropy(cosines / tau, same)
    known = labels.sum(1) > 0
    told = sharpness[0] * cosines[known] + sharpness[1]
    soft = F.binary_cross_entropy_with_logits(told, alike(labels)[known].to(told)) if known.any() else cosines.new_zeros(())
    return (1 - mix) * nce, mix * soft


@objective
@dataclass(frozen=True)
class SoftCon(Objective):
    """Wang, Albrecht, Zhu, "Multi-Label Guided Soft Contrastive Learning for Efficient Earth Observation Pretraining" (TGRS
    2024); labels `[B, K]`, several a scene.

    From the paper: two views contrasted, a soft term whose target is the cosine of two scenes' labels, continual pretraining of a
    DINO model whose first layer is drawn anew (`with_channels`), patches left out of the trained branch alone. **The formula, its
    weights and temperatures were not to be had; these are ours**: InfoNCE to a branch that follows with momentum 0.99 to 1, and
    binary cross-entropy of the cosines, scaled and shifted by two learnt numbers. Pictures are cropped (0.2, 1) and
    mirrored only.
    """

    wants = ()
    whole_batch: ClassVar[bool] = True
    tau: float = 0.2
    mix: float = 0.5
    mask: float = 0.5
    width: int = 256

    def __post_init__(self) -> None:
        share(self, "mix", "mask")
        positive(self, "tau", "width")

    def parts(self, model: nn.Module) -> nn.Module:
        s = shape(model, "SoftCon")
        if not read(model).class_token:
            raise VitreousError("SoftCon reads a class token: choose a ViT with one")
        if int((1 - self.mask) * s.grid[0] * s.grid[1]) < 1:
            raise VitreousError(f"SoftCon: a mask of {self.mask} leaves none of {s.grid[0] * s.grid[1]} patches to see")
        head, predictor = Mlp(s.width, 2 * s.width, self.width), Mlp(self.width, 2 * self.width, self.width)
        backbone, teacher = twin(model, head)
        made = nn.ModuleDict({"head": head, "predictor": predictor, "backbone": backbone, "teacher": teacher})
        made.register_parameter("sharpness", nn.Parameter(torch.tensor([10.0, -5.0])))
        return made

    def class_token(self, model: nn.Module, images: Tensor, kept: int) -> Tensor:
        """`[B, C]`, of `kept` patches drawn for each image."""
        s = shape(model, "SoftCon")
        order = torch.rand(len(images), s.grid[0] * s.grid[1]).argsort(1)[:, :kept].to(images.device)
        return encode_visible(model, images, order, final(model))[:, 0]

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        parts: Any = now.parts
        labels = batch.need_labels()
        if labels.ndim != 2:
            labels = F.one_hot(labels, int(labels.max()) + 1)
        size, n = (batch.images.shape[2], batch.images.shape[3]), shape(now.model, "SoftCon").grid
        views = [cropped(batch.images, size, (0.2, 1.0)) for _ in range(2)]
        n_all = n[0] * n[1]
        query = parts["predictor"](parts["head"](self.class_token(now.model, views[0], int((1 - self.mask) * n_all))))
        with torch.no_grad():
            key = parts["teacher"](self.class_token(parts["backbone"], views[1], n_all))
        nce, soft = soft_contrast(query, key, labels, self.tau, self.mix, parts.sharpness)
        return {"nce": nce, "soft": soft}

    def after_step(self, now: Now) -> None:
        parts: Any = now.parts
        momentum = rising(0.99, 1.0, now.share)
        follow(parts["backbone"], now.model, momentum)
        follow(parts["teacher"], parts["head"], momentum)
