"""Published variants under their official names, and their official checkpoints."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..errors import VitreousError, nearest
from .undrawn import Undrawn

Build = Callable[..., nn.Module]
Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]
Told = Callable[[dict[str, Tensor]], dict[str, Any]]

_published: dict[str, tuple[Build, Convert]] = {}
_families: dict[str, tuple[Build, Convert, Told]] = {}
SIDES = (224, 384, 256, 448, 512, 32, 64, 128, 192, 320, 288, 336, 518, 160, 96, 48, 240, 272, 392, 480, 560, 640, 768, 1024)


def official(name: str, build: Build, convert: Convert = dict) -> None:
    """Make `name`, as "pvt--pvt_tiny" (system and variant), known to `load_official`.

    `build(**kwargs)` gives the model; `convert` turns the official state dict into ours and must use every tensor.
    """
    _published[name] = build, convert


def family(system: str, build: Build, convert: Convert, told: Told) -> None:
    """Let `load_official` take checkpoints of `system` whose variant it does not know, where every network is another: those that
    were searched, or stitched. `told` gives the arguments of `build` that converted weights tell."""
    _families[system] = build, convert, told


def _maps(cls: type[nn.Module], given: Mapping[str, Any], maps: int) -> int:
    """How many maps a network of these arguments gives, where they are asked for: as many as it has stages, not as published."""
    if not given.get("features_only"):
        return maps
    own = {k: v for k, v in given.items() if k not in ("features_only", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
    with suppress(Exception), torch.device("meta"):  # what cannot be made without numbers is as published
        return len(cast(Any, cls(**own)).feature_info)
    return maps


def publish(
    cls: type[nn.Module],
    name: str,
    arguments: Mapping[str, Any],
    *,
    variant: str,
    convert: Convert = dict,
    doc: str = "",
    size: int = 224,
    maps: int = 4,
    **cfg: Any,
) -> None:
    """Register `cls(**arguments)` with timm as `name`, and with `load_official` as `variant` ("system--official name").

    convert: as in `official`. size: pixels a side of the images it was published for. `cfg`: other entries of timm's pretrained
    configuration than ImageNet's (`fixed_input_size`, `first_conv`, `crop_pct`, `num_classes`, …). maps: how many stages a
    pyramid has, whose maps `features_only=True` gives.
    """

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        features = None
        if hasattr(cls, "forward_intermediates"):
            given = {**arguments, **kwargs}
            features = dict(out_indices=tuple(range(_maps(cls, given, maps))), feature_cls="getter")
        return cast(nn.Module, build_model_with_cfg(cls, name, pretrained, feature_cfg=features, **{**arguments, **kwargs}))

    whole = dict(
        num_classes=1000,
        input_size=(3, size, size),
        crop_pct=0.9,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        classifier="head",
    )
    build.__name__, build.__module__, build.__doc__ = name, cls.__module__, doc or f"{cls.__name__}, published as {variant}."
    configurations = vars(sys.modules[cls.__module__]).setdefault("default_cfgs", {})
    configurations.update(generate_default_cfgs({name: {**whole, **cfg}}))
    build.convert = convert  # type: ignore[attr-defined]  # `vitreous.checkpoints` converts official files by it
    setattr(sys.modules[cls.__module__], name, build)  # where timm's `register_model` says that it is
    register_model(build)
    official(variant, build, convert)


def renamed(
    state: Mapping[str, Tensor], *rules: tuple[str, str] | tuple[str, Callable[[re.Match[str]], str]]
) -> dict[str, Tensor]:
    """The tensors under new names: each rule is a regular expression and what `re.sub` puts in its place, in this order."""
    for pattern, to in rules:
        state = {re.sub(pattern, to, name): tensor for name, tensor in state.items()}
    return dict(state)


def staged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PVT's names, which many papers took over, to stages that are a sequence each: `patch_embed1.…`, `block1.0.…`, `norm1.…` of
    a stage of one block become `stages.0.0.…`, `stages.0.1.…`, `stages.0.2.…`."""
    blocks = [re.match(r"block(\d)\.(\d+)\.", name) for name in state]
    norms = {m[1]: 0 for m in blocks if m}
    for m in blocks:
        if m:
            norms[m[1]] = max(norms[m[1]], int(m[2]) + 2)

    def place(m: re.Match[str]) -> str:
        part, stage, number = m.groups()
        place = norms[stage] if part == "norm" else int(number) + 1 if number else 0
        return f"stages.{int(stage) - 1}.{place}."

    return {re.sub(r"^(patch_embed|block|norm)(\d)\.(?:(?<=block\d\.)(\d+)\.)?", place, k): v for k, v in state.items()}


