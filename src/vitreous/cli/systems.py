"""`vitreous systems`: the published methods that work here, and what was published of them beside what is measured."""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from typing import Annotated, Any

import typer
from rich.progress import track
from rich.table import Table

from ..errors import VitreousError, nearest
from ..terminal import console


def listed(family: str | None = None, name: str | None = None) -> list[dict[str, Any]]:
    """The rows of `systems.toml`: all, or those of one family, or the one called `name`."""
    rows = [{"slug": slug, **row} for slug, row in tomllib.loads(files("vitreous").joinpath("systems.toml").read_text()).items()]
    families, slugs = sorted({r["family"] for r in rows}), [r["slug"] for r in rows]
    if family is not None and family not in families:
        raise VitreousError(f"no family '{family}'{nearest(family, families) or ': there are ' + ', '.join(families)}")
    if name is not None and name not in slugs:
        raise VitreousError(f"no system '{name}'{nearest(name, slugs) or ': vitreous systems lists them'}")
    found = [r for r in rows if family in (None, r["family"]) and name in (None, r["slug"])]
    if not found:
        raise VitreousError(f"'{name}' is no system of the family '{family}': leave --family out")
    return found


def measured(variant: str) -> dict[str, float]:
    """Parameters (millions) and GMACs of one image at the published size, of the timm model `variant`.

    It is built on torch's meta device: shapes pass through it, and nothing is computed or kept.
    """
    import timm
    import torch

    from .. import models  # noqa: F401  its names are timm's from then on
    from ..prove.cost import macs

    with torch.device("meta"):
        model: Any = timm.create_model(variant).eval()
        image = torch.zeros(1, *model.pretrained_cfg["input_size"])
    return {"params": sum(p.numel() for p in model.parameters()) / 1e6, "gmacs": macs(model, image, variant) / 1e9}


def systems(
    name: Annotated[str | None, typer.Argument(help="only this system, with the figures of its variants")] = None,
    family: Annotated[str | None, typer.Option(help="only this family; 'backbone' with the figures of all variants")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """List the published systems that work: paper, entry point, published figures, deployable or simulated.

    The variants of an architecture come with published parameters, GMACs and top-1, and what is measured of them here.
    """
    rows = listed(family, name)
    figures = {v: f for r in rows for v, f in r.get("variants", {}).items()} if name or family == "backbone" else {}
    for variant in track(figures, "measuring", console=console(stderr=True), transient=True):
        figures[variant]["measured"] = measured(variant)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("system", "family", "paper", "use", "runs as", "published")
    for r in rows:
        table.add_row(r["slug"], r["family"], f"{r['authors']} {r['year']}: {r['title']}", r["entry"], r["runs"], r["published"])
    console().print(table)
    if figures:
        console().print(variants_table(figures))
        for variant, f in figures.items():
            if "note" in f:
                console().print(f"{variant}: {f['note']}")


def variants_table(figures: dict[str, dict[str, Any]]) -> Table:
    """Published figures of variants beside the measured ones; – where none was published."""
    table = Table("variant", "pixels", "top-1 %", "parameters, M", "measured", "GMACs", "measured")
    for column in table.columns[1:]:
        column.justify = "right"
    for variant, f in figures.items():
        here = f["measured"]
        said = {k: str(f.get(k, "–")) for k in ("top1", "params", "gmacs")}
        table.add_row(
            variant,
            str(f.get("size", 224)),
            said["top1"],
            said["params"],
            f"{here['params']:.2f}",
            said["gmacs"],
            f"{here['gmacs']:.2f}",
        )
    return table
