"""Checkpoints as people save them: which tensors of a file are the model's, under which names, and what else the file tells.

A file is opened in three steps: `read` finds the weights in it, `as_built` what a model must be built with to take them, `fill`
gives them to the model. Each tells what it did in `notes`, for people to read.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import pickle
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from timm.models import model_entrypoint
from torch import Tensor, nn

from ..errors import VitreousError
from ..files.archives import refuse_bomb
from ..models.official import in_common
from ..schema import plain
from .expects import INTERPOLATIONS
from .record import arguments

SCALAR: Any = np.float64(0).__reduce__()[0]  # what makes a pickled number again
# Plain values that training scripts keep beside the weights; of everything else nothing is unpickled.
ALLOWED: list[Any] = [
    argparse.Namespace,
    pathlib.PosixPath,
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
    np.dtype,
    type(np.dtype("float32")),
    type(np.dtype("float64")),
    type(np.dtype("int64")),
    SCALAR,
    (SCALAR, "numpy.core.multiarray.scalar"),
]

# Where the weights lie in a training checkpoint, the averaged ones first, as timm takes them; DINO's teacher and I-JEPA's target
# encoder are averages too.
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema", "teacher", "target_encoder")
PLAIN = ("state_dict", "model_state_dict", "model_state", "model", "network", "net", "module", "weights", "params")
ENCODERS = ("backbone", "encoder", "student")

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PRETRAINING = re.compile(r"mask_token$|decoder_|(dino|ibot)_head\.")  # what pretraining needs beside the network


@dataclass(frozen=True)
class Checkpoint:
    """state: all tensors by their names in the file, less those of wrappers (`torch.compile`, FSDP). trained: what the training
    script was called with, where the file tells. notes: which of the file's sets of weights this is."""

    source: str
    state: dict[str, Tensor]
    trained: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read(path: str | Path) -> Checkpoint:
    """The weights in a local file: safetensors, or `torch.load(weights_only=True)`; nothing else is ever unpickled.

    They may lie at any depth, under the names that training scripts use; averaged (EMA) weights are preferred. Raises
    `VitreousError` for a broken file, pickled code, no weights, and several sets of weights under unknown names.
    """
    path = Path(path)
    if not path.is_file():
        raise VitreousError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return Checkpoint(str(path), _unwrapped(read_safetensors(path)[0]))
    refuse_bomb(path)
    try:
        with torch.serialization.safe_globals(ALLOWED):
            held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise VitreousError(
            f"{path} holds pickled code{_named_in(path)}, which is never run: save its state_dict() alone, best as safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it ends early"
        if "TorchScript" in reason or "torch.jit" in str(error):
            reason = "it is a TorchScript archive; save torch.jit.load(file).state_dict()"
        raise VitreousError(f"{path} is not a whole checkpoint: {reason}") from error
    state, where = _weights(held, str(path))
    notes = [f"weights: '{where}' of {path.name}"] if where else []
    return Checkpoint(str(path), _unwrapped(state), _trained(held), notes)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise VitreousError(f"{path} is not a whole safetensors file: {error}") from error


def _named_in(path: Path) -> str:
    try:
        with torch.serialization.safe_globals(ALLOWED):
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a file of the old format, or a broken one
        return ""
    return f" ({', '.join(sorted(found)[:3])})" if found else ""


def _is_state(held: Any) -> bool:
    """Names to tensors, beside which there may be plain values."""
    if not isinstance(held, Mapping) or not held:
        return False
    tensors = sum(isinstance(v, Tensor) and v.ndim > 0 for v in held.values())
    return tensors > 0 and not any(isinstance(v, Mapping | list | tuple) and len(v) > 0 for v in held.values())


def _weights(held: Any, source: str) -> tuple[dict[str, Tensor], str]:
    """The state dict inside what a file holds, and the dotted path to it."""
    if _is_state(held):
        return {str(k): v for k, v in held.items() if isinstance(v, Tensor)}, ""
    if isinstance(held, Mapping):
        # DINOv2 and I-JEPA keep whole networks side by side, so encoders come last
        known = [k for k in (*AVERAGED, *PLAIN, *ENCODERS) if isinstance(held.get(k), Mapping)]
        others = [k for k, v in held.items() if k not in known and isinstance(v, Mapping)]
        found = {k: inner for k in known if (inner := _try(held[k], source)) is not None}
        if not found:
            found = {str(k): inner for k in others if not str(k).startswith("optim") and (inner := _try(held[k], source))}
            if len(found) > 1:
                raise VitreousError(f"{source} holds several sets of weights ({', '.join(found)}): save the one to use alone")
        for key, (state, inner) in found.items():
            return state, f"{key}.{inner}" if inner else key
    raise VitreousError(f"{source} holds no state dict: expected a mapping from names to tensors")


def _try(held: Any, source: str) -> tuple[dict[str, Tensor], str] | None:
    try:
        return _weights(held, source)
    except VitreousError:
        return None


def _trained(held: Any) -> dict[str, Any]:
    for key in ("args", "opt", "config"):
        told = held.get(key) if isinstance(held, Mapping) else None
        told = vars(told) if isinstance(told, argparse.Namespace) else told
        if isinstance(told, Mapping):
            return {str(k): v for k, v in told.items()}
    return {}


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {WRAPPERS.sub("", k): v for k, v in state.items()}
    while all(k.startswith("module.") for k in state):
        state = {k.removeprefix("module."): v for k, v in state.items()}
    return state


# ---- what timm's train.py tells of itself


def trained_as(given: Checkpoint) -> tuple[str | None, dict[str, Any], dict[str, Any]]:
    """The timm name, the arguments and the preparation (for `expects.expect`) with which timm's `train.py` made the file."""
    told = given.trained
    name = told.get("model")
    if not isinstance(name, str) or name.split(".")[0] not in timm.list_models():
        return None, {}, {}
    kwargs = dict(told["model_kwargs"]) if isinstance(told.get("model_kwargs"), Mapping) else {}
    sizes = {"num_classes": told.get("num_classes"), "img_size": told.get("img_size"), "in_chans": told.get("in_chans")}
    size = told.get("input_size")
    if isinstance(size, list | tuple) and len(size) == 3 and not sizes["img_size"]:
        sizes |= {"img_size": size[1] if size[1] == size[2] else tuple(size[1:]), "in_chans": size[0]}
    kwargs |= {k: v for k, v in sizes.items() if v}
    if isinstance(told.get("gp"), str):
        kwargs["global_pool"] = told["gp"]
    allowed = arguments(name)
    kwargs = {k: v for k, v in kwargs.items() if k in allowed and plain(v)}
    given_there = lambda k: told.get(k) not in (None, "", [], ()) and (k != "interpolation" or told[k] in INTERPOLATIONS)
    expected = {k: told[k] for k in ("mean", "std", "crop_pct", "interpolation", "crop_mode") if given_there(k)}
    classes = told.get("class_map")
    if isinstance(classes, str | Path) and str(classes):
        if Path(classes).is_file() and Path(classes).suffix in (".txt", ".json"):
            expected["classes"] = Path(classes)
        else:
            given.notes.append(f"trained with the class map {classes}, which is not here: name the classes yourself")
    return name, kwargs, expected


# ---- names and shapes


def fill(model: nn.Module, given: Checkpoint) -> list[str]:
    """Load the weights, which must fit: no name missing or left over, no other shape. What was done to make them fit is told.

    Prefixes of wrappers are cut off; positions, relative biases and patch embeddings of another size are resampled; foreign names
    are converted by timm's own filter of the model's family. Half precision becomes the model's own.
    """
    state, notes = _matched(model, given.state)
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing or extra or wrong:
        found = [f"{len(missing)} missing (first '{missing[0]}')"] if missing else []
        found += [f"{len(extra)} unknown (first '{extra[0]}')"] if extra else []
        found += [_other_shape(model, wrong, state, own)] if wrong else []
        first = {k.split(".")[0] for k in given.state}
        found += [f"all names in the file begin with '{first.pop()}.'"] if len(first) == 1 else []
        raise VitreousError(
            f"the weights in {given.source} do not fit {type(model).__name__}: {'; '.join(found)}. Name the model they were "
            "trained as, with the same img_size and num_classes"
        )
    model.load_state_dict(state)
    return [*given.notes, *notes]


def fitting(model: nn.Module, given: Checkpoint) -> float:
    """The share of the weights, of the model's and the file's, that are in both in the same shape; nothing is loaded."""
    return in_common(model.state_dict(), _matched(model, given.state)[0])


def _other_shape(model: nn.Module, wrong: list[str], state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    k = wrong[0]
    heads = [f"{c}.weight" for c in classifiers(model)]
    hint = ""
    if all(name.rsplit(".", 1)[0] + ".weight" in heads for name in wrong):
        hint = f": its head is for {state[k].shape[0]} classes, leave num_classes out to take it as it is"
    return f"{len(wrong)} of another shape (first '{k}': {tuple(state[k].shape)} in the file, {tuple(own[k].shape)} here){hint}"


def as_built(model: nn.Module, given: Checkpoint, told: Iterable[str]) -> dict[str, Any]:
    """What to build `model` with, beside the arguments `told`, so that it is the one that the file was saved from.

    The file's own shapes decide over what the name stands for: classes of the head, none where there is no head, size of
    patches and images, channels, and pooling behind which timm has a norm of another name.
    """
    state, own = _matched(model, given.state)[0], model.state_dict()
    raw = _named_as(model, given.state)[0]
    found: dict[str, Any] = {}
    if len(own.keys() & state.keys()) < len(own) / 2:
        return found  # another model
    if "num_classes" not in told and (heads := classifiers(model)) and getattr(model, "num_classes", 0):
        head = state.get(f"{heads[0]}.weight")
        number = 0 if head is None and f"{heads[0]}.weight" in own else len(head) if head is not None else None
        if number is not None and number != model.num_classes:
            found["num_classes"] = number
    patch, here = raw.get("patch_embed.proj.weight"), own.get("patch_embed.proj.weight")
    if patch is not None and here is not None and patch.ndim == here.ndim == 4:
        if "in_chans" not in told and patch.shape[1] != here.shape[1]:
            found["in_chans"] = patch.shape[1]
        if "patch_size" not in told and patch.shape[2:] != here.shape[2:] and patch.shape[2] == patch.shape[3]:
            found["patch_size"] = patch.shape[2]
        positions, mine = raw.get("pos_embed"), own.get("pos_embed")
        grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
        if "img_size" not in told and positions is not None and mine is not None and grid is not None:
            side = math.isqrt(n := max(0, positions.shape[1] - (mine.shape[1] - grid[0] * grid[1])))
            if positions.shape != mine.shape and positions.shape[2:] == mine.shape[2:] and n and side**2 == n:
                found["img_size"] = side * patch.shape[2]
    if "global_pool" not in told and "fc_norm.weight" in raw and "fc_norm.weight" not in own and "norm.weight" in own:
        found["global_pool"] = "avg"
    return found


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules of a timm model that give the logits."""
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    named = known.get("classifier") if isinstance(known, Mapping) else None
    return (named,) if isinstance(named, str) else tuple(named or ())


def _matched(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The file's tensors under the model's names and in its shapes, as far as that can be had; and how."""
    own = model.state_dict()
    fits = lambda tried: sum(k in tried and tried[k].shape == v.shape for k, v in own.items()) - len(tried.keys() - own.keys())
    plain, notes = _named_as(model, state)
    ways = [(_less(model, _resampled(model, plain)), notes)]
    if fits(ways[0][0]) < len(own):
        for names, said in ((plain, notes), (dict(state), [])):
            if (converted := _by_timm(model, names)) is not None:
                filtered, more = _named_as(model, converted)
                renamed = [] if filtered.keys() <= names.keys() else ["names converted from another library's"]
                ways.append((_less(model, filtered), [*said, *more, *renamed]))
    found, notes = max(ways, key=lambda way: fits(way[0]))
    if left := sorted(plain.keys() - found.keys() - own.keys()):
        notes = [*notes, f"left out, as this model has no such part: {len(left)} tensors (first '{left[0]}')"]
    for name in sorted(found.keys() & plain.keys()):
        before, after = tuple(plain[name].shape), tuple(found[name].shape)
        if before != after:
            notes = [*notes, f"'{name}' resampled from {before} to {after}, for images or patches of another size"]
    return found, notes


def _less(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what only pretraining needs, and without the classifier where features were asked for."""
    own = model.state_dict()
    heads = tuple(f"{name}." for name in classifiers(model)) if getattr(model, "num_classes", None) == 0 else ()
    return {k: v for k, v in state.items() if k in own or not (PRETRAINING.match(k) or (heads and k.startswith(heads)))}


def _named_as(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """`state` under the names of `model`: the prefix cut off behind which most of them are found, and all that lies elsewhere
    left out, but for a linear layer that can be the model's classifier."""
    own = model.state_dict()
    counts: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        counts.update(".".join(parts[:i]) + "." * (i > 0) for i in range(min(len(parts), 6)) if ".".join(parts[i:]) in own)
    averaged = lambda prefix: any(word in prefix for word in ("ema", "teacher", "target"))
    prefix = max(counts, key=lambda p: (counts[p], averaged(p), -len(p)), default="")
    if not prefix:
        return dict(state), []
    inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    outside = {k: v for k, v in state.items() if not k.startswith(prefix)}
    notes = [f"weights: the names under '{prefix}'"]
    linear = [k.rsplit(".", 1)[0] for k, v in outside.items() if k.endswith(".weight") and v.ndim == 2]
    head = next((c for c in classifiers(model) if f"{c}.weight" in own and f"{c}.weight" not in inside), None)
    if head and len(linear) == 1 and outside[f"{linear[0]}.weight"].shape[1:] == own[f"{head}.weight"].shape[1:]:
        inside |= {f"{head}.{p}": outside.pop(k) for p in ("weight", "bias") if (k := f"{linear[0]}.{p}") in outside}
        notes.append(f"classifier: '{linear[0]}'")
    if outside:
        notes.append(f"left out, as they lie elsewhere: {len(outside)} tensors (first '{min(outside)}')")
    return inside, notes


def _by_timm(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """`state` through the filter for published weights of this family, timm's or ours: foreign names, other sizes. None where
    there is none."""
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    name = known.get("architecture") if isinstance(known, Mapping) else None
    try:
        module = model_entrypoint(name).__module__ if name else type(model).__module__
    except RuntimeError:
        module = type(model).__module__
    convert = getattr(sys.modules.get(module), "checkpoint_filter_fn", None)
    official = getattr(model_entrypoint(name), "convert", None) if name and timm.is_model(name) else None
    try:
        if official is not None:
            return official(dict(state))
        return None if convert is None else convert(dict(state), model)
    except Exception:  # made for the published files; what it cannot read is told by its names, as without it
        return None


def _resampled(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Position embeddings `[1, prefix + h·w, C]` of a ViT trained at another size, on the grid of this one, as timm does."""
    own = getattr(model, "pos_embed", None)
    given, grid = state.get("pos_embed"), getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if not isinstance(own, Tensor) or given is None or given.ndim != 3 or given.shape == own.shape or grid is None:
        return state
    prefix = own.shape[1] - grid[0] * grid[1]
    if min(grid) < 1 or given.shape[1] <= prefix:
        return state
    if given.shape[2] != own.shape[2] or math.isqrt(given.shape[1] - prefix) ** 2 != given.shape[1] - prefix:
        return state  # another model: told by its shape
    last = prefix if getattr(model, "num_prefix_tokens", prefix) == 0 else 0  # iLLaMA's class token comes last
    sized = resample_abs_pos_embed(given.roll(last, 1), list(grid), num_prefix_tokens=prefix)
    return {**state, "pos_embed": sized.roll(-last, 1)}
