"""`vitreous design`: a network for a budget, found without training any."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import finite

_limit = lambda help: typer.Option(help=help, callback=finite)


def design(
    method: Annotated[str, typer.Argument(help="deepmad (a CNN by entropy) or as-vit (by trainability and expressivity)")],
    params: Annotated[float | None, _limit("parameters at most, as 11e6; deepmad counts without the classifier")] = None,
    macs: Annotated[float | None, _limit("multiply-accumulates of an image at most, as 1.8e9; deepmad")] = None,
    rho: Annotated[float, _limit("effectiveness, depth over mean width, at most; deepmad")] = 0.3,
    samples: Annotated[int, typer.Option(min=1, help="topologies to look at; as-vit")] = 100,
    img_size: Annotated[int, typer.Option(min=32, help="pixels a side of the images it is for")] = 224,
    num_classes: Annotated[int, typer.Option(min=1, max=2**20)] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    out: Annotated[Path, typer.Option(help="file to write, untrained; `vitreous train` goes on from it")] = Path(
        "designed.safetensors"
    ),
    overwrite: Annotated[bool, typer.Option(help="replace --out if it exists")] = False,
) -> None:
    """Design a network within a budget by the measures of a paper; no image is looked at."""
    from .. import models, store
    from ..errors import VitreousError, nearest
    from ..files import writable
    from ..search.nets import as_vit, deepmad
    from ..terminal import progress_bar, stages

    assert models
    known = ("deepmad", "as-vit")
    if method not in known:
        raise VitreousError(f"no way to design is called {method!r}{nearest(method, known) or ': give deepmad or as-vit'}")
    writable(out, overwrite, "another --out")
    with progress_bar() as bar:
        progress = stages(bar)
        if method == "deepmad":
            if macs is None:
                raise VitreousError("deepmad needs --macs, as --macs 1.8e9")
            net = deepmad.design(macs, params or float("inf"), rho, size=img_size, seed=seed, progress=progress)
            built = store.open_model("deepmad_r18", num_classes=num_classes, **net.arguments())
            found = deepmad.figures(net)
            print(f"entropy {found.entropy:.0f}, effectiveness {found.effectiveness:.3f}, {found.flops / 1e9:.3g} GMACs")
        else:
            if params is None or macs is not None:
                raise VitreousError("as-vit needs --params, as --params 20e6, and takes no --macs")
            genotype = as_vit.design(params, steps=samples, seed=seed, progress=progress)
            built = store.open_model("as_vit_seed", num_classes=num_classes, img_size=img_size, genotype=as_vit.numbers(genotype))
            print(f"genotype {genotype}")
    store.save_model(built, out)
    print(f"{sum(p.numel() for p in built.parameters()) / 1e6:.2f} M parameters, untrained, written to {out}")
