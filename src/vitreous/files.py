"""Files that are never half written."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .errors import VitreousError


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write aside, then rename: a reader never sees half a file. Raises `VitreousError` when that cannot be done."""
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(aside, path)
    except OSError as error:
        raise VitreousError(f"cannot write {path}: {error.strerror or error}; choose a folder with room to write in") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
