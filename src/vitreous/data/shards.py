"""WebDataset shards: tar files whose members of one name are a sample, a picture and its class (`000017.jpg`, `000017.cls`).

The library's own readers stream from the start of a shard: they cannot go on in the middle of an epoch, nor give two processes
what one would see. So a shard is read through once for the places of its members, and pictures are then read where they lie;
`in_windows` orders them so that a run goes from shard to shard.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path

import numpy as np

from ..errors import VitreousError
from .folder import Listing, Skipped, numbered

PICTURES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "gif", "tif", "tiff", "jp2", "avif")
WINDOW = 16_384  # pictures that are shuffled among each other: some 2 GB of photographs, or a few shards


@dataclass(frozen=True)
class Member:
    """A picture inside a shard: `size` bytes from `start` on."""

    shard: Path
    name: str
    start: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


def are_shards(source: str | Path) -> bool:
    """Whether `source` names tar files: one, or several by `{0000..0009}` or `*`."""
    return str(source).endswith(".tar")


def read_shards(source: str | Path) -> Listing:
    """The samples of the shards that `source` names, in their order; classes are what `.cls` members say, numbers or names.

    Without any `.cls`, pictures have no labels. Samples without a picture, or without the class that others have, are skipped, as
    is what a shard that is cut off has lost. Raises `VitreousError` for shards that are missing or no tar files.
    """
    shards, members, named, skipped = _expanded(str(source)), [], [], []
    for shard in shards:
        for key, picture, label in _samples(shard, skipped):
            if picture is None:
                skipped.append(Skipped(f"{shard}/{key}", "a sample without a picture"))
            else:
                members.append(picture)
                named.append(label)
    if any(n is not None for n in named):
        skipped += [Skipped(str(m), "no .cls beside it") for m, n in zip(members, named, strict=True) if n is None]
        members = [m for m, n in zip(members, named, strict=True) if n is not None]
        classes, labels = numbered([n for n in named if n is not None])
    else:
        classes, labels = (), None
    if not members:
        raise VitreousError(f"{source} holds no pictures" + (f": {skipped[0].path} ({skipped[0].reason})" if skipped else ""))
    return Listing(Path(source), classes, members, labels, skipped)


def _expanded(source: str) -> list[Path]:
    try:
        from braceexpand import braceexpand  # which WebDataset brings
    except ImportError:
        raise VitreousError("shards need WebDataset: python -m pip install 'vitreous[shards]'") from None
    patterns = list(braceexpand(str(Path(source).expanduser())))
    found = [Path(p) for pattern in patterns for p in (sorted(glob(pattern)) if "*" in pattern or "?" in pattern else [pattern])]
    if absent := [p for p in found if not p.is_file()]:
        raise VitreousError(f"there is no shard {absent[0]}: {len(absent)} of the {len(found)} that {source} names are missing")
    if not found:
        raise VitreousError(f"no file is called {source}")
    return found


def _samples(shard: Path, skipped: list[Skipped]) -> Iterator[tuple[str, Member | None, str | None]]:
    """Name, picture and class of each sample: members that follow each other and are called alike up to the first dot."""
    from webdataset.tariterators import base_plus_ext

    key, picture, label = "", None, None
    end = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for info in tar:
                base, ending = base_plus_ext(info.name)
                if not info.isfile() or base is None or ending is None or Path(base).name.startswith("."):
                    continue
                if base != key:
                    if key:
                        yield key, picture, label
                    key, picture, label = base, None, None
                kind = ending.lower().rsplit(".", 1)[-1]
                if kind == "cls" and info.size < 4096 and (file := tar.extractfile(info)) is not None:
                    label = file.read().decode("utf-8", "replace").strip() or None
                elif kind in PICTURES and picture is None:
                    picture = Member(shard, info.name, info.offset_data, info.size)
                if info.offset_data + info.size > end:
                    raise tarfile.ReadError("unexpected end of data")
    except tarfile.ReadError as error:
        if not key:
            raise VitreousError(f"cannot read the shard {shard}: it is no tar file, or a compressed one ({error})") from error
        skipped.append(Skipped(f"{shard}/{key}", f"the shard is cut off here: {error}"))
        return
    except OSError as error:
        raise VitreousError(f"cannot read the shard {shard}: {error.strerror or error}") from error
    if key:
        yield key, picture, label


def in_windows(shards: np.ndarray, draw: np.random.Generator, window: int = WINDOW) -> np.ndarray:
    """An order of the pictures that lie in `shards [N]`: shard after shard as drawn, shuffled among `window` neighbours."""
    order = draw.permutation(len(shards))
    turn = draw.permutation(int(shards.max()) + 1)
    order = order[np.argsort(turn[shards[order]], kind="stable")]
    return np.concatenate([draw.permutation(order[i : i + window]) for i in range(0, len(order), window)])
