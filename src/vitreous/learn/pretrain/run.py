"""`vt.pretrain`: the engine without labels, an eye on collapse, and the encoder beside its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2

from ...data import Data
from ...data.transform import preparation
from ...errors import VitreousError
from ...store import save_model
from .. import written
from ..batches import Pair
from ..engine import train
from ..objective import Batch, Now, Objective, Seen
from ..optimisers import AdamW, Optimiser
from .probe import collapsed, features

FIRST = "first.safetensors"
LOOKED_AT = 256  # pictures by which a collapse is noticed


@dataclass(frozen=True)
class Crop:
    """A random crop of `share` of a picture at the model's size, perhaps mirrored."""

    size: tuple[int, int]
    share: tuple[float, float]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, picture: Image.Image) -> Tensor:
        made = v2.Compose([
            v2.RandomResizedCrop(self.size, scale=self.share, interpolation=InterpolationMode.BICUBIC), v2.RandomHorizontalFlip(),
            v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.mean, self.std),
        ])  # fmt: skip
        return made(picture)


@dataclass(frozen=True)
class Part:
    """A random crop of `share` of the rows and columns of what is no picture, the same in every frame, slice and channel, at the
    size that it had; perhaps mirrored, but no clip, in which left and right tell which way things move. Sound stays as it is."""

    what: str
    share: tuple[float, float]

    def __call__(self, x: Tensor) -> Tensor:
        if self.what == "sound":
            return x
        rows = 1 if self.what == "volumes" else x.ndim - 2
        seen = x.movedim((rows, rows + 1), (-2, -1))
        size = seen.shape[-2:]
        top, left, height, width = RandomResizedCrop.get_params(seen, list(self.share), [3 / 4, 4 / 3])
        cut = seen[..., top : top + height, left : left + width].flatten(0, -3)[None]
        seen = F.interpolate(cut, size, mode="bilinear", antialias=True)[0].view_as(seen)
        seen = seen.flip(-1) if self.what != "clips" and torch.rand(()) < 0.5 else seen
        return seen.movedim((-2, -1), (rows, rows + 1))


@dataclass(frozen=True)
class Watch(Objective):
    """Has no loss: after every epoch it keeps the encoder as it is, and says when it has collapsed. `first`: the encoder before
    the run, in a tuple, as a module alone is taken for a teacher."""

    wants = ()
    sample: Pair | Data
    say: Callable[[str], None]
    folder: Path | None = None
    first: tuple[nn.Module, ...] = ()
    seen: dict[str, int] = field(default_factory=lambda: {"epoch": 0})

    def __str__(self) -> str:
        return "Watch()"

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        return {}

    def before_step(self, now: Now) -> None:
        if int(now.epoch) > self.seen["epoch"]:
            self.seen["epoch"] = int(now.epoch)
            self.look(now.model, f"after {int(now.epoch)} epochs ")

    def look(self, model: nn.Module, when: str = "") -> None:
        if self.folder is not None and self.folder.is_dir():
            for was in () if (self.folder / FIRST).exists() else self.first:
                save_model(was, self.folder / FIRST)
            save_model(model, self.folder / "last.safetensors")
        if (said := collapsed(features(model, self.sample)[0])) is not None:
            self.say(when + said)


def pretrain(
    model: nn.Module,
    data: Data | Pair,
    method: str | Objective,
    optimiser: Optimiser | None = None,
    *,
    teacher: nn.Module | None = None,
    epochs: float = 100,
    batch: int = 128,
    augment: Any = "crop",
    out: str | Path | None = None,
    say: Callable[[str], None] = print,
    **settings: Any,
) -> nn.Module:
    """Train a copy of `model` on `data` without labels; returns the encoder in eval mode, an ordinary model of timm.

    method: an objective, or its text, as "SimMIM(mask=0.6)". optimiser: AdamW (0.9, 0.95) at 1.5 · 10⁻⁴ · batch / 256 when
    None. augment: "crop" is a crop of the share that the method's paper takes, mirrored or not (see `Part` for what is no
    picture; of tensors a shift); else as `vt.train`, which takes the other settings too. out: folder of the run; beside what
    `train` writes it holds `last.safetensors`, the encoder after each epoch, and `first.safetensors`, as it was before. say: told
    where the encoder has collapsed.

    Raises `VitreousError` as `train` does.
    """
    made = [method] if isinstance(method, Objective) else written.objectives(method, teacher)
    if len(made) != 1:
        raise VitreousError(f"give one method of pretraining, not {len(made)}")
    optimiser = optimiser or AdamW(lr=1.5e-4 * batch / 256, betas=(0.9, 0.95))
    if augment == "crop" and isinstance(data, Data) and data.pictures:
        config = preparation(model).config
        augment = Crop(tuple(config["input_size"][1:]), made[0].crop, tuple(config["mean"]), tuple(config["std"]))
    elif augment == "crop" and isinstance(data, Data):
        augment = Part(data.what, made[0].crop)
    _fits(model, data.tensor([0]) if isinstance(data, Data) else data[0][:1])
    folder = None if out is None else Path(out)
    some = data.part(range(min(len(data), LOOKED_AT))) if isinstance(data, Data) else (data[0][:LOOKED_AT], None)
    watch = Watch(some, say, folder, (model,))
    encoder = train(model, data, [*made, watch], optimiser, epochs=epochs, batch=batch, augment=augment, out=out, **settings)
    watch.look(encoder)
    return encoder


def _fits(model: nn.Module, x: Tensor) -> None:
    """Raise `VitreousError` for inputs of other channels than the model's, or of a size that it cannot cut into patches."""
    embed: Any = getattr(model, "patch_embed", None)
    channels = getattr(getattr(embed, "proj", None), "in_channels", None)
    if channels is not None and x.shape[1] != channels:
        raise VitreousError(
            f"the model takes {channels} channels and the pictures have {x.shape[1]}: open it with in_chans={x.shape[1]}"
        )
    size, patch = getattr(embed, "img_size", None), getattr(embed, "patch_size", None)
    if size is not None and patch is not None and tuple(size) != tuple(x.shape[2:]):
        wrong = (
            "which its patches do not divide"
            if any(n % p for n, p in zip(x.shape[2:], patch, strict=False))
            else "not of that size"
        )
        raise VitreousError(
            f"the model takes pictures of {size[0]} × {size[1]}, and these are {' × '.join(map(str, x.shape[2:]))}, {wrong}: "
            "open it with img_size="
        )
