"""`vitreous prove MODEL OTHER… --data DATA`: paired measurements of models and shipped files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from .options import MODEL, DataOptions, ModelOptions, grouped

SHIPPED = (".onnx", ".xml")


@grouped
def prove(
    model: MODEL = None,
    others: Annotated[list[str] | None, typer.Argument(help="saved or shipped (.onnx, .xml), to compare with MODEL")] = None,
    *,
    opening: ModelOptions,
    source: DataOptions,
    batches: Annotated[str, typer.Option(help="batch sizes to time, with commas between")] = "1,64",
    seconds: Annotated[float, typer.Option(min=0, max=86400, help="of timing, about")] = 20.0,
    multi_label: Annotated[bool, typer.Option(help="an image may have several classes: answers by sigmoid")] = False,
    json: Annotated[Path | None, typer.Option(help="also write every figure to this file; - prints it alone")] = None,
    report: Annotated[Path | None, typer.Option(help="also write a report, one HTML file")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace files that exist")] = False,
) -> None:
    """Measure models against the first, on the same images and interleaved: accuracy, agreement, speed, size, attention drift."""
    from ..data import open_data
    from ..errors import VitreousError
    from ..files import writable
    from ..prove import prove, write_report
    from ..terminal import console, progress_bar

    try:
        sizes = [int(b) for b in batches.split(",")]
    except ValueError:
        raise VitreousError(f"--batches {batches}: give whole numbers with commas between, as 1,16") from None
    printed = json == Path("-")
    for path, option in ((None if printed else json, "--json"), (report, "--report")):
        if path is not None:
            writable(path, overwrite, f"another {option}")
    if json is not None and report is not None and json.resolve() == report.resolve():
        raise VitreousError(f"--json and --report are both to be written to {json}: give each a file of its own")
    named = [model or "vit_fashion", *(others or ())]
    models: dict[str, Any] = {}
    for i, which in enumerate([model, *(others or ())]):
        models[_title(named, i)] = _opened(which, opening if i == 0 else opening.beside(named[i]))
    first = next(iter(models.values()))
    prepared = _told_by_file(first) if isinstance(named[0], str) and named[0].endswith(SHIPPED) else first
    with progress_bar() as bar:
        task = bar.add_task("", total=1.0)
        say = lambda what, share: bar.update(task, description=what, completed=share)
        told = lambda done, total: say("looking through the data", done / max(total, 1))
        data = open_data(source.data, prepared, limit=source.limit, seed=source.seed, download=source.download, progress=told)
        proof = prove(
            models,
            data,
            batches=sizes,
            seconds=seconds,
            threads=opening.threads,
            seed=source.seed,
            multi_label=multi_label,
            progress=say,
        )
    if json is not None and not printed:
        proof.save(json)
    if report is not None:
        write_report(proof, report, title=f"{', '.join(models)} on {data.name}")
    if printed:
        print(proof.to_json())
        return
    printer = console()
    printer.print(proof, width=max(printer.width, proof.width))
    for line in filter(None, (proof.note, *(m.coverage and f"{m.name}: {m.coverage}" for m in proof.models))):
        printer.print(line)
    for path in filter(None, (None if printed else json, report)):
        printer.print(f"written to {path}")


def _title(named: list[str], i: int) -> str:
    """A file's own name where no other is called so."""
    short = [Path(n).name for n in named]
    return short[i] if short.count(short[i]) == 1 else f"{i + 1}. {named[i]}"


def _opened(which: str | None, opening: ModelOptions) -> Any:
    if which is None or not which.endswith(SHIPPED):
        return opening.open(which)
    from ..ship import Runtime

    return Runtime(which, threads=opening.threads)


def _told_by_file(runtime: Any) -> Any:
    """What a shipped file says about its images, where data look for it on a model."""
    from ..errors import VitreousError

    card = runtime.card
    if "preprocess" not in card:
        raise VitreousError(f"{runtime.path} does not say how its images are prepared: name the model that it came from first")
    classes = card.get("classes")
    kwargs = card.get("model", {}).get("kwargs", {})
    return SimpleNamespace(
        pretrained_cfg={**card["preprocess"], **({"label_names": classes} if classes else {})},
        num_classes=len(classes) if classes else kwargs.get("num_classes"),
    )
