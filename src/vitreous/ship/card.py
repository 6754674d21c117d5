"""What a shipped file says about itself, so that it can be served without this library."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import timm
import torch
from PIL import Image
from timm.data.config import resolve_data_config
from timm.layers.helpers import to_2tuple
from torch import nn

from ..errors import VitreousError
from ..steps import history_of

FIELDS = ("preprocess", "classes", "model", "recipe", "versions", "precision")  # under these names in the file


def card(model: nn.Module) -> dict[str, Any]:
    """`preprocess`, `classes`, `model`, `recipe` and `versions`; what is not known of `model` is left out."""
    history = history_of(model)
    found: dict[str, Any] = {"recipe": [step.to_dict() for step in history.steps()], "versions": _versions()}
    with suppress(VitreousError):  # of a model of one's own that says nothing about its images
        found["preprocess"] = preprocess(model)
    if names := _configuration(model).get("label_names"):
        found["classes"] = list(map(str, names))
    if history.base:
        found["model"] = {"name": history.base["name"], "kwargs": _plain(history.base.get("kwargs", {}))}
    return found


def preprocess(model: nn.Module) -> dict[str, Any]:
    """How a picture becomes the file's input: the fields of timm's `pretrained_cfg` and of Hugging Face's image processors.

    Resize the shorter side to `size.shortest_edge` by `interpolation`, cut `crop_size` from the middle, divide by 255, subtract
    `mean`, divide by `std`, channels first. Raises `VitreousError` where the model says nothing about its images.
    """
    config = _configuration(model)
    if not config.get("input_size"):
        raise VitreousError(f"{type(model).__name__} has no pretrained_cfg with an input_size, so its images are unknown")
    told = resolve_data_config(pretrained_cfg=config)
    channels = getattr(model, "in_chans", None) or told["input_size"][0]
    side = getattr(getattr(model, "patch_embed", None), "img_size", None) or told["input_size"][1:]
    height, width = map(int, to_2tuple(side))
    mean, std = (
        list(values) if len(values) == channels else [sum(values) / len(values)] * channels
        for values in (told["mean"], told["std"])
    )
    mode = told.get("crop_mode") or "center"
    scaled = [int(n / told["crop_pct"]) for n in (height, width)]
    whole = {"height": scaled[0], "width": scaled[1]}
    return {
        "input_size": [channels, height, width],
        "interpolation": told["interpolation"],
        "mean": mean,
        "std": std,
        "crop_pct": told["crop_pct"],
        "crop_mode": mode,
        "image_processor_type": "CLIPImageProcessor",  # the one of theirs that cuts the middle out
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": scaled[0]} if mode == "center" and height == width else whole,
        "resample": int(Image.Resampling[told["interpolation"].upper()]),
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def texts(found: dict[str, Any]) -> dict[str, str]:
    """A card as the strings that ONNX and OpenVINO keep beside a graph: JSON each."""
    return {name: json.dumps(found[name], ensure_ascii=False) for name in FIELDS if name in found}


def beside(model: nn.Module) -> dict[str, str]:
    """What lies beside a shipped file, name to text: `preprocess.json`, `labels.txt` (a class a line), `recipe.json` (what
    `--recipe` takes); without what `model` does not say."""
    found = card(model)
    named = {"preprocess.json": found.get("preprocess"), "recipe.json": found["recipe"] or None}
    files = {name: json.dumps(said, indent=1, ensure_ascii=False) for name, said in named.items() if said is not None}
    if "classes" in found:
        files["labels.txt"] = "".join(" ".join(c.split()) + "\n" for c in found["classes"])
    return files


def _configuration(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def _plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if isinstance(v, str | int | float | bool | list | tuple | None)}


def _versions() -> dict[str, str]:
    known = {"torch": torch.__version__, "timm": timm.__version__}
    for name in ("vitreous", "onnx", "openvino"):
        with suppress(PackageNotFoundError):
            known[name] = version(name)
    return known
