"""`vitreous ship`: write a model as a file that other programs run, checked against the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import MODEL, DataOptions, ModelOptions, grouped


@grouped
def ship(
    model: MODEL = None,
    *,
    opening: ModelOptions,
    source: DataOptions,
    out: Annotated[Path | None, typer.Option(help="file to write: .onnx, .xml (OpenVINO) or .pt2 (torch.export)")] = None,
    repository: Annotated[
        Path | None, typer.Option(help="write a repository for Triton and OpenVINO Model Server instead")
    ] = None,
    name: Annotated[str | None, typer.Option(help="of the model in the repository (default: MODEL)")] = None,
    format: Annotated[str, typer.Option(help="of the file in the repository: onnx or xml")] = "onnx",
    batch: Annotated[int | None, typer.Option(min=1, max=2**16, help="the only batch size it is to take (default: any)")] = None,
    with_preprocessing: Annotated[
        bool, typer.Option(help="take uint8 pictures of any size, and prepare them in the file")
    ] = False,
    tolerance: Annotated[float | None, typer.Option(min=0, help="largest mean relative error of its outputs")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace what exists")] = False,
) -> None:
    """Ship a model, slimmed or not, as one file; checked with images of --data where it is given, with noise otherwise."""
    from ..errors import VitreousError
    from ..files import writable, write_whole
    from ..ship import ship as written
    from ..ship.card import beside
    from ..ship.named import plain
    from ..ship.repository import ship_repository
    from ..ship.shipment import FORMATS

    if (out is None) == (repository is None):
        raise VitreousError("give --out FILE or --repository DIR")
    if format not in ("onnx", "xml"):
        raise VitreousError(f"--format {format}: a repository holds onnx or xml")
    if out is not None and out.suffix not in FORMATS:
        raise VitreousError(f"cannot tell a format from {out.name!r}: give --out an ending of {', '.join(FORMATS)}")
    net = opening.open(model)
    images = None
    if source.data != "sample" or model is None:
        data = source.open(net)
        images = data.tensor(range(min(16, len(data))))
    if repository is not None:
        called = name or Path(model or "vit_fashion").stem
        print(
            ship_repository(
                net, repository, called, ending=f".{format}", example=images, batch=batch, tolerance=tolerance,
                with_preprocessing=with_preprocessing, overwrite=overwrite,
            )
        )  # fmt: skip
        return
    assert out is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    told = {out.with_name(file): text for file, text in beside(plain(net)).items()}
    for file, text in told.items():
        if not file.exists() or file.read_text() != text:
            writable(file, overwrite, "another folder in --out")
    made = written(
        net, out, example=images, batch=batch, tolerance=tolerance, with_preprocessing=with_preprocessing, overwrite=overwrite
    )
    for file, text in told.items():
        write_whole(file, text)
    print(made)
