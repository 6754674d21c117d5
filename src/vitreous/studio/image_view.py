"""The image view: click a patch, and see where it attends in any layer and head; explanations and models side by side."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from nicegui import ui
from starlette.datastructures import UploadFile

from .. import see
from ..errors import VitreousError
from ..files.rows import Rows
from ..prove.drawing import data_uri, enlarge, survival, tokens_left
from ..prove.drift import total_variation
from .drawing import Sheet, heat, patch_at, whole_svg
from .parts import attributes, exports, guarded, heading, take_files, thumb_button
from .run_view import RunView
from .session import MAX_BYTES, Session

SHOWN = 24  # pictures of the data on one page of the strip
KEYS = "(e) => { if (e.key.startsWith('Arrow')) { e.preventDefault(); emit({key: e.key}); } }"
ARROWS = {"ArrowLeft": (0, -1), "ArrowRight": (0, 1), "ArrowUp": (-1, 0), "ArrowDown": (1, 0)}


def image_view(session: Session) -> None:
    strip = _Strip(session)
    with ui.element("div").classes("studio-pair"):
        with ui.column().classes("studio-card gap-3"):
            main = _Picture(session)
        with ui.column().classes("studio-card gap-3"):
            sheet = _Sheet(session)
    with ui.column().classes("studio-card gap-3 w-full"):
        explanations = _Explanations(session)
    run = RunView(session)
    models = _Models(session)

    async def refresh() -> None:
        if session.state.view == "image":
            for part in (main, sheet, strip, run, models, explanations):  # what was asked for first, what takes long last
                await part.refresh()

    session.listeners.append(guarded(refresh))


class _Picture:
    """The picture with the attention of one layer, head and query over it."""

    def __init__(self, session: Session) -> None:
        self.session, self.drawn, self.content, self.values = session, "", "", np.zeros((1, 1))
        with ui.row().classes("w-full items-center justify-between no-wrap"):
            heading("Where it attends")
            exports("attention", self.rows, self.svg)
        self.image = ui.interactive_image(on_mouse=guarded(self.clicked), events=["click"], sanitize=False)
        self.image.classes("w-full pixelated rounded-lg overflow-hidden").props("tabindex=0 role=application")
        self.image.on("keydown", guarded(self.typed), args=["key"], js_handler=KEYS)
        self.answer = ui.label().classes("text-sm font-medium")
        self.caption = ui.label().classes("text-sm studio-note").props("aria-live=polite")
        with ui.row().classes("w-full items-center gap-4 no-wrap"):
            self.layer_name = ui.label().classes("text-sm w-32 shrink-0")
            self.layer = ui.slider(min=0, max=1, step=1, value=0).props("aria-label=Layer").classes("grow")
            self.layer.on_value_change(guarded(lambda e: self.session.change(layer=int(e.value))))
        with ui.row().classes("w-full items-center gap-4"):
            self.head = ui.select({-1: "mean of all heads"}, value=-1, label="Head").props("dense outlined").classes("w-44")
            self.head.on_value_change(guarded(lambda e: self.session.change(head=e.value)))
            ui.button("Class token", on_click=guarded(lambda: self.session.change(patch=-1))).props(
                "outline no-caps dense"
            ).classes("px-3")

    async def clicked(self, event: Any) -> None:
        grid = self.session.opened.anatomy.grid
        if grid and self.size:
            patch = patch_at(event.image_x, event.image_y, self.size, grid)
            await self.session.change(patch=-1 if patch == self.session.state.patch else patch)

    async def typed(self, event: Any) -> None:
        grid, state = self.session.opened.anatomy.grid, self.session.state
        if grid is None:
            return
        row, column = divmod(state.patch, grid[1]) if state.patch >= 0 else (grid[0] // 2, grid[1] // 2)
        down, right = ARROWS[event.args["key"]]
        row, column = min(max(row + down, 0), grid[0] - 1), min(max(column + right, 0), grid[1] - 1)
        await self.session.change(patch=row * grid[1] + column)

    async def refresh(self) -> None:
        session, state, opened = self.session, self.session.state, self.session.opened
        key = f"{state.model} {state.image}"
        if key != self.drawn:
            picture, _ = await asyncio.to_thread(session.pictured, opened, state.image)
            self.base = enlarge(picture)
            self.size = self.base.size
            self.image.set_source(data_uri(self.base, 1))
            self.drawn = key
        layers = max(1, len(opened.heads))
        self.layer.props(f"max={layers - 1} markers")
        self.layer.set_value(state.layer)
        self.layer_name.set_text(f"Layer {state.layer} of 0–{layers - 1}")
        heads = opened.heads[state.layer] if opened.heads else 0
        self.head.set_options({-1: "mean of all heads", **{h: f"head {h}" for h in range(heads)}}, value=state.head)
        try:
            self.values = await self.attention()
        except VitreousError as reason:
            self.content, said = "", str(reason)
        else:
            patch = state.patch if state.patch >= 0 else None
            self.content, said = heat(self.values, self.size, patch), self.told()
        self.image.set_content(self.content)
        self.caption.set_text(said)
        attributes(self.image, aria_label=f"{session.named(state.image)}. {said} Arrow keys choose a patch.")

    async def attention(self) -> np.ndarray:
        state = self.session.state
        found = await self.session.look(state.model, state.image, state.layer)
        self.answer.set_text(self.session.opened.answer(found.out[0]))
        layer = found.layers[state.layer] if len(found.layers) > state.layer else found.layers[0]
        maps = layer.maps("class" if state.patch < 0 else state.patch)[0]
        return (maps.mean(0) if state.head < 0 else maps[state.head]).numpy()

    def told(self) -> str:
        state, w = self.session.state, self.values.shape[1]
        who = "The class token" if state.patch < 0 else f"Patch {divmod(state.patch, w)}"
        best = int(self.values.argmax())
        share = 100 * self.values.max() / max(self.values.sum(), 1e-12)
        return (
            f"{who} attends most to patch {divmod(best, w)} ({share:.0f} % of what goes to patches); "
            f"{100 * self.values.sum():.0f} % of its attention goes to patches."
        )

    def rows(self) -> Rows:
        return [{"row": r, "column": c, "attention": float(v)} for (r, c), v in np.ndenumerate(self.values)]

    def svg(self) -> str:
        return whole_svg(self.base, self.content)


class _Sheet:
    """All heads of all layers at once, for the same query."""

    def __init__(self, session: Session) -> None:
        self.session, self.sheet, self.maps = session, None, []
        with ui.row().classes("w-full items-center justify-between no-wrap"):
            self.title = ui.label().classes("text-base font-semibold").props('role=heading aria-level="2"')
            exports("heads", self.rows, lambda: whole_svg(self.sheet.image, "") if self.sheet else "")
        self.image = ui.interactive_image(on_mouse=guarded(self.clicked), events=["click"], sanitize=False)
        self.image.classes("w-full pixelated all-heads")
        self.caption = ui.label().classes("text-sm studio-note")

    async def clicked(self, event: Any) -> None:
        found = self.sheet.at(event.image_x, event.image_y) if self.sheet else None
        if found:
            await self.session.change(layer=found[0], head=found[1])

    async def refresh(self) -> None:
        state = self.session.state
        try:
            found = await self.session.look(state.model, state.image, state.layer)
        except VitreousError:
            found = None
        query = "class" if state.patch < 0 else state.patch
        self.maps = [] if found is None else [None if layer.problem else layer.maps(query)[0].numpy() for layer in found.layers]
        if all(m is None for m in self.maps):
            self.title.set_text("All heads")
            self.caption.set_text("No layer of this model attends over its whole grid of patches.")
            self.image.set_visibility(False)
            return
        self.sheet = Sheet(self.maps)
        self.image.set_visibility(True)
        self.image.set_source(data_uri(self.sheet.image, 1))
        alone = len(self.maps) < len(self.session.opened.heads)
        layer = 0 if alone else state.layer
        self.image.set_content(self.sheet.mark(layer, None if state.head < 0 else state.head))
        self.title.set_text(f"All {sum(self.sheet.heads)} heads")
        first = f"The heads of layer {state.layer}" if alone else "A column for each layer, the first at the left"
        self.caption.set_text(f"{first}; every map is scaled to its own maximum. Click one to see it large.")

    def rows(self) -> Rows:
        return [
            {"layer": i, "head": h, "row": r, "column": c, "attention": float(v)}
            for i, layer in enumerate(self.maps)
            if layer is not None
            for (h, r, c), v in np.ndenumerate(layer)
        ]


class _Explanations:
    """Several explanations of the same answer, beside each other."""

    def __init__(self, session: Session) -> None:
        self.session, self.key, self.found = session, ("", ""), {}
        with ui.row().classes("w-full items-center justify-between no-wrap"):
            heading("Explanations", "")
            exports("explanations", self.rows, self.svg)
        self.choice = ui.select(sorted(see.METHODS), multiple=True, value=[], label="Methods").props("dense outlined use-chips")
        self.choice.classes("w-full max-w-xl")
        self.choice.on_value_change(guarded(lambda e: session.change(methods=",".join(e.value))))
        self.row = ui.row().classes("w-full gap-4")

    async def refresh(self) -> None:
        state, opened = self.session.state, self.session.opened
        methods = [m for m in state.methods.split(",") if m in see.METHODS]
        self.choice.set_value(methods)
        key = (f"{state.model} {state.image}", state.methods)
        if key == self.key:
            return
        if key[0] != self.key[0]:
            self.found = {}
        self.key = key
        picture, x = await asyncio.to_thread(self.session.pictured, opened, state.image)
        self.base = enlarge(picture)
        self.row.clear()
        places = {}
        with self.row:
            for method in methods:
                with ui.column().classes("gap-1").style("width: min(180px, calc(50% - 8px)); overflow-wrap: anywhere"):
                    image = ui.interactive_image(data_uri(self.base), sanitize=False).classes("w-full pixelated rounded")
                    places[method] = image, ui.label(f"{method}: computing…").classes("text-sm")
                    if warning := see.warning(method):
                        ui.label(f"⚠ {warning}").classes("text-xs text-amber-700 dark:text-amber-400")
        for method, (image, label) in places.items():
            if self.key != key:  # another picture was chosen meanwhile
                return
            try:
                if method not in self.found:
                    self.found[method] = await self.session.newest("explanation", opened.explain(method, x))
            except VitreousError as reason:
                label.set_text(f"{method}: {reason}")
                continue
            values, seconds = self.found[method]
            image.set_content(heat(values, self.base.size))
            attributes(image, aria_label=f"{method} over {self.session.named(state.image)}")
            label.set_text(f"{method}, {1000 * seconds:.0f} ms")

    def rows(self) -> Rows:
        return [
            {"method": method, "row": r, "column": c, "value": float(v)}
            for method, (values, _) in self.found.items()
            for (r, c), v in np.ndenumerate(values)
        ]

    def svg(self) -> str:
        w, h = self.base.size
        shown = [m for m in self.session.state.methods.split(",") if m in self.found]
        parts = [
            f'<svg x="{i * (w + 12)}" width="{w}" height="{h}">{whole_svg(self.base, heat(self.found[m][0], (w, h)))}</svg>'
            f'<text x="{i * (w + 12)}" y="{h + 16}" font-size="14" font-family="sans-serif">{m}</text>'
            for i, m in enumerate(shown)
        ]
        width = max(1, len(shown)) * (w + 12)
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{h + 24}">{"".join(parts)}</svg>'


class _Models:
    """The same attention in every open model, how far it drifted from the first's, and the tokens each one gives up."""

    def __init__(self, session: Session) -> None:
        self.session, self.key = session, None
        self.card = ui.column().classes("studio-card gap-3 w-full")
        with self.card:
            heading(
                "Models side by side", "Rollout of each open model, how far it is from the first's, and the tokens it gives up."
            )
            self.row = ui.row().classes("w-full gap-4")

    async def refresh(self) -> None:
        session, image = self.session, self.session.state.image
        key = (image, len(session.models))
        if key == self.key:
            return
        self.key = key
        reduced = any(len(getattr(m, "reducers", ())) for opened in session.models for m in opened.net.modules())
        self.card.set_visibility(len(session.models) > 1 or reduced)
        if not self.card.visible:
            return
        first: np.ndarray | None = None
        self.row.clear()
        for opened in session.models:
            picture, x = await asyncio.to_thread(session.pictured, opened, image)
            base = enlarge(picture)
            try:
                values = (await opened.explain("rollout", x))[0]
                lost = await opened.survival(x)
            except VitreousError as reason:
                values, lost, said = None, [], str(reason)
            else:
                said = opened.title
                if first is None:
                    first = values
                elif first.shape == values.shape:
                    said += f": {100 * total_variation(first[None], values[None])[0]:.0f} % of its attention lies elsewhere"
            if self.key != key:
                return
            with self.row:
                with ui.column().classes("gap-1").style("width: min(180px, calc(50% - 8px)); overflow-wrap: anywhere"):
                    content = "" if values is None else heat(values, base.size)
                    ui.interactive_image(data_uri(base), content=content, sanitize=False).classes("w-full pixelated rounded")
                    ui.label(said).classes("text-sm")
                for layer, groups in lost:
                    with ui.column().classes("gap-1").style("width: min(140px, calc(50% - 8px)); overflow-wrap: anywhere"):
                        attributes(ui.image(survival(base, groups)).classes("w-full rounded"), alt=f"Tokens left after {layer}")
                        ui.label(f"{layer}: {tokens_left(groups)} tokens").classes("text-sm")


