"""From a model's own `pretrained_cfg` to the transform that its images need."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.data.transforms_factory import create_transform
from timm.layers.helpers import to_2tuple
from torchvision.transforms.functional import to_pil_image

from ..errors import VitreousError
from ..models.bundled import MEAN, STD


@dataclass(frozen=True)
class Preparation:
    """How pictures become tensors: `mode` (`RGB` or `L`), then `to_tensor`; `view` cuts likewise but stays a picture."""

    mode: str
    to_tensor: Callable[[Image.Image], torch.Tensor]
    view: Callable[[Image.Image], Image.Image]
    said: str = "by a transform of your own"
    config: Mapping[str, Any] = field(default_factory=dict)  # timm's: input_size, mean, std, interpolation, crop_pct

    def __str__(self) -> str:
        return self.said


@dataclass(frozen=True)
class View:
    """The picture that `look`, a transform to a tensor without normalization, leaves; a class, so that it can be pickled."""

    look: Callable[[Image.Image], torch.Tensor]

    def __call__(self, image: Image.Image) -> Image.Image:
        return to_pil_image(self.look(image))


def unchanged(image: Image.Image) -> Image.Image:
    return image


def preparation(model: Any = None, transform: Callable[[Image.Image], torch.Tensor] | None = None) -> Preparation:
    """The evaluation transform of `model` (of the bundled model when None), or the given `transform`.

    With a `transform` of one's own and no word from the model about its channels, pictures come as RGB.

    Size and channels come from the model itself where it states them, as timm leaves `pretrained_cfg` alone when a
    model is created with another `img_size` or `in_chans`; the rest comes from `pretrained_cfg` through timm.
    Raises `VitreousError` for a model that has no `pretrained_cfg` when no `transform` is given.
    """
    cfg: Any
    if model is None and transform is None:
        cfg = {"input_size": (1, 28, 28), "mean": MEAN, "std": STD, "interpolation": "bilinear", "crop_pct": 1.0}
    else:
        cfg = getattr(model, "pretrained_cfg", None) or {}
        cfg = cfg.to_dict() if hasattr(cfg, "to_dict") else cfg
        cfg = cfg if isinstance(cfg, Mapping) else {}
    if transform is None and not cfg:
        raise VitreousError(
            f"{type(model).__name__} has no pretrained_cfg, so its input size and normalisation are unknown: "
            "set model.pretrained_cfg (input_size, mean, std) or pass transform="
        )
    chans = getattr(model, "in_chans", None) or (cfg.get("input_size") or (3,))[0]
    if chans not in (1, 3):
        raise VitreousError(f"the model takes images of {chans} channels; pictures have 1 (grey) or 3 (RGB)")
    mode = "L" if chans == 1 else "RGB"
    if transform is not None:
        return Preparation(mode, transform, unchanged)

    config = resolve_data_config(pretrained_cfg=dict(cfg))
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or config["input_size"][1:]
    config["input_size"] = (chans, *to_2tuple(size))
    for key in ("mean", "std"):
        values = tuple(config[key])
        if len(values) != chans:
            config[key] = (sum(values) / len(values),) * chans
    look: Any = create_transform(**config, normalize=False)
    to_tensor: Any = create_transform(**config)
    return Preparation(mode, to_tensor, View(look), _said(mode, config), config)


def _said(mode: str, config: Mapping[str, Any]) -> str:
    height, width = config["input_size"][1:]
    told = lambda key: " ".join(f"{v:.4g}" for v in (config[key][:1] if len(set(config[key])) == 1 else config[key]))
    crop = "" if config["crop_pct"] == 1 else f", the middle {100 * config['crop_pct']:.4g} % of the shorter side"
    colours = "grey" if mode == "L" else "RGB"
    return f"{colours}, {config['interpolation']} to {height} x {width}{crop}, mean {told('mean')}, std {told('std')}"
