"""Pictures to learn from, and others to check by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import VitreousError
from .folder import split_parts
from .sets import NAMES, Data, balanced_order, listed, open_data

CHECKED = 0.2  # of a folder without parts


def training_data(source: str | Path, model: Any = None, **given: Any) -> tuple[Data, Data]:
    """Pictures of `source` to train `model` on, and others to measure it on; the other arguments are those of `open_data`.

    They are the train and the test part where the source has both, else four fifths and one fifth of it, drawn by the seed with
    every class in both. Raises `VitreousError` as `open_data` does, and for a folder of too few pictures to cut.
    """
    folder = Path(source).expanduser()
    if source in NAMES or (folder.is_dir() and split_parts(folder)[1] is not None):
        return open_data(source, model, part="train", **given), open_data(source, model, **given)
    data = open_data(source, model, **given)
    order = balanced_order(data.labels, given.get("seed", 0))
    kept = round(CHECKED * len(data))
    if not 0 < kept < len(data):
        raise VitreousError(f"{source} has {len(data)} pictures, too few to train on some and check by others")
    return data.part(order[kept:]), data.part(order[:kept])


def class_names(source: str | Path, download: bool = False) -> tuple[str, ...]:
    """The classes of the training pictures of `source`, by label."""
    if source in NAMES:
        return open_data(source, part="train", limit=1, download=download).classes
    return listed(Path(source).expanduser(), "train").classes
