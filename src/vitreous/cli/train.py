"""`vitreous train MODEL --data DATA`: teach a model, from its labels or from a teacher."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import MODEL, DataOptions, ModelOptions, grouped


@grouped
def train(
    model: MODEL = None,
    *,
    opening: ModelOptions,
    source: DataOptions,
    out: Annotated[Path, typer.Option(help="folder of the run; an unfinished one goes on")] = Path("runs/train"),
    teacher: Annotated[str | None, typer.Option(help="timm name or saved model to learn from")] = None,
    teacher_checkpoint: Annotated[Path | None, typer.Option(help="local weights for --teacher")] = None,
    steps: Annotated[str | None, typer.Option(help='applied first, as "VPT(prompts=10)"; what they freeze stays')] = None,
    partner: Annotated[
        str | None, typer.Option(help="a second student, a CNN's timm name, that learns beside MODEL: Collaborate()")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help='such as "CrossEntropy(), NKD(gamma=1.5)" (default: cross-entropy, and KD() of a teacher)'),
    ] = None,
    optimiser: Annotated[str, typer.Option(help="AdamW, Lion, SGD or SGDSaI, as Lion(lr=1e-4)")] = "AdamW",
    sam: Annotated[float | None, typer.Option(help="sharpness-aware steps of this radius")] = None,
    epochs: Annotated[float, typer.Option(min=0, help="times through the training images")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="images a step")] = 128,
    micro: Annotated[int | None, typer.Option(min=1, help="images at once, where a batch does not fit into memory")] = None,
    augment: Annotated[
        str, typer.Option(help="crop, shift (for small pictures), randaugment, none, or FerKD(labels='labels.safetensors')")
    ] = "crop",
    mixup: Annotated[float, typer.Option(min=0, help="strength; 0 for none")] = 0.0,
    cutmix: Annotated[float, typer.Option(min=0, help="strength; 0 for none")] = 0.0,
    ema: Annotated[float | None, typer.Option(min=0, max=1, help="decay of an average of the weights")] = None,
    precision: Annotated[str, typer.Option(help="32-true, 64-true, bf16-mixed or 16-mixed.")] = "32-true",
    fsdp: Annotated[
        bool, typer.Option(help="under torchrun: each process keeps a share of the weights alone, where a model does not fit")
    ] = False,
    tensorboard: Annotated[bool, typer.Option(help="write the curves into OUT for TensorBoard too, while it runs")] = False,
    compile: Annotated[bool, typer.Option(help="compile the model first")] = False,
    workers: Annotated[int, typer.Option(min=0, help="processes that read pictures")] = 0,
) -> None:
    """Train a model on class folders: from scratch, --pretrained or from a --checkpoint, alone or with a teacher.

    OUT gets the last checkpoint, the best and the final weights, log.csv and report.html, whose curves grow with each epoch.
    Start it under torchrun for several devices.
    """
    import timm
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

    from .. import store
    from ..data.training import class_names, training_data
    from ..errors import VitreousError
    from ..learn import KD, SAM, BinaryCrossEntropy, CrossEntropy, Students, written
    from ..learn import train as teach
    from ..learn.classify import by_labels
    from ..learn.measure import accuracy_on
    from ..outputs import embeds
    from ..steps import Recipe, slim
    from ..terminal import console

    if teacher is None and teacher_checkpoint is not None:
        raise VitreousError("--teacher-checkpoint holds the weights of --teacher: name it too")
    if model in timm.list_models() and opening.num_classes is None and opening.checkpoint is None:
        opening = replace(opening, num_classes=len(class_names(source.data, source.download)))
    kind, _, number = (opening.device or "cpu").partition(":")
    net = replace(opening, device=None).open(model)  # each process brings it to a device of its own
    if steps is not None:
        net = slim(net, Recipe.parse(steps))
    taught_by = store.open_model(teacher, checkpoint=teacher_checkpoint) if teacher is not None else None
    if partner is not None:
        classes: Any = getattr(net, "num_classes", None)
        net = Students(store.open_model(partner, num_classes=classes), net)
        objective = objective or "Collaborate()"
    chosen = written.objectives(objective, taught_by) if objective else []
    base, augmented = written.optimiser(optimiser), written.augmentation(augment)
    learn_from, check = training_data(source.data, net, limit=source.limit, seed=source.seed, download=source.download)
    if not chosen:
        by = by_labels(learn_from.labels)
        chosen = [by] if taught_by is None else [by, KD(taught_by, multi_label=isinstance(by, BinaryCrossEntropy))]
    for what, part in (("train", learn_from), ("check", check)):
        print(f"{len(part)} images to {what}, {len(part.skipped)} files skipped", file=sys.stderr)
        for skipped in part.skipped[:5]:
            print(f"  {skipped.path}: {skipped.reason}", file=sys.stderr)
    by_label = any(isinstance(o, CrossEntropy | BinaryCrossEntropy) for o in chosen)
    if by_label and embeds(net, learn_from.tensor([0])):
        raise VitreousError("the model gives features and has no classes to learn: give --num-classes, or an --objective without")
    with Progress(
        SpinnerColumn(), BarColumn(), TextColumn("{task.description}", markup=False), console=console(stderr=True), transient=True
    ) as bar:
        task = bar.add_task("", total=1.0)
        try:
            taught = teach(
                net,
                learn_from,
                chosen,
                SAM(base, sam) if sam is not None else base,
                epochs=epochs,
                batch=batch,
                micro=micro,
                augment=augmented,
                mixup=mixup,
                cutmix=cutmix,
                ema=ema,
                precision=precision,
                compiled=compile,
                check=check,
                out=out,
                seed=source.seed,
                workers=workers,
                accelerator=kind,
                devices=[int(number)] if number.isdigit() else 1,
                fsdp=fsdp,
                tensorboard=tensorboard,
                progress=lambda line, share: bar.update(task, description=line, completed=share),
            )
        except KeyboardInterrupt:
            raise VitreousError(f"stopped; to go on: {shlex.join(['vitreous', *sys.argv[1:]])}") from None
    if os.environ.get("RANK", "0") != "0":
        return  # the first process writes and speaks
    if isinstance(taught, Students):
        for name, student in (("cnn", taught.cnn), ("vit", taught.vit)):
            store.save_model(student, out / f"{name}.safetensors")
    accuracy = accuracy_on(taught, check)
    what = "find one of their class" if embeds(taught, check.tensor([0]).to(next(taught.parameters()))) else "right"
    said = "" if accuracy is None else f", {100 * accuracy:.2f} % of {len(check)} images {what}"
    print(f"written to {out}: {', '.join(sorted(p.name for p in out.iterdir() if not p.name.startswith('.')))}{said}")