def variants() -> list[str]:
    """All that `load_official` knows, as "system--variant"."""
    return sorted(_published)


def in_common(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The share of the tensors of both that have the same name and shape in both."""
    first, second = ({(k, v.shape) for k, v in state.items()} for state in (a, b))
    return len(first & second) / max(len(first | second), 1)


def fitting_side(model: nn.Module, build: Build, fitting: Callable[[nn.Module], float]) -> int | None:
    """The side of the images for which `build(img_size=side)` gives a model that is `fitting` wholly (1), of those in use; None
    for none of them, and at once where less than half fits `model`, for the size of images decides over few shapes.

    Nothing but shapes is built.
    """
    if fitting(model) < 0.5:
        return None
    for side in SIDES:
        try:
            with torch.device("meta"):
                if fitting(build(img_size=side)) == 1:
                    return side
        except TypeError:  # built for any size
            return None
        except (VitreousError, AssertionError, RuntimeError, ValueError):  # cannot be built for this one
            continue
    return None


def take_classes(model: Any, state: Mapping[str, Tensor]) -> None:
    """Give `model` as many classes as the head in `state` has, where it is a linear layer of the model's width."""
    head = model.get_classifier() if hasattr(model, "get_classifier") else None
    inside = set(head.modules()) if isinstance(head, nn.Module) else set()
    for name, m in model.named_modules():
        if m in inside and isinstance(m, nn.Linear) and m.out_features == model.num_classes:
            weight = state.get(f"{name}.weight", m.weight)
            if weight.shape[1:] == m.weight.shape[1:] and len(weight) != model.num_classes:
                model.reset_classifier(len(weight))
                return


def load_official(variant: str, state: Mapping[str, Tensor], **kwargs: Any) -> nn.Module:
    """The published `variant` with the weights of its official checkpoint, in eval mode.

    `variant` is the official name, as "pvt_tiny", or "system--variant" where several papers use one name (a bare "tiny" is
    told apart by its tensors); of systems whose networks are found by a search also any other of theirs, as "vit-resnas--mine",
    built by what its tensors tell. `state` has the official repository's own names and is used strictly: a tensor that is
    missing, left over or of another shape raises VitreousError, which names the `img_size` to pass where that is all there is to
    it. There are as many classes as the checkpoint's head has. `kwargs` go to the variant's builder.
    """
    found = [n for n in _published if n == variant or n.partition("--")[2] == variant]
    if not found and (known := _families.get(variant.partition("--")[0])):
        return _unnamed(variant, *known, state, kwargs)
    if not found:
        hint = nearest(variant, [*_published, *(n.partition("--")[2] for n in _published)])
        raise VitreousError(f"no published variant '{variant}'{hint}")
    reasons = []
    for name in found:
        build, convert = _published[name]
        with Undrawn():
            model = build(**kwargs)
        try:
            ours = convert(dict(state))
            if "num_classes" not in kwargs:
                with Undrawn():
                    take_classes(model, ours)
            model.load_state_dict(ours, strict=True)
        except (RuntimeError, KeyError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reasons.append(f"{name}: {' '.join(lines[1:3]) or lines[0]}"[:300])
            if any("size mismatch" in line for line in lines):
                sized = partial(build, **{k: v for k, v in kwargs.items() if k != "img_size"})
                if side := fitting_side(model, sized, lambda m, ours=ours: in_common(m.state_dict(), ours)):
                    reasons[-1] = f"{name}: they are for images of {side} × {side} pixels: pass img_size={side}"
        else:
            return model.eval()
    raise VitreousError(f"the weights do not fit {'; nor '.join(reasons)}")


def _unnamed(
    variant: str, build: Build, convert: Convert, told: Told, state: Mapping[str, Tensor], kwargs: dict[str, Any]
) -> nn.Module:
    try:
        ours = convert(dict(state))
        with Undrawn():
            model = build(**{**told(ours), **kwargs})
            if "num_classes" not in kwargs:
                take_classes(model, ours)
        model.load_state_dict(ours, strict=True)
    except (RuntimeError, KeyError, ValueError, IndexError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise VitreousError(f"the weights do not fit {variant}: {' '.join(lines[1:3]) or lines[0]}"[:400]) from None
    return model.eval()
