"""`vitreous systems`: the published methods that work here."""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import VitreousError, nearest


def listed(family: str | None = None) -> list[dict[str, Any]]:
    """The rows of `systems.toml`, all or those of one family."""
    rows = [{"slug": slug, **row} for slug, row in tomllib.loads(files("vitreous").joinpath("systems.toml").read_text()).items()]
    families = sorted({r["family"] for r in rows})
    if family is not None and family not in families:
        raise VitreousError(f"no family '{family}'{nearest(family, families) or ': there are ' + ', '.join(families)}")
    return [r for r in rows if family in (None, r["family"])]


def systems(
    family: Annotated[str | None, typer.Option(help="only this family")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """List the published systems that work: paper, entry point, published figures, deployable or simulated."""
    rows = listed(family)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("system", "family", "paper", "use", "runs as", "published")
    for r in rows:
        table.add_row(r["slug"], r["family"], f"{r['authors']} {r['year']}: {r['title']}", r["entry"], r["runs"], r["published"])
    Console().print(table)
