"""Archives that would unpack far beyond their size are refused by their headers, before anything is unpacked."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

from ..errors import VitreousError

TIMES = 20  # how many times its own size an archive may unpack to; pictures and weights hardly shrink
SPARE = 2**26  # bytes that are no matter


def refuse_bomb(path: Path) -> None:
    """Raise `VitreousError` for a zip file (a `torch.save` file is one) whose parts say they are far larger than it, or that says
    nothing which can be read: torch's reader is less strict than this one, and would unpack it."""
    try:
        with zipfile.ZipFile(path) as archive:
            told = sum(part.file_size for part in archive.infolist())
    except (ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":  # no archive: its reader says what it is
                return
        raise VitreousError(f"{path} is not a whole checkpoint: {error}") from error
    if told > TIMES * path.stat().st_size + SPARE:
        raise VitreousError(f"{path} would unpack from {_mb(path.stat().st_size)} to {_mb(told)}: it is not opened")


def gunzip(path: Path, most: int) -> bytes:
    """The whole content of a gzip file of at most `most` bytes. Raises `VitreousError` when it is longer; errors of `gzip`."""
    with gzip.open(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise VitreousError(f"{path} unpacks to more than the {_mb(most)} that it should hold: it is not opened")
    return content


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
