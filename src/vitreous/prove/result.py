"""What results of measurements share: they print as a table and are saved as JSON."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.table import Table

from .. import terminal
from ..files import write_whole


class Result:
    """A dataclass of figures with a `__rich__` table, `width` characters wide where it is printed as text."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def width(self) -> int:
        return 110

    def __rich__(self) -> Table:
        raise NotImplementedError

    def __str__(self) -> str:
        console = terminal.console(file=io.StringIO(), width=self.width, color_system=None)
        with console.capture() as shown:
            console.print(self)
        return "\n".join(line.rstrip() for line in shown.get().splitlines())

    def to_dict(self) -> dict[str, Any]:
        """Every figure, as JSON holds it: NaN and infinities become None."""
        return plain(asdict(self))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON. Raises `VitreousError` when `path` cannot be written, and leaves it as it was."""
        write_whole(path, self.to_json() + "\n")


def plain(value: Any) -> Any:
    """`value` of containers and numbers as JSON holds it."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
