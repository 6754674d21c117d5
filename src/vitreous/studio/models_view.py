"""The model view: what every open model costs and answers; a recipe applied, watched, cancelled, downloaded."""

from __future__ import annotations

import asyncio
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from nicegui import ui

from ..files.rows import Rows
from ..prove.table import three
from . import apart
from .opened import Opened, Source
from .parts import attributes, exports, guarded, heading, table
from .recipe_editor import RecipeEditor
from .running import Running
from .runs_view import runs_view
from .session import Session

FILES = {
    "model.safetensors": "the slimmed model, for vt.load",
    "model.onnx": "for ONNX Runtime",
    "model.xml": "for OpenVINO",
    "model.bin": "the weights of model.xml",
    "report.html": "the proof, for people",
    "proof.json": "the proof, for programs",
}


def models_view(session: Session) -> None:
    rows: Rows = []
    with ui.column().classes("studio-card gap-3 w-full"):
        with ui.row().classes("w-full items-center gap-3"):
            heading("Open models")
            ui.space()
            exports("models", lambda: rows)
        known = ui.column().classes("w-full")
        work = Running("Measure them", "Accuracy, speed and size on the same pictures, interleaved.")
    with ui.column().classes("studio-card gap-3 w-full"):
        heading("Apply a recipe", "Steps in their order. Without any, the studio chooses, as the command vitreous slim does.")
        recipe = RecipeEditor()
        images = (
            ui.number("Pictures to prove on", value=500, min=10, step=10, precision=0).props("outlined dense").classes("w-44")
        )
        slimming = Running("Apply", "")
        results = ui.column().classes("w-full gap-3")
    if session.runs is not None:
        runs_view(session, session.runs)

    def show(new: Rows) -> None:
        rows[:] = new
        known.clear()
        with known:
            table([{key: _told(key, value) for key, value in row.items()} for row in rows])

    async def measure() -> None:
        show(await work.run(apart.measure, [m.source for m in session.models], int(images.value or 500)))

    async def slim() -> None:
        written = recipe.checked()  # what is wrong with it is told before anything starts
        folder = Path(tempfile.mkdtemp(dir=session.folder.name))
        source = session.opened.source
        proved = await slimming.run(apart.recipe, source, written, int(images.value or 500), folder)
        await adopt(folder, source, written or "the studio's choice", proved)

    async def adopt(folder: Path, source: Source, recipe: str, proved: Rows) -> None:
        made = Source(str(folder / "model.safetensors"), data=source.data)
        opened = await asyncio.to_thread(Opened, made)
        opened.title = f"{source.title}: {recipe}"
        session.models.append(opened)
        with results, ui.column().classes("w-full gap-2"):
            heading(opened.title)
            table([{key: _told(key, value) for key, value in row.items()} for row in proved])
            with ui.row().classes("gap-2"):
                for name, what in FILES.items():
                    if (folder / name).exists():
                        button = ui.button(name, on_click=partial(ui.download, folder / name, name))
                        attributes(button.props("outline dense no-caps icon=download"), aria_label=f"Download {name}").classes(
                            "px-3"
                        )
                        button.tooltip(what)
        await session.refresh()

    async def refresh() -> None:
        if not rows or len(rows) != len(session.models):
            show([_known(i, opened) for i, opened in enumerate(session.models)])

    work.start.on_click(guarded(measure))
    slimming.start.on_click(guarded(slim))
    session.listeners.append(guarded(refresh))


def _known(i: int, opened: Opened) -> dict[str, Any]:
    parameters = sum(p.numel() for p in opened.net.parameters())
    return {"model": f"{i + 1}. {opened.title}", "parameters": parameters, "attention layers": len(opened.heads)}


def _told(key: str, value: Any) -> Any:
    if isinstance(value, float):
        return f"{100 * value:.1f} %" if key.startswith(("accuracy", "agreement")) else three(value)
    return f"{value:,}" if isinstance(value, int) else value
