"""`vitreous probe MODEL --data DATA`: what an encoder is worth, by nearest neighbours, a linear layer, fine-tuning."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from .options import MODEL, DataOptions, ModelOptions, grouped


@grouped
def probe(
    model: MODEL = None,
    *,
    opening: ModelOptions,
    source: DataOptions,
    protocol: Annotated[str, typer.Option(help="knn, linear, finetune, with commas between")] = "knn,linear",
    tokens: Annotated[str, typer.Option(help="what is read: pooled, as a classifier would, or patches, their mean")] = "pooled",
    block: Annotated[int | None, typer.Option(help="read patch tokens as they leave this block")] = None,
    epochs: Annotated[float, typer.Option(min=0, help="of fine-tuning")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="of fine-tuning")] = 64,
    lr: Annotated[float, typer.Option(help="of fine-tuning")] = 1e-3,
    layer_decay: Annotated[
        float, typer.Option(min=0, max=1, help="of fine-tuning: the rate of each block from the head on")
    ] = 0.65,
    augment: Annotated[str, typer.Option(help="of fine-tuning: crop, shift (for small pictures), randaugment, none")] = "crop",
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Measure an encoder on labelled pictures; of a folder without parts it learns from four fifths."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    from ..data.training import training_data
    from ..learn.pretrain.probe import probe as measure
    from ..terminal import console

    net = opening.open(model)
    data, check = training_data(source.data, net, limit=source.limit, seed=source.seed, download=source.download)
    print(f"{len(data)} images to learn from, {len(check)} to measure on", file=sys.stderr)
    with Progress(
        SpinnerColumn(), BarColumn(), TextColumn("{task.description}", markup=False), console=console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=1.0)
        found = measure(
            net, data, check, [p.strip() for p in protocol.split(",") if p.strip()], tokens=tokens, block=block, epochs=epochs,
            batch=batch, lr=lr, layer_decay=layer_decay, augment=None if augment == "none" else augment, seed=source.seed,
            progress=lambda line, share: bar.update(task, description=line, completed=share),
        )  # fmt: skip
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:>12}  {value:.2f}" if name in ("rankme", "spread") else f"{name:>12}  {100 * value:.2f} %")
