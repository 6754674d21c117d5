"""The training runs of a folder: how far each is, its curve, and its best weights opened beside the other models."""

from __future__ import annotations

import asyncio
import csv
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from nicegui import ui

from ..files.rows import Rows
from .heads_view import colours
from .opened import Opened, Source
from .parts import attributes, exports, guarded, heading, plot, plotted, table
from .session import Session

EVERY = 5.0  # seconds between two looks at the folder


@dataclass(frozen=True)
class TrainingRun:
    """What `vitreous train` or `pretrain --out` wrote so far: a row an epoch, and the best weights, of an encoder the last."""

    name: str
    epochs: float | None
    rows: Rows
    weights: Path | None
    done: bool
    changed: float  # seconds since 1970

    def row(self, now: float) -> dict[str, Any]:
        last = self.rows[-1] if self.rows else {}
        best = max((r["accuracy"] for r in self.rows if "accuracy" in r), default=None)
        of = f" of {self.epochs:g}" if self.epochs else ""
        told = {"run": self.name, "epoch": f"{last.get('epoch', 0):g}{of}"}
        told |= {"loss": f"{last['loss']:.4g}"} if "loss" in last else {}
        told |= {"best accuracy": f"{100 * best:.1f} %"} if best is not None else {}
        return told | {"state": "finished" if self.done else f"written {_ago(now - self.changed)} ago"}


def find_runs(folder: Path) -> list[TrainingRun]:
    """The runs in `folder` and two levels below; what cannot be read of one is left out."""
    found = sorted(chain(folder.glob("run.json"), folder.glob("*/run.json"), folder.glob("*/*/run.json")))
    return [_read(about.parent, folder) for about in found]


def _read(home: Path, folder: Path) -> TrainingRun:
    try:
        settings = json.loads((home / "run.json").read_text())["settings"]
        epochs = settings["epochs"] if isinstance(settings["epochs"], int | float) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        epochs = None
    log, rows = home / "log.csv", []
    try:
        with log.open(newline="") as file:
            rows = [_numbers(row) for row in csv.DictReader(file)]
        changed = log.stat().st_mtime
    except (OSError, ValueError, csv.Error):
        changed = home.stat().st_mtime
    whole = home / "model.safetensors"
    weights = next((p for p in (home / "best.safetensors", whole, home / "last.safetensors") if p.is_file()), None)
    name = str(home.relative_to(folder)) if home != folder else folder.name
    return TrainingRun(name, epochs, [r for r in rows if "epoch" in r], weights, whole.is_file(), changed)


def _numbers(row: dict[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        try:
            number = float(value)
        except (TypeError, ValueError):
            continue
        if math.isfinite(number):
            found[str(key)] = number
    return found


def _ago(seconds: float) -> str:
    size, unit = next((u for u in ((86400, "d"), (3600, "h"), (60, "min")) if seconds >= u[0]), (1, "s"))
    return f"{max(seconds, 0) / size:.0f} {unit}"


def curves(runs: list[TrainingRun]) -> go.Figure:
    """Of each run the accuracy by epoch, or the loss where none has an accuracy."""
    by = "accuracy" if any("accuracy" in r for run in runs for r in run.rows) else "loss"
    figure = go.Figure()
    for run, colour in zip(runs, colours(len(runs)), strict=True):
        x, y = ([r[key] for r in run.rows if by in r] for key in ("epoch", by))
        figure.add_trace(go.Scatter(x=x, y=y, name=run.name[:40], mode="lines+markers", line_color=colour))
    figure.update_xaxes(title="epoch").update_yaxes(title=by, tickformat=".0%" if by == "accuracy" else None)
    return plotted(figure, 300).update_layout(showlegend=True, legend=dict(orientation="h", y=1.15))


def runs_view(session: Session, folder: Path) -> None:
    """A card of the runs in `folder`, read again every few seconds."""
    runs: list[TrainingRun] = []
    with ui.column().classes("studio-card gap-3 w-full"):
        top = ui.row().classes("w-full items-center gap-3")
        note = ui.label().classes("text-sm studio-note")
        picture = plot(300)
        listed = ui.column().classes("w-full gap-3")
        with top:
            heading("Training runs")
            ui.space()
            exports("runs", lambda: [{"run": run.name, **row} for run in runs for row in run.rows], plot=picture)

    async def take(run: TrainingRun) -> None:
        source = Source(str(run.weights), data=session.opened.source.data)
        session.models.append(made := await asyncio.to_thread(Opened, source))
        made.title = run.name
        await session.refresh()

    async def refresh() -> None:
        if session.state.view != "models":
            return
        found = await asyncio.to_thread(find_runs, folder)
        note.set_text(f"In {folder}." if found else f"None in {folder} yet: vitreous train --out {folder / 'NAME'} writes one.")
        now = time.time()
        if found == runs and all(run.done for run in runs):
            return
        runs[:] = found
        picture.set_visibility(any(run.rows for run in runs))
        picture.update_figure(curves(runs))
        listed.clear()
        with listed:
            if runs:
                table([run.row(now) for run in runs])
            with ui.row().classes("gap-2"):
                for run in runs:
                    if run.weights:
                        button = ui.button(run.name, on_click=guarded(partial(take, run)))
                        attributes(button.props("outline dense no-caps icon=visibility"), aria_label=f"Open {run.name}")

    ui.timer(EVERY, guarded(refresh))
    session.listeners.append(guarded(refresh))
