"""`vitreous slim`: the main job. Slim a model, ship it, prove what was gained and lost, and write it all into one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def slim(
    model: Annotated[str | None, typer.Argument(help="timm name or saved model; the bundled model by default")] = None,
    data: Annotated[str, typer.Option(help="sample, fashion-mnist, cifar10, or a folder of class folders")] = "sample",
    recipe: Annotated[Path | None, typer.Option(help="JSON file of steps")] = None,
    steps: Annotated[str | None, typer.Option(help='such as "EViT(keep=0.7), RepQ(weights=8)"')] = None,
    calibrate: Annotated[int | None, typer.Option(min=1, help="calibration images [default: 128, or all there are]")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="measure on the first N images only")] = None,
    budget: Annotated[float, typer.Option(min=0, help="points of accuracy that the default recipe may lose")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="threads for torch and the runtimes")] = None,
    pretrained: Annotated[bool, typer.Option(help="download timm's weights for MODEL")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="local weights for MODEL")] = None,
    num_classes: Annotated[int | None, typer.Option(min=0, help="outputs of MODEL's classifier; 0 for features")] = None,
    img_size: Annotated[int | None, typer.Option(min=1, help="input size to build MODEL for")] = None,
    download: Annotated[bool, typer.Option(help="let torchvision download DATA")] = False,
    out: Annotated[Path | None, typer.Option(help="folder to write [default: vitreous-out, vitreous-out-2 …]")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace --out if it exists")] = False,
    resume: Annotated[Path | None, typer.Option(help="folder where long steps keep what is finished, to go on from it")] = None,
    seed: Annotated[int, typer.Option(help="for calibration images and intervals")] = 0,
) -> None:
    """Make a vision transformer small and fast, prove it on data, and ship it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from ..errors import VitreousError
    from ..folders import folder
    from ..search import Job
    from ..steps import Recipe

    if recipe is not None and steps is not None:
        raise VitreousError("give --recipe or --steps, not both")
    chosen = Recipe.read(recipe) if recipe else Recipe.parse(steps) if steps is not None else None
    extra = {k: v for k, v in {"num_classes": num_classes, "img_size": img_size}.items() if v is not None}
    console = Console()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with folder(out, overwrite) as (aside, target), Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def progress(what: str, share: float) -> None:
            if what not in tasks:
                for done in tasks.values():
                    bar.update(done, visible=False)
                tasks[what] = bar.add_task(what, total=1.0)
            bar.update(tasks[what], completed=share)

        job = Job(aside, data, seed, threads, budget, limit, progress, resume)
        proof = job.run(model, chosen, calibrate, pretrained, checkpoint, download, extra)
    console.print(proof, width=max(console.width, 110))
    for line in job.notes:
        console.print(line, highlight=False)
    console.print(f"written to {target}: " + ", ".join(sorted(p.name for p in target.iterdir())), highlight=False)
