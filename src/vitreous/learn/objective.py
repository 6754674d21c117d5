"""What a model is taught by: the contract that every objective keeps, and what it is shown.

An objective is a frozen dataclass under `@objective`. It says what it wants to see of the student (`wants`), and turns that and
the batch into named loss terms. The engine runs the student once for all objectives of a run, and a teacher once for all that
share it. Projectors and other parts that an objective needs (`parts`) are trained with the student and thrown away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..anatomy import read
from ..errors import VitreousError, nearest
from ..outputs import answer

REGISTRY: dict[str, type[Objective]] = {}
Kind = TypeVar("Kind", bound="type[Objective]")


@dataclass
class Batch:
    """Images `[B, C, H, W]`; labels `[B]` class numbers, or `[B, K]` shares (mixed or multi-label), or None; `index [B]`, the
    places of the images in the training data."""

    images: Tensor
    labels: Tensor | None
    index: Tensor

    @property
    def classes(self) -> Tensor:
        """Class numbers `[B]`, of mixed labels the largest share. Raises `VitreousError` as `one_each` does."""
        labels = self.one_each
        return labels if labels.ndim == 1 else labels.argmax(1)

    @property
    def one_each(self) -> Tensor:
        """Class numbers `[B]`, or float shares `[B, K]` that sum to 1. Raises `VitreousError` without labels, and where they mark
        several classes, of which a softmax knows nothing."""
        labels = self.need_labels()
        if several(labels):
            raise VitreousError("this objective learns one class an image, and the labels mark several: BinaryCrossEntropy can")
        return labels.float() if labels.ndim == 2 else labels

    def need_labels(self) -> Tensor:
        if self.labels is None:
            raise VitreousError("this objective needs labels, and the data has none: choose one that needs none")
        return self.labels

    def shares(self, classes: int, smoothing: float = 0.0) -> Tensor:
        """Labels as `[B, K]` float shares, smoothed: one-hot where they are class numbers; of one output the share of class 1."""
        labels = self.need_labels()
        among = max(classes, 2)
        if labels.ndim == 1:
            labels = nn.functional.one_hot(labels, among).float()
        if classes == 1:
            labels = labels[:, -1:]
        return labels * (1 - smoothing) + smoothing / among if smoothing else labels


def several(labels: Tensor | None) -> bool:
    """Whether labels are marks `[N, K]` of which several or none may hold, and not class numbers or shares that sum to 1."""
    return (
        labels is not None
        and labels.ndim == 2
        and (labels.shape[1] == 1 or bool(((labels.double().sum(1) - 1).abs() > 1e-3).any()))
    )


@dataclass
class Seen:
    """What a model gave for a batch: its answer `[B, K]`; prefix tokens `[B, P, C]` and patch tokens `[B, N, C]` as they leave
    the last block (after the final norm where the model has one); `pooled [B, C]`, what the classifier reads, or the answer where
    there is none; `blocks[i]`, all tokens `[B, P + N, C]` that leave block i; `layers[name]`, what leaves the submodule of that
    name."""

    logits: Tensor
    prefix: Tensor | None = None
    patches: Tensor | None = None
    pooled: Tensor | None = None
    blocks: dict[int, Tensor] = field(default_factory=dict)
    layers: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Now:
    """Where the training is. `share` goes from 0 to 1 over the run, `epoch` is fractional; `teach(teacher, images, wants,
    blocks, layers)` gives what a frozen teacher sees, once for all objectives; `gather` brings `[b, …]` of every process
    together, with gradient."""

    model: nn.Module
    share: float = 0.0
    epoch: float = 0.0
    parts: nn.Module | None = None
    teach: Callable[..., Seen] = field(default=lambda *_: Seen(torch.empty(0)))
    gather: Callable[[Tensor], Tensor] = field(default=lambda x: x)


@dataclass(frozen=True)
class Objective:
    """A published way to teach. See the module; `whole_batch` says that the loss of one image depends on the others, so that the
    batch must not be split by accumulation."""

    wants: ClassVar[tuple[str, ...]] = ("logits",)
    whole_batch: ClassVar[bool] = False
    official: ClassVar[tuple[tuple[str, str], ...]] = ()  # patterns in the names of a paper's checkpoint, and our names
    crop: ClassVar[tuple[float, float]] = (0.2, 1.0)  # shares of a picture that crops cover in pretraining

    def blocks(self, model: nn.Module) -> Sequence[int]:
        """Blocks whose tokens it wants to see."""
        return ()

    def layers(self, model: nn.Module) -> Sequence[str]:
        """Names of the submodules whose output it wants to see."""
        return ()

    def parts(self, model: nn.Module) -> nn.Module | None:
        """Projectors and heads to train beside the student; made anew for each run, by torch's generator as it stands."""
        return None

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        """Named scalar terms, already weighted: the loss is their sum."""
        raise VitreousError(f"{type(self).__name__} does not say what its loss is")

    def around(self, now: Now) -> AbstractContextManager[Any]:
        """Held open while the student runs, with this objective's `now.parts`: how a paper has its layers computed."""
        return nullcontext()

    def before_step(self, now: Now) -> None:
        """Called before each step of the optimiser, with this objective's `now.parts`: schedules that a paper owns."""

    def after_step(self, now: Now) -> None:
        """Called after each step of the optimiser, with this objective's `now.parts`."""

    def __str__(self) -> str:
        shown = {k: f"<{type(v).__name__}>" if isinstance(v, nn.Module) else repr(v) for k, v in vars(self).items()}
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in shown.items())})"


