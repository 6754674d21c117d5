"""`vitreous anatomy MODEL`: what a model is made of."""

from __future__ import annotations

from typing import Annotated

import typer


def anatomy(
    model: Annotated[str | None, typer.Argument(help="timm name or saved model; the bundled model by default")] = None,
) -> None:
    """Show patch grid, prefix tokens, blocks and attention, and which steps' blocks are plain."""
    from .. import store
    from ..anatomy import read

    print(read(store.open_model(model)))
