"""The page: one address, four views, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi import Request
from nicegui import app, ui
from starlette.middleware.trustedhost import TrustedHostMiddleware

from . import folders
from .heads_view import heads_view
from .image_view import image_view
from .limits import BodyLimit, SameOrigin
from .models_view import models_view
from .opened import Opened
from .parts import guarded
from .patterns_view import patterns_view
from .session import MAX_BYTES, Session, State

VIEWS: dict[str, tuple[str, Callable[[Session], None]]] = {
    "image": ("Image", image_view),
    "heads": ("Heads", heads_view),
    "patterns": ("Patterns", patterns_view),
    "models": ("Models", models_view),
}
LOOKS = Path(__file__).parent / "page.css"
SCRIPT = Path(__file__).parent / "page.js"


def serve(models: list[Opened], host: str, port: int, show: bool, runs: Path | None = None) -> None:
    """Serve the studio for these models, and the training runs in a folder, until it is stopped."""
    folders.remove_left()
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]", host])
    app.add_middleware(SameOrigin)
    app.add_middleware(BodyLimit, limit=MAX_BYTES + 2**20)
    app.on_exception(lambda error: print(f"vitreous studio: {type(error).__name__}: {error}"))

    @ui.page("/")
    def page(request: Request) -> None:
        draw(models, dict(request.query_params), runs)

    ui.run(
        host=host,
        port=port,
        show=show,
        reload=False,
        show_welcome_message=False,
        reconnect_timeout=30.0,
        title="Vitreous studio",
        favicon="🔎",
    )


def draw(models: list[Opened], query: dict[str, str], runs: Path | None) -> None:
    session = Session(models, State.of(query), runs)
    ui.context.client.on_delete(session.close)
    ui.add_css(LOOKS)
    ui.add_head_html(f"<script>{SCRIPT.read_text()}</script>")
    ui.colors(primary="#0f766e", secondary="#334155", accent="#22d3ee")
    dark = ui.dark_mode(None)

    with ui.header().classes("items-center gap-x-4 gap-y-0 px-4 py-1 studio-header"):
        ui.label("Vitreous").classes("text-lg font-semibold").props('role=heading aria-level="1"')
        with ui.tabs().props("dense inline-label no-caps aria-label='Views'") as tabs:
            for name, (title, _) in VIEWS.items():
                ui.tab(name, title)
        ui.space()
        choice = ui.select({}, label="Model").props("dense outlined options-dense dark").classes("w-52")
        ui.button(icon="link", on_click=lambda: ui.run_javascript("copyLink()")).props(
            "flat round color=white aria-label='Copy a link to this view'"
        )
        ui.button(icon="contrast", on_click=lambda: dark.set_value(not dark.value)).props(
            "flat round color=white aria-label='Light or dark'"
        )

    built: set[str] = set()
    with ui.tab_panels(tabs, keep_alive=True, animated=False).classes("w-full bg-transparent"):
        panels = {}
        for name in VIEWS:
            with ui.tab_panel(name).classes("p-0"):
                panels[name] = ui.column().classes("w-full gap-6").props('role="main"')

    async def refresh() -> None:
        options = {i: opened.title for i, opened in enumerate(session.models)}
        if choice.options != options:
            choice.set_options(options)
        choice.set_value(session.state.model)
        tabs.set_value(session.state.view)
        query = session.state.query()
        ui.navigate.history.replace("/" + (f"?{query}" if query else ""))

    async def turn_to(name: str) -> None:
        new = name not in built
        if new:
            built.add(name)
            with panels[name]:
                VIEWS[name][1](session)
        if session.state.view != name:
            await session.change(view=name)
        elif new:  # drawing takes a while, and somebody may be in another view when it is done: nothing follows it
            await session.refresh()

    session.listeners.append(refresh)
    tabs.on_value_change(guarded(lambda e: turn_to(e.value)))
    choice.on_value_change(guarded(lambda e: session.change(model=e.value)))
    view = session.state.view if session.state.view in VIEWS else "image"
    ui.timer(0, guarded(lambda: turn_to(view)), once=True)
