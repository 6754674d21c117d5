"""What is printed on a terminal: text as it is. Names in data may hold brackets and colons that rich would read as markup."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


def console(**options: Any) -> Console:
    """A console that takes every string literally; what is to be coloured is given as `rich.text.Text`."""
    return Console(markup=False, emoji=False, highlight=False, **options)


def progress_bar() -> Progress:
    """A bar for each task on stderr, which leaves nothing behind, and where nobody watches nothing at all."""
    watched = console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=watched, transient=True, disable=not watched.is_terminal)


def stages(bar: Progress) -> Callable[[str, float], None]:
    """Told a stage of the work and the share of it that is done, shows a bar of that stage alone."""
    tasks: dict[str, TaskID] = {}

    def progress(what: str, share: float) -> None:
        if what not in tasks:
            for done in tasks.values():
                bar.update(done, visible=False)
            tasks[what] = bar.add_task(what, total=1.0)
        bar.update(tasks[what], completed=share)

    return progress
