"""The Pareto front: what nothing measured beats in loss and cost both; printed, drawn, and written with its recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..files import write_whole
from ..steps import Recipe, Step
from .budget import Goal


@dataclass(frozen=True)
class Point:
    """A recipe in a runtime. ms: an image, the geometric mean over batches; first: at the batch that limits hold at. lost: in
    hundredths of `unit`, on the images that chose; error: its standard error. predicted: what `ms` was thought to be before."""

    steps: tuple[Step, ...]
    engine: str
    ms: float
    first: float
    lost: float
    error: float
    unit: str
    bytes: int
    macs: int | None
    memory: int | None
    predicted: float | None
    energy: float | None = None

    @staticmethod
    def of(value: dict[str, Any], engine: str) -> Point:
        """From a trial in the record."""
        run = value["runs"][engine]
        mean = lambda times: float(np.exp(np.mean(np.log(times))))
        predicted = mean(run["predicted"]) if run["predicted"] and value.get("explored") else None
        same = {name: run[name] for name in ("lost", "error", "unit", "bytes", "macs", "memory")}
        steps = Recipe.from_json(value["recipe"]).steps
        return Point(steps, engine, mean(run["ms"]), run["ms"][0], **same, predicted=predicted, energy=run.get("energy"))

    @property
    def name(self) -> str:
        return f"{Recipe(self.steps)} in {self.engine}"

    def cost(self, goal: Goal) -> float:
        """What is to be small, as `Trial.cost`."""
        if goal.speedup is None and goal.latency is None:
            for limit, value in zip(goal.sizes, (self.bytes, self.macs, self.memory, self.energy), strict=True):
                if limit is not None and value is not None:
                    return float(value)
        return self.ms


def front(points: Sequence[Point], goal: Goal) -> list[Point]:
    """Those that no other beats in both, from the one that loses least."""
    found: list[Point] = []
    for p in sorted(points, key=lambda p: (p.lost, p.cost(goal))):
        if not found or p.cost(goal) < found[-1].cost(goal):
            found.append(p)
    return found


def table(points: Sequence[Point], slowest: float) -> Table:
    """For the terminal; `slowest`: milliseconds of the original in torch, to tell speeds by."""
    shares = any(p.energy is not None for p in points)
    made = Table("lost", "± s.e.", "ms", "× torch", "MB", "GMACs", *(["energy"] if shares else []), "recipe, in")
    for p in points:
        macs = f"{p.macs / 1e9:.3g}" if p.macs else "–"
        numbers = (f"{p.lost:+.2f}", f"{p.error:.2f}", f"{p.ms:.3g}", f"{slowest / p.ms:.2f}", f"{p.bytes / 1e6:.1f}", macs)
        made.add_row(*numbers, *([f"{p.energy:.2f}" if p.energy is not None else "–"] if shares else []), p.name)
    return made


def written(points: Sequence[Point], folder: Path) -> None:
    """`front.json` with the figures, and the recipe of every point as `vitreous slim --recipe` takes it."""
    (folder / "recipes").mkdir(exist_ok=True)
    rows = []
    for i, p in enumerate(points):
        name = f"recipes/{i + 1}.json"
        write_whole(folder / name, Recipe(p.steps).to_json())
        figures = {k: getattr(p, k) for k in ("engine", "ms", "lost", "error", "unit", "bytes", "macs", "memory", "energy")}
        rows.append({"recipe": name, "steps": str(Recipe(p.steps)), **figures})
    write_whole(folder / "front.json", json.dumps(rows, indent=2))


def drawn(points: Sequence[Point], goal: Goal, budget: float, title: str) -> str:
    """A page with every point measured, those of the front joined."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for engine in sorted({p.engine for p in points}):
        some = [p for p in points if p.engine == engine]
        figure.add_scatter(
            x=[p.cost(goal) for p in some],
            y=[p.lost for p in some],
            error_y={"array": [1.96 * p.error for p in some], "thickness": 0.5},
            mode="markers",
            name=engine,
            text=[str(Recipe(p.steps)) for p in some],
        )
    best = front(points, goal)
    figure.add_scatter(x=[p.cost(goal) for p in best], y=[p.lost for p in best], mode="lines", line_shape="hv", name="front")
    figure.add_hline(y=budget, line_dash="dot", annotation_text="budget")
    unit = points[0].unit if points else ""
    figure.update_layout(title=title, template="plotly_white", yaxis_title=f"lost, {unit}")
    figure.update_xaxes(type="log", title="milliseconds an image" if best and best[0].cost(goal) == best[0].ms else "cost")
    return figure.to_html(include_plotlyjs=True, full_html=True)
