"""How training pictures are changed before the model sees them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torchvision.transforms import v2

from ..data import Data
from ..data.signals import unchanged
from ..data.transform import preparation
from ..errors import VitreousError
from .ferkd import FerKD, Labelled

KINDS = ("crop", "shift", "randaugment")


def transform_for(
    model: nn.Module, data: Any, augment: str | Callable[[Any], Tensor] | FerKD | None
) -> Callable[[Any], Tensor] | Labelled | None:
    """From a picture of `data` to the tensor that `model` takes; of tensors, from a batch to a batch (None: as they are)."""
    if isinstance(augment, FerKD):
        return augment.bound(model, data)
    if callable(augment):
        return augment
    if augment is not None and augment not in KINDS:
        raise VitreousError(f"no augmentation '{augment}': choose {', '.join(KINDS)}, none, or give a function")
    if not isinstance(data, Data):
        return shift if augment is not None else None
    if not data.pictures:
        if augment in ("crop", None):  # "crop" is the default, of pictures
            return unchanged
        raise VitreousError(f"'{augment}' changes pictures, and {data.name} holds others: choose none, or give a function")
    prepared = preparation(model)
    if augment is None:
        return prepared.to_tensor
    size, mean, std = (prepared.config[k] for k in ("input_size", "mean", "std"))
    _, height, width = size
    if augment == "shift":
        pad = max(height, width) // 8
        base = [v2.Resize((height, width)), v2.RandomCrop((height, width), padding=pad), v2.RandomHorizontalFlip()]
        return v2.Compose([*base, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    policy = "rand-m9-mstd0.5-inc1" if augment == "randaugment" else None
    how = prepared.config["interpolation"]
    no_jitter: Any = None
    made: Any = create_transform(size, True, mean=mean, std=std, interpolation=how, auto_augment=policy, color_jitter=no_jitter)
    return made


def shift(images: Tensor) -> Tensor:
    """Each image of `[B, C, H, W]` moved by up to an eighth of its side, and mirrored with probability ½."""
    b, _, h, w = images.shape
    pad = max(h, w) // 8
    moves, mirrored = torch.randint(0, 2 * pad + 1, (2, b)), torch.rand(b) < 0.5  # drawn alike for every device
    moves, mirrored = moves.to(images.device), mirrored.to(images.device)
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    down, along = (torch.arange(n, device=images.device) for n in (h, w))
    rows = moves[0][:, None] + down
    columns = moves[1][:, None] + torch.where(mirrored[:, None], along.flip(0), along)
    place = rows[:, :, None] * (w + 2 * pad) + columns[:, None]  # [B, H, W]
    return padded.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, images.shape[1], -1)).view_as(images)
