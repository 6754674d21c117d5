"""`vitreous heads`: which heads matter, how far they look, and what patterns they have."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import MODEL, DataOptions, ModelOptions, grouped


@grouped
def heads(
    model: MODEL = None,
    *,
    opening: ModelOptions,
    source: DataOptions,
    multi_label: Annotated[bool, typer.Option(help="an image may have several classes: answers by sigmoid")] = False,
    csv: Annotated[Path | None, typer.Option(help="write one row a head as CSV")] = None,
    json: Annotated[Path | None, typer.Option(help="write one row a head as JSON; - prints it alone")] = None,
    parquet: Annotated[Path | None, typer.Option(help="write one row a head as Parquet; needs pyarrow")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace those files if they exist")] = False,
    precision: Annotated[str, typer.Option(help="of the removals: f32, or bf16, quicker where the processor has it")] = "f32",
) -> None:
    """Show every attention head of a model over 256 images of a data set, or --limit: importance, distance, entropy, pattern."""
    import numpy as np

    from ..errors import VitreousError
    from ..files import writable, write_whole
    from ..files.rows import as_csv, as_json, as_parquet, need_parquet
    from ..see.distance import distance
    from ..see.head_importance import head_importance
    from ..see.patterns import patterns
    from ..terminal import console, progress_bar
    from ..work import Work, working

    printed = json == Path("-")
    files = (("csv", csv), ("json", None if printed else json), ("parquet", parquet))
    targets = {kind: path for kind, path in files if path is not None}
    for kind, target in targets.items():
        writable(target, overwrite, f"another --{kind}")
    if len({target.resolve() for target in targets.values()}) < len(targets):
        raise VitreousError("two of --csv, --json and --parquet name one file: give each its own")
    if parquet is not None:
        need_parquet()
    net = opening.open(model)
    pictures = source.open(net, limit=256, labelled=False)
    found: list[Any] = []
    with progress_bar() as bar:
        ablate = partial(head_importance, precision=precision, multi_label=multi_label)
        for what, analysis in (("importance", ablate), ("distance", distance), ("patterns", patterns)):
            task = bar.add_task(what, total=1.0)
            with working(Work(lambda share, task=task: bar.update(task, completed=share))):
                found.append(analysis(net, pictures, seed=source.seed))
    importance, far, pattern = found

    printer = console(quiet=printed)
    printer.print(f"{type(net).__name__}, {len(pictures)} images of {pictures.name}")
    by = "loss" if "loss" in importance.metrics else "output"
    printer.print(_matrix(f"importance: what removing the head adds to '{by}'", importance.values[importance.metrics.index(by)]))
    printer.print(_matrix("mean attention distance, pixels", far.measures[0]))
    printer.print(_matrix("entropy of attention, nats", far.measures[1]))
    printer.print(_matrix("pattern", pattern.labels))
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in pattern.shares.items())
    printer.print(f"patterns: {shares}")
    taus = importance.agreement[np.triu_indices(len(importance.metrics), 1)]
    if len(taus):
        printer.print(f"agreement of the metrics of importance, Kendall's τ: {np.nanmin(taus):.2f} to {np.nanmax(taus):.2f}")
    if importance.why_not:
        printer.print(f"one pass a head: {importance.why_not}")

    merged = {(r["layer"], r["head"]): r for r in importance.rows()}
    for r in (*far.rows(), *pattern.rows()):
        merged[r["layer"], r["head"]] |= r
    if printed:
        print(as_json(list(merged.values())).decode())
    write = {"csv": as_csv, "json": as_json, "parquet": as_parquet}
    for kind, target in targets.items():
        write_whole(target, write[kind](list(merged.values())))
        printer.print(f"written to {target}")


def _matrix(title: str, values: Any) -> Any:
    """A table of layers by heads: numbers in colours from the least (blue) to the most (red), or words."""
    import numpy as np
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    table.add_column("layer", justify="right")
    for head in range(values.shape[1]):
        table.add_column(f"head {head}", justify="right")
    words = values.dtype == object
    ranks = None if words else np.argsort(np.argsort(values, axis=None)).reshape(values.shape) / max(1, values.size - 1)
    colours = ("blue", "cyan", "green", "yellow", "red")
    for layer, row in enumerate(values):
        cells: list[str | Text] = []
        for head, value in enumerate(row):
            if words:
                cells.append(value)
            elif np.isnan(value):
                cells.append("–")
            else:
                assert ranks is not None
                cells.append(Text(f"{value:.3g}", style=colours[min(4, int(5 * ranks[layer, head]))]))
        table.add_row(str(layer), *cells)
    return table
