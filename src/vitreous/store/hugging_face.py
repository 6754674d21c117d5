"""Folders as Hugging Face keeps models: `config.json` and `preprocessor_config.json` beside the weights; opened locally."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import VitreousError
from ..schema import plain, short
from .expects import expect

TOWERS = {"CLIPModel": "CLIPVisionModelWithProjection", "SiglipModel": "SiglipVisionModel", "Siglip2Model": "Siglip2VisionModel"}
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers

PREFIX = "transformers:"  # of a base that is an architecture of theirs with the values of its configuration
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # as timm calls them
# No part of how a model is built: labels are kept with the preparation, and the rest is about files and versions.
ASIDE = ("id2label", "label2id", "transformers_version", "architectures", "model_type", "dtype", "torch_dtype")


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
    kind = _kind(TOWERS.get(named[0], named[0]), str(folder))
    try:
        model: Any = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and safetensors raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VitreousError(f"transformers cannot open {folder}: {reason}") from error
    _prepared(model, folder)
    return model


def timm_folder(folder: Path) -> tuple[str, Path, dict[str, Any], dict[str, Any]] | None:
    """Of a folder that timm's `save_for_hf` wrote: the architecture, its weights, its arguments and what to tell `expect`."""
    config = read_config(folder)
    name, expected = config.get("architecture"), config.get("pretrained_cfg") or {}
    if not isinstance(name, str) or "architectures" in config:
        return None
    weights = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if weights is None:
        raise VitreousError(f"{folder} has no {' and no '.join(WEIGHTS)}")
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, dict) or not isinstance(expected, dict):
        raise VitreousError(f"{folder / 'config.json'} is not what timm writes: its model_args or pretrained_cfg is no mapping")
    arguments |= {k: config[k] for k in ("num_classes", "global_pool") if k in config}
    told = {k: expected[k] for k in ("mean", "std", "crop_pct", "interpolation", "crop_mode") if expected.get(k) is not None}
    return name, weights, arguments, told | ({"classes": config["label_names"]} if config.get("label_names") else {})


def base_of(model: nn.Module) -> dict[str, Any] | None:
    """How a model of transformers is built again: its class and the values of its configuration; None for other models, and
    for configurations inside of configurations."""
    kind, config = type(model), getattr(model, "config", None)
    if not kind.__module__.startswith("transformers.models.") or config is None:
        return None
    known = _values(kind)
    kwargs = {k: v for k, v in config.to_diff_dict().items() if k in known and k not in ASIDE and not k.startswith("_")}
    if "num_labels" not in kwargs and config.num_labels != 2:  # theirs, where none is said
        kwargs["num_labels"] = config.num_labels
    return {"name": PREFIX + kind.__name__, "kwargs": kwargs} if all(map(plain, kwargs.values())) else None


def built(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A model of `base_of`, with random weights. Raises `VitreousError` where transformers has no such model."""
    kind = _kind(name.removeprefix(PREFIX), "the file")
    try:
        return kind(kind.config_class(**kwargs)).eval()
    except Exception as error:  # transformers raises many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VitreousError(f"transformers cannot build {name.removeprefix(PREFIX)}: {reason}") from error


def refuse_arguments(name: str, kwargs: dict[str, Any], source: str) -> None:
    """Raise `VitreousError` for values that are no part of the architecture, or make it read files or the network."""
    allowed = {"num_labels", *_values(_kind(name.removeprefix(PREFIX), source))}
    if wrong := [k for k in kwargs if k not in allowed or "backbone" in k or k in ASIDE or k.startswith("_")]:
        raise VitreousError(f"{source} wants to build {short(name)} with {short(wrong[0])}, which is none of its architecture's")


def _values(kind: Any) -> dict[str, Any]:
    return kind.config_class().to_dict()


def _kind(name: str, source: str) -> Any:
    """The class of transformers that is called so."""
    try:
        import transformers
    except ImportError:
        raise VitreousError(f"{source} holds a model of transformers: python -m pip install transformers") from None
    kind: Any = None
    with suppress(Exception):  # some need packages of their own
        kind = getattr(transformers, name, None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    if not known or kind.config_class is None or ".timm_" in kind.__module__:
        raise VitreousError(f"transformers {transformers.__version__} has no {short(name)}, which {source} asks for")
    return kind


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
