"""Objectives, optimisers and merging rules as people write them: `CrossEntropy(), NKD(gamma=1.5)`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from ..calls import checked, read_calls
from ..errors import VitreousError, nearest
from .ferkd import FerKD
from .merging import RULES, MergingRule
from .objective import REGISTRY, Objective
from .optimisers import SGD, AdamW, Lion, Optimiser, SGDSaI

OPTIMISERS: dict[str, type[Optimiser]] = {c.__name__: c for c in (AdamW, Lion, SGD, SGDSaI)}
Kind = TypeVar("Kind")


def objectives(text: str, teacher: nn.Module | None = None) -> list[Objective]:
    """What `text` names, each with `teacher` where it takes one. Raises `VitreousError` for what is no objective."""
    made = [_made(name, given, REGISTRY, "objective") for name, given in read_calls(text, "objectives", "NKD(gamma=1.5)")]
    fields: Any = {"teacher": teacher}
    return [replace(o, **fields) if hasattr(o, "teacher") else o for o in made]


def optimiser(text: str, **given: Any) -> Optimiser:
    """One optimiser; `given` fills in what the text leaves open."""
    found = read_calls(text, "optimiser", "Lion(lr=1e-4)")
    if len(found) != 1:
        raise VitreousError(f"give one optimiser, as Lion(lr=1e-4), not {len(found)}")
    name, parameters = found[0]
    return _made(name, {**given, **parameters}, OPTIMISERS, "optimiser")


def augmentation(text: str) -> str | FerKD | None:
    """The name of an augmentation, None for "none", or `FerKD(labels='labels.safetensors')`."""
    if "(" not in text:
        return None if text == "none" else text
    found = read_calls(text, "augmentation", "FerKD(labels='labels.safetensors')")
    if len(found) != 1:
        raise VitreousError(f"give one augmentation, as FerKD(labels='labels.safetensors'), not {len(found)}")
    return _made(*found[0], {"FerKD": FerKD}, "augmentation")


def rule(text: str) -> MergingRule:
    """One merging rule."""
    found = read_calls(text, "rule", "OPCM(alpha=0.5)")
    if len(found) != 1:
        raise VitreousError(f"give one rule, as OPCM(alpha=0.5), not {len(found)}")
    return _made(*found[0], RULES, "rule")


def _made(name: str, given: dict[str, Any], known: dict[str, type[Kind]], what: str) -> Kind:
    cls = next((c for n, c in known.items() if n.lower() == name.lower()), None)
    if cls is None:
        raise VitreousError(
            f"unknown {what} '{name[:100]}'{nearest(name[:100], known) or '; there are ' + ', '.join(sorted(known))}"
        )
    return checked(cls, f"{what} {cls.__name__}", given)
