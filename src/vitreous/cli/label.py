"""`vitreous label TEACHER --data DATA`: what a teacher sees in crops of the training pictures, kept for `FerKD`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import MODEL, DataOptions, ModelOptions, grouped


@grouped
def label(
    model: MODEL = None,
    *,
    opening: ModelOptions,
    source: DataOptions,
    crops: Annotated[int, typer.Option(min=1, max=10**4, help="crops of each picture")] = 8,
    top: Annotated[int, typer.Option(min=1, help="classes kept of each crop")] = 5,
    out: Annotated[Path, typer.Option(help="file to write")] = Path("labels.safetensors"),
    overwrite: Annotated[bool, typer.Option(help="replace --out if it exists")] = False,
) -> None:
    """Label crops of the training pictures, by MODEL, for `vitreous train --augment "FerKD(labels='labels.safetensors')"`."""
    from rich.progress import BarColumn, Progress, TextColumn

    from ..data import training_data
    from ..files import writable
    from ..learn import FerKD, label_crops
    from ..terminal import console

    writable(out, overwrite, "another --out")
    net = opening.open(model)
    learn_from, _ = training_data(source.data, net, limit=source.limit, seed=source.seed, download=source.download)
    with Progress(
        BarColumn(), TextColumn("{task.description}", markup=False), console=console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=1.0)
        say = lambda line, share: bar.update(task, description=line, completed=share)
        labels = label_crops(net, learn_from, crops, top, seed=source.seed, progress=say)
    labels.save(out)
    print(f"written to {out}: {crops} crops of each of {len(learn_from)} pictures")
    said = ", ".join(f"{100 * share:.1f} % {kind}" for kind, share in FerKD(labels).shares().items())
    print(f"with FerKD's defaults: {said}")
