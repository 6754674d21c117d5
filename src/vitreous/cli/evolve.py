"""`vitreous evolve MODEL --data DATA`: the best sub-networks of a model that was trained as a supernet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import MODEL, DataOptions, ModelOptions, finite, grouped


@grouped
def evolve(
    model: MODEL = None,
    *,
    opening: ModelOptions,
    source: DataOptions,
    macs: Annotated[float | None, typer.Option(help="multiply-accumulates in the blocks at most", callback=finite)] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="fewest blocks (default: two less than all)")] = None,
    least: Annotated[float, typer.Option(min=0.01, max=1, help="least share of heads and hidden units")] = 0.5,
    levels: Annotated[int, typer.Option(min=1, max=16, help="numbers of heads, and of hidden units, to choose from")] = 3,
    width: Annotated[float, typer.Option(min=0.01, max=1, help="least share of the tokens' channels")] = 1.0,
    bits: Annotated[bool, typer.Option("--bits", help="choose 8 bits or floats for each layer too; cost is then bytes")] = False,
    measured: Annotated[int, typer.Option(min=10, help="about how many networks to run")] = 100,
    predictor: Annotated[bool, typer.Option(help="search by predictors of what was measured, or by evolution alone")] = True,
    sort: Annotated[bool, typer.Option(help="first put heads and hidden units into the order of their importance")] = False,
    out: Annotated[Path, typer.Option(help="file to write the most accurate to")] = Path("subnet.safetensors"),
    overwrite: Annotated[bool, typer.Option(help="replace --out if it exists")] = False,
) -> None:
    """Search sub-networks of MODEL (prefixes of its blocks, heads, hidden units and channels) on images of DATA. A model is
    trained for it by `vitreous train --objective "InstaTune()"`; of any other most sub-networks answer badly."""
    from .. import store
    from ..data import training_data
    from ..errors import VitreousError
    from ..files import writable
    from ..models.elasticvit import ElasticViT
    from ..models.vit_resnas import ViTResNAS
    from ..prune.subnet import Space, sort_units
    from ..search.nets.elastic import search_elastic
    from ..search.nets.policy import search_policy
    from ..search.nets.resnas import search_resnas
    from ..search.nets.subnets import search_subnets
    from ..steps import history_of, slim
    from ..terminal import console, progress_bar, stages

    writable(out, overwrite, "another --out")
    net = opening.open(model)
    if steps := history_of(net).steps():
        raise VitreousError(f"sub-networks are cut from a model as it was trained, and this one was changed by {steps[0]}")
    space = None if isinstance(net, ViTResNAS | ElasticViT) else Space.of(net, depth, least, levels, width)
    calibrate, check = training_data(source.data, net, limit=source.limit, seed=source.seed, download=source.download)
    images = calibrate.tensor(range(min(64, len(calibrate))))
    if isinstance(net, ViTResNAS | ElasticViT):
        if macs is None:
            raise VitreousError("this supernet is searched just below a limit: give --macs")
        if bits or sort or depth is not None or width < 1:
            raise VitreousError("this supernet knows its sub-networks itself: leave --bits, --sort, --depth and --width out")
        most, seed = max(4, measured // 5), source.seed
        with progress_bar() as bar:
            if isinstance(net, ViTResNAS):
                genes, wrong, supernet = search_resnas(
                    net, check, macs, least=least, levels=levels, population=most, generations=5, seed=seed, progress=stages(bar)
                )
                smaller, cost = supernet.cut(genes), supernet.macs(genes)
            else:
                smaller, wrong, cost = search_elastic(
                    net, check, macs, images, population=most, generations=5, seed=seed, progress=stages(bar)
                )
        print(f"{100 * wrong:.2f} % wrong, {cost / 1e6:.4g} MMACs, chosen on {len(check)} images; written to {out}")
        store.save_model(smaller, out)
        return
    if sort:
        sort_units(net, images)
    printer = console()
    with progress_bar() as bar:
        told = stages(bar)
        if bits:
            if macs is not None:
                raise VitreousError("--bits searches bytes: leave --macs out")
            found = search_policy(net, check, images, space, population=max(5, measured // 4), seed=source.seed, progress=told)
        else:
            front = search_subnets(
                net, check, space, limit=macs, measured=measured, predictor=predictor, seed=source.seed, progress=told
            )
    if bits:
        for p in found:
            printer.print(f"{100 * p.wrong:.2f} % wrong, {p.bytes / 1e6:.3f} MB, {p.recipe}", markup=False)
        made = slim(net, min(found, key=lambda p: (p.wrong, p.bytes)).recipe, images)
    else:
        for m in front:
            printer.print(f"{100 * m.wrong:.2f} % wrong, {m.macs / 1e6:.4g} MMACs, {m.choice}", markup=False)
        made = min(front, key=lambda m: (m.wrong, m.macs)).cut(net)
    store.save_model(made, out)
    printer.print(f"chosen on {len(check)} images, so it must be proven on others; written to {out}")
