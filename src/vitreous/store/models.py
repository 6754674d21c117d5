"""Open a model, save a slimmed one as one file, load it again bit for bit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.layers import to_2tuple
from torch import nn

from ..copies.untie import untie
from ..copies.working import bare
from ..data.transform import preparation
from ..errors import VitreousError
from ..files import check, write_whole
from ..models.bundled import CLASSES, WEIGHTS
from ..models.official import fitting_side
from ..outputs import tensors
from ..steps import History, history_of, refuse_nan, remember
from ..work import fingerprint
from .checkpoints import Checkpoint, as_built, fill, fitting, read, read_safetensors, trained_as
from .expects import class_names, expect, expectations, restore
from .hugging_face import PREFIX, base_of, built, open_folder, timm_folder
from .record import HUBS, NEVER, affordable, arguments, fits_memory, read_record, refuse_hub, refuse_reading

BUNDLED = "vit_fashion"
KEY = "vitreous"
SUM = "vitreous_sum"  # by which damage is told
VAST = 2048  # side of images that take minutes to run
FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")


def open_model(
    model: str | Path | nn.Module | None = None,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    *,
    classes: str | Path | Sequence[str] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    device: str | torch.device | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A model ready to be looked into and slimmed, in eval mode.

    Args:
        model: a timm name; the path of a file written by `save`, of a checkpoint of timm's `train.py`, or of a folder that
            transformers or timm's `save_for_hf` wrote; an `nn.Module` (returned as it is); or None for the bundled model.
        pretrained: download timm's weights for that name. Nothing is ever downloaded otherwise.
        checkpoint: local weights, as training scripts save them (`checkpoints`): what they say of number of classes, sizes and
            preparation decides where you do not. What was done to make them fit is told by `warnings.warn`.
        classes, mean, std, crop_pct, interpolation: what the weights were trained with, where it is not what the name says
            (`expects.expect`); kept in the file that `save` writes.
        device: where the model goes ("cuda", "cuda:1", "mps" …); a given module stays where it is by default.
        kwargs: passed to `timm.create_model` (`num_classes`, `img_size` …) and kept in the file that `save` writes.

    Raises `VitreousError` for unknown names, weights that do not fit, broken files, and weights that hold NaN.
    """
    opened, notes = _opened(model, pretrained, checkpoint, kwargs)
    expect(opened, classes, mean, std, crop_pct, interpolation)
    for note in notes:
        warnings.warn(note, stacklevel=2)
    return opened.eval() if device is None else _moved(opened.eval(), device)


