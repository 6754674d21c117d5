"""Whom a glass concerns: the thread that opened it, and in that the task."""

from __future__ import annotations

from contextvars import ContextVar
from threading import get_ident
from typing import Any

from ..errors import VitreousError

_MINE: ContextVar[tuple[Any, ...]] = ContextVar("glasses", default=())  # what this thread or task looks through
_OPEN: dict[int, list[Any]] = {}  # what each thread looks through, whichever of its tasks does


def enter(glass: Any) -> None:
    """Raises `VitreousError` when the glass is open, or when another task of this thread looks: torch's modes do not tell tasks
    apart, so that what one runs would be seen by the other."""
    if any(glass in others for others in _OPEN.values()):
        raise VitreousError("this glass is open already: make another by vt.glass(model)")
    mine = _OPEN.get(get_ident(), [])
    if any(g not in _MINE.get() for g in mine):
        raise VitreousError(
            "another task of this thread is looking through a glass, and what this one runs would be seen there: close that "
            "before an await, or look in a thread of its own"
        )
    _OPEN[get_ident()] = [*mine, glass]
    _MINE.set((*_MINE.get(), glass))


def leave(glass: Any) -> None:
    _MINE.set(tuple(g for g in _MINE.get() if g is not glass))
    for thread, open_ in list(_OPEN.items()):
        if glass in open_:
            _OPEN[thread] = [g for g in open_ if g is not glass]
            if not _OPEN[thread]:
                del _OPEN[thread]


def here(glass: Any) -> bool:
    """Whether what runs now was started by whoever opened this glass, and not by another thread or task."""
    return glass in _MINE.get() and glass in _OPEN.get(get_ident(), ())
