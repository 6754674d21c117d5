"""Pieces that every view uses: headings, guarded handlers, and the way out for figures and their data."""

from __future__ import annotations

import inspect
import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import plotly.graph_objects as go
from fastapi import HTTPException, Request
from nicegui import app, ui
from starlette.datastructures import UploadFile

from ..errors import VitreousError
from ..files.rows import Rows, as_csv, as_parquet
from .session import Superseded

E = TypeVar("E", bound=ui.element)
FAINT = "rgba(148, 163, 184, 0.3)"  # in the light and in the dark


def attributes(element: E, **values: str) -> E:
    """`element` with HTML attributes (`aria_label` is `aria-label`), set as values.

    `props` parses a text, in which a name that somebody else chose could add attributes and code of its own.
    """
    element.props.update({name.replace("_", "-"): value for name, value in values.items()})
    element.update()
    return element


def guarded(handler: Callable[..., Awaitable[None]]) -> Callable[..., Any]:
    """`handler`, whose failure is shown as a message; the page goes on."""

    async def safe(*arguments: Any) -> None:
        client = ui.context.client
        try:
            await handler(*arguments)
        except Superseded:
            pass
        except Exception as error:
            ours = isinstance(error, VitreousError)
            if not client.is_deleted:  # else the page was closed meanwhile
                with client:
                    said = str(error) if ours else f"{type(error).__name__}: {error}"
                    kind = "warning" if ours else "negative"
                    ui.notify(said, type=kind, multi_line=True, close_button="Close", timeout=0)
            if not ours:
                raise

    if any(p.default is p.empty for p in inspect.signature(handler).parameters.values()):
        return lambda event: safe(event)
    return lambda: safe()


def thumb_button(name: str, source: str, chosen: Callable[[], Awaitable[None]]) -> ui.element:
    """A small picture, `source` its address, that can be chosen."""
    with attributes(ui.element("button").classes("bare"), aria_label=name) as button:
        attributes(ui.element("img").classes("thumb"), src=source, alt="")
    return button.on("click", guarded(chosen))


def take_files(upload: ui.upload, handler: Callable[[UploadFile], Awaitable[None]]) -> None:
    """Give each file sent to `upload` to `handler`; what is no file is a 400. (NiceGUI's own route fails on a field of text.)"""
    address = upload.props["url"]
    app.remove_route(address)

    @app.post(address, include_in_schema=False)
    async def take(request: Request) -> dict[str, str]:
        async with request.form() as form:
            if not form or not all(isinstance(part, UploadFile) for _, part in form.multi_items()):
                raise HTTPException(400, "a file is wanted here")
            for _, part in form.multi_items():
                with upload:
                    await guarded(handler)(part)
        return {}


def heading(text: str, note: str = "") -> None:
    ui.label(text).classes("text-base font-semibold").props('role=heading aria-level="2"')
    if note:
        ui.label(note).classes("text-sm studio-note -mt-3")


def table(rows: Rows) -> None:
    """A row for each, and on a narrow screen a list for each, so that nothing is cut."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with ui.element("table").classes("studio-table"):
        with ui.element("thead"), ui.element("tr"):
            for key in keys:
                with ui.element("th"):
                    ui.label(key)
        with ui.element("tbody"):
            for row in rows:
                with ui.element("tr"):
                    for key in keys:
                        with attributes(ui.element("td"), data_label=key):
                            ui.label(str(row.get(key, "–")))


def exports(name: str, rows: Callable[[], Rows], svg: Callable[[], str] | None = None, plot: ui.plotly | None = None) -> None:
    """A menu that downloads a figure as SVG or PNG and its data as CSV or Parquet.

    The figure is the SVG text that `svg` gives, or a `plot` on the page; the browser makes the PNG of both.
    """

    def figure(kind: str) -> None:
        if plot is not None:
            ui.run_javascript(f"savePlot('c{plot.id}', {kind!r}, {name!r})")
        elif svg is not None and kind == "svg":
            ui.download(svg().encode(), f"{name}.svg", "image/svg+xml")
        elif svg is not None:
            ui.run_javascript(f"savePicture({json.dumps(svg())}, {name!r})")

    async def data(kind: str) -> None:
        ui.download(as_csv(rows()) if kind == "csv" else as_parquet(rows()), f"{name}.{kind}")

    with attributes(ui.button(icon="download").props("flat round dense"), aria_label=f"Export {name}"), ui.menu():
        for kind in ("svg", "png"):
            ui.menu_item(f"Figure as {kind.upper()}", partial(figure, kind))
        ui.menu_item("Data as CSV", guarded(lambda: data("csv")))
        ui.menu_item("Data as Parquet", guarded(lambda: data("parquet")))


def plot(height: int = 120) -> ui.plotly:
    """A place for a plot, empty until it is given a figure."""
    return ui.plotly(plotted(go.Figure().update_layout(xaxis_visible=False, yaxis_visible=False), height)).classes("w-full")


def plotted(figure: go.Figure, height: int) -> go.Figure:
    """The same look for every plot; transparent, so that it fits light and dark."""
    figure.update_xaxes(gridcolor=FAINT, zerolinecolor=FAINT)
    figure.update_yaxes(gridcolor=FAINT, zerolinecolor=FAINT)
    return figure.update_layout(
        height=height,
        margin=dict(l=50, r=10, t=20, b=40),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font=dict(color="#64748b", size=12),
        dragmode=False,
        modebar=dict(remove=["zoom", "pan", "autoscale"]),
    )