def _opened(
    model: str | Path | nn.Module | None, pretrained: bool, checkpoint: str | Path | None, kwargs: dict[str, Any]
) -> tuple[nn.Module, list[str]]:
    """The model, and what there is to tell of how it was opened."""
    refuse_reading(kwargs, pretrained)
    if isinstance(model, nn.Module):
        if kwargs:
            raise VitreousError(f"a module is taken as it is built: leave {', '.join(kwargs)} out")
        return model, fill(model, read(checkpoint)) if checkpoint is not None else []
    if model is not None and (Path(model) / "config.json").is_file():
        if kwargs or checkpoint is not None:
            raise VitreousError(f"{model} is built as its config.json says: leave {', '.join(kwargs) or 'checkpoint'} out")
        if (found := timm_folder(Path(model))) is not None:
            name, weights, arguments_of, expected = found
            opened, notes = _opened(name, False, weights, arguments_of)
            expect(opened, **expected)
            return opened, notes
        opened = open_folder(Path(model))
        refuse_nan(opened)
        return remember(opened, History(base_of(opened))), []
    if model is not None and (Path(model).suffix in FILES or Path(model).is_file()) and not timm.is_model(str(model)):
        if Path(model).suffix == ".safetensors" and (not Path(model).is_file() or KEY in read_safetensors(Path(model))[1]):
            if kwargs or checkpoint is not None:
                raise VitreousError(f"{model} is built as it was saved: leave {', '.join(kwargs) or 'checkpoint'} out")
            return load(model, pretrained=pretrained), []
        model, checkpoint = None, model
        if trained_as(given := read(checkpoint))[0] is None:
            raise VitreousError(
                f"{given.source} holds weights but no recipe: name its timm model and pass the file as the checkpoint"
            )
    given = read(checkpoint) if checkpoint is not None else None
    known, trained, expected = trained_as(given) if given else (None, {}, {})
    name = str(model or known or BUNDLED)
    refuse_hub(name, pretrained)
    if not name.startswith(HUBS):
        arguments(name)
    kwargs = {**trained, **kwargs}
    opened = _create(name, pretrained and given is None, kwargs)
    notes: list[str] = []
    if given is not None:
        if more := as_built(opened, given, kwargs):
            kwargs |= more
            opened = _create(name, False, kwargs)
        try:
            notes = fill(opened, given)
        except VitreousError as error:
            file, others = given, {k: v for k, v in kwargs.items() if k != "img_size"}
            build = lambda img_size: _create(name, False, {**others, "img_size": img_size})
            side = fitting_side(opened, build, lambda m: fitting(m, file)) if "of another shape" in str(error) else None
            raise VitreousError(f"{error}: img_size={side} fits" if side else str(error)) from None
        if built := trained | more:
            notes.append("built as the file tells: " + ", ".join(f"{k}={v!r}" for k, v in built.items()))
        if known and known.split(".")[0] != name.split(".")[0]:
            notes.append(f"the file was trained as '{known}', not as '{name}'")
        expect(opened, **expected)
    elif name == BUNDLED:
        fill(opened, Checkpoint(f"the package ({WEIGHTS.name})", read_safetensors(WEIGHTS)[0]))
        expect(opened, classes=CLASSES)
    refuse_nan(opened)
    if given is not None:
        refuse_overflow(opened, given.source)
    return remember(
        opened,
        History(
            {"name": name, "kwargs": {k: v for k, v in kwargs.items() if k not in NEVER}} | ({"notes": notes} if notes else {})
        ),
    ), notes


def _moved(model: nn.Module, device: str | torch.device) -> nn.Module:
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("what lies there has no numbers")
        return model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *["mps"] * torch.backends.mps.is_available()]
        reason = str(error).splitlines()[0].rstrip(".")
        raise VitreousError(f"cannot use the device '{device}': {reason}; this machine has {', '.join(there)}") from error


def about(model: nn.Module) -> list[str]:
    """How a model's weights were read, how its pictures are prepared, and what its classes are: a line each."""
    base = history_of(model).base or {}
    lines = list(base.get("notes", ()))
    with suppress(VitreousError):  # of a model that no picture can be prepared for
        lines.append(f"images: {preparation(model)}")
    if names := class_names(model):
        shown = ", ".join(names[:6]) + (" …" if len(names) > 6 else "")
        lines.append(f"{len(names)} classes: {shown}")
    return lines


def _create(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    if name.startswith(PREFIX):
        return built(name, kwargs)
    if kwargs and not name.startswith(HUBS):
        fits_memory(name, kwargs)
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except Exception as error:  # timm and the hub raise many kinds; the user needs the reason, not the stack
        doing = "downloading its weights or " if pretrained else ""
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, TypeError) and "argument 'img_size'" in reason:
            reason = "it is not built for one size of images, leave img_size out"
        raise VitreousError(f"cannot create '{name}': {doing}building it failed: {reason}") from error