class _Strip:
    """Pictures to choose from, and the way in for one's own."""

    def __init__(self, session: Session) -> None:
        self.session, self.shown = session, None
        self.page = session.state.image // SHOWN if session.state.image >= 0 else 0
        with ui.column().classes("studio-card gap-2 w-full"):
            with ui.row().classes("w-full items-center gap-3"):
                heading("Pictures")
                ui.space()
                back = ui.button(icon="chevron_left").props("flat round dense aria-label='Earlier pictures'")
                forth = ui.button(icon="chevron_right").props("flat round dense aria-label='Later pictures'")
                self.upload = ui.upload(auto_upload=True, max_file_size=MAX_BYTES).props('accept="image/*"').classes("hidden")
                own = ui.button("Your picture", icon="upload", on_click=lambda: self.upload.run_method("pickFiles"))
                own.props("outline no-caps dense").classes("px-3")
            self.row = ui.row().classes("w-full gap-2 strip")
        back.on_click(guarded(lambda: self.turn(-1)))
        forth.on_click(guarded(lambda: self.turn(1)))
        take_files(self.upload, self.taken)
        self.upload.on_rejected(guarded(self.refused))

    async def refresh(self) -> None:
        session, total = self.session, len(self.session.opened.data)
        self.page = min(self.page, (total - 1) // SHOWN)
        numbers = [*session.uploads, *range(self.page * SHOWN, min(total, (self.page + 1) * SHOWN))]
        shown = (session.state.model, numbers, session.state.image)
        if shown == self.shown:
            return
        self.shown = shown
        pictures = await asyncio.to_thread(lambda: {i: session.thumb(i) for i in numbers})
        self.row.clear()
        with self.row:
            for i, source in pictures.items():
                button = thumb_button(session.named(i), source, lambda i=i: session.change(image=i))
                button.classes("picked" if i == session.state.image else "")

    async def turn(self, by: int) -> None:
        self.page = max(0, self.page + by)
        await self.refresh()

    async def taken(self, file: UploadFile) -> None:
        self.upload.reset()
        number = await self.session.upload(file.filename or "a picture", file.file)
        await self.session.change(image=number, patch=-1)

    async def refused(self) -> None:
        self.upload.reset()
        raise VitreousError(f"that file was refused: pictures of at most {MAX_BYTES // 2**20} MB are taken")
