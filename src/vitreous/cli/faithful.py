"""`vitreous faithful MODEL --data DATA`: which explanations tell the truth about a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def faithful(
    model: Annotated[str | None, typer.Argument(help="timm name or saved model; the bundled model by default")] = None,
    data: Annotated[str, typer.Option(help="sample, fashion-mnist, cifar10, or a folder of class folders")] = "sample",
    checkpoint: Annotated[Path | None, typer.Option(help="local weights for the timm name")] = None,
    pretrained: Annotated[bool, typer.Option(help="download timm's weights")] = False,
    img_size: Annotated[int | None, typer.Option(help="input size, where the model is to be built for another")] = None,
    methods: Annotated[
        str | None, typer.Option(help="names with commas between, from vitreous.see.METHODS; all by default")
    ] = None,
    limit: Annotated[int, typer.Option(help="the first so many images", min=1)] = 64,
    json: Annotated[Path | None, typer.Option(help="also write every figure to this file")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace the JSON file if it exists")] = False,
    seed: Annotated[int, typer.Option(help="for random orders, random weights and intervals")] = 0,
) -> None:
    """Measure explanations of a model: insertion, deletion, and the sanity check by random weights."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from .. import see, store
    from ..data import open_data
    from ..errors import VitreousError, nearest
    from ..prove import faithfulness

    names = [n.strip() for n in methods.split(",")] if methods is not None else list(see.METHODS)
    for n in names:
        if n not in see.METHODS:
            raise VitreousError(f"unknown method '{n}'{nearest(n, see.METHODS) or ': choose ' + ', '.join(see.METHODS)}")
    if json is not None and json.exists() and not overwrite:
        raise VitreousError(f"{json} exists: give another --json, or --overwrite")
    sized: dict[str, Any] = {"img_size": img_size} if img_size else {}
    net = store.open_model(model, pretrained=pretrained, checkpoint=checkpoint, **sized)
    opened = open_data(data, net, limit=limit, seed=seed)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        found = faithfulness(
            net,
            {n: see.METHODS[n] for n in names},
            opened.tensor(range(len(opened))),
            seed=seed,
            progress=lambda what, share: bar.update(task, description=what, completed=share),
        )
    console = Console()
    console.print(found, width=max(console.width, 110))
    if json is not None:
        found.save(json)
