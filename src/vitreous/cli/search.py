"""`vitreous search`: try combinations under a budget, print the Pareto front, ship the best."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import MODEL, DataOptions, ModelOptions, finite, grouped

_limit = lambda help: typer.Option(help=help, callback=finite)


@grouped
def search(
    model: MODEL = None,
    *,
    opening: ModelOptions,
    source: DataOptions,
    budget: Annotated[float | None, _limit("what may be lost: points of accuracy (1), or % of nearest neighbours (5)")] = None,
    speedup: Annotated[float | None, _limit("times as fast as the original in torch, at least")] = None,
    latency: Annotated[float | None, _limit("milliseconds an image at --batch, at most")] = None,
    macs: Annotated[float | None, _limit("multiply-accumulates of an image, at most, as 1e9")] = None,
    bytes: Annotated[float | None, _limit("of the shipped file, at most, as 5e6")] = None,
    memory: Annotated[float | None, _limit("bytes to run a batch, at most: weights, and activations as torch holds them")] = None,
    energy: Annotated[
        float | None, _limit("share of what the original takes, at most: measured where the processor tells, else modelled")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=4096, help="images at once (default: 1 and 16; limits are of 1)")
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="of searching, stopped runs included", callback=finite)] = 10.0,
    trials: Annotated[int | None, typer.Option(min=0, help="recipes to try at most, beside those of slim")] = None,
    axes: Annotated[str | None, typer.Option(help="what may change: tokens,heads,mlp,bits,runtime (default: all)")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the front as a page, as pareto.html")] = None,
    storage: Annotated[
        str | None, typer.Option(help="share what is tried with other processes: a database's URL, or a file that all reach")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the search; started again there it goes on")] = Path("vitreous-search"),
) -> None:
    """Search combinations of token steps, removed heads and hidden units, integers and runtimes, under a budget.

    Where nothing keeps to it, the closest is shipped and said, with exit status 2.
    """
    from ..errors import VitreousError
    from ..search import Goal
    from ..search import search as run
    from ..search.front import table
    from ..terminal import console, progress_bar, stages

    mega = lambda value: None if value is None else value / 1e6
    goal = Goal(budget, speedup, latency, mega(bytes), macs, mega(memory), energy, batch)
    wanted = None if axes is None else [a.strip() for a in axes.split(",") if a.strip()]
    try:
        with progress_bar() as bar:
            progress = stages(bar)
            net = opening.open(model)
            found = run(
                net,
                source.data,
                goal=goal,
                axes=wanted,
                minutes=minutes,
                trials=trials,
                out=out,
                storage=storage,
                plot=plot,
                limit=source.limit,
                seed=source.seed,
                threads=opening.threads,
                download=source.download,
                progress=progress,
            )
    except KeyboardInterrupt:
        again = shlex.join(["vitreous", *sys.argv[1:]])
        raise VitreousError(f"stopped; what was tried is kept in {storage or out}, to go on: {again}") from None
    printer = console()
    width = max(printer.width, 110)
    printer.print(table(found.front, found.original), width=width)
    printer.print(found.proof, width=width)
    for line in (*found.notes, *found.log):
        printer.print(line)
    printer.print(
        f"in {out}: {'' if storage else 'trials.jsonl, '}front.json, recipes/, best/ with the shipped files, proof and report"
    )
    if found.missed:
        raise VitreousError(found.missed)
