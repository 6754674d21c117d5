"""Tables of pictures: CSV, TSV or Parquet files that name a picture file, and its class or classes, in each row."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import VitreousError
from ..files.rows import need_parquet
from .folder import Listing, numbered

SUFFIXES = (".csv", ".tsv", ".parquet")
PATHS = ("path", "file_name", "filename", "file", "image_path", "filepath", "image", "img")
LABELS = ("label", "class", "class_name", "target", "category", "labels", "y")
SPLITS = ("split", "part", "set", "subset")
PARTS = {"test": ("test", "val", "valid", "validation"), "train": ("train", "training")}


def read_table(file: Path, part: str) -> Listing:
    """The rows of `file` that belong to `part` ("test" or "train"; all where no column tells of parts).

    Columns are found by their names: one of `PATHS`, relative to the file; one of `LABELS`, names or numbers of classes; or,
    where no column is called so, one column of 0 and 1 for each class that an image may have. Without either, pictures have no
    labels. Raises `VitreousError` for a file that is no such table, and for rows without a path or a label.
    """
    rows = _rows(file)
    columns = {str(c).strip().lower(): c for c in (rows[0] if rows else ())}
    called = lambda names: next((columns[n] for n in names if n in columns), None)
    path, label, split = called(PATHS), called(LABELS), called(SPLITS)
    if path is None:
        raise VitreousError(f"{file} has no column of picture files: call it one of {', '.join(PATHS)}")
    if split is not None:
        there = {str(r[split]).strip().lower() for r in rows}
        kinds = (
            PARTS["train"]
            if part == "train" and there & set(PARTS["train"])
            else next(((name,) for name in PARTS["test"] if name in there), ())
        )
        rows = [r for r in rows if not kinds or str(r[split]).strip().lower() in kinds]
    paths = [file.parent / str(r[path]).strip() for r in rows]
    for i, r in enumerate(rows):
        if any(c is not None and str("" if r[c] is None else r[c]).strip() == "" for c in (path, label)):
            raise VitreousError(f"row {i + 1} of {file} names no picture or no label: fill it in, or leave the row out")
    if label is not None:
        classes, labels = numbered([_name(r[label]) for r in rows])
        return Listing(file, classes, paths, labels, [])
    marks = [c for c in columns.values() if c not in (path, split) and all(_mark(r[c]) for r in rows)]
    if len(marks) > 1:
        values = np.array([[int(float(r[c])) for c in marks] for r in rows], np.int64)
        return Listing(file, tuple(map(str, marks)), paths, values, [])
    return Listing(file, (), paths, None, [])


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        if file.suffix == ".parquet":
            need_parquet()
            import pyarrow.parquet as pq

            return pq.read_table(file).to_pylist()
        text = file.read_text(encoding="utf-8-sig")
        found = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        rows = list(found)
    except VitreousError:
        raise
    except Exception as error:  # pyarrow has its own kinds
        raise VitreousError(f"cannot read the table {file}: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    if not rows:
        raise VitreousError(f"{file} has no rows: name a picture in each, below a line of column names")
    for i, r in enumerate(rows):
        if None in r or None in r.values():
            raise VitreousError(f"row {i + 1} of {file} has {'more' if None in r else 'fewer'} cells than there are columns")
    return rows


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _mark(value: Any) -> bool:
    return str(value).strip() in ("0", "1", "0.0", "1.0")
