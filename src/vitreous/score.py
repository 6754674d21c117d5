"""The score of an image that is explained: the logit of a class, or of features a number that they decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .copies.own import run, still
from .errors import VitreousError
from .outputs import answer, embeds

Target = int | list[int] | Tensor | None
CONSTANT = 0.01  # norms that differ by less say nothing: what is left of their gradients is mostly rounding


@dataclass(frozen=True)
class Criterion:
    """What is explained of a model's answer.

    The logit of a class; of features the square of their norm, and where that is the same for every image (normalised embeddings)
    the square of their distance from the features of a blank picture.
    """

    kind: str
    features: bool
    blank: Tensor | None = None  # the features of a blank picture, flat, where the norm is constant

    def __call__(self, out: Any, target: Target) -> tuple[Tensor, Tensor]:
        """The score `[B]`, and the relevance of all outputs `[B, …]` with which its propagation begins.

        Raises `VitreousError` for targets of features or that do not fit, and scores that are no `[B, classes]`.
        """
        y = answer(out)
        index = targets(target, len(y))
        if self.features and index is None:
            flat = y.flatten(1)
            squares = (flat if self.blank is None else flat - self.blank.to(flat)).square()
            start = squares.detach()
            start = start / start.sum(1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
            return squares.sum(1), start.view_as(y)
        if y.ndim != 2:
            raise VitreousError(f"scores [B, classes] can be explained; {self.kind} gives {list(y.shape)}: use see.rollout")
        index = y.argmax(1) if index is None else index.to(y.device)
        if len(wrong := index[(index < 0) | (index >= y.shape[1])]):
            raise VitreousError(f"{self.kind} has classes 0 to {y.shape[1] - 1}: there is no target {int(wrong[0])}")
        index = index[:, None]
        return y.gather(1, index)[:, 0], torch.zeros_like(y).scatter_(1, index, 1.0)


def criterion(model: nn.Module, x: Tensor) -> Criterion:
    """What is explained of the answers of `model` to images like `x`; found out by running once, and kept."""
    if not embeds(model, x):
        return Criterion(type(model).__name__, False)
    key, known = tuple(x.shape[1:]), _KNOWN.setdefault(model, {})
    if key not in known:
        with torch.no_grad(), still(model) as own:
            ends = torch.cat([x[:1], torch.zeros_like(x[:1])])
            features = answer(run(own, ends)).flatten(1).double()
        image, blank = features.norm(dim=1).tolist()
        known[key] = abs(image - blank) <= CONSTANT * max(image, blank)
    if not known[key]:
        return Criterion(type(model).__name__, True)
    with torch.no_grad(), still(model) as own:
        return Criterion(type(model).__name__, True, answer(run(own, torch.zeros_like(x[:1]))).flatten(1))


_KNOWN: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()


def targets(target: Target, images: int) -> Tensor | None:
    """One class for each image, `[images]`; None stays None.

    Raises `VitreousError` when it is neither one class nor as many as there are images, in a list, an array or a tensor.
    """
    if target is None:
        return None
    try:
        index = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError):
        index = None
    if index is None or index.is_floating_point() or index.dtype == torch.bool or index.shape not in ((), (images,)):
        given = repr(target)[:60] if index is None else f"{str(index.dtype).removeprefix('torch.')} {list(index.shape)}"
        raise VitreousError(f"target must be one class or one for each of the {images} images, not {given}")
    return index.long().expand(images)


def two(out: Tensor) -> Tensor:
    """One logit `[…, 1]` says whether or not: as two classes, of which the first has 0. More stay as they are."""
    return F.pad(out, (1, 0)) if out.shape[-1] == 1 else out
