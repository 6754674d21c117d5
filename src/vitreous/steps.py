"""Steps, recipes, and models that remember which steps made them.

A step is a frozen dataclass: its fields are its parameters, its class says what it does to a model. A slimmed model is an
ordinary `nn.Module` with a `History`, from which `save` and `load` build it again.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .calibrate import images
from .calls import checked, read_calls
from .copies.untie import untie
from .copies.working import bare, in_float32
from .errors import VitreousError, nearest
from .files.folders import locked
from .schema import fits, named, read_json, short
from .work import Work, fingerprint, working

REGISTRY: dict[str, type[Step]] = {}
LONGEST = 10**6  # bytes of a recipe
Kind = TypeVar("Kind", bound="type[Step]")


@dataclass(frozen=True)
class Step:
    """One published transformation. A method is a frozen dataclass under `@step`, and says how to

    - `plan(model, calibration)`: decide what depends on data or weights; what it returns is JSON and is saved;
    - `build(model, plan)`: change the given model's structure, in place;
    - `fit(model, calibration)`: set what the new structure needs from data (scales …), in place; saved as buffers. What it
      returns, if anything, is added to the plan for people to read.

    Only `build` is compulsory. `apply` does the three on a copy. Calibration is a `[N, C, H, W]` batch of images.
    """

    family: ClassVar[str] = ""
    needs_calibration: ClassVar[bool] = False
    wide: ClassVar[bool] = False  # works in float32, on a model in half precision too
    # The keys of its plan and the type hint of each, by which saved plans are checked; one that allows None may be missing.
    plans: ClassVar[dict[str, Any]] = {}

    @property
    def name(self) -> str:
        return f"{self.family}.{type(self).__name__}"

    def plan(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any]:
        return {}

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        raise VitreousError(f"{self.name} does not say how to change a model")

    def fit(self, model: nn.Module, calibration: Tensor | None) -> dict[str, Any] | None:
        return None

    def covers(self, model: nn.Module, calibration: Tensor | None) -> str:
        """How much of the changed model the step reached, and what it left out and why; empty where that says nothing."""
        return ""

    def refuse_after(self, done: Sequence[Step]) -> str:
        """Why this step makes no sense after those; empty when it does."""
        return ""

    def refuse_before(self, following: Step) -> str:
        """Why `following` makes no sense once this step is done; empty when it does."""
        return ""

    def apply(self, model: nn.Module, calibration: Any = None) -> nn.Module:
        """A changed copy of `model`, in eval mode; the argument is not touched. `calibration` in any form that `slim` takes.

        Raises `VitreousError` when the model's anatomy does not allow the step, when the order of steps makes no sense, or
        when calibration images are needed and missing, or are not what the model was made for.
        """
        return self._applied(model, None if calibration is None else images(model, calibration))

    def _applied(self, model: nn.Module, calibration: Tensor | None, own: bool = False) -> nn.Module:
        """`apply`, with images that were checked; `own`: on `model` itself, which nobody else holds."""
        history = history_of(model)
        done = history.steps()
        for names, reason in (
            (", ".join(s.name for s in done), self.refuse_after(done)),
            *((s.name, s.refuse_before(self)) for s in done),
        ):
            if reason:
                raise VitreousError(f"{self.name} cannot come after {names}: {reason}")
        if self.needs_calibration and calibration is None:
            raise VitreousError(f"{self.name} needs calibration images: pass calibration=, a [N, C, H, W] tensor")
        refuse_nan(model)
        with torch.inference_mode(False):
            new = model.eval() if own else bare(model)
            calibration = calibration.clone() if calibration is not None and calibration.is_inference() else calibration
        untied = untie(new)
        with torch.random.fork_rng(devices=[]), in_float32(new) if self.wide else nullcontext():
            torch.manual_seed(0)
            plan = self.plan(new, calibration)
            self.build(new, plan)
            plan = plan | (self.fit(new, calibration) or {})
        if covers := self.covers(new, calibration):
            plan["covers"] = covers
        if untied:
            plan["untied"] = untied
            first = ", ".join(untied[:3]) + (f" and {len(untied) - 3} more" if len(untied) > 3 else "")
            warnings.warn(f"{first} shared weights with other layers: from {self.name} on each has its own", stacklevel=3)
        self.check_plan(plan)
        return remember(new, History(history.base, [*history.done, (self, plan)])).eval()

    def check_plan(self, plan: object) -> None:
        """Raise `VitreousError` for what cannot be a plan of this step."""
        hints = {**self.plans, "covers": str | None, "untied": list[str] | None}  # the last two `apply` adds
        if not isinstance(plan, dict) or plan.keys() - hints.keys():
            raise VitreousError(f"{self.name} has no such plan: {short(plan)}")
        for key, hint in hints.items():
            if not fits(plan.get(key), hint):
                raise VitreousError(f"{self.name}: '{key}' in its plan must be {named(hint)}, not {short(plan.get(key))}")

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.name, **asdict(self)}

    def __str__(self) -> str:
        given = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{self.name}({given})"


def step(family: str) -> Callable[[Kind], Kind]:
    """Class decorator: register a step under `family.ClassName`."""

    def register(cls: Kind) -> Kind:
        cls.family = family
        REGISTRY[f"{family}.{cls.__name__}"] = cls
        return cls

    return register


def make_step(name: str, /, **parameters: Any) -> Step:
    """The step called `name` ("tokens.EViT", or "EViT" when that is unique), with its parameters checked."""
    wanted = name.lower()
    found = [n for n in REGISTRY if wanted in (n.lower(), n.split(".")[1].lower())]
    if len(found) != 1:
        names = [*REGISTRY, *(n.split(".")[1] for n in REGISTRY)]
        hint = nearest(name[:100], names) or f"; there are {', '.join(sorted(REGISTRY))}"
        raise VitreousError(f"unknown step {short(name)}{hint}")
    return checked(REGISTRY[found[0]], f"step {found[0]}", parameters)


@dataclass(frozen=True)
class Recipe:
    """An ordered list of steps; as JSON a list of objects, each with "step" and its parameters."""

    steps: tuple[Step, ...] = ()

    @staticmethod
    def parse(text: str) -> Recipe:
        """From `"tokens.EViT(keep=0.7), quant.RepQ(weights=8)"`, the way steps are written in Python."""
        return Recipe(tuple(make_step(name, **given) for name, given in read_calls(text, "steps", "EViT(keep=0.7), RepQ()")))

    @staticmethod
    def from_json(text: str, source: str = "recipe") -> Recipe:
        entries = read_json(text, source)
        if isinstance(entries, dict) and set(entries) == {"steps"}:
            entries = entries["steps"]
        if not isinstance(entries, list) or not all(isinstance(e, dict) and isinstance(e.get("step"), str) for e in entries):
            raise VitreousError(
                f'{source} must be a list of objects, each with a "step" name, as in [{{"step": "tokens.EViT", "keep": 0.7}}]'
            )
        return Recipe(tuple(make_step(e["step"], **{k: v for k, v in e.items() if k != "step"}) for e in entries))

    @staticmethod
    def read(path: str | Path) -> Recipe:
        try:
            with Path(path).open("rb") as file:
                text = file.read(LONGEST + 1)  # of a device there is no end
            if len(text) > LONGEST:
                raise VitreousError(f"cannot read the recipe {path}: longer than {LONGEST // 10**6} MB")
            return Recipe.from_json(text.decode("utf-8-sig"), str(path))
        except (OSError, ValueError) as error:
            raise VitreousError(f"cannot read the recipe {short(str(path))}: {error}") from None

    def to_json(self) -> str:
        return json.dumps([s.to_dict() for s in self.steps], indent=2)

    def __str__(self) -> str:
        return ", ".join(map(str, self.steps)) or "no step"


@dataclass
class History:
    """How a model came to be: the base it was opened from, and each step with its plan."""

    base: dict[str, Any] | None = None
    done: list[tuple[Step, dict[str, Any]]] = field(default_factory=list)

    def steps(self) -> list[Step]:
        return [s for s, _ in self.done]

    def __str__(self) -> str:
        return "\n".join(f"{s}: {plan['covers']}" if plan.get("covers") else str(s) for s, plan in self.done)


def history_of(model: nn.Module) -> History:
    history = getattr(model, "vitreous", None)
    return history if isinstance(history, History) else History()


def remember(model: nn.Module, history: History) -> nn.Module:
    """Let `model` know how it came to be; its `repr` then begins with its steps and what they covered."""
    model.vitreous = history  # type: ignore[assignment]
    model.extra_repr = functools.partial(str, history)  # type: ignore[assignment]
    return model


def refuse_nan(model: nn.Module) -> None:
    for name, p in model.state_dict().items():
        if p.is_floating_point() and not torch.isfinite(p).all():
            raise VitreousError(f"the weight '{name}' holds NaN or infinity: the checkpoint is broken, or training diverged")


def slim(
    model: nn.Module,
    steps: Recipe | Step | Iterable[Step],
    calibration: Any = None,
    progress: Callable[[str, float], None] | None = None,
    resume: str | Path | None = None,
) -> nn.Module:
    """Apply the steps in order to a copy of `model`; returns an ordinary `nn.Module` in eval mode.

    Args:
        calibration: images, prepared as the model expects them, for the steps that need data: a tensor or array
            `[N, C, H, W]`, a list, a `DataLoader` or other iterable of batches, or a data set of `vt.data` (`calibrate.images`).
        progress: told the step at work and the share of it that is done.
        resume: a folder in which steps that take minutes keep what is finished, to go on from it when called again.

    Raises `VitreousError` when a step cannot work on this model, or not after the steps before it.
    """
    todo = steps.steps if isinstance(steps, Recipe) else (steps,) if isinstance(steps, Step) else tuple(steps)
    from . import __version__  # which is set after this room is read

    calibration = None if calibration is None else images(model, calibration)
    kept = kept_in(resume) if resume else None
    for i, s in enumerate(todo):
        say = functools.partial(progress, str(s)) if progress else lambda share: None
        key = fingerprint(__version__, torch.__version__, s, history_of(model), model, calibration) if kept else ""
        say(0.0)
        with locked(kept, "--resume") if kept else nullcontext(), working(Work(say, kept, key)):
            model = s._applied(model, calibration, own=i > 0)
        say(1.0)
    return model if todo else bare(model)


def kept_in(resume: str | Path) -> Path:
    """The folder `resume`, tried before the work. Raises `VitreousError` where nothing can be kept."""
    folder = Path(resume).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "not allowed")
    except (OSError, ValueError) as error:
        raise VitreousError(f"cannot keep parts in {str(resume)!r}: {getattr(error, 'strerror', None) or error}") from error
    return folder
