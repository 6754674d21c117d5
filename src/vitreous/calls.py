"""What people write as they would in Python, `EViT(keep=0.7), RepQ()`, read without running any of it."""

from __future__ import annotations

import ast
import types
import typing
import warnings
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from .errors import VitreousError, nearest
from .schema import fits, named, short

Kind = TypeVar("Kind")


def read_calls(text: str, what: str, example: str) -> list[tuple[str, dict[str, Any]]]:
    """Names with their parameters, plain values all. `what` they are called and an `example` go into messages.

    Raises `VitreousError` for anything else, in one line.
    """
    wrong = f"cannot read the {what} {short(text)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the parser thinks of odd code
            tree = ast.parse(f"[{text}]", mode="eval").body
        if not isinstance(tree, ast.List):
            raise VitreousError(f"{wrong}: a bracket closes what it did not open; write them as {example}")
        return [_one_call(node, example) for node in tree.elts]
    except SyntaxError as error:
        raise VitreousError(f"{wrong}: {error.msg}; write them as {example}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # a NUL byte; brackets by the hundred
        raise VitreousError(f"{wrong}: {error or 'nested too deeply'}; write them as {example}") from None


def _one_call(node: ast.expr, example: str) -> tuple[str, dict[str, Any]]:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    said = short(ast.unparse(call))
    if call.args or any(k.arg is None for k in call.keywords):
        raise VitreousError(f"cannot read {said}: name each parameter, as in {example}")
    names = [str(k.arg) for k in call.keywords]
    if twice := [n for n in names if names.count(n) > 1]:
        raise VitreousError(f"cannot read {said}: '{twice[0]}' is given twice")
    try:
        return ast.unparse(call.func), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (ValueError, TypeError):
        raise VitreousError(f"cannot read {said}: parameters must be plain values") from None


def _floated(value: Any, hint: Any) -> Any:
    """`value` with its whole numbers as floats where the type hint wants floats alone, in tuples too."""
    if fits(value, hint):
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if fits(value, int) and fits(float(value), hint):
        return float(value)
    if origin in (typing.Union, types.UnionType):
        return next((made for a in args if fits(made := _floated(value, a), a)), value)
    if origin is tuple and isinstance(value, tuple):
        wanted = args[:1] * len(value) if args[-1:] == (...,) else args
        return tuple(map(_floated, value, wanted)) if len(wanted) == len(value) else value
    return value


def checked(cls: type[Kind], label: str, parameters: Mapping[str, Any]) -> Kind:
    """A dataclass made of `parameters` that fit its type hints; `label` names it in messages. Raises `VitreousError`."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values = {}
    for key, value in parameters.items():
        if key not in known:
            hint = nearest(key[:100], known) or f"; it has {', '.join(known) or 'none'}"
            raise VitreousError(f"{label} has no parameter '{key[:100]}'{hint}")
        value = tuple(value) if isinstance(value, list) else value
        value = _floated(value, hints[key])
        if not fits(value, hints[key]):
            huge = isinstance(value, int | float) and not isinstance(value, bool) and not fits(value, int | float)
            wanted_type = "finite and below 2⁵³" if huge else named(hints[key])
            raise VitreousError(f"{label}: '{key}' must be {wanted_type}, not {short(value)}")
        values[key] = value
    if missing := [n for n, f in known.items() if n not in values and f.default is MISSING and f.default_factory is MISSING]:
        raise VitreousError(f"{label} needs '{missing[0]}'")
    return cls(**values)
