"""What people and files may say: JSON read strictly, and values checked against type hints.

Hints are those of the steps' own fields and plans: `int`, `float`, `bool`, `str`, `None`, `Literal`, unions, `tuple[T, ...]`,
`tuple[T, U]`, `list[T]` and `dict[str, T]`, in any depth.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import types
import typing
from typing import Any

from .errors import VitreousError

MOST = 2**53  # beyond it a float does not hold each integer, and no parameter has a meaning
WORD = re.compile(r"[\w.+-]{0,100}")
LARGEST = 2**20  # of an argument of a model: image side, width, number of classes
SHALLOW = 4  # how deep lists may lie in an argument

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def short(value: object) -> str:
    """`repr`, of a length that fits into a message."""
    try:
        return _SHORT.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return f"a {type(value).__name__} too long to print"


def read_json(text: str | bytes, source: str) -> Any:
    """What JSON says. Raises `VitreousError`, also for what JSON forbids and Python reads: NaN, and a name given twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"{short(key)} is given twice")
            found[key] = value
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=refuse)
    except RecursionError:
        raise VitreousError(f"{source} is not JSON that anyone wrote: it is nested too deeply") from None
    except ValueError as error:
        raise VitreousError(f"{source} is not JSON: {error}") from None


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is what the type hint says; numbers are finite and at most 2⁵³."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is typing.Literal:
        return any(type(value) is type(a) and value == a for a in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1:] == (...,):
            return all(fits(v, args[0]) for v in value)
        return len(value) == len(args) and all(map(fits, value, args))
    if origin is list:
        return isinstance(value, list | tuple) and all(fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(k, str) and fits(v, args[1]) for k, v in value.items())
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        return type(value) is hint and abs(value) <= MOST and math.isfinite(value)
    return isinstance(value, hint)


def named(hint: Any) -> str:
    """A type hint as people write it."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def plain(value: Any, depth: int = 0) -> bool:
    """Whether an argument of a model is a word, a number of sensible size, or a short list of such."""
    if isinstance(value, list | tuple):
        return depth < SHALLOW and len(value) <= 64 and all(plain(v, depth + 1) for v in value)
    if isinstance(value, str):
        return WORD.fullmatch(value) is not None
    return value is None or isinstance(value, bool) or (fits(value, int | float) and abs(value) <= LARGEST)
