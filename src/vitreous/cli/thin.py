"""`vitreous thin MODEL --data DATA --keep 0.5`: which training pictures to keep, by the density of concepts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from .options import MODEL, DataOptions, ModelOptions, finite, grouped

if TYPE_CHECKING:
    from ..data import Data


@grouped
def thin(
    model: MODEL = None,
    *,
    opening: ModelOptions,
    source: DataOptions,
    keep: Annotated[float, typer.Option(help="share of the training pictures", callback=finite)] = 0.5,
    clusters: Annotated[int, typer.Option(min=1, help="concepts that the pictures are grouped into")] = 100,
    temperature: Annotated[float, typer.Option(help="the smaller, the more goes to complex concepts", callback=finite)] = 0.1,
    order: Annotated[str, typer.Option(help="of a concept keep the hard, easy or random pictures")] = "hard",
    alike: Annotated[float | None, typer.Option(help="leave out pictures this alike first, as 0.98", callback=finite)] = None,
    out: Annotated[Path, typer.Option(help="table to write, for --data of other commands")] = Path("kept.csv"),
    overwrite: Annotated[bool, typer.Option(help="replace --out if it exists")] = False,
) -> None:
    """Keep part of the training pictures: few of simple concepts, more of complex ones, as MODEL's features tell.

    OUT is a table of what is kept, and of the test part where DATA has one.
    """
    from ..data import by_concepts
    from ..data.concepts import Order
    from ..data.folder import split_parts
    from ..errors import VitreousError
    from ..files import writable, write_whole
    from ..files.rows import as_csv
    from ..learn.measure import features

    if order not in ("hard", "easy", "random"):
        raise VitreousError(f"--order must be hard, easy or random, not {order!r}")
    writable(out, overwrite, "another --out")
    net = opening.open(model)
    learn_from = _opened(source, net, "train")
    found = by_concepts(
        features(net, learn_from),
        keep,
        clusters=clusters,
        temperature=temperature,
        order=cast(Order, order),
        alike=alike,
        seed=source.seed,
    )
    rows = _rows(source, learn_from, "train", found.indices.tolist())
    folder = Path(source.data).expanduser()
    if folder.is_dir() and split_parts(folder)[1] is not None:
        test = _opened(source, net, "test")
        rows += _rows(source, test, "test", range(len(test)))
    else:
        rows = [{k: v for k, v in row.items() if k != "split"} for row in rows]
    write_whole(out, as_csv(rows))
    print(f"{len(found.indices)} of {len(learn_from)} training pictures kept, {found.duplicates} left out as alike; in {out}")
    print(f"of {len(found.counts)} concepts the most complex gets {found.spread:.2f} times an equal part (--temperature)")


def _opened(source: DataOptions, net: Any, part: Literal["train", "test"]) -> Data:
    from ..data import open_data
    from ..errors import VitreousError

    data = open_data(source.data, net, part=part, limit=source.limit, seed=source.seed, download=source.download, labelled=False)
    if data.files is None:
        raise VitreousError(f"{source.data} is no folder or table of pictures, whose files could be named: give --data one")
    return data


def _rows(source: DataOptions, data: Data, part: str, indices: Iterable[int]) -> list[dict[str, Any]]:
    """Pictures by their files, with the names of their classes as the source has them, which need not be the model's."""
    from ..data.sets import listed

    listing = listed(Path(source.data).expanduser(), part, need_classes=False)
    named = listing.labels is not None and listing.labels.ndim == 1
    label = dict(zip(listing.paths, listing.labels, strict=True)) if named and listing.labels is not None else {}
    files = data.files or []
    row = lambda path: {"label": listing.classes[label[path]]} if label else {}
    return [{"path": str(files[i].resolve()), "split": part, **row(files[i])} for i in indices]
