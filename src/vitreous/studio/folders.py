"""Folders that last as long as this process: what one that was killed left behind goes when the next one starts."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "vitreous-studio-"
LOCK = "lock"  # held while the process lives; the system lets go of it however the process ends


_held: list[FileLock] = []


@cache
def own() -> Path:
    """This process's folder."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        _held.append(FileLock(folder / LOCK))
        _held[-1].acquire()
        if folder.exists():  # else another process took it for a dead one's before it was locked
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            return folder


def remove_left() -> None:
    """Remove the folders of processes that are no more."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK}"):
        try:
            if lock.is_symlink():
                continue
            with FileLock(lock, timeout=0):
                shutil.rmtree(lock.parent, ignore_errors=True)
        except (Timeout, OSError):  # alive, or another person's
            continue
