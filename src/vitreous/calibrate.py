"""Images in whatever form people hold them, and whether they are what the model was made for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .anatomy.parts import here
from .errors import VitreousError
from .glass.compiled import as_written

MOST = 1024  # images taken from a loader or an iterable, which may not end
LOOKED_AT = 64  # images on which ranges are judged
KEYS = ("pixel_values", "images", "image", "x", "inputs")  # of batches that are mappings
LABELS = ("labels", "label", "targets", "target", "y")
UNKNOWN = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's mean and deviation, where the model tells of none
FAR = 10  # widths of the range that the preparation gives; what lies further off has not been through it


def images(model: nn.Module, given: Any) -> Tensor:
    """`given` as calibration images `[N, C, H, W]` float32 for `model`, checked.

    Args:
        given: a tensor or array `[N, C, H, W]`; a list of images `[C, H, W]`, of batches, or of pairs with labels; a `DataLoader`
            or another iterable of batches (tensors, arrays, pairs, mappings with "pixel_values" or "image"); or a data set of
            `vt.data`. Of what is iterated over, the first `MOST` images.

    Raises `VitreousError` for no images, integers, another rank, NaN, images that the model does not run on, values that its own
    preparation (mean and std of its `pretrained_cfg`) cannot have made, and images of one colour throughout. What is merely odd
    (images not normalised, copies, another size than the model's own) is told by `warnings.warn`.
    """
    x = _checked(_joined(given))
    x = x.to(next((p.device for p in model.parameters()), x.device))
    judge(model, x)
    _judge_variety(x)
    wanted = _size(model)
    if wanted and wanted[1:] != tuple(x.shape[2:]):
        _odd(f"images are {x.shape[2]} × {x.shape[3]}, the model's own preparation gives {wanted[1]} × {wanted[2]}")
    return x


def judge(model: nn.Module, x: Tensor) -> None:
    """Whether `model` runs on images `x` `[N, C, H, W]`, and whether they are prepared for it; as `images` tells."""
    try:
        seen = _entered(model, _checked(x)[:: max(1, len(x) // LOOKED_AT)][:LOOKED_AT])
    except VitreousError:
        raise
    except Exception as error:  # whatever a stranger's forward raises for images of another size or number of channels
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        wanted = _size(model)
        made_for = f", it is made for {list(wanted)}" if wanted and wanted != tuple(x.shape[1:]) else ""
        last = ": channels come first, x.permute(0, 3, 1, 2)" if x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3) else ""
        raise VitreousError(
            f"{type(model).__name__} does not run on images {list(x.shape)}{made_for} ({reason}){last}"
        ) from error
    _judge_range(model, *seen)


def batches(given: Any, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """`given`, in the forms of `images`, as `(x [b, C, H, W], y or None)`, `size` at a time; labels where there are some.

    Nothing is kept of what has been given. Raises `VitreousError` for what is no images, and labels that do not fit.
    """
    xs: list[Tensor] = []
    ys: list[Tensor | None] = []
    for x, y in _pairs(given, size):
        if x.ndim == 3:
            x, y = x[None], None if y is None else y[None]
        _checked(x)
        if y is not None and len(y) != len(x):
            raise VitreousError(f"{len(x)} images have {len(y)} labels: one each")
        if ys and (y is None) != (ys[0] is None):
            raise VitreousError("some images have labels and some have none: give all or none")
        if xs and x.shape[1:] != xs[0].shape[1:]:
            raise VitreousError(f"images must be of one size: {list(xs[0].shape[1:])} and {list(x.shape[1:])} were given")
        xs.append(x)
        ys.append(y)
        while sum(map(len, xs)) >= size:
            x, y = torch.cat(xs), None if ys[0] is None else torch.cat([t for t in ys if t is not None])
            yield x[:size], None if y is None else y[:size]
            xs, ys = ([], []) if len(x) == size else ([x[size:]], [None if y is None else y[size:]])
    if xs:
        yield torch.cat(xs), None if ys[0] is None else torch.cat([t for t in ys if t is not None])


def count(given: Any) -> int:
    """How many images there are; 0 where that is not known before."""
    given = _image_part(given) if isinstance(given, Mapping) or _is_labelled(given) else given
    if isinstance(given, (list, tuple)):
        first = _image_part(given[0]) if given else None
        return len(given) if getattr(first, "ndim", 4) == 3 else 0
    given = getattr(given, "dataset", given)
    return len(given) if hasattr(given, "__len__") else 0


def example(model: nn.Module) -> Tensor:
    """Noise `[1, C, H, W]` of the size that `model` is made for. Raises `VitreousError` for a model that tells of none."""
    if (size := _size(model)) is None:
        raise VitreousError(f"{type(model).__name__} tells of no size of images: give some")
    return torch.randn(1, *size, generator=torch.Generator().manual_seed(0))


# ---- forms


def _joined(given: Any) -> Tensor:
    if isinstance(given, (Tensor, np.ndarray)):
        return _tensor(given)
    if isinstance(given, Mapping):
        return _joined(_image_part(given))
    if isinstance(given, (str, bytes)) or not any(hasattr(given, a) for a in ("__iter__", "__getitem__", "batches")):
        raise VitreousError(f"images cannot be a {type(given).__name__}: give a tensor [N, C, H, W] or a DataLoader")
    if _is_labelled(given):
        return _tensor(given[0])
    parts: list[Tensor] = []
    count = 0
    for batch in _batches(given):
        part = _tensor(_image_part(batch))
        part = part[None] if part.ndim == 3 else part
        if part.ndim != 4:
            raise VitreousError(f"images come as [B, C, H, W] or [C, H, W], not {list(part.shape)}")
        if parts and part.shape[1:] != parts[0].shape[1:]:
            raise VitreousError(f"images must be of one size: {list(parts[0].shape[1:])} and {list(part.shape[1:])} were given")
        parts.append(part[: MOST - count])
        count += len(parts[-1])
        if count >= MOST:
            break
    return torch.cat(parts) if parts else torch.zeros(0, 1, 1, 1)


def _batches(given: Any) -> Iterator[Any]:
    if hasattr(given, "batches"):  # of `vt.data`
        return given.batches(size=32, limit=MOST)
    if hasattr(given, "__iter__"):
        return iter(given)
    return (given[i] for i in range(len(given)))  # a data set of torch's


def _pairs(given: Any, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    if _is_array(given):
        given = _tensor(given)
        yield from ((part, None) for part in given.split(size))
    elif isinstance(given, Mapping) or _is_labelled(given):
        x, y = _tensor(_image_part(given)), _label_part(given)
        yield from zip(x.split(size), [None] * len(x) if y is None else y.split(size), strict=False)
    elif isinstance(given, (str, bytes)) or not any(hasattr(given, a) for a in ("__iter__", "__getitem__", "batches")):
        raise VitreousError(f"images cannot be a {type(given).__name__}: give a tensor [N, C, H, W] or a DataLoader")
    else:
        yield from ((_tensor(_image_part(batch)), _label_part(batch)) for batch in _batches(given))


def _is_labelled(given: Any) -> bool:
    """Whether these are images and their labels."""
    return isinstance(given, tuple) and len(given) == 2 and _is_array(given[0]) and getattr(given[1], "ndim", 0) < 3


def _label_part(batch: Any) -> Tensor | None:
    if isinstance(batch, Mapping):
        found = next((batch[k] for k in LABELS if k in batch), None)
    else:
        found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    try:
        return None if found is None else torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        raise VitreousError(f"labels must be class numbers, not {type(found).__name__}") from None


def _image_part(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        if (key := next((k for k in KEYS if k in batch), None)) is None:
            has = ", ".join(map(str, batch))
            raise VitreousError(f"batches have no images under {', '.join(KEYS)}; they have {has}")
        return batch[key]
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _tensor(value: Any) -> Tensor:
    if not _is_array(value):
        raise VitreousError(
            f"images must be tensors or arrays, not {type(value).__name__}: prepare them as the model expects "
            "(vt.data.calibration does)"
        )
    x = torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value.detach()
    if not x.is_floating_point():
        raise VitreousError(f"images are {x.dtype}".replace("torch.", "") + f": {PREPARE}")
    return x.float()


PREPARE = (
    "give floats, prepared as the model's training did (scaled to 0 … 1, then (x − mean) / std; vt.data.calibration does it)"
)


# ---- checks


def _checked(x: Tensor) -> Tensor:
    if x.ndim != 4:
        raise VitreousError(f"images must be [N, C, H, W], not {list(x.shape)}")
    if not x.numel():
        raise VitreousError("there are no calibration images: give at least one, 32 are usual")
    if not torch.isfinite(x).all():
        raise VitreousError("the images hold NaN or infinity: check the transform")
    return x


def _entered(model: nn.Module, x: Tensor) -> tuple[nn.Module | None, Tensor]:
    """Who tells of the preparation (None where nobody does), and what reaches it of `x` `[B, C, H, W]`.

    A wrapper may prepare the images itself: then what counts is what enters the model inside, or the first layer. The model
    runs on one image, which shows whether it can; on more only where what reaches the layer is not `x` itself.
    """
    told = next((m for m in model.modules() if _config(m).get("mean")), None)
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))), model)
    asked = first if told is None else told  # a compiled model has no truth value
    read: list[Tensor] = []

    def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        read.extend(v.detach().float() for v in (*given, *named.values())[:1] if isinstance(v, Tensor))

    parameter = next(model.parameters(), x)
    training = [m for m in model.modules() if m.training]
    model.eval()
    handle = asked.register_forward_pre_hook(here(note), with_kwargs=True)
    try:
        with torch.no_grad(), as_written(model):
            one = x[:1].to(parameter)
            model(one)
            if asked is model or not read or (read[0].shape == one.shape and torch.equal(read[0], one.float())):
                return told, x
            model(x[:8].to(parameter))
    finally:
        handle.remove()
        for m in training:
            m.training = True
    return told, read[-1]


def _judge_range(model: nn.Module, told: nn.Module | None, x: Tensor) -> None:
    """Compare values `[B, C, H, W]` with those that pictures of 0 … 1 have after the preparation of `told`."""
    mean, std = (_config(told)[k] for k in ("mean", "std")) if told is not None else UNKNOWN
    low, high = min(-m / s for m, s in zip(mean, std, strict=True)), max((1 - m) / s for m, s in zip(mean, std, strict=True))
    width, values = high - low, x.flatten()
    off = torch.maximum(low - values, values - high)
    whole = bool((values == values.round()).all()) and float(values.max()) > max(2.0, 1.5 * high) and float(values.min()) >= 0
    seen = f"they lie in {float(values.min()):.3g} … {float(values.max()):.3g}"
    able = f"its preparation (mean {_short(mean)}, std {_short(std)}) gives {low:.3g} … {high:.3g}"
    able = able if told is not None else f"usual preparations give {low:.3g} … {high:.3g}"
    if whole or float((off > FAR * width).float().mean()) > 0.01:
        raise VitreousError(f"the images are not prepared for {type(model).__name__}: {seen}, {able}; {PREPARE}")
    if told is None:
        return
    if float(values.min()) >= 0 and float(values.max()) <= 1 and low < -0.5:
        _odd(f"the images look like pictures that were not normalised: {seen}, {able}")
    elif float((off > 0.05 * width).float().mean()) > 0.01:
        _odd(f"the images are not what {type(model).__name__}'s own preparation makes of pictures: {seen}, {able}")


def _judge_variety(x: Tensor) -> None:
    flat = x.flatten(1)
    least, most = flat.aminmax(dim=1)
    plain = int((most - least <= 1e-3 * most.abs().clamp_min(1e-3)).sum())
    if plain == len(x):
        raise VitreousError("the images are each of one colour, black perhaps: nothing can be learned from them")
    different = len({(float(a), float(b)) for a, b in zip(flat.double().sum(1), flat.double().square().sum(1), strict=True)})
    if plain:
        _odd(f"{plain} of {len(x)} images are of one colour throughout")
    if different == 1 < len(x):
        _odd(f"the {len(x)} images are copies of one: ranges hold for that picture alone")
    elif different <= len(x) / 2:
        _odd(f"only {different} of {len(x)} images differ")


# ---- what the model says


def _config(module: nn.Module | None) -> dict[str, Any]:
    cfg: Any = getattr(module, "pretrained_cfg", None) or {}
    cfg = cfg.to_dict() if hasattr(cfg, "to_dict") else cfg
    return dict(cfg) if isinstance(cfg, Mapping) and cfg.get("std") else {}


def _size(model: nn.Module) -> tuple[int, int, int] | None:
    """`[C, H, W]` of the images that the model, or the first one inside that says so, is made for."""
    for m in model.modules():
        side: Any = getattr(getattr(m, "patch_embed", None), "img_size", None)
        size: Any = _config(m).get("input_size")
        if side or size:
            h, w = size[1:] if not side else side if isinstance(side, (tuple, list)) else (side, side)
            return getattr(m, "in_chans", None) or (size or (3,))[0], h, w
        config = getattr(m, "config", None)  # of Hugging Face
        if side := getattr(config, "image_size", None) or getattr(m, "image_size", None):
            h, w = side if isinstance(side, (tuple, list)) else (side, side)
            return getattr(config, "num_channels", 3), h, w
    return None


def _short(values: Any) -> str:
    return ", ".join(f"{float(v):.3g}" for v in values)


def _odd(what: str) -> None:
    warnings.warn(what, stacklevel=5)
