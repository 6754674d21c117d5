"""A recipe as a list of steps with their parameters, and the same as the text that the command line takes."""

from __future__ import annotations

import dataclasses
from functools import partial

from nicegui import ui

from ..cli.steps import described
from ..errors import VitreousError
from ..steps import REGISTRY, Recipe, Step
from .parts import guarded


class RecipeEditor:
    """The text decides; the list shows it, and writes into it."""

    def __init__(self, first: str = "EViT(keep=0.7)") -> None:
        self.text = ui.input("Recipe", value=first).props("outlined dense").classes("w-full")
        self.problem = ui.label().classes("text-sm text-amber-700 dark:text-amber-400").props("aria-live=polite")
        self.list = ui.column().classes("w-full gap-2")
        names = {name: f"{name.split('.')[1]} · {name.split('.')[0]}" for name in sorted(REGISTRY)}
        self.more = ui.select(names, label="Add a step", with_input=True).props("outlined dense").classes("w-64")
        self.text.on_value_change(guarded(self._draw))
        self.more.on_value_change(guarded(self._add))
        self._steps: list[Step] = []
        self._fields: list[dict[str, ui.input]] = []
        ui.timer(0, guarded(self._draw), once=True)

    def checked(self) -> str:
        """The recipe as text, empty where none was given. Raises `VitreousError` where it is none."""
        written = (self.text.value or "").strip()
        if written:
            Recipe.parse(written)
        return written

    async def _draw(self) -> None:
        try:
            steps = list(Recipe.parse(written).steps) if (written := (self.text.value or "").strip()) else []
        except VitreousError as reason:
            self.problem.set_text(str(reason))
            return
        self.problem.set_text("")
        before, self._steps = self._steps, steps
        if [step.name for step in steps] == [step.name for step in before]:
            # The same fields stay, and of them only what changed: another may be just being written in.
            for old, new, fields in zip(before, steps, self._fields):
                for name, field in fields.items():
                    if getattr(old, name) != getattr(new, name):
                        field.set_value(repr(getattr(new, name)))
            return
        self.list.clear()
        with self.list:
            self._fields = [self._row(i, step) for i, step in enumerate(steps)]

    def _row(self, i: int, step: Step) -> dict[str, ui.input]:
        told = described(step.name, type(step))
        with ui.column().classes("studio-step w-full gap-2"):
            with ui.row().classes("w-full items-center no-wrap gap-2"):
                with ui.row().classes("items-center gap-x-2 gap-y-0 grow min-w-0"):
                    ui.label(f"{i + 1}. {step.name.split('.')[1]}").classes("font-semibold")
                    ui.label(told["source"]).classes("text-sm studio-note")
                if i:
                    up = ui.button(icon="arrow_upward", on_click=guarded(partial(self._move, i)))
                    up.props("flat round dense aria-label='Earlier'")
                gone = ui.button(icon="close", on_click=guarded(partial(self._remove, i)))
                gone.props("flat round dense aria-label='Remove this step'")
            fields = {}
            with ui.row().classes("w-full gap-3"):
                for parameter in told["parameters"]:
                    name = parameter["name"]
                    fields[name] = ui.input(f"{name}: {parameter['type']}", value=repr(getattr(step, name)))
                    fields[name].props("outlined dense").classes("w-48")
                    fields[name].on("change", guarded(partial(self._set, i, name, fields[name])))
        return fields

    async def _add(self) -> None:
        if name := self.more.value:
            self.more.set_value(None)
            await self._write([*self._steps, *Recipe.parse(f"{name.split('.')[1]}()").steps])

    async def _remove(self, i: int) -> None:
        await self._write([*self._steps[:i], *self._steps[i + 1 :]])

    async def _move(self, i: int) -> None:
        steps = list(self._steps)
        steps[i - 1], steps[i] = steps[i], steps[i - 1]
        await self._write(steps)

    async def _set(self, i: int, name: str, value: ui.input) -> None:
        given = {f.name: repr(getattr(self._steps[i], f.name)) for f in dataclasses.fields(self._steps[i])} | {name: value.value}
        kind = self._steps[i].name.split(".")[1]
        changed = Recipe.parse(f"{kind}({', '.join(f'{key}={written}' for key, written in given.items())})").steps
        await self._write([*self._steps[:i], *changed, *self._steps[i + 1 :]])

    async def _write(self, steps: list[Step]) -> None:
        self.text.set_value(", ".join(str(step) for step in steps))
