"""Labels as the model numbers its classes: by name where the model's names are known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from timm.data.imagenet_info import ImageNetInfo

from ..errors import VitreousError
from ..store.expects import class_names


def match(
    source: str, classes: tuple[str, ...], labels: np.ndarray | None, model: Any, logits: int | None, labelled: bool
) -> tuple[tuple[str, ...], np.ndarray | None, str]:
    """The names of the model's classes, the labels numbered as these are, and a note where the report needs one.

    Raises `VitreousError` for other classes than the model's, where labels are needed.
    """
    names = class_names(model) if logits != 0 else ()
    if labels is None or logits == 0:
        return classes, labels, ""
    if labels.ndim == 2 and not labelled:
        return (), None, f"labels are left out: a picture of {source} may have several classes"
    if not names and logits == 1000 and set(classes) <= set(ids := ImageNetInfo().label_names()):
        return tuple(ImageNetInfo().label_descriptions()), _renumbered(labels, [ids.index(c) for c in classes], 1000), ""
    if not names:
        try:
            return classes, labels, _check_classes(source, classes, logits)
        except VitreousError:
            if labelled:
                raise
            return (), None, f"labels are left out: {source} has {len(classes)} classes, the model {logits} logits"
    plain = lambda name: re.sub(r"[\W_]+", " ", name).strip().casefold()
    place = {plain(n): i for i, n in enumerate(names)}
    to = [place.get(plain(c), -1) for c in classes]
    if all(c.isdigit() for c in classes) and not any(n.isdigit() for n in names):
        to = [int(c) if int(c) < len(names) else -1 for c in classes]
    if -1 in to or len(set(to)) < len(to):
        strange = next((c for c, i in zip(classes, to, strict=True) if i < 0), classes[0])
        if labelled:
            known = ", ".join(names[:5]) + (" …" if len(names) > 5 else "")
            raise VitreousError(
                f"the class '{strange}' of {source} is none of the model's ({known}): name the classes alike, or tell its "
                "own in the order of its outputs (--classes, classes=)"
            )
        return (), None, f"labels are left out: the class '{strange}' of {source} is none of the model's"
    missing = len(names) - len(classes)
    note = f"{source} has {len(classes)} of the model's {len(names)} classes" if missing else ""
    return names, _renumbered(labels, to, len(names)), note


def _renumbered(labels: np.ndarray, to: Sequence[int], count: int) -> np.ndarray:
    if labels.ndim == 1:
        return np.array(to)[labels]
    marks = np.zeros((len(labels), count), np.int64)
    marks[:, list(to)] = labels
    return marks


def _check_classes(source: str, classes: Sequence[str], logits: int | None) -> str:
    """Refuse more classes than logits; otherwise the note that fewer classes call for, or the empty string."""
    if not logits or len(classes) == max(logits, 2):  # one logit answers yes or no
        return ""
    if len(classes) > logits:
        raise VitreousError(
            f"{source} has {len(classes)} classes but the model only {logits} logits: "
            "use the data that the model was trained for, or a model with a head for these classes"
        )
    return (
        f"{source} has {len(classes)} classes and the model {logits} logits: accuracy holds only if the first "
        f"{len(classes)} logits are these classes, in alphabetical order of their names"
    )