def objective(cls: Kind) -> Kind:
    """Class decorator: register an objective under its name."""
    REGISTRY[cls.__name__] = cls
    return cls


def positive(of: Any, *names: str) -> None:
    """Raise `VitreousError` where one of these numbers is not above 0."""
    for name in names:
        if not getattr(of, name) > 0:
            raise VitreousError(f"{type(of).__name__}: {name} must be above 0, not {getattr(of, name)}")


def share(of: Any, *names: str) -> None:
    """Raise `VitreousError` where one of these numbers is no share from 0 to 1."""
    for name in names:
        if not 0 <= getattr(of, name) <= 1:
            raise VitreousError(f"{type(of).__name__}: {name} must lie between 0 and 1, not {getattr(of, name)}")


def need_teacher(teacher: nn.Module | None, name: str) -> nn.Module:
    if teacher is None:
        raise VitreousError(f"{name} needs a teacher: give {name}(teacher=model), or --teacher")
    return teacher


def same_classes(ours: Tensor, theirs: Tensor, name: str) -> None:
    """Raise `VitreousError` where student and teacher do not answer with as many numbers."""
    if ours.shape != theirs.shape:
        raise VitreousError(
            f"{name}: the teacher answers with {theirs.shape[-1]} numbers and the student with {ours.shape[-1]}: "
            "give a teacher of the same classes"
        )


FINAL_NORM = ("norm", "layernorm", "post_layernorm", "ln_post", "ln", "encoder.ln")


def final(model: nn.Module) -> str:
    """The submodule that tokens leave last: the norm after the last block, or that block where there is none."""
    last, names = read(model).blocks[-1].name, dict(model.named_modules())
    stem = last.split(".")
    holders = [".".join(stem[:i]) for i in range(len(stem))]
    return next((n for h in reversed(holders) for f in FINAL_NORM if (n := f"{h}.{f}".strip(".")) in names), last)


def look(
    model: nn.Module,
    images: Tensor,
    wants: Iterable[str] = ("logits",),
    blocks: Iterable[int] = (),
    layers: Iterable[str] = (),
) -> Seen:
    """Run `model` on `images` and keep what is wanted: "logits", "prefix", "patches", "pooled", tokens that leave `blocks`, and
    what leaves the submodules called `layers`.

    Raises `VitreousError` where tokens are wanted of a model that has no blocks, or of a block or submodule that it has not.
    """
    wants, blocks, layers = set(wants), sorted(set(blocks)), sorted(set(layers))
    tokens, handles = {}, []
    anatomy = read(model) if blocks or wants & {"prefix", "patches"} else None
    names = dict(model.named_modules())
    if absent := [n for n in layers if n not in names]:
        raise VitreousError(f"{type(model).__name__} has no module '{absent[0]}'{nearest(absent[0], names)}")

    def keep(key: int | str) -> Callable[[Any, Any, Any], None]:
        def hook(_: Any, __: Any, out: Any) -> None:
            tokens[key] = out[0] if isinstance(out, tuple) else out

        return hook

    if anatomy is not None:
        if not anatomy.blocks:
            raise VitreousError(f"{anatomy.kind} has no blocks of attention whose tokens could be taught: teach by its answers")
        depth = len(anatomy.blocks)
        if wrong := [i for i in blocks if not -depth <= i < depth]:
            raise VitreousError(f"{anatomy.kind} has blocks 0 to {depth - 1}, there is no block {wrong[0]}")

        for i in blocks:
            handles.append(model.get_submodule(anatomy.blocks[i].name).register_forward_hook(keep(i)))
        if wants & {"prefix", "patches"}:
            handles.append(names[final(model)].register_forward_hook(keep("last")))
    for name in layers:
        handles.append(names[name].register_forward_hook(keep(f"layer {name}")))
    if "pooled" in wants and (head := read(model).classifier) is not None:
        handles.append(model.get_submodule(head).register_forward_pre_hook(lambda _, given: tokens.update(pooled=given[0])))
    try:
        seen = Seen(answer(model(images)))
    finally:
        for handle in handles:
            handle.remove()
    seen.pooled = tokens.get("pooled", seen.logits)
    seen.blocks = {i: tokens[i] for i in blocks}
    seen.layers = {name: tokens[f"layer {name}"] for name in layers}
    if "last" in tokens and anatomy is not None:
        seen.prefix, seen.patches = tokens["last"][:, : anatomy.prefix], tokens["last"][:, anatomy.prefix :]
    return seen


def pooled(model: nn.Module, images: Tensor) -> Tensor:
    """What the classifier of `model` reads of `images`, or its answer where it has none: `[B, C]`."""
    found = look(model, images, ("pooled",)).pooled
    assert found is not None
    return found
