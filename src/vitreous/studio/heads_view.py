"""The heads view: all heads of a model as a matrix; one of them close up; and the model without some of them."""

from __future__ import annotations

import asyncio
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from nicegui import ui

from ..errors import VitreousError
from ..files.rows import Rows
from ..prove.drawing import data_uri, enlarge
from . import apart
from .drawing import heat
from .parts import FAINT, attributes, exports, guarded, heading, plot, plotted, thumb_button
from .running import Running
from .session import Session

STRONGEST = 6  # pictures shown of a head


def heads_view(session: Session) -> None:
    study = Study(session)
    with ui.element("div").classes("studio-pair"):
        with ui.column().classes("studio-card gap-3"):
            close = _Close(session)
        with ui.column().classes("studio-card gap-3"):
            matrix = _Matrix(session)
            removal = _Removal(session)
            agreement = _Agreement()

    async def refresh() -> None:
        if session.state.view != "heads":
            return
        found = session.opened.known.get("study")
        study.refresh(found)
        matrix.refresh(found)
        removal.refresh()
        agreement.refresh(found)
        await close.refresh(found)  # last, as it takes longest

    session.listeners.append(guarded(refresh))


class Study:
    """What a study tells, the button that starts it, and on how many pictures."""

    def __init__(self, session: Session) -> None:
        self.session = session
        with ui.column().classes("studio-card gap-3 w-full"):
            heading("Study the heads", "How much each one matters, how far it looks, and which pattern it has learned.")
            self.images = ui.number("Pictures", value=128, min=8, step=8, precision=0).props("outlined dense").classes("w-32")
            self.work = Running("Study", "")
        self.work.start.on_click(guarded(self.run))

    async def run(self) -> None:
        opened = self.session.opened
        opened.known["study"] = await self.work.run(apart.study, opened.source, int(self.images.value or 128))
        await self.session.refresh()

    def refresh(self, found: apart.Study | None) -> None:
        self.work.note.set_text(f"Studied on {found.images} pictures." if found else "")


class _Matrix:
    """Layers × heads, coloured by one measure."""

    def __init__(self, session: Session) -> None:
        self.session, self.found = session, None
        with ui.row().classes("w-full items-center justify-between"):
            heading("All heads")
            self.colour = ui.select([session.state.colour], value=session.state.colour, label="Coloured by")
            self.colour.props("dense outlined").classes("w-48")
            self.colour.on_value_change(guarded(lambda e: session.change(colour=e.value)))
        self.plot = plot()
        self.plot.on("plotly_click", guarded(self.clicked))
        with ui.row().classes("w-full items-center justify-between no-wrap"):
            ui.label("Click a head to see it close up.").classes("text-sm studio-note")
            exports("heads", lambda: self.found.rows if self.found else [], plot=self.plot)

    async def clicked(self, event: Any) -> None:
        point = event.args["points"][0]
        await self.session.change(layer=int(point["x"]), head=int(point["y"]))

    def refresh(self, found: apart.Study | None) -> None:
        self.found, state = found, self.session.state
        by = state.colour
        if found:
            by = by if by in found.measures else found.measures[0]
            self.colour.set_options(found.measures, value=by)
        self.plot.update_figure(matrix(self.session.opened.heads, found.rows if found else [], by, (state.layer, state.head)))


def matrix(
    heads: list[int], rows: Rows, by: str, picked: tuple[int, int], chosen: set[tuple[int, int]] | None = None
) -> go.Figure:
    """Layers × heads coloured by an entry of the rows, names or numbers; only the `chosen`, if any; `picked` outlined."""
    shape = max(heads, default=1), max(1, len(heads))
    values, texts = np.full(shape, np.nan), np.full(shape, "", object)
    named = sorted({str(row[by]) for row in rows}) if rows and isinstance(rows[0][by], str) else []
    for row in rows:
        at = row["head"], row["layer"]
        texts[at] = str(row[by]) if named else f"{row[by]:.4g}"
        if not chosen or (row["layer"], row["head"]) in chosen:
            values[at] = named.index(row[by]) if named else row[by]
    for layer, count in enumerate(heads if not rows else ()):
        values[:count, layer] = 0
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=list(range(shape[1])),
            y=list(range(shape[0])),
            text=texts,
            hovertemplate="layer %{x}, head %{y}: %{text}<extra></extra>",
            hoverongaps=False,
            colorscale=steps(len(named)) if named else "Viridis" if rows else [[0, FAINT], [1, FAINT]],
            colorbar=dict(tickvals=list(range(len(named))), ticktext=named) if named else dict(title=by),
            showscale=bool(rows),
            zmin=-0.5 if named else None,
            zmax=len(named) - 0.5 if named else None,
            xgap=2,
            ygap=2,
        )
    )
    if picked[1] >= 0:
        x, y = picked
        figure.add_shape(type="rect", x0=x - 0.5, x1=x + 0.5, y0=y - 0.5, y1=y + 0.5, line=dict(color="#22d3ee", width=3))
    figure.update_xaxes(title="layer", dtick=1, showgrid=False, zeroline=False)
    figure.update_yaxes(title="head", dtick=1, autorange="reversed", showgrid=False, zeroline=False)
    return plotted(figure, 120 + 30 * shape[0])


