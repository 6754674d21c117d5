"""`vitreous run`: the answers of a shipped file to a folder of pictures, as Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    file: Annotated[Path, typer.Argument(help="a shipped .onnx or .xml")],
    data: Annotated[Path, typer.Option(help="folder of pictures, searched whole")],
    out: Annotated[Path, typer.Option(help="Parquet file to write, a row a picture")] = Path("answers.parquet"),
    batch: Annotated[int, typer.Option(min=1, max=4096, help="pictures at once")] = 16,
    shard: Annotated[str | None, typer.Option(help="only every nth picture from the ith on, as 3/16")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="threads of the runtime")] = None,
    precision: Annotated[
        str | None, typer.Option(help="f32, bf16 or f16 where the processor has it (default: the file's)")
    ] = None,
    multi_label: Annotated[bool, typer.Option(help="a picture may have several classes: answers by sigmoid")] = False,
    overwrite: Annotated[bool, typer.Option(help="replace --out if it exists")] = False,
) -> None:
    """Classify or embed every picture of a folder; a run that was cut off goes on where it was."""
    import re
    import sys

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..errors import VitreousError
    from ..files import replaceable, writable
    from ..ship import Runtime
    from ..ship.folder import answer_folder
    from ..ship.runtime import files
    from ..terminal import console

    if replaceable(out).resolve() in [p.resolve() for p in files(file)]:
        raise VitreousError(f"the answers cannot take the place of {out}, which gives them: give another --out")
    part = (1, 1)
    if shard is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", shard)
        part = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= part[0] <= part[1]:
            raise VitreousError(f"--shard {shard}: give which and of how many, from 1/16 to 16/16")
        out = out.with_name(f"{out.stem}-{part[0]:05d}-of-{part[1]:05d}{out.suffix}")
    if not data.is_dir():
        raise VitreousError(f"there is no folder {data}")
    writable(out, overwrite, "another --out")
    runtime = Runtime(file, threads=threads, precision=precision)
    watched = console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=watched, transient=True, disable=not watched.is_terminal) as bar:
        task = bar.add_task(f"{runtime.kind}", total=None)
        made = answer_folder(
            runtime, data, out, batch=batch, shard=part, multi_label=multi_label,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    for name, reason in made.skipped:
        print(f"skipped {name}: {reason}", file=sys.stderr)
    again = f", {made.resumed} of them by an earlier run" if made.resumed else ""
    print(f"{made.path}: {made.pictures - len(made.skipped)} pictures answered, {len(made.skipped)} skipped{again}")
