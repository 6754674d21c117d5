"""The patterns view: all heads in two dimensions, near each other where they attend alike, linked to the matrix of heads."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
from nicegui import ui

from ..files.rows import Rows
from . import apart
from .heads_view import Study, colours, matrix
from .parts import exports, guarded, heading, plot, plotted
from .session import Session


def patterns_view(session: Session) -> None:
    chosen: set[tuple[int, int]] = set()
    with ui.column().classes("w-full") as empty:
        study = Study(session)
    with ui.element("div").classes("studio-pair") as pair:
        with ui.column().classes("studio-card gap-3"):
            heading("Heads that attend alike", "Each point is a head; select some, and the matrix shows where they are.")
            scatter = plot()
            with ui.row().classes("w-full items-center justify-between no-wrap"):
                count = ui.label().classes("text-sm studio-note").props("aria-live=polite")
                exports("patterns", lambda: _rows(session), plot=scatter)
        with ui.column().classes("studio-card gap-3"):
            heading("Where they are")
            where = plot()
            heading("The chosen head", "Mean attention by relative place: the middle is the asking patch itself.")
            offsets = plot()
    with ui.column().classes("studio-card gap-3 w-full") as card:
        with ui.row().classes("w-full items-center justify-between"):
            heading("How many heads have each pattern")
            exports("shares", lambda: _shares(session))
        shares = ui.row().classes("gap-3")

    def pick(points: list[dict[str, Any]]) -> list[tuple[int, int]]:
        return [(int(p["customdata"][0]), int(p["customdata"][1])) for p in points if p.get("customdata")]

    async def clicked(event: Any) -> None:
        for layer, head in pick(event.args["points"])[:1]:
            await session.change(layer=layer, head=head)

    async def selected(event: Any) -> None:
        chosen.clear()
        chosen.update(pick((event.args or {}).get("points", [])))
        mark()

    async def cleared() -> None:
        chosen.clear()
        mark()

    async def moved(event: Any) -> None:
        point = event.args["points"][0]
        await session.change(layer=int(point["x"]), head=int(point["y"]))

    def mark() -> None:
        """Show where the chosen heads are. The scatter stays as it is: drawn again it would forget the selection."""
        found: apart.Study = session.opened.known["study"]
        state = session.state
        where.update_figure(matrix(session.opened.heads, found.rows, "pattern", (state.layer, state.head), chosen))
        count.set_text(f"{len(chosen)} heads selected." if chosen else f"{len(found.rows)} heads, on {found.images} pictures.")

    async def refresh() -> None:
        if session.state.view != "patterns":
            return
        found: apart.Study | None = session.opened.known.get("study")
        for part in (pair, card):
            part.set_visibility(found is not None)
        empty.set_visibility(found is None)
        if found is None:
            study.refresh(found)
            return
        state = session.state
        scatter.update_figure(_scatter(found.rows, (state.layer, state.head)))
        mark()
        offsets.set_visibility(state.head >= 0)
        if state.head >= 0:
            offsets.update_figure(_offsets(found.offsets[state.layer, state.head]))
        shares.clear()
        with shares:
            for name, share in found.shares.items():
                ui.label(f"{name} {100 * share:.0f} %").classes("text-sm")

    scatter.on("plotly_click", guarded(clicked))
    scatter.on("plotly_selected", guarded(selected))
    scatter.on("plotly_deselect", guarded(cleared))
    where.on("plotly_click", guarded(moved))
    session.listeners.append(guarded(refresh))


def _rows(session: Session) -> Rows:
    found = session.opened.known.get("study")
    return [{k: r[k] for k in ("layer", "head", "pattern", "cluster", "x", "y")} for r in found.rows] if found else []


def _shares(session: Session) -> Rows:
    found = session.opened.known.get("study")
    return [{"pattern": name, "share": share} for name, share in found.shares.items()] if found else []


def _scatter(rows: Rows, picked: tuple[int, int]) -> go.Figure:
    names = sorted({row["pattern"] for row in rows})
    figure = go.Figure()
    for name, colour in zip(names, colours(len(names)), strict=True):
        these = [row for row in rows if row["pattern"] == name]
        figure.add_scatter(
            x=[row["x"] for row in these],
            y=[row["y"] for row in these],
            customdata=[(row["layer"], row["head"]) for row in these],
            text=[f"layer {row['layer']}, head {row['head']}: {name}" for row in these],
            hoverinfo="text",
            mode="markers",
            marker=dict(size=11, color=colour),
            name=name,
        )
    for row in rows:
        if (row["layer"], row["head"]) == picked:
            ring = dict(size=18, color="rgba(0,0,0,0)", line=dict(color="#22d3ee", width=3))
            figure.add_scatter(x=[row["x"]], y=[row["y"]], mode="markers", marker=ring, showlegend=False, hoverinfo="skip")
    figure.update_xaxes(showticklabels=False, zeroline=False)
    figure.update_yaxes(showticklabels=False, zeroline=False)
    return plotted(figure, 460).update_layout(dragmode="lasso", uirevision="kept", legend=dict(orientation="h", y=-0.08))


def _offsets(values: Any) -> go.Figure:
    h, w = values.shape
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=list(range(-(w // 2), w // 2 + 1)),
            y=list(range(-(h // 2), h // 2 + 1)),
            colorscale="Inferno",
            hovertemplate="%{x} to the right, %{y} down: %{z:.3g}<extra></extra>",
        )
    )
    figure.update_xaxes(showgrid=False, zeroline=False, constrain="domain")
    figure.update_yaxes(autorange="reversed", scaleanchor="x", showgrid=False, zeroline=False)
    return plotted(figure, 260)
