"""Folders of class folders: which files they hold, and which of these are pictures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import VitreousError
from .pictures import Unreadable, read_picture


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Listing:
    """The files below one folder, or in shards, in order, none of them opened yet; `labels [N]` index `classes`, `[N, K]` mark
    those of several, None where nothing tells them."""

    folder: Path
    classes: tuple[str, ...]
    paths: Sequence[Any]  # of files, or places in shards
    labels: np.ndarray | None
    skipped: list[Skipped]


def numbered(named: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The classes of these labels, numbers by their size and names by the alphabet, and which of them each is."""
    classes = tuple(sorted(set(named), key=lambda n: (not n.isdigit(), int(n) if n.isdigit() else 0, n)))
    place = {name: i for i, name in enumerate(classes)}
    return classes, np.array([place[n] for n in named], np.int64)


def subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise VitreousError(f"cannot read the folder {folder}: {error.strerror}") from error


def split_parts(root: Path) -> tuple[Path, Path | None]:
    """The folder to evaluate on and the folder to calibrate on: `test` or `val`, and `train`; or `root` and None.

    Of `test` and `val` the first with class folders is taken, as many a published `test` comes without labels.
    """
    names = {p.name for p in subfolders(root)}
    there = [root / name for name in ("test", "val") if name in names]
    if there and ("train" in names or names <= {"test", "val"}):
        labelled = [p for p in there if subfolders(p)]
        return (labelled or there)[0], root / "train" if "train" in names else None
    if names == {"train"}:
        raise VitreousError(
            f"{root} has a train part but no test or val part: add one, or name {root / 'train'} to measure on training data"
        )
    return root, None


def list_files(root: Path, part: str, need_classes: bool) -> Listing:
    """Every file of `root`'s `test` or `train` part (or of `root` where it has no parts), with its class.

    Class folders may hold folders of any depth. Names that start with a dot are passed over, and links that lead back
    to a folder already read are skipped. With `need_classes` false, a folder without class folders is one class.
    """
    test, train = split_parts(root)
    folder = train if part == "train" and train else test
    homes = subfolders(folder)
    if not homes:
        if need_classes:
            raise VitreousError(
                f"{folder} holds no class folders: give each class a folder of its own, named after the class, with its images"
            )
        homes = [folder]
    # Both parts together name the classes, so that a label means the same in each.
    classes = {p.name for p in homes} | {p.name for other in (test, train) if other for p in subfolders(other)}
    index = {name: i for i, name in enumerate(sorted(classes))}

    seen = {_identity(p) for p in (root, folder, *homes)}
    paths: list[Path] = []
    labels: list[int] = []
    skipped: list[Skipped] = []
    empty: list[str] = []
    for home in homes:
        inside = sorted(_walk(home, seen, skipped))
        if not inside:
            empty.append(home.name)
        paths += inside
        labels += [index[home.name]] * len(inside)
    if not paths:
        raise VitreousError(f"{folder} holds no images{_first_reasons(skipped)}")
    if need_classes and empty:
        raise VitreousError(
            f"empty class folder{'s' if len(empty) > 1 else ''} in {folder}: {', '.join(empty[:5])}"
            f"{' …' if len(empty) > 5 else ''}: put images in, or remove the folder if the model has no such class"
        )
    if need_classes and len(homes) < 2:
        raise VitreousError(
            f"{folder} has only the class '{homes[0].name}': accuracy over one class says nothing; add a second class folder"
        )
    return Listing(folder, tuple(index), paths, np.array(labels, np.int64), skipped)


def _identity(path: Path) -> tuple[int, int]:
    info = path.stat()
    return info.st_dev, info.st_ino


def _walk(home: Path, seen: set[tuple[int, int]], skipped: list[Skipped]) -> list[Path]:
    """All files below `home`; folders already in `seen` and unreadable ones go to `skipped`."""

    def refuse(error: OSError) -> None:
        skipped.append(Skipped(str(error.filename), f"cannot be read: {error.strerror}"))

    found: list[Path] = []
    for here, folders, files in os.walk(home, followlinks=True, onerror=refuse):
        keep = []
        for name in sorted(folders):
            path = Path(here, name)
            if name.startswith("."):
                continue
            if (identity := _identity(path)) in seen:
                skipped.append(Skipped(str(path), "a link to a folder that is already read"))
                continue
            seen.add(identity)
            keep.append(name)
        folders[:] = keep
        found += [Path(here, name) for name in files if not name.startswith(".")]
    return found


def readable(
    listing: Listing,
    order: Sequence[int],
    wanted: int | None,
    progress: Callable[[int, int], None] | None = None,
    read: Callable[[Path], object] | None = None,
) -> tuple[list[int], list[Skipped]]:
    """The first `wanted` indices of `order` (all when None) whose files decode to the end (by `read`, or as pictures),
    and what was passed over.

    Raises `VitreousError` when there is none.
    """

    def probe(i: int) -> str:
        try:
            if read is None:
                read_picture(listing.paths[i], probe=True)
            else:
                read(listing.paths[i])
        except Unreadable as reason:
            return str(reason)
        return ""

    good: list[int] = []
    bad: list[Skipped] = []
    step = 256
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # read_picture has a lower limit of its own
        for start in range(0, len(order), step):
            chunk = order[start : start + step]
            for i, reason in zip(chunk, pool.map(probe, chunk), strict=True):
                if wanted is None or len(good) < wanted:
                    if reason:
                        bad.append(Skipped(str(listing.paths[i]), reason))
                    else:
                        good.append(i)
            if progress:
                progress(start + len(chunk), len(order))
            if wanted is not None and len(good) >= wanted:
                break
    bad = listing.skipped + sorted(bad, key=lambda s: s.path)
    if not good:
        raise VitreousError(f"{listing.folder} holds no readable image{_first_reasons(bad)}")
    return good, bad


def _first_reasons(skipped: list[Skipped]) -> str:
    if not skipped:
        return ""
    more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return ": " + "; ".join(f"{s.path} ({s.reason})" for s in skipped[:3]) + more