def save_model(model: nn.Module, path: str | Path) -> Path:
    """Write base, recipe and weights of a model as one safetensors file, whole or not at all.

    A model that was neither opened by name nor is one of transformers has no base: `load` then needs it as `base=`.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise VitreousError(f"save writes safetensors: name the file {path.with_suffix('.safetensors').name}, not {path.name}")
    history = history_of(model)
    steps = [{**s.to_dict(), "plan": plan} for s, plan in history.done]
    base = history.base or base_of(model)
    about = {"base": base, "steps": steps, "expects": expectations(model)}
    # `torch.compile` puts a module around each that it compiles, whose name is no part of the model
    state = {k.replace("_orig_mod.", ""): v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    try:
        text = json.dumps(about, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise VitreousError(f"cannot save how this model was made, its arguments must be plain values: {error}") from None
    read_record(text, path.name, network=True)  # what could not be loaded again is not saved
    write_whole(path, _ordered(save(state, {KEY: text, SUM: fingerprint(text, state), "format": "pt"})))
    return path


def _ordered(file: bytes) -> bytes:
    """The same safetensors file with its metadata in order, which safetensors shuffles: equal models make equal files."""
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(file)[start:]))


def load(path: str | Path, base: nn.Module | None = None, pretrained: bool = False) -> nn.Module:
    """The model in a file written by `save`: its base is built again, its steps' structure, then its weights.

    The file decides no more than `record` allows; nothing in it makes anything download, unless `pretrained` is asked for and
    its base was opened from a hub. Raises `VitreousError` when the file is broken or was not written by `save`, when its
    weights are not finite or compute what is not, or when it needs a `base`.
    """
    path = Path(path)
    if not path.is_file():
        raise VitreousError(f"there is no file {path}")
    if path.suffix != ".safetensors":
        raise VitreousError(
            f"{path} is no safetensors file; to use a checkpoint, name its timm model and pass it as the checkpoint"
        )
    check(path)
    state, metadata = read_safetensors(path)
    if KEY not in metadata:
        raise VitreousError(f"{path} holds weights but no recipe: name its timm model and pass the file as the checkpoint")
    if SUM in metadata and metadata[SUM] != fingerprint(metadata[KEY], state):
        raise VitreousError(f"{path} is damaged: its weights are not those that were written. Take another copy of it")
    record = read_record(metadata[KEY], str(path), pretrained)
    if base is not None:
        model = bare(base)
    elif record.base is None:
        raise VitreousError(f"{path} holds a model that neither timm nor transformers builds: pass the original model as base=")
    else:
        affordable(record.base, state, str(path))
        model = _create(record.base["name"], False, record.base["kwargs"]).eval()
    for s, plan in record.done:
        try:
            if plan.get("untied"):
                untie(model)
            s.build(model, plan)
        except VitreousError as error:
            raise VitreousError(f"the recipe inside {path} does not fit its model: {error}") from error
        except Exception as error:  # a plan of the right form for another model
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise VitreousError(f"the recipe inside {path} does not fit its model: {s.name}: {reason}") from error
        model.eval()
    for name, here in (*model.named_parameters(), *model.named_buffers()):  # each comes back in the precision it was saved in
        if name in state and here.is_floating_point() and state[name].is_floating_point():
            here.data = here.data.to(state[name].dtype)
    own = model.state_dict()  # of a checkpoint much is made to fit; a saved file does, to the last name
    if wrong := sorted(k for k in own.keys() | state.keys() if k not in own or k not in state or own[k].shape != state[k].shape):
        raise VitreousError(
            f"the weights in {path} do not fit the model that its recipe builds: {len(wrong)} are missing, unknown or of another "
            f"shape, the first '{wrong[0]}'. Name the model they were saved from as base, or take another copy of the file"
        )
    model.load_state_dict(state)
    refuse_nan(model)
    refuse_overflow(model, str(path))
    restore(model, record.expects)
    return remember(model, History(record.base, record.done)).eval()


def refuse_overflow(model: nn.Module, source: str) -> None:
    """Raise `VitreousError` when finite weights compute what is not finite, on one image of noise of the model's own size.

    Not told of weights in half precision, which overflow on processors where their authors did not run them, nor of models
    that do not say the size of their images, or take larger ones than anybody waits for.
    """
    config: Any = getattr(model, "pretrained_cfg", None)
    config = config.to_dict() if hasattr(config, "to_dict") else config
    size = config.get("input_size") if isinstance(config, Mapping) else None
    if size is None or any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        return
    sides: Any = to_2tuple(getattr(getattr(model, "patch_embed", None), "img_size", None) or size[1:])
    channels: Any = getattr(model, "in_chans", None) or size[0]
    if max(sides) > VAST:
        return
    image = torch.randn(1, channels, *sides, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            out = tensors(model(image))
    except Exception:  # not a model of pictures as its configuration tells them: it says so when it is run
        return
    for name, value in out.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise VitreousError(
                f"the weights in {source} are finite, and what they compute is not ('{name}' holds NaN or infinity): the file is "
                "damaged, or training diverged"
            )
