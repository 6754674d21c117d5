"""The one kind of error a user of Vitreous has to catch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VitreousError(Exception):
    """Something the user gave cannot be used; the message says what, where, and what to do."""


def nearest(name: str, names: Iterable[str], n: int = 3) -> str:
    """`"; did you mean a, b?"` for the names closest to `name`, or the empty string."""
    close = difflib.get_close_matches(name, list(names), n=n, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
