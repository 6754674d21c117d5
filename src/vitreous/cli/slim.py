"""`vitreous slim`: the main job. Slim a model, ship it, prove what was gained and lost, and write it all into one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import MODEL, DataOptions, ModelOptions, grouped


@grouped
def slim(
    model: MODEL = None,
    *,
    opening: ModelOptions,
    source: DataOptions,
    recipe: Annotated[Path | None, typer.Option(help="JSON file of steps")] = None,
    steps: Annotated[str | None, typer.Option(help='such as "EViT(keep=0.7), RepQ(weights=8)"')] = None,
    calibrate: Annotated[int | None, typer.Option(min=1, max=2**20, help="calibration images (default: 128, or all)")] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="what the default recipe may lose: points of accuracy (1), or % of nearest neighbours (5)"),
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="times as fast as the original in torch, at least")] = None,
    latency: Annotated[float | None, typer.Option(help="milliseconds an image at batch 1, at most")] = None,
    megabytes: Annotated[float | None, typer.Option(help="of the shipped file, at most")] = None,
    heal: Annotated[
        float, typer.Option(min=0, help="epochs to fine-tune against the original, before the first step that quantizes")
    ] = 0.0,
    out: Annotated[Path | None, typer.Option(help="folder to write (default: vitreous-out, vitreous-out-2 …)")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace --out if it exists")] = False,
    resume: Annotated[Path | None, typer.Option(help="folder where long steps keep what is finished, to go on from it")] = None,
) -> None:
    """Make a vision transformer small and fast, prove it on data, and ship it."""
    from ..errors import VitreousError
    from ..files.folders import folder
    from ..search import Goal, Job
    from ..steps import Recipe, kept_in
    from ..terminal import console, progress_bar, stages

    if recipe is not None and steps is not None:
        raise VitreousError("give --recipe or --steps, not both")
    if resume is not None:
        kept_in(resume)
    chosen = Recipe.read(recipe) if recipe else Recipe.parse(steps) if steps is not None else None
    goal = Goal(budget, speedup, latency, megabytes)
    printer = console()
    with folder(out, overwrite) as (aside, target), progress_bar() as bar:
        progress = stages(bar)
        progress("opening model", 0.0)
        net = opening.open(model)
        job = Job(aside, source.data, source.seed, opening.threads, goal, source.limit, progress, resume, heal)
        proof = job.run(net, chosen, calibrate, source.download)
    printer.print(proof, width=max(printer.width, 110))
    for line in (*job.notes, *job.log):
        printer.print(line)
    printer.print(f"written to {target}: " + ", ".join(sorted(p.name for p in target.iterdir())))
