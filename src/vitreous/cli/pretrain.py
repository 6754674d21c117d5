"""`vitreous pretrain MODEL --data DATA --method METHOD`: teach an encoder without labels."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .options import MODEL, DataOptions, ModelOptions, grouped


@grouped
def pretrain(
    model: MODEL = None,
    *,
    opening: ModelOptions,
    source: DataOptions,
    method: Annotated[str, typer.Option(help='such as "SimMIM(mask=0.6)", "MAE(depth=2)"; vitreous systems --family pretrain')],
    out: Annotated[Path, typer.Option(help="folder of the run; an unfinished one goes on")] = Path("runs/pretrain"),
    teacher: Annotated[str | None, typer.Option(help="timm name or saved model whose features are learnt, as EVA does")] = None,
    teacher_checkpoint: Annotated[Path | None, typer.Option(help="local weights for --teacher")] = None,
    optimiser: Annotated[
        str | None, typer.Option(help="such as AdamW(lr=1e-3); by default AdamW at 1.5e-4 · batch / 256")
    ] = None,
    epochs: Annotated[float, typer.Option(min=0, help="times through the pictures")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="pictures a step")] = 128,
    micro: Annotated[int | None, typer.Option(min=1, help="pictures at once, where a batch does not fit into memory")] = None,
    augment: Annotated[str, typer.Option(help="crop, shift (for small pictures), none")] = "crop",
    precision: Annotated[str, typer.Option(help="32-true, 64-true, bf16-mixed or 16-mixed.")] = "32-true",
    workers: Annotated[int, typer.Option(min=0, help="processes that read pictures")] = 0,
) -> None:
    """Pretrain an encoder on pictures without labels.

    OUT gets last.safetensors, the encoder after each epoch, and model.safetensors, the finished one: ordinary models that
    every command opens; and what goes on where it stopped.
    """
    import timm
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    from .. import store
    from ..data import open_data
    from ..errors import VitreousError
    from ..learn import written
    from ..learn.pretrain.run import pretrain as teach
    from ..terminal import console

    if teacher is None and teacher_checkpoint is not None:
        raise VitreousError("--teacher-checkpoint holds the weights of --teacher: name it too")
    if model in timm.list_models() and opening.num_classes is None and opening.checkpoint is None:
        opening = replace(opening, num_classes=0)
    net = opening.open(model)
    taught_by = store.open_model(teacher, checkpoint=teacher_checkpoint) if teacher is not None else None
    data = open_data(
        source.data, net, part="train", limit=source.limit, seed=source.seed, download=source.download, labelled=False
    )  # fmt: skip
    print(f"{len(data)} images, {len(data.skipped)} files skipped", file=sys.stderr)
    for skipped in data.skipped[:5]:
        print(f"  {skipped.path}: {skipped.reason}", file=sys.stderr)
    with Progress(
        SpinnerColumn(), BarColumn(), TextColumn("{task.description}", markup=False), console=console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=1.0)
        try:
            teach(
                net,
                data,
                method,
                None if optimiser is None else written.optimiser(optimiser),
                teacher=taught_by,
                epochs=epochs,
                batch=batch,
                micro=micro,
                augment=None if augment == "none" else augment,
                precision=precision,
                out=out,
                seed=source.seed,
                workers=workers,
                accelerator=next(net.parameters()).device.type,
                say=lambda line: print(f"caution: {line}", file=sys.stderr),
                progress=lambda line, share: bar.update(task, description=line, completed=share),
            )
        except KeyboardInterrupt:
            raise VitreousError(f"stopped; to go on: {shlex.join(['vitreous', *sys.argv[1:]])}") from None
    print(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir() if not p.name.startswith('.')))}")
