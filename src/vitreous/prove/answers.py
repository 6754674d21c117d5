"""What the models answer on the same images: accuracy, agreement, damage, and the images whose answer changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..errors import VitreousError
from ..outputs import embeds
from .cautions import caution
from .distances import Distances, FeatureError
from .statistics import Interval, bootstrap_mean, mcnemar, paired_difference, wilson
from .subject import Model, Outputs, caller


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
class Answers:
    """One model's answers, shares 0 to 1; None where it does not apply: no labels, no classes, the reference itself.

    Where an image may have several classes, each class is a question of its own: accuracy and agreement are the share of
    questions answered rightly and alike.
    """

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
    outputs: dict[str, FeatureError] = field(default_factory=dict)
    """Of further outputs that the reference has too, by name."""


class Task:
    """What the reference's answers mean, and so how others are compared with them.

    - `"classes"`: `[B, K]` scores, one class an image.
    - `"yes or no"`: one score an image and labels of 0 and 1: yes above 0.
    - `"marks"`: `[B, K]` scores and labels `[B, K]` of 0 and 1, or no labels where asked (`multi_label`): each class yes above 0.
    - `"features"`: whatever else, one number an image without labels included; labels are left aside.
    """

    def __init__(self, name: str, answer: Tensor, features: bool, labels: np.ndarray | None, multi_label: bool = False) -> None:
        if features or answer.ndim > 2 or (answer.flatten(1).shape[1] == 1 and labels is None):
            self.kind = "features"
        elif (multi_label and labels is None) or (labels is not None and labels.ndim == 2):
            self.kind = "marks"
            if labels is not None and labels.shape[1] != answer.flatten(1).shape[1]:
                raise VitreousError(
                    f"the labels mark {labels.shape[1]} classes and {name!r} has {answer.flatten(1).shape[1]} outputs: "
                    "they must be the same, in the same order"
                )
        else:
            self.kind = "yes or no" if answer.flatten(1).shape[1] == 1 else "classes"
        self.classes = answer.flatten(1).shape[1]
        self.outputs = 2 if self.kind == "yes or no" else self.classes

    def check(self, labels: np.ndarray | None, batch: int, name: str) -> None:
        if labels is None or self.kind == "features":
            return
        if (labels.ndim == 2) != (self.kind == "marks") or (labels.ndim == 1 and labels.max(initial=0) >= self.outputs):
            raise VitreousError(
                f"batch {batch} of the data: labels must be one class number for each image, below {self.outputs} "
                f"(the outputs of {name!r}), or marks [B, {self.classes}] throughout; images without labels: give None"
            )

    def decide(self, answer: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """What is answered, `[B]` of class numbers or `[B, K]` of yes and no, and the probability of it."""
        answer = answer.flatten(1)
        if self.kind == "classes":
            probability, top = answer.softmax(1).max(1)
            return top.numpy(), probability.numpy()
        yes = answer > 0
        probability = answer.abs().sigmoid()
        if self.kind == "yes or no":
            yes, probability = yes[:, 0], probability[:, 0]
        return yes.long().numpy(), probability.numpy()


@dataclass
class _Seen:
    decided: list[np.ndarray] = field(default_factory=list)
    probability: list[np.ndarray] = field(default_factory=list)
    features: Distances | None = None
    outputs: dict[str, Distances] = field(default_factory=dict)


def compare(
    models: Mapping[str, Model],
    batches: Iterable[tuple[Tensor, np.ndarray | None]],
    *,
    classes: Sequence[str] = (),
    keep: int = 64,
    seed: int = 0,
    multi_label: bool = False,
    tick: Callable[[int], None] = lambda images: None,
) -> tuple[dict[str, Answers], list[str], int, Tensor]:
    """The answers of each model, cautions about the labels, the number of images, and the first `keep` images.

    `batches` (of `prove.batches`) is gone through once and every model answers each batch, so the images are the same
    whatever the iterable does. What the answers mean is decided by the reference, the first model.
    """
    names = list(models)
    reference = names[0]
    calls = {name: caller(name, model) for name, model in models.items()}
    seen = {name: _Seen() for name in names}
    labels: list[np.ndarray] = []
    kept: list[Tensor] = []
    task: Task | None = None
    n = 0
    with torch.no_grad():
        for b, (x, y) in enumerate(batches):
            outputs = {name: call(x) for name, call in calls.items()}
            ref = outputs[reference]
            if task is None:
                task = Task(reference, ref.answer, _embeds(models[reference], x), y, multi_label)
            task.check(y, b, reference)
            if y is not None and task.kind != "features":
                labels.append(y)
            for name, out in outputs.items():
                _pairs(out, ref, (reference, name))
                _refuse_nan(name, out.answer, task.kind, b, n)
                _note(seen[name], out, ref, task, with_features=y is None)
            if n < keep:
                kept.append(x[: keep - n].float())
            n += len(x)
            if labels and sum(map(len, labels)) != n:
                raise VitreousError(f"batch {b} of the data: some images have labels and some have none; give all or None")
            tick(n)
    if not n or task is None:
        raise VitreousError("the data has no images: give at least one batch")
    truth = np.concatenate(labels) if labels else None
    found = {name: _answers(seen[name], seen[reference], name == reference, truth, task, classes, seed) for name in names}
    cautions: list[str] = []
    if truth is not None and truth.ndim == 1:
        cautions += filter(None, [caution(reference, np.concatenate(seen[reference].decided), truth, task.outputs)])
    return found, cautions, n, torch.cat(kept)


def _embeds(model: Model, x: Tensor) -> bool:
    """A module without parameters is a function in disguise: it embeds only if it says so."""
    function = isinstance(model, torch.nn.Module) and next(model.parameters(), None) is None
    return bool(getattr(model, "vitreous_embeds", False)) if function else embeds(model, x)


def _pairs(out: Outputs, ref: Outputs, who: tuple[str, str]) -> None:
    if out.answer.flatten(1).shape != ref.answer.flatten(1).shape:
        counts = [list(o.answer.shape[1:]) if o.answer.ndim > 2 else o.answer.flatten(1).shape[1] for o in (out, ref)]
        raise VitreousError(f"model {who[1]!r} has {counts[0]} outputs and {who[0]!r} has {counts[1]}: no pair")


def _refuse_nan(name: str, out: Tensor, kind: str, batch: int, first: int) -> None:
    """A logit of minus infinity is fine, it is how classes are masked."""
    bad = (out.softmax(1) if kind == "classes" else out).isfinite().logical_not().flatten(1).any(1)
    if kind == "marks":
        bad &= out.isnan().any(1)
    if bad.any():
        raise VitreousError(
            f"model {name!r} gives NaN or infinite outputs for {int(bad.sum())} of {len(out)} images in batch {batch}, "
            f"the first is image {first + int(bad.nonzero()[0])}: look for NaN in its weights or in that image, "
            "or for a number format too narrow for its activations"
        )


def _note(seen: _Seen, out: Outputs, ref: Outputs, task: Task, with_features: bool) -> None:
    if task.kind != "features":
        decided, probability = task.decide(out.answer)
        seen.decided.append(decided)
        seen.probability.append(probability)
    if task.kind == "features" or with_features:
        seen.features = seen.features or Distances(search=task.kind == "features" and out.answer.ndim <= 2)
        seen.features.add(out.answer, ref.answer)
    for name, t in out.others.items():
        if name in ref.others and t.shape == ref.others[name].shape:
            seen.outputs.setdefault(name, Distances(search=False)).add(t, ref.others[name])


def _answers(
    model: _Seen,
    ref: _Seen,
    is_reference: bool,
    truth: np.ndarray | None,
    task: Task,
    classes: Sequence[str],
    seed: int,
) -> Answers:
    features = None if is_reference or model.features is None else model.features.result()
    outputs = {} if is_reference else {name: d.result() for name, d in model.outputs.items()}
    if task.kind == "features":
        return Answers(features=features, outputs=outputs)
    decided, before = np.concatenate(model.decided), np.concatenate(ref.decided)
    if task.kind == "marks":
        return _marks(decided, before, is_reference, truth, classes, outputs, seed)

    def name(c: int) -> str:
        return classes[c] if c < len(classes) else str(c)

    n = len(decided)
    right = None if truth is None else decided == truth
    accuracy = None if right is None else wilson(int(right.sum()), n)
    if is_reference:
        return Answers(accuracy=accuracy)
    p, p_before = np.concatenate(model.probability), np.concatenate(ref.probability)
    agreement = wilson(int((decided == before).sum()), n)
    changed = [
        Changed(
            int(i), None if truth is None else name(truth[i]),
            Guess(name(before[i]), float(p_before[i])), Guess(name(decided[i]), float(p[i])),
        )
        for i in np.flatnonzero(decided != before)
    ]  # fmt: skip
    if truth is None or right is None:
        return Answers(agreement=agreement, changed=changed, features=features, outputs=outputs)
    was = before == truth
    lost, gained = int((was & ~right).sum()), int((right & ~was).sum())
    damage = [_damage(name(int(c)), was[truth == c], right[truth == c]) for c in np.unique(truth)]
    return Answers(
        accuracy=accuracy,
        difference=paired_difference(lost, gained, n, seed),
        mcnemar=mcnemar(lost, gained),
        lost=lost,
        gained=gained,
        agreement=agreement,
        classes=sorted(damage, key=lambda c: (c.difference, -c.images)),
        changed=changed,
        outputs=outputs,
    )


def _marks(
    decided: np.ndarray,
    before: np.ndarray,
    is_reference: bool,
    truth: np.ndarray | None,
    classes: Sequence[str],
    outputs: dict[str, FeatureError],
    seed: int,
) -> Answers:
    agreement = bootstrap_mean((decided == before).mean(1), seed)
    if truth is None:
        return Answers() if is_reference else Answers(agreement=agreement, outputs=outputs)
    right, was = decided == truth, before == truth  # [N, K]
    accuracy = bootstrap_mean(right.mean(1), seed)
    if is_reference:
        return Answers(accuracy=accuracy)
    named = [classes[k] if k < len(classes) else str(k) for k in range(truth.shape[1])]
    damage = [_damage(named[k], was[:, k], right[:, k]) for k in range(truth.shape[1])]
    return Answers(
        accuracy=accuracy,
        difference=bootstrap_mean(right.mean(1) - was.mean(1), seed),
        lost=int((was & ~right).sum()),
        gained=int((right & ~was).sum()),
        agreement=agreement,
        classes=sorted(damage, key=lambda c: c.difference),
        outputs=outputs,
    )


def _damage(name: str, was: np.ndarray, right: np.ndarray) -> ClassChange:
    a, b = float(was.mean()), float(right.mean())
    return ClassChange(name, len(was), a, b, b - a)
