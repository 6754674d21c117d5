"""Rows of figures as files: CSV, JSON, Parquet."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
from typing import Any

from ..errors import VitreousError

Rows = list[dict[str, Any]]


def as_csv(rows: Rows) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_json(rows: Rows) -> bytes:
    """NaN becomes null, which JSON can hold."""
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    return json.dumps(plain, indent=1).encode()


def as_parquet(rows: Rows) -> bytes:
    arrow, parquet = need_parquet()
    held = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), held)
    return held.getvalue()


def need_parquet() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet. Raises `VitreousError` where they are missing."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise VitreousError("Parquet needs pyarrow: python -m pip install 'vitreous[parquet]'") from None
