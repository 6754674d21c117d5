"""`vitreous anatomy MODEL`: what a model is made of."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from .options import MODEL, ModelOptions, grouped


@grouped
def anatomy(
    model: MODEL = None,
    *,
    opening: ModelOptions,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Show patch grid, prefix tokens, blocks and attention, and which steps' blocks are plain."""
    from ..anatomy import read

    found = read(opening.open(model))
    print(json.dumps(asdict(found), indent=1, default=str) if as_json else found)
