"""`vitreous split MODEL --data DATA --parts 2`: a model as several smaller ones, each for some of the classes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import MODEL, DataOptions, ModelOptions, finite, grouped


@grouped
def split(
    model: MODEL = None,
    *,
    opening: ModelOptions,
    source: DataOptions,
    parts: Annotated[int, typer.Option(min=1, help="how many smaller models")] = 2,
    memory: Annotated[str | None, typer.Option(help="MB of each device, with commas between (default: any)")] = None,
    keep: Annotated[float, typer.Option(help="share of heads, channels and units a part begins with", callback=finite)] = 0.5,
    epochs: Annotated[float, typer.Option(min=0, help="of healing each part on images of its classes")] = 1.0,
    fusion_epochs: Annotated[float, typer.Option(min=0, help="of training what fuses them")] = 1.0,
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("split"),
    overwrite: Annotated[bool, typer.Option(help="replace --out if it exists")] = False,
) -> None:
    """Split MODEL by classes (ED-ViT): prune a copy for each set, assign the copies to devices, fuse their features.

    Then run the parts in processes of their own, and tell what goes between them.
    """
    import torch

    from ..data import training_data
    from ..deploy import Apart, ed_vit, save_split
    from ..deploy.ed_vit import size_of
    from ..errors import VitreousError
    from ..files.folders import folder
    from ..learn.measure import accuracy_on
    from ..terminal import progress_bar, stages

    try:
        room = None if memory is None else [int(float(m) * 1e6) for m in memory.split(",")]
    except ValueError:
        raise VitreousError(f"--memory must be megabytes with commas between, as 2,2,4, not {memory!r}") from None
    net = opening.open(model)
    learn_from, check = training_data(source.data, net, limit=source.limit, seed=source.seed, download=source.download)
    with folder(out, overwrite) as (aside, _):
        with progress_bar() as bar:
            whole, device = ed_vit(
                net,
                learn_from,
                parts,
                memory=room,
                keep=keep,
                epochs=epochs,
                fusion_epochs=fusion_epochs,
                seed=source.seed,
                progress=stages(bar),
            )
        save_split(whole, device, aside)
    right = [accuracy_on(m, check) for m in (net, whole)]
    for i, (part, place) in enumerate(zip(whole.parts, device, strict=True)):
        print(f"part {i}: classes {', '.join(map(str, whole.classes[i]))}; {size_of(part) / 1e6:.2f} MB, on device {place}")
    shares = " against ".join("–" if r is None else f"{100 * r:.2f} %" for r in reversed(right))
    print(f"together {shares} of {len(check)} other images right; the model itself is {size_of(net) / 1e6:.2f} MB")
    x = check.tensor(range(min(8, len(check))))
    with Apart(whole) as devices, torch.inference_mode():
        off = float((devices(x) - whole(x)).abs().max())
        print(f"in {parts} processes: {devices.received // len(x)} bytes an image from all parts, answers off by {off:.1e}")
    print(f"written to {out}")
