"""What a model expects of its pictures, and what it calls its classes: kept in its `pretrained_cfg`, where timm keeps them.

Weights from elsewhere may have been trained with another mean, crop or order of classes than the name they are opened by. What
is told here is what `data` prepares pictures by and matches labels with; `save` writes it, and `load` brings it back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import VitreousError, nearest

CROPS = ("center", "squash", "border")
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos", "nearest", "box", "hamming")
KEPT = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")


def expect(
    model: nn.Module,
    classes: str | Path | Sequence[str] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    crop_mode: str | None = None,
    input_size: Sequence[int] | None = None,
) -> None:
    """Tell `model` what its weights were trained with; what is None stays as it was.

    Args:
        classes: names in the order of the logits: a list, "cat,dog", or a file of one name a line or JSON (`read_classes`).
        mean, std: of the pixels, from 0 to 1, for each channel or for all.
        crop_pct: side of the crop as a share of the resized picture's shorter side.
        interpolation: one of `INTERPOLATIONS`.
        crop_mode: one of `CROPS`, timm's words.
        input_size: (channels, height, width), for a model that does not tell it.

    Raises `VitreousError` for values that cannot be, and for another number of classes than the model has logits.
    """
    told: dict[str, Any] = {}
    channels = getattr(model, "in_chans", None)
    for name, value in (("mean", mean), ("std", std)):
        if value is not None:
            values = tuple(float(v) for v in ([value] if isinstance(value, int | float) else value))
            if len(values) == 1:
                values *= channels or 3
            if len(values) not in (1, 3, channels) or not all(math.isfinite(v) for v in values):
                raise VitreousError(f"{name}={value!r}: give one number, or one for each of the image's {channels or 3} channels")
            if name == "std" and min(values) <= 0:
                raise VitreousError(f"std={value!r}: must be above 0")
            if max(abs(v) for v in values) > 3:
                raise VitreousError(f"{name}={value!r}: pixels are counted from 0 to 1 here; divide by 255")
            told[name] = values
    if crop_pct is not None:
        if not 0 < crop_pct <= 1:
            raise VitreousError(f"crop_pct={crop_pct}: a share of the picture, above 0 and at most 1")
        told["crop_pct"] = float(crop_pct)
    for name, value, known in (("interpolation", interpolation, INTERPOLATIONS), ("crop_mode", crop_mode, CROPS)):
        if value is not None:
            if value not in known:
                raise VitreousError(f"unknown {name} '{value}'{nearest(value, known) or ': choose ' + ', '.join(known)}")
            told[name] = value
    if input_size is not None:
        told["input_size"] = tuple(int(n) for n in input_size)
    if classes is not None:
        names = read_classes(classes)
        logits = getattr(model, "num_classes", None)
        if isinstance(logits, int) and logits != len(names):
            raise VitreousError(f"{len(names)} class names for a model with {logits} logits: give one for each, in their order")
        told["label_names"] = names
    if told:
        model.pretrained_cfg = {**_configuration(model), **told}  # type: ignore[assignment]


def expectations(model: nn.Module) -> dict[str, Any]:
    """What `expect` needs to tell another model the same; empty where `model` says nothing."""
    known = _configuration(model)
    kept = {k: known[k] for k in KEPT if known.get(k) is not None}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()} | (
        {"label_names": list(names)} if (names := class_names(model)) else {}
    )


def restore(model: nn.Module, told: Mapping[str, Any]) -> None:
    """Give `model` the `expectations` of another. Raises `VitreousError` where they make no sense."""
    try:
        expect(model, classes=told.get("label_names"), **{k: told[k] for k in KEPT if k in told})
    except (TypeError, ValueError, AttributeError) as error:
        raise VitreousError(f"what is said there of the model's pictures makes no sense: {error}") from None


def class_names(model: Any) -> tuple[str, ...]:
    """The names of the logits in their order, or none where they are not known."""
    names = _configuration(model).get("label_names")
    return tuple(map(str, names)) if isinstance(names, list | tuple) else ()


def read_classes(classes: str | Path | Sequence[str]) -> tuple[str, ...]:
    """Class names in the order of the logits.

    From a list; "cat,dog"; a text file of one name a line; or a JSON file: a list, or a mapping between names and numbers
    either way round (`class_to_idx` of torchvision, `id2label` of Hugging Face).
    """
    if not isinstance(classes, str | Path):
        names = [str(c) for c in classes]
    elif (path := Path(classes)).is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            names = _from_json(json.loads(text)) if path.suffix == ".json" else lines
        except (OSError, ValueError, TypeError) as error:
            raise VitreousError(f"cannot read class names from {path}: {error}") from None
    elif isinstance(classes, Path) or "," not in classes:
        raise VitreousError(f"no file {classes} with class names: give a file, or the names with commas between")
    else:
        names = [s.strip() for s in classes.split(",")]
    if not all(names) or not names:
        raise VitreousError("a class name is empty: give one for each logit, in their order")
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise VitreousError(f"the class '{twice}' is named twice: give one name for each logit, in their order")
    return tuple(names)


def _from_json(found: Any) -> list[str]:
    if isinstance(found, list):
        return [str(n) for n in found]
    if not isinstance(found, dict):
        raise ValueError("neither a list nor a mapping")
    numbered = {int(v): str(k) for k, v in found.items()} if all(isinstance(v, int) for v in found.values()) else {}
    numbered = numbered or {int(k): str(v) for k, v in found.items()}
    if sorted(numbered) != list(range(len(found))):
        raise ValueError(f"the numbers must run from 0 to {len(found) - 1}")
    return [numbered[i] for i in range(len(found))]


def _configuration(model: Any) -> dict[str, Any]:
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    known = known.to_dict() if hasattr(known, "to_dict") else known
    return dict(known) if isinstance(known, Mapping) else {}
