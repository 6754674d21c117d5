"""What the studio computes in a process of its own: everything that takes longer than a click may."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import see
from ..files.rows import Rows
from ..prove import Proof, prove
from ..see.distance import MEASURES
from ..work import Work, working
from .opened import Source
from .work import Say


def measure(sources: list[Source], images: int, say: Say) -> Rows:
    """Accuracy, speed and size of open models, interleaved, on the first `images` of the first one's pictures."""
    say("opening the models", 0.0)
    nets = {f"{i + 1}. {source.title}": source.net() for i, source in enumerate(sources)}
    data = sources[0].pictures(next(iter(nets.values())), limit=images)
    return summary(prove(nets, data, batches=(1, 16), seconds=12.0, progress=say))


@dataclass(frozen=True)
class Study:
    """What analytics found of all heads of a model on `images` pictures."""

    images: int
    rows: Rows
    """One row a head: its number, its measures with their intervals, its pattern and place in two dimensions."""
    measures: list[str]
    """By what heads can be coloured: names of entries of the rows."""
    uniform: list[float]
    """The share of attention at each number of hops of a head that attends to all patches alike."""
    offsets: np.ndarray
    """`[layers, heads, 2h - 1, 2w - 1]`: mean attention by relative place."""
    shares: dict[str, float]
    """The share of heads with each pattern."""
    agreement: Rows
    """Kendall's τ-b between the measures of importance."""


def study(source: Source, images: int, say: Say) -> Study:
    """Importance, distance and patterns of every head on the first `images` pictures."""
    net = source.net()
    data = source.pictures(net, limit=images)

    def part(name: str) -> Work:
        return Work(lambda share: say(name, share))

    with working(part("how much each head matters")):
        importance = see.head_importance(net, data)
    with working(part("how far each head looks")):
        far = see.distance(net, data)
    with working(part("what pattern each head has learned")):
        learned = see.patterns(net, data)
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    shown = ("layer", "head", "pattern", "cluster", "x", "y")
    for found in (importance.rows(), far.rows(), [{k: r[k] for k in shown} for r in learned.rows()]):
        for row in found:
            rows.setdefault((row["layer"], row["head"]), {}).update(row)
    agreement = [
        {"metric": a, **{b: float(tau) for b, tau in zip(importance.metrics, taus, strict=True)}}
        for a, taus in zip(importance.metrics, importance.agreement, strict=True)
    ]
    measures = [*importance.metrics, *MEASURES, "pattern", "cluster"]
    return Study(len(data), list(rows.values()), measures, far.uniform.tolist(), learned.offsets, learned.shares, agreement)


def recipe(source: Source, steps: str, images: int, folder: Path, say: Say) -> Rows:
    """`vitreous slim` into `folder`: the model, its shipped files, the proof and the report."""
    from ..search import Goal, Job
    from ..steps import Recipe

    job = Job(folder, source.data.data, source.data.seed, source.opening.threads, Goal(), images, say)
    chosen = Recipe.parse(steps) if steps.strip() else None
    return summary(job.run(source.net(), chosen))


def summary(proof: Proof) -> Rows:
    rows: Rows = []
    for m in proof.models:
        a = m.answers
        row: dict[str, Any] = {"model": m.name}
        if a.accuracy:
            row["accuracy"] = a.accuracy.value
            row["accuracy low"], row["accuracy high"] = a.accuracy.low, a.accuracy.high
        if a.agreement:
            row["agreement"] = a.agreement.value
        if a.features:
            row["feature error"] = a.features.mean
        row |= {f"ms, batch {t.batch}": t.median for t in m.latency}
        row |= {"MMACs": m.cost.macs / 1e6} if m.cost.macs else {}
        row |= {"parameters": m.cost.parameters} if m.cost.parameters else {}
        row |= {"MB": m.cost.bytes / 2**20} if m.cost.bytes else {}
        rows.append(row)
    return rows
