"""Folders as Hugging Face keeps models: `config.json` and `preprocessor_config.json` beside the weights; opened locally."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import VitreousError
from .expects import expect

TOWERS = {"CLIPModel": "CLIPVisionModelWithProjection", "SiglipModel": "SiglipVisionModel", "Siglip2Model": "Siglip2VisionModel"}
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of the folder. Raises `VitreousError` when it is not there or no mapping."""
    try:
        found = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise VitreousError(f"{folder} is no folder of a model, it has no {name} that can be read: {error}") from None
    if not isinstance(found, dict):
        raise VitreousError(f"{folder / name} is no mapping")
    return found


def open_folder(folder: Path) -> nn.Module:
    """The model of transformers in `folder`, of CLIP and SigLIP the vision tower; nothing is downloaded, no code of others run.

    Raises `VitreousError` for folders without a model of transformers, and where transformers is not installed.
    """
    named = read_config(folder).get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise VitreousError(f"{folder / 'config.json'} names no architecture: save the model by save_pretrained()")
    try:
        import transformers
    except ImportError:
        raise VitreousError(f"{folder} holds a model of transformers: python -m pip install transformers") from None
    name = TOWERS.get(named[0], named[0])
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise VitreousError(f"transformers {transformers.__version__} has no '{name}', which {folder} asks for")
    try:
        model: Any = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and safetensors raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VitreousError(f"transformers cannot open {folder}: {reason}") from error
    _prepared(model, folder)
    return model


def _prepared(model: Any, folder: Path) -> None:
    """What the folder says of pictures and classes, told to `model`."""
    names = getattr(model.config, "id2label", None) or {}
    known = [names[k] for k in sorted(names)] if hasattr(model, "classifier") else []
    expect(model, classes=None if not known or known[0] == "LABEL_0" else known)
    vision = getattr(model.config, "vision_config", model.config)
    side, channels = getattr(vision, "image_size", 224), getattr(vision, "num_channels", 3)
    sides = tuple(side) if isinstance(side, list | tuple) else (side, side)
    told: dict[str, Any] = {}
    if (folder / "preprocessor_config.json").is_file():
        said = read_config(folder, "preprocessor_config.json")
        size, crop = said.get("size"), said.get("crop_size") if said.get("do_center_crop") else None
        size = {"height": size, "width": size} if isinstance(size, int) else size or {}
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        final = crop or size
        if "height" in final:
            sides = final["height"], final["width"]
        resized = size.get("shortest_edge") or size.get("height") or sides[0]
        told |= dict(crop_pct=min(1.0, sides[0] / resized), crop_mode="center" if "shortest_edge" in size else "squash")
        if said.get("do_normalize", True) and "image_mean" in said:
            told |= dict(mean=said["image_mean"], std=said["image_std"])
        else:
            told |= dict(mean=0.0, std=1.0)
        told["interpolation"] = RESAMPLE.get(said.get("resample", 3), "bicubic")
    expect(model, input_size=(channels, *sides), **told)
