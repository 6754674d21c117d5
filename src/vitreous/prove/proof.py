"""`prove` and `Proof`: everything that is measured about some models on the same images and the same machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from torch import Tensor, nn

from ..errors import VitreousError
from .answers import Answers, compare
from .batches import batches as in_batches
from .batches import count
from .cost import Cost, cost, coverage
from .drift import Drift, Explain, drifts
from .latency import Latency, latencies
from .machine import describe
from .result import Result
from .subject import Model, at_rest, caller, named, simulated
from .table import table

if TYPE_CHECKING:
    from ..data import Data

Batches = Iterable[tuple[Tensor, Tensor | np.ndarray | None]]
Progress = Callable[[str, float], None]

DRIFT_IMAGES = 64


@dataclass(frozen=True)
class Measured:
    """All figures of one model; what does not apply is None or empty. Shares are 0 to 1."""

    name: str
    kind: str
    """The class of a module, or what a shipped file says of itself."""
    simulated: str | None
    """Why it has no speed, or None: it computes what would be deployed."""
    threads: int
    """That its runtime uses: its own attribute `threads`, else torch's."""
    answers: Answers
    cost: Cost
    latency: list[Latency] = field(default_factory=list)
    drift: Drift | None = None
    drift_missing: str | None = None
    """Why there is no drift; None for the reference."""
    coverage: str | None = None
    """How much of the multiplications is in few bits, and which layers were left and why; None for models of floats."""


@dataclass(frozen=True)
class Proof(Result):
    """Paired measurements; the first of `models` is the reference. `print(proof)`, or `proof.save("proof.json")`."""

    models: list[Measured]
    data: str
    images: int
    note: str
    """A caution that the data carries, or empty."""
    skipped: list[dict[str, str]]
    """Files left out of the data: `path` and `reason`."""
    threads: int
    batches: list[int]
    seed: int
    date: str
    machine: dict[str, Any]
    load: float | None = None
    """Processes that wanted to run while it was timed, this one among them (the system's average of the last minute); None
    where the system does not tell."""

    def __getitem__(self, name: str) -> Measured:
        return {m.name: m for m in self.models}[name]

    def __rich__(self) -> Table:
        return table(self)

    @property
    def width(self) -> int:
        return max(80, 24 + 22 * len(self.models))


def prove(
    models: Mapping[str, Model] | Sequence[Model],
    data: Data | tuple[Tensor, Tensor | np.ndarray | None] | Tensor | Batches,
    *,
    batches: Sequence[int] = (1, 64),
    rounds: int | None = None,
    seconds: float = 20.0,
    threads: int | None = None,
    seed: int = 0,
    multi_label: bool = False,
    explain: Explain | None = None,
    progress: Progress | None = None,
) -> Proof:
    """Measure `models` on the same images, in interleaved order, each against the first.

    - `models`: name to `nn.Module`, or to any callable from images `[B, C, H, W]`; what they return may be a tensor, tuple,
      dict or object (`vitreous.outputs` says which tensor answers), and of further tensors the error is told. One that calls
      itself `simulated` (`prove.subject.simulated`) is not timed.
    - `data`: a `vitreous.data.Data`, images alone, a pair `(x, y)`, or any iterable of such pairs. `y [B]` holds class numbers
      (0 and 1 for a model with one logit), `y [B, K]` marks of 0 and 1 where an image has several classes; without labels there
      is agreement and output error instead of accuracy. Features, and one number an image without labels, are compared by
      their error; of features `[B, D]` also the share of nearest neighbours kept.
    - `batches`: the batch sizes to time, within about `seconds` altogether (5 rounds at least) or for `rounds` rounds.
    - `threads`: for torch while it measures (None: as set). A shipped runtime has its own setting.
    - `multi_label`: an image may have several classes; known without being told where labels are marks.
    - `explain`: `(model, x) -> heatmaps [B, h, w]` for the attention drift over the first 64 images; default rollout.
    - `progress`: called with what is being done and the fraction of it that is done.

    Raises `VitreousError` for no models, no images, images or labels of the wrong form, and models that fail, give NaN,
    or differ in the number of outputs.
    """
    models = named(models)
    if not batches or any(not isinstance(b, int) or b < 1 for b in batches):
        raise VitreousError(f"batches={batches!r}: give one or more whole batch sizes of at least 1")
    for what, value in (("threads", threads), ("rounds", rounds)):
        if value is not None and value < 1:
            raise VitreousError(f"{what}={value}: must be at least 1")
    say = progress or (lambda task, fraction: None)
    total = count(data)
    with at_rest(models, threads) as used:
        answers, cautions, n, images = compare(
            models,
            in_batches(data),
            classes=getattr(data, "classes", ()),
            keep=max(DRIFT_IMAGES, *batches),
            seed=seed,
            multi_label=multi_label,
            tick=lambda done: say("accuracy", done / total if total else 0.0),
        )
        say("accuracy", 1.0)
        costs = {}
        for i, (name, model) in enumerate(models.items()):
            costs[name] = cost(name, model, images[: max(batches)])
            say("cost", (i + 1) / len(models))
        drift = drifts(models, images[:DRIFT_IMAGES], explain, seed, lambda f: say("attention drift", f))
        reasons = {name: simulated(model) for name, model in models.items()}
        times = latencies(
            {name: caller(name, model) for name, model in models.items() if not reasons[name]},
            images,
            reference=next(iter(models)),
            batches=batches,
            rounds=rounds,
            seconds=seconds,
            seed=seed,
            tick=lambda f: say("latency", f),
        )
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") and any(times.values()) else None
    measured = []
    for name, model in models.items():
        moved = drift.get(name)
        measured.append(
            Measured(
                name=name,
                kind=type(model).__name__ if isinstance(model, nn.Module) else str(getattr(model, "kind", "callable")),
                simulated=reasons[name],
                threads=int(getattr(model, "threads", None) or used),
                answers=answers[name],
                cost=costs[name],
                latency=times.get(name, []),
                drift=moved if isinstance(moved, Drift) else None,
                drift_missing=moved if isinstance(moved, str) else None,
                coverage=coverage(model),
            )
        )
    return Proof(
        models=measured,
        data=str(getattr(data, "name", "images")),
        images=n,
        note=" ".join(said for said in (str(getattr(data, "note", "")), *cautions) if said),
        skipped=[{"path": str(s.path), "reason": s.reason} for s in getattr(data, "skipped", ())],
        threads=used,
        batches=list(batches),
        seed=seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe(),
        load=load,
    )
