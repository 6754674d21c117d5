"""Long work as people see it: a button that starts it, a bar that tells how far it is, and a button that stops it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nicegui import ui

from ..errors import VitreousError
from .work import Stopped, Work


class Running:
    """`start` is for its owner to connect; `note` says what is going on. The work ends with the page."""

    def __init__(self, name: str, note: str) -> None:
        self.work: Work | None = None
        with ui.row().classes("w-full items-center gap-4"):
            self.start = ui.button(name).props("unelevated no-caps")
            self.cancel = ui.button("Cancel", on_click=self.stop).props("outline no-caps")
            self.note = ui.label(note).classes("text-sm studio-note grow").props("aria-live=polite")
        self.bar = ui.linear_progress(0.0, show_value=False).props("aria-label=Progress")
        self.timer = ui.timer(0.25, self._tell, active=False)
        ui.context.client.on_delete(self.stop)
        self._idle()

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns; raises `VitreousError` when it fails or somebody stopped it."""
        self.work = Work(function, *arguments)
        self.start.disable()
        self.cancel.set_visibility(True)
        self.bar.set_visibility(True)
        self.timer.activate()
        try:
            found = await self.work.result()
            self.note.set_text("Done.")
            return found
        except Stopped:
            self.note.set_text("Cancelled.")
            raise VitreousError("cancelled: nothing was changed") from None
        except VitreousError:
            self.note.set_text("Failed.")
            raise
        finally:
            self._idle()

    def stop(self) -> None:
        if self.work:
            self.work.stop()

    def _idle(self) -> None:
        self.timer.deactivate()
        self.start.enable()
        self.cancel.set_visibility(False)
        self.bar.set_visibility(False)

    def _tell(self) -> None:
        if self.work:
            self.note.set_text(f"{self.work.what}: {100 * self.work.share:.0f} %")
            self.bar.set_value(self.work.share)
