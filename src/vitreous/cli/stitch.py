"""`vitreous stitch SMALL LARGE`: one net of two trained ones, with a route for every cost between."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import DataOptions, finite, grouped


@grouped
def stitch(
    small: Annotated[str, typer.Argument(help="a trained plain ViT of timm's, or a stitched net that was trained")],
    large: Annotated[
        str | None, typer.Argument(help="a larger one of the same patches and classes; leave it out for a stitched net")
    ] = None,
    *,
    source: DataOptions,
    rank: Annotated[int, typer.Option(min=0, help="of what the stitching layers learn; 0 for all of it")] = 64,
    routes: Annotated[int | None, typer.Option(min=2, help="how many to measure, evenly by cost (default: all)")] = None,
    macs: Annotated[
        float | None, typer.Option(help="write the best route of at most so many, as 1e9, alone", callback=finite)
    ] = None,
    out: Annotated[Path, typer.Option(help="file to write")] = Path("stitched.safetensors"),
    overwrite: Annotated[bool, typer.Option(help="replace --out if it exists")] = False,
) -> None:
    """Stitch two trained models, fitted on 100 images of DATA, and measure the routes on others. To train the net further:
    vitreous train stitched.safetensors --objective "Stitched()"; then stitch it again, with --macs, to take one route out."""
    from .. import models, store
    from ..data import training_data
    from ..errors import VitreousError
    from ..files import writable
    from ..models.sn_net import SNNet
    from ..search.nets import stitch as stitching
    from ..terminal import console, progress_bar, stages

    assert models
    writable(out, overwrite, "another --out")
    first = store.open_model(small)
    learnt, check = training_data(source.data, first, limit=source.limit, seed=source.seed, download=source.download)
    if isinstance(first, SNNet):
        if large is not None:
            raise VitreousError(f"{small} is a stitched net already: leave LARGE out")
        net = first
    else:
        if large is None:
            raise VitreousError("stitching needs two models: name a larger one behind it")
        net = stitching.stitch(first, store.open_model(large), learnt.tensor(range(min(stitching.IMAGES, len(learnt)))), rank)
    with progress_bar() as bar:
        found = stitching.measure(net, check, routes, stages(bar))
    printer = console()
    for m in stitching.front(found):
        printer.print(f"route {m.route}: {100 * m.accuracy:.2f} %, {m.macs / 1e9:.3g} GMACs, {net.at(m.route)}", markup=False)
    worse = len(found) - len(stitching.front(found))
    printer.print(f"{worse} of {len(found)} routes are no better than a cheaper one; {len(check)} images, none fitted on")
    if macs is None:
        store.save_model(net, out)
        return printer.print(f"written to {out}")
    within = [m for m in found if m.macs <= macs]
    if not within:
        raise VitreousError(f"the cheapest route takes {min(m.macs for m in found):.3g} multiply-accumulates: allow as many")
    best = max(within, key=lambda m: (m.accuracy, -m.macs))
    store.save_model(stitching.single(net, best.route), out)
    printer.print(f"route {best.route} alone written to {out}: {100 * best.accuracy:.2f} %, {best.macs / 1e9:.3g} GMACs")