def colours(n: int) -> list[str]:
    """`n` colours, neighbours far apart."""
    return [f"hsl({int(i * 222.5) % 360}, 60%, {45 + 12 * (i % 3)}%)" for i in range(n)]


def steps(n: int) -> list[list[Any]]:
    """A colour scale of `n` flat steps."""
    return [[(i + end) / n, colour] for i, colour in enumerate(colours(n)) for end in (0, 1)]


class _Close:
    """One head: its numbers, how far it looks, its map on the picture, and the pictures that it matters for."""

    def __init__(self, session: Session) -> None:
        self.session, self.key, self.row, self.uniform = session, None, {}, []
        with ui.row().classes("w-full items-center gap-3"):
            heading("One head")
            ui.space()
            self.layer = ui.select([0], value=0, label="Layer").props("dense outlined").classes("w-24")
            self.head = ui.select([0], value=0, label="Head").props("dense outlined").classes("w-24")
        self.layer.on_value_change(guarded(lambda e: session.change(layer=e.value)))
        self.head.on_value_change(guarded(lambda e: session.change(head=e.value)))
        with ui.row().classes("w-full gap-4 items-start"):
            self.image = ui.interactive_image(sanitize=False).classes("pixelated rounded").style("width: 180px")
            self.numbers = ui.html("", sanitize=False).classes("text-sm grow")
        self.profile = plot()
        with ui.row().classes("w-full items-center justify-between no-wrap"):
            self.loss = ui.label().classes("text-sm studio-note").props("aria-live=polite")
            exports("profile", lambda: [{"hops": k, "share": v} for k, v in enumerate(self._hops())], plot=self.profile)
        self.strongest = ui.row().classes("w-full gap-2")

    def _hops(self) -> list[float]:
        return [self.row[f"hops_{k}"] for k in range(len(self.uniform)) if f"hops_{k}" in self.row]

    async def refresh(self, found: apart.Study | None) -> None:
        session, state, opened = self.session, self.session.state, self.session.opened
        if not opened.heads:
            self.loss.set_text("This model has no attention heads.")
            return
        head = max(state.head, 0)
        self.layer.set_options(list(range(len(opened.heads))), value=state.layer)
        self.head.set_options(list(range(opened.heads[state.layer])), value=head)
        key = (state.model, state.image, state.layer, head, id(found))
        if key == self.key:
            return
        self.key = key
        at = (state.layer, head)
        self.row = next((r for r in found.rows if (r["layer"], r["head"]) == at), {}) if found else {}
        self.uniform = found.uniform if found else []
        self.numbers.set_content(_numbers(self.row, found.measures if found else []))
        self.profile.set_visibility(bool(self._hops()))
        if self._hops():
            self.profile.update_figure(_profile(self._hops(), self.uniform))
        try:
            picture, _ = await asyncio.to_thread(session.pictured, opened, state.image)
            seen = await session.look(state.model, state.image, state.layer)
            layer = seen.layers[state.layer] if len(seen.layers) > state.layer else seen.layers[0]
            content = heat(layer.maps()[0, head].numpy(), enlarge(picture).size)
        except VitreousError:
            content = ""
        self.image.set_source(data_uri(enlarge(picture))).set_content(content)
        attributes(self.image, aria_label=f"Layer {state.layer}, head {head} on {session.named(state.image)}")
        self.loss.set_text("Without this head: computing…")
        self.strongest.clear()
        loss = await session.newest("head", opened.without({state.layer: [head]}))
        if key != self.key:
            return
        self.loss.set_text(f"Without this head: {loss}. It moves these pictures most:")
        with self.strongest:
            for i in np.argsort(-loss.moved)[:STRONGEST]:
                thumb_button(session.named(int(i)), session.thumb(int(i)), lambda i=int(i): session.change(image=i))


