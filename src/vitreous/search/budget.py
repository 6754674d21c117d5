"""What a recipe may lose, in a measure that is defined for the model, and what it must reach."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..errors import VitreousError
from ..prove import Answers, Interval


@dataclass(frozen=True)
class Criterion:
    """One way to say what was lost: in hundredths, of `unit`; `default` is lost at most where nothing else is asked for."""

    unit: str
    default: float


ACCURACY = Criterion("points of accuracy", 1.0)
AGREEMENT = Criterion("% of the answers changed", 2.0)
NEIGHBOURS = Criterion("% of the nearest neighbours lost", 5.0)
ERROR = Criterion("% relative error of the outputs", 5.0)


@dataclass(frozen=True)
class Loss:
    """`value` lost, in hundredths of `criterion`'s unit; negative where accuracy was gained. `error`: its standard error."""

    criterion: Criterion
    value: float
    error: float

    def within(self, budget: float) -> bool:
        """Whether it keeps to the budget. What can only get worse has a standard error in hand, so that other images keep to it
        as well; a difference of accuracies errs to both sides, and its proof has an interval."""
        margin = 0.0 if self.criterion is ACCURACY or not self.value else self.error
        return self.value + margin <= budget

    def __str__(self) -> str:
        if self.criterion is not ACCURACY:
            return f"{self.value:.1f} {self.criterion.unit}"
        shown = f"{abs(self.value):.1f}"
        return "no accuracy lost" if shown == "0.0" else f"{shown} {self.criterion.unit} {'lost' if self.value > 0 else 'gained'}"


def loss(answers: Answers) -> Loss:
    """What a model lost against the reference: accuracy where there are labels, else agreement, else nearest neighbours of its
    features, else the relative error of its outputs (of one number an image, of its spread)."""
    if answers.difference is not None:
        return Loss(ACCURACY, -100 * answers.difference.value, _error(answers.difference))
    if answers.agreement is not None:
        return Loss(AGREEMENT, 100 * (1 - answers.agreement.value), _error(answers.agreement))
    if answers.features is None:
        raise VitreousError("the models' answers cannot be compared: they have neither classes nor features")
    kept = answers.features.neighbours
    if kept is not None:
        return Loss(NEIGHBOURS, 100 * (1 - kept.value), _error(kept))
    spread = float(np.std(answers.features.errors) / max(len(answers.features.errors), 1) ** 0.5)
    return Loss(ERROR, 100 * answers.features.mean, 100 * spread)


def _error(interval: Interval) -> float:
    return 100 * (interval.high - interval.low) / 3.92


@dataclass(frozen=True)
class Goal:
    """What is asked for: at most `budget` lost (None: the criterion's default), and, if given, at least `speedup` times as fast
    as the original in torch, at most `latency` milliseconds an image, at most `megabytes` on disk, at most `macs`
    multiply-accumulates an image, at most `memory` megabytes to run a batch (weights, and activations as torch holds them), and
    at most the share `energy` of what the original takes: by the processor's counters where they can be read, else by LPViT's
    model of power, which is then said. `batch`: images at once, for times and memory; None for 1 and 16, of which limits hold at
    1."""

    budget: float | None = None
    speedup: float | None = None
    latency: float | None = None
    megabytes: float | None = None
    macs: float | None = None
    memory: float | None = None
    energy: float | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "speedup", "latency", "megabytes", "macs", "memory", "energy", "batch"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf or (name == "budget" and value == 0)):
                raise VitreousError(f"{name}={value:g}: must be above 0 and finite")
        if self.energy is not None and self.energy > 1:
            raise VitreousError(f"energy={self.energy:g}: a share of what the original takes, above 0 and at most 1")

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes to time, the one that limits hold at first."""
        return (1, 16) if self.batch is None else (self.batch,)

    @property
    def sizes(self) -> tuple[float | None, ...]:
        """The limits that are no times: of bytes, multiply-accumulates, memory, energy."""
        return self.megabytes, self.macs, self.memory, self.energy

    @property
    def targets(self) -> str:
        asked = (
            (self.speedup, "{:g} times the speed"),
            (self.latency, "{:g} ms an image"),
            (self.megabytes, "{:g} MB"),
            (self.macs, "{:g} MACs"),
            (self.memory, "{:g} MB of memory"),
            (self.energy, "{:g} of the energy"),
        )
        return ", ".join(text.format(value) for value, text in asked if value is not None)

    def allowed(self, criterion: Criterion) -> float:
        return criterion.default if self.budget is None else self.budget
