"""What a saved file says of itself: how its model is built again. All of it is checked before anything is built.

A file decides no more than which known architecture, with which plain arguments of its constructors, and which known steps with
which parameters and plans. It cannot name other files, reach the network, or ask for more memory than its weights are worth.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models import model_entrypoint
from torch import Tensor, nn

from ..errors import VitreousError, nearest
from ..processor import free_memory
from ..schema import fits, plain, read_json, short
from ..steps import Step, make_step
from .expects import KEPT
from .hugging_face import PREFIX, built, refuse_arguments

# Arguments by which timm reads files or the network, or answers another thing than a model.
NEVER = {"self", "args", "kwargs", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
HUBS = ("hf-hub:", "hf_hub:", "local-dir:")
SPARE = 16  # how many times the numbers in the file a model may hold before its steps make it smaller
DEEPEST = 1000  # layers of any model that someone has trained


@dataclass
class Record:
    base: dict[str, Any] | None
    done: list[tuple[Step, dict[str, Any]]] = field(default_factory=list)
    expects: dict[str, Any] = field(default_factory=dict)


def read_record(text: str, source: str, network: bool = False) -> Record:
    """What `save` wrote about a model. `network`: whether a name that makes timm read a hub or a folder is allowed.

    Raises `VitreousError` for all that `save` does not write.
    """
    said = read_json(text, f"the recipe inside {source}")
    damaged = f"the recipe inside {source} cannot be read (%s): the file is damaged or from a newer version"
    if not isinstance(said, dict) or not {"base", "steps"} <= said.keys() or said.keys() - {"base", "steps", "expects"}:
        raise VitreousError(damaged % "it names no base and no steps, or something else")
    base, entries = said["base"], said["steps"]
    if base is not None and not fits(base, dict[str, Any]):
        raise VitreousError(damaged % "its base is no mapping")
    if base is not None:
        _check_base(base, source, network)
    if not isinstance(entries, list):
        raise VitreousError(damaged % "its steps are no list")
    done = []
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), str) or "plan" not in entry:
            raise VitreousError(damaged % "a step has no name or no plan")
        parameters = {k: v for k, v in entry.items() if k not in ("step", "plan")}
        try:
            step = make_step(entry["step"], **parameters)
            step.check_plan(entry["plan"])
        except VitreousError as error:
            raise VitreousError(damaged % error) from None
        done.append((step, entry["plan"]))
    expects = said.get("expects", {})
    typed = fits(expects, dict[str, str | float | int | list[str] | list[float | int] | None])
    if not typed or not set(expects) <= {*KEPT, "label_names"} or not all(plain(expects.get(key)) for key in KEPT):
        raise VitreousError(damaged % "what it expects of images is no plain value")
    return Record(base, done, expects)


def _check_base(base: dict[str, Any], source: str, network: bool) -> None:
    name, kwargs, notes = base.get("name"), base.get("kwargs"), base.get("notes", [])
    if base.keys() - {"name", "kwargs", "notes"} or not isinstance(name, str) or not fits(notes, list[str]):
        raise VitreousError(f"{source} does not say by a name what model it was made from: the file is damaged")
    if not isinstance(kwargs, dict) or (name.startswith(HUBS) and kwargs.keys() & NEVER):
        raise VitreousError(f"{source} names no arguments of its model, or some that read other files: it is damaged")
    if name.startswith(HUBS):
        refuse_hub(name, network)
        return
    if name.startswith(PREFIX):
        refuse_arguments(name, kwargs, source)
    allowed = kwargs if name.startswith(PREFIX) else arguments(name)
    for key, value in kwargs.items():
        if key not in allowed:
            raise VitreousError(
                f"{source} wants to build '{name}' with the argument {short(key)}, which is none of its architecture's: the file "
                "is damaged, or was made to do harm"
            )
        if not plain(value):
            raise VitreousError(f"{source} wants to build '{name}' with {key}={short(value)}, which is no plain value")


def refuse_hub(name: str, network: bool) -> None:
    """Raise `VitreousError` for a name by which timm reads the network or another folder, unless that was asked for."""
    if name.startswith(HUBS) and not network:
        raise VitreousError(f"{short(name)} makes timm read the network or another folder: ask for pretrained if you trust it")


def refuse_reading(kwargs: Mapping[str, Any], network: bool) -> None:
    """Raise `VitreousError` for arguments by which timm reads files or the network, unless that was asked for."""
    for key in sorted(kwargs.keys() & (NEVER if not network else {"checkpoint_path"})):
        raise VitreousError(
            f"'{key}' makes timm read files or the network: give local weights as checkpoint, or ask for pretrained"
        )


def known(name: str) -> bool:
    """Whether timm has the architecture, with or without the tag of its weights behind a dot."""
    return bool(re.fullmatch(r"\w{1,100}(\.\w{1,100})?", name)) and timm.is_model(name.split(".")[0])


def arguments(name: str) -> set[str]:
    """What the constructors of an architecture, and of what it is made of, take by name. Raises `VitreousError` for no name."""
    if not known(name):
        raise VitreousError(f"unknown model {short(name)}{nearest(name[:100], timm.list_models()) or ': see timm.list_models()'}")
    home = sys.modules[model_entrypoint(name.split(".")[0]).__module__]
    classes = {
        c for found in vars(home).values() if isinstance(found, type) and issubclass(found, nn.Module) for c in found.mro()
    }
    return {p for c in classes if c not in (nn.Module, object) for p in inspect.signature(c.__init__).parameters} - NEVER


def affordable(base: dict[str, Any], state: Mapping[str, Tensor], source: str) -> None:
    """Raise `VitreousError` when the model that a file asks for is out of proportion to its weights; costs no memory."""
    if deep := _deep(base["kwargs"], len(state)):
        raise VitreousError(f"{source} asks for {deep}, and holds {len(state)} tensors: the file is damaged")
    wanted, there = _numbers(base["name"], base["kwargs"]), sum(p.numel() for p in state.values())
    if wanted > SPARE * there + 2**20:
        raise VitreousError(
            f"{source} asks for a model of {wanted / 1e6:.0f} million numbers, and holds {there / 1e6:.1f}: the file is damaged"
        )


def fits_memory(name: str, kwargs: dict[str, Any]) -> None:
    """Raise `VitreousError` for a model whose weights would not fit into the memory that is free; costs none itself."""
    asked = ", ".join(f"{k}={short(v)}" for k, v in kwargs.items())
    if deep := _deep(kwargs, DEEPEST):
        raise VitreousError(f"cannot build '{name}' with {deep}: nothing published has over {DEEPEST} layers")
    if (needed := 4 * _numbers(name, kwargs)) > (free := free_memory()):
        size = f"{needed / 2**30:.1f} GiB, of which {free / 2**30:.1f} are free"
        raise VitreousError(f"cannot build '{name}' with {asked}: its weights take {size}")


def _deep(kwargs: Mapping[str, Any], most: int) -> str:
    """The argument that asks for more layers than that, or nothing."""
    for key, value in kwargs.items():
        values = value if isinstance(value, list | tuple) else [value]
        if any(word in key for word in ("dep", "layers", "blocks")) and any(fits(v, int) and v > most for v in values):
            return f"{key}={short(value)}"
    return ""


def _numbers(name: str, kwargs: dict[str, Any]) -> int:
    """How many numbers a model holds; 0 where it cannot be built without them."""
    try:
        with torch.device("meta"):
            model = built(name, kwargs) if name.startswith(PREFIX) else timm.create_model(name, **kwargs)
            return sum(p.numel() for p in model.state_dict().values())
    except Exception:  # what is wrong with it is told where it is built
        return 0
