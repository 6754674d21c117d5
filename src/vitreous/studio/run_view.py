"""What a pretraining run made of its encoder: pictures as it answers them, and attention before and after."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nicegui import ui
from PIL import Image
from torch import Tensor

from .. import see
from ..errors import VitreousError
from ..files.rows import Rows
from ..learn.pretrain.reconstruct import before, opened, pixels
from ..learn.pretrain.run import FIRST
from ..prove.drawing import answered, data_uri, enlarge
from .drawing import heat, whole_svg
from .opened import Opened
from .parts import attributes, exports, guarded, heading
from .session import Session


@dataclass(frozen=True)
class Shown:
    """Pictures by what they are, each with a heatmap `[h, w]` or None; `top`, the greatest of all values; what is missing."""

    pictures: dict[str, tuple[Image.Image, np.ndarray | None]]
    top: float
    said: str = ""


def run_of(model: Opened) -> Path | None:
    """The folder of the pretraining run whose encoder this is."""
    name = model.source.model or ""
    home = Path(name).parent
    return home if name.endswith(".safetensors") and (home / FIRST).is_file() else None


def shown_by(net: torch.nn.Module, run: Path, picture: Image.Image, x: Tensor, config: object, seed: int) -> Shown:
    """What the run hides of a picture and how it answers, drawn by `seed`; and its rollout before the run and of `net`."""
    found: dict[str, tuple[Image.Image, np.ndarray | None]] = {"picture": (enlarge(picture), None)}
    said: list[str] = []
    try:
        encoder, method, parts = opened(run)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            hidden, made = method.reconstruct(encoder, parts, x)
        drawn = answered(picture, hidden[0, 0].numpy(), pixels(made[0], config))
        found |= {name: (enlarge(p), None) for name, p in zip(("hidden", "answered"), drawn, strict=True)}
    except VitreousError as reason:
        said.append(str(reason))
    try:
        maps = [see.METHODS["rollout"](m, x)[0].numpy() for m in (before(run), net) if m is not None]
        found |= {name: (enlarge(picture), m) for name, m in zip(("attention before", "attention after"), maps, strict=True)}
    except VitreousError as reason:
        said.append(str(reason))
    return Shown(found, max((float(m.max()) for _, m in found.values() if m is not None), default=1.0), "; ".join(said))


class RunView:
    """A card that shows where the chosen model is the encoder of a pretraining run."""

    def __init__(self, session: Session) -> None:
        self.session, self.key, self.seed, self.shown = session, None, 0, Shown({}, 1.0)
        self.card = ui.column().classes("studio-card gap-3 w-full")
        with self.card:
            with ui.row().classes("w-full items-center gap-3"):
                heading("What pretraining made of it")
                ui.space()
                button = ui.button("Another mask", icon="casino", on_click=guarded(self.again))
                button.props("outline no-caps dense").classes("px-3")
                exports("reconstruction", self.rows, self.svg)
            ui.label("A picture as the run answers it; rollout before and after, on one scale.").classes(
                "text-sm studio-note -mt-2"
            )
            self.row = ui.row().classes("w-full gap-4")
            self.note = ui.label().classes("text-sm studio-note")

    async def again(self) -> None:
        self.seed += 1
        await self.refresh()

    async def refresh(self) -> None:
        model, image = self.session.opened, self.session.state.image
        run = run_of(model)
        self.card.set_visibility(run is not None)
        key = (model, image, self.seed)
        if run is None or key == self.key:
            return
        self.key = key
        picture, x = await asyncio.to_thread(self.session.pictured, model, image)
        shown = await model.slowly(shown_by, run, picture, x, model.prepare.config, self.seed)
        if self.key != key:
            return
        self.shown = shown
        self.row.clear()
        with self.row:
            for name, (base, values) in shown.pictures.items():
                with ui.column().classes("gap-1").style("width: min(180px, calc(50% - 8px)); overflow-wrap: anywhere"):
                    content = self.content(base, values)
                    seen = ui.interactive_image(data_uri(base), content=content, sanitize=False)
                    attributes(seen.classes("w-full pixelated rounded"), aria_label=f"{self.session.named(image)}: {name}")
                    ui.label(name).classes("text-sm")
        self.note.set_text(shown.said)

    def content(self, base: Image.Image, values: np.ndarray | None) -> str:
        return "" if values is None else heat(values, base.size, top=self.shown.top)

    def rows(self) -> Rows:
        return [
            {"map": name, "row": r, "column": c, "value": float(v)}
            for name, (_, values) in self.shown.pictures.items()
            if values is not None
            for (r, c), v in np.ndenumerate(values)
        ]

    def svg(self) -> str:
        left, parts = 0, []
        for name, (base, values) in self.shown.pictures.items():
            w, h = base.size
            parts.append(f'<svg x="{left}" width="{w}" height="{h}">{whole_svg(base, self.content(base, values))}</svg>')
            parts.append(f'<text x="{left}" y="{h + 16}" font-size="14" font-family="sans-serif">{name}</text>')
            left += w + 12
        height = max((p.height for p, _ in self.shown.pictures.values()), default=0) + 24
        return f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(left, 1)}" height="{height}">{"".join(parts)}</svg>'
