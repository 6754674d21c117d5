"""`prove` and `Proof`: everything that is measured about some models on the same images and the same machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from rich.table import Table
from torch import Tensor, nn

from ..errors import VitreousError
from .answers import Answers, compare
from .cost import Cost, cost
from .drift import Drift, Explain, drifts
from .latency import Latency, latencies
from .machine import describe
from .result import Result
from .subject import Model, at_rest, caller, simulated
from .table import table

if TYPE_CHECKING:
    from ..data import Data

Batches = Iterable[tuple[Tensor, Tensor | np.ndarray | None]]
Progress = Callable[[str, float], None]

BATCH = 64
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

    def __getitem__(self, name: str) -> Measured:
        return {m.name: m for m in self.models}[name]

    def __rich__(self) -> Table:
        return table(self)

    @property
    def width(self) -> int:
        return max(80, 24 + 22 * len(self.models))


def prove(
    models: Mapping[str, Model],
    data: Data | tuple[Tensor, Tensor | np.ndarray | None] | Batches,
    *,
    batches: Sequence[int] = (1, 64),
    rounds: int | None = None,
    seconds: float = 20.0,
    threads: int | None = None,
    seed: int = 0,
    explain: Explain | None = None,
    progress: Progress | None = None,
) -> Proof:
    """Measure `models` on the same images, in interleaved order, each against the first.

    - `models`: name to `nn.Module`, or to any callable from images `[B, C, H, W]` to outputs `[B, K]`. One that calls
      itself `simulated` (`prove.subject.simulated`) is not timed.
    - `data`: a `vitreous.data.Data`, a pair `(x, y)`, or any iterable of such pairs. `y [B]` holds class numbers, or is
      None: then there is agreement and output error instead of accuracy. Where the reference has `num_classes` 0, its
      features are compared.
    - `batches`: the batch sizes to time, within about `seconds` altogether (5 rounds at least) or for `rounds` rounds.
    - `threads`: for torch while it measures (None: as set). A shipped runtime has its own setting.
    - `explain`: `(model, x) -> heatmaps [B, h, w]` for the attention drift over the first 64 images; default rollout.
    - `progress`: called with what is being done and the fraction of it that is done.

    Raises `VitreousError` for no models, no images, images or labels of the wrong form, and models that fail, give NaN,
    or differ in the number of outputs.
    """
    if not models:
        raise VitreousError("there is nothing to prove: give at least one model, the reference first")
    if not batches or any(not isinstance(b, int) or b < 1 for b in batches):
        raise VitreousError(f"batches={batches!r}: give one or more whole batch sizes of at least 1")
    for what, value in (("threads", threads), ("rounds", rounds)):
        if value is not None and value < 1:
            raise VitreousError(f"{what}={value}: must be at least 1")
    say = progress or (lambda task, fraction: None)
    total = len(data) if _is_data(data) else len(data[0]) if _is_pair(data) else 0
    with at_rest(models, threads) as used:
        answers, n, images = compare(
            models,
            _batches(data),
            classes=getattr(data, "classes", ()),
            keep=max(DRIFT_IMAGES, *batches),
            seed=seed,
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
            )
        )
    return Proof(
        models=measured,
        data=str(getattr(data, "name", "images")),
        images=n,
        note=str(getattr(data, "note", "")),
        skipped=[{"path": str(s.path), "reason": s.reason} for s in getattr(data, "skipped", ())],
        threads=used,
        batches=list(batches),
        seed=seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe(),
    )


def _is_data(data: Any) -> TypeGuard[Data]:
    return hasattr(data, "batches")


def _is_pair(data: Any) -> TypeGuard[tuple[Tensor, Any]]:
    return isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor)


def _batches(data: Any) -> Iterator[tuple[Tensor, Any]]:
    if _is_data(data):
        yield from data.batches(BATCH)
    elif _is_pair(data):
        x, y = data
        for i in range(0, len(x), BATCH):
            yield x[i : i + BATCH], None if y is None else y[i : i + BATCH]
    else:
        for b, batch in enumerate(data):
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise VitreousError(f"batch {b} of the data: give (images, labels), or (images, None) without labels")
            yield batch[0], batch[1]
