"""`vitreous steps`: the steps that a recipe can be made of."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from typing import Annotated, Any

import typer
from rich.table import Table

from ..errors import VitreousError, nearest
from ..steps import REGISTRY, Step
from ..terminal import console


def described(name: str, step: type[Step]) -> dict[str, Any]:
    """What a step is and takes; a parameter without a default has no "default"."""
    hints = typing.get_type_hints(step)
    parameters = []
    for f in dataclasses.fields(step):
        told: dict[str, Any] = {"name": f.name, "type": _written(hints[f.name])}
        if f.default is not dataclasses.MISSING:
            told["default"] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            told["default"] = f.default_factory()
        parameters.append(told)
    source = (inspect.getdoc(step) or "").split("\n\n")[0].replace("\n", " ")
    calibrated = step.needs_calibration
    return {"step": name, "family": step.family, "source": source, "needs_calibration": calibrated, "parameters": parameters}


def _written(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def steps(
    family: Annotated[str | None, typer.Argument(help="only this family: tokens, quant or prune")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """List the steps of recipes with their parameters, types and defaults."""
    from .. import prune, quant, tokens  # noqa: F401  they register their steps

    rows = [described(name, step) for name, step in sorted(REGISTRY.items()) if family in (None, step.family)]
    if not rows:
        families = sorted({s.family for s in REGISTRY.values()})
        raise VitreousError(f"no family '{family}'{nearest(str(family), families) or ': there are ' + ', '.join(families)}")
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("step", "parameters", "source", show_lines=True)
    for r in rows:
        given = [f"{p['name']}: {p['type']}" + (f" = {p['default']!r}" if "default" in p else "") for p in r["parameters"]]
        source = r["source"] + (" Needs calibration images." if r["needs_calibration"] else "")
        table.add_row(r["step"], "\n".join(given), source)
    console().print(table)
