"""`vitreous faithful MODEL --data DATA`: which explanations tell the truth about a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import MODEL, DataOptions, ModelOptions, grouped


@grouped
def faithful(
    model: MODEL = None,
    *,
    opening: ModelOptions,
    source: DataOptions,
    methods: Annotated[
        str | None, typer.Option(help="names with commas between, from vitreous.see.METHODS; all by default")
    ] = None,
    multi_label: Annotated[bool, typer.Option(help="an image may have several classes: scores by sigmoid")] = False,
    json: Annotated[Path | None, typer.Option(help="also write every figure to this file; - prints it alone")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the JSON file if it exists")] = False,
) -> None:
    """Measure explanations of a model: insertion, deletion, and the sanity check by random weights; on 64 images unless told."""
    from .. import see
    from ..errors import VitreousError, nearest
    from ..files import writable
    from ..prove import faithfulness
    from ..terminal import console, progress_bar

    names = [n.strip() for n in methods.split(",")] if methods is not None else list(see.METHODS)
    for n in names:
        if n not in see.METHODS:
            raise VitreousError(f"unknown method '{n}'{nearest(n, see.METHODS) or ': choose ' + ', '.join(see.METHODS)}")
    printed = json == Path("-")
    if json is not None and not printed:
        writable(json, overwrite, "another --json")
    net = opening.open(model)
    opened = source.open(net, limit=64, labelled=False)
    with progress_bar() as bar:
        task = bar.add_task("", total=1.0)
        found = faithfulness(
            net,
            {n: see.METHODS[n] for n in names},
            opened.tensor(range(len(opened))),
            seed=source.seed,
            multi_label=multi_label,
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )
    if printed:
        print(found.to_json())
        return
    printer = console()
    printer.print(found, width=max(printer.width, 110))
    if json is not None:
        found.save(json)