def _numbers(row: dict[str, Any], measures: list[str]) -> str:
    cells = []
    for name in measures:
        value = row.get(name)
        if value is None:
            continue
        told = escape(str(value)) if isinstance(value, str | int) else f"{value:.4g}"
        if f"{name}_low" in row:
            told += f" <span class='studio-note'>[{row[f'{name}_low']:.4g}, {row[f'{name}_high']:.4g}]</span>"
        cells.append(f"<tr><th scope='row'>{name.replace('_', ' ')}</th><td>{told}</td></tr>")
    return f"<table class='studio-numbers'>{''.join(cells)}</table>"


def _profile(hops: list[float], uniform: list[float]) -> go.Figure:
    figure = go.Figure(go.Bar(x=list(range(len(hops))), y=hops, name="this head", marker_color="#0f766e"))
    figure.add_scatter(x=list(range(len(uniform))), y=uniform, name="a head that attends to all alike", line_color="#f59e0b")
    figure.update_xaxes(title="patches away", dtick=1 if len(hops) < 12 else None)
    figure.update_yaxes(title="share of attention")
    figure.update_layout(legend=dict(orientation="h", y=1.2))
    return plotted(figure, 240)


class _Removal:
    """The model without any set of heads, recomputed at once."""

    def __init__(self, session: Session) -> None:
        self.session, self.shown = session, None
        heading("Remove heads", "Take heads out, and see what the model then answers on the first pictures of the data.")
        with ui.row().classes("w-full gap-3 items-center"):
            ui.button("Remove this head", on_click=guarded(self.remove)).props("unelevated no-caps")
            ui.button("Put all back", on_click=guarded(lambda: session.change(removed=""))).props("outline no-caps")
        self.list = ui.label().classes("text-sm")
        self.result = ui.label().classes("text-base").props("aria-live=polite")

    async def remove(self) -> None:
        state = self.session.state
        name = f"{state.layer}.{max(state.head, 0)}"
        removed = [r for r in state.removed.split(",") if r]
        await self.session.change(removed=",".join([*removed, name] if name not in removed else removed))

    def refresh(self) -> None:
        state = self.session.state
        key = (state.model, state.removed)
        if key != self.shown:
            self.shown = key
            ui.timer(0, guarded(lambda: self.compute(key)), once=True)

    async def compute(self, key: Any) -> None:
        opened, removed = self.session.opened, self.session.removed()
        count = sum(len(heads) for heads in removed.values())
        self.list.set_text(f"Removed: {self.session.state.removed.replace(',', ', ')}" if count else "No head is removed.")
        self.result.set_text("computing…" if count else "")
        if count:
            loss = await self.session.newest("removal", opened.without(removed))
            if key == self.shown:
                self.result.set_text(f"Without {count} of {sum(opened.heads)} heads: {loss}.")


class _Agreement:
    """How far the measures of importance rank the heads alike."""

    def __init__(self) -> None:
        self.rows: Rows = []
        with ui.column().classes("w-full gap-3") as self.part:
            heading(
                "Do the measures of importance agree?", "Kendall's τ between their rankings of all heads: 1 is the same order."
            )
            self.plot = plot()
            with ui.row().classes("w-full justify-end"):
                exports("agreement", lambda: self.rows, plot=self.plot)

    def refresh(self, found: apart.Study | None) -> None:
        self.part.set_visibility(found is not None)
        if found and found.agreement is not self.rows:
            self.rows = found.agreement
            names = [row["metric"] for row in self.rows]
            values = [[row[name] for name in names] for row in self.rows]
            look = dict(zmin=-1, zmax=1, colorscale="RdBu", texttemplate="%{z:.2f}", xgap=2, ygap=2)
            figure = go.Figure(go.Heatmap(z=values, x=names, y=names, **look))
            figure.update_yaxes(autorange="reversed")
            self.plot.update_figure(plotted(figure, 260).update_layout(margin_l=120))
