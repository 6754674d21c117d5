"""What the models answer on the same images: accuracy, agreement, damage, and the images whose answer changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import VitreousError
from .statistics import Interval, mcnemar, paired_difference, wilson
from .subject import Model, caller


@dataclass(frozen=True)
class Guess:
    """A class that a model answered, and the probability it gave to it."""

    name: str
    probability: float


@dataclass(frozen=True)
class Changed:
    """Image `index` (in the order of the data) got another answer than the reference's."""

    index: int
    label: str | None
    before: Guess
    after: Guess


@dataclass(frozen=True)
class ClassChange:
    """Accuracy on the `images` images of one class, of the reference and of the model; shares."""

    name: str
    images: int
    before: float
    after: float
    difference: float


@dataclass(frozen=True)
class FeatureError:
    """Distance of outputs `f` from the reference's `r`, an image each: `|f - r| / |r|`, and the cosine between them."""

    mean: float
    worst: float
    mean_cosine: float
    worst_cosine: float
    errors: list[float]
    cosines: list[float]


@dataclass(frozen=True)
class Answers:
    """One model's answers, shares 0 to 1; None where it does not apply: no labels, no classes, the reference itself."""

    accuracy: Interval | None = None
    difference: Interval | None = None
    """Accuracy minus the reference's, on the same images."""
    mcnemar: float | None = None
    lost: int | None = None
    """Images that the reference got right and this model gets wrong; `gained` is the opposite."""
    gained: int | None = None
    agreement: Interval | None = None
    classes: list[ClassChange] = field(default_factory=list)
    """Worst damage first."""
    changed: list[Changed] = field(default_factory=list)
    features: FeatureError | None = None
    """Only where there are no labels, or no classes."""


@dataclass
class _Seen:
    top: list[np.ndarray] = field(default_factory=list)
    probability: list[np.ndarray] = field(default_factory=list)
    error: list[np.ndarray] = field(default_factory=list)
    cosine: list[np.ndarray] = field(default_factory=list)


def compare(
    models: Mapping[str, Model],
    batches: Iterable[tuple[Tensor, Tensor | np.ndarray | None]],
    *,
    classes: Sequence[str] = (),
    keep: int = 64,
    seed: int = 0,
    tick: Callable[[int], None] = lambda images: None,
) -> tuple[dict[str, Answers], int, Tensor]:
    """The answers of each model, the number of images, and the first `keep` images.

    `batches` is gone through once and every model answers each batch, so the images are the same whatever the iterable
    does. A reference with `num_classes` 0 embeds: labels are then left aside and features are compared.
    """
    names = list(models)
    reference = names[0]
    embeds = getattr(models[reference], "num_classes", None) == 0
    calls = {name: caller(name, model) for name, model in models.items()}
    seen = {name: _Seen() for name in names}
    labels: list[np.ndarray] = []
    kept: list[Tensor] = []
    n = 0
    with torch.no_grad():
        for b, (x, y) in enumerate(batches):
            if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point():
                raise VitreousError(f"batch {b} of the data: images must be one float32 tensor [B, C, H, W]")
            if not embeds and y is not None:
                labels.append(np.asarray(y, np.int64).reshape(-1))
            outputs = {name: _finite(name, call(x), embeds, b, n) for name, call in calls.items()}
            for name, out in outputs.items():
                _note(seen[name], out, outputs[reference], embeds or y is None, (reference, name))
            if n < keep:
                kept.append(x[: keep - n].float())
            n += len(x)
            if labels and (sum(map(len, labels)) != n or labels[-1].max() >= outputs[reference].shape[1]):
                raise VitreousError(
                    f"batch {b} of the data: labels must be one class number for each of its {len(x)} images, below "
                    f"{outputs[reference].shape[1]} (the outputs of {reference!r}); images without labels: give None"
                )
            tick(n)
    if not n:
        raise VitreousError("the data has no images: give at least one batch")
    truth = np.concatenate(labels) if labels else None
    found = {name: _answers(seen[name], seen[reference], name == reference, truth, classes, embeds, seed) for name in names}
    return found, n, torch.cat(kept)


def _finite(name: str, out: Tensor, embeds: bool, batch: int, first: int) -> Tensor:
    """`out`, refused where it is not finite; a logit of minus infinity is fine, it is how classes are masked."""
    bad = (out if embeds else out.softmax(1)).isfinite().logical_not().any(1)
    if bad.any():
        raise VitreousError(
            f"model {name!r} gives NaN or infinite outputs for {int(bad.sum())} of {len(out)} images in batch {batch}, "
            f"the first is image {first + int(bad.nonzero()[0])}: look for NaN in its weights or in that image, "
            "or for a number format too narrow for its activations"
        )
    return out


def _note(seen: _Seen, out: Tensor, ref: Tensor, features: bool, who: tuple[str, str]) -> None:
    if out.shape != ref.shape:
        raise VitreousError(f"model {who[1]!r} has {out.shape[1]} outputs and {who[0]!r} has {ref.shape[1]}: no pair")
    probability, top = out.softmax(1).max(1)
    seen.top.append(top.numpy())
    seen.probability.append(probability.numpy())
    if features:
        out, ref = out.double(), ref.double()
        seen.error.append(((out - ref).norm(dim=1) / ref.norm(dim=1).clamp_min(1e-12)).numpy())
        seen.cosine.append(torch.cosine_similarity(out, ref, dim=1).numpy())


def _answers(
    model: _Seen,
    ref: _Seen,
    is_reference: bool,
    truth: np.ndarray | None,
    classes: Sequence[str],
    embeds: bool,
    seed: int,
) -> Answers:
    def name(c: int) -> str:
        return classes[c] if c < len(classes) else str(c)

    top, before = np.concatenate(model.top), np.concatenate(ref.top)
    n = len(top)
    right = None if truth is None else top == truth
    accuracy = None if right is None else wilson(int(right.sum()), n)
    if is_reference:
        return Answers(accuracy=accuracy)
    features = None
    if model.error:
        error, cosine = np.concatenate(model.error), np.concatenate(model.cosine)
        features = FeatureError(
            float(error.mean()), float(error.max()), float(cosine.mean()), float(cosine.min()),
            error.tolist(), cosine.tolist(),
        )  # fmt: skip
    if embeds:
        return Answers(features=features)
    p, p_before = np.concatenate(model.probability), np.concatenate(ref.probability)
    agreement = wilson(int((top == before).sum()), n)
    changed = [
        Changed(
            int(i), None if truth is None else name(truth[i]),
            Guess(name(before[i]), float(p_before[i])), Guess(name(top[i]), float(p[i])),
        )
        for i in np.flatnonzero(top != before)
    ]  # fmt: skip
    if truth is None or right is None:
        return Answers(agreement=agreement, changed=changed, features=features)
    was = before == truth
    lost, gained = int((was & ~right).sum()), int((right & ~was).sum())
    damage = []
    for c in np.unique(truth):
        mine = truth == c
        a, b = float(was[mine].mean()), float(right[mine].mean())
        damage.append(ClassChange(name(int(c)), int(mine.sum()), a, b, b - a))
    return Answers(
        accuracy=accuracy,
        difference=paired_difference(lost, gained, n, seed),
        mcnemar=mcnemar(lost, gained),
        lost=lost,
        gained=gained,
        agreement=agreement,
        classes=sorted(damage, key=lambda c: (c.difference, -c.images)),
        changed=changed,
    )
