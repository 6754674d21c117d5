"""The folder that a command writes: whole or not at all, by one run at a time, never of two runs.

`folder` is for every command that has `--out` for a folder:

    with folder(out, overwrite) as (aside, target):
        ...  # write into aside; when the body is through, it becomes target, with a manifest
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import VitreousError
from .writing import MANIFEST, folder_aside, manifest, replaceable, write_manifest


class Busy(VitreousError):
    """Another run holds the lock."""


@contextmanager
def locked(path: Path, option: str = "--out") -> Iterator[None]:
    """One process and thread at a time. Raises `VitreousError` at once when another is there; `option` says what to change."""
    lock = FileLock(path.with_name(f".{path.name[:50]}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Busy(f"another run is at work in {path}: wait until it is done, or give another {option}") from None
    except OSError as error:
        raise VitreousError(f"cannot write in {path.parent}: {error.strerror or error}; give another {option}") from error
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock.lock_file)  # while it is held: whoever waits sees that, and makes a new one
        lock.release()


@contextmanager
def folder(out: Path | None, overwrite: bool, default: str = "vitreous-out") -> Iterator[tuple[Path, Path]]:
    """A folder to write in, and what it will be called: it appears under that name, with a manifest, when all is written.

    `out` None is `default`, or with a number behind it where that is taken. With `overwrite` the files of the run before are
    replaced all at once, and whatever else lies there stays. Raises `VitreousError` before the work where `out` cannot be
    written, is not empty (without `overwrite`), or another run is at work in it.
    """
    with ExitStack() as held:
        target = _claim(out, overwrite, default, held)
        place = target / target.name if _stays(target) else target
        try:
            aside = held.enter_context(folder_aside(place))
        except OSError as error:
            raise VitreousError(f"cannot write in {place.parent}: {error.strerror}; give another --out") from error
        yield aside, out or target
        try:
            write_manifest(aside, (p.relative_to(aside).as_posix() for p in aside.rglob("*") if p.is_file()))
            aside.chmod(target.stat().st_mode & 0o7777 if target.exists() else 0o777 & ~_umask())
            _appear(aside, target)
        except OSError as error:
            raise VitreousError(f"cannot write {target}: {error.strerror or error}; nothing was kept") from error


def _claim(out: Path | None, overwrite: bool, default: str, held: ExitStack) -> Path:
    """The folder to write, with its lock held."""
    if out is None:
        names = (Path(default if i == 1 else f"{default}-{i}") for i in range(1, 10_000))
        for target in names:
            if not os.path.lexists(target):
                with suppress(Busy):
                    held.enter_context(locked(target))
                    return target
        raise VitreousError("give --out: all names by default are taken")
    try:
        if out.is_symlink() and not out.exists():
            raise VitreousError(f"{out} is a link to nothing: give another --out, or remove it")
        target = out.resolve()
        if target.exists() and not target.is_dir():
            kind = "a file" if target.is_file() else "no folder"
            raise VitreousError(f"{out} is {kind}: give another --out")
        target.parent.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(target / target.name if _stays(target) else target))
        inside = sorted(p for p in target.iterdir() if not p.name.endswith((".lock", ".part"))) if target.exists() else []
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VitreousError(f"cannot write in {str(out.parent)!r}: {reason}; give another --out") from error
    if inside and not overwrite:
        raise VitreousError(f"{out} is not empty: give another --out, or --overwrite to replace what is in it")
    for p in inside:
        if not p.is_dir():
            replaceable(p)
    return target


def _stays(target: Path) -> bool:
    """Whether the folder itself cannot be put in place by renaming, so that its files are moved into it one by one."""
    inside = target.is_dir() and Path.cwd().is_relative_to(target)
    return target.is_dir() and (inside or os.path.ismount(target) or not os.access(target.parent, os.W_OK))


def _appear(aside: Path, target: Path) -> None:
    old = manifest(target)
    made = {p.name for p in aside.iterdir()}
    for name in made:
        if (target / name).exists():
            replaceable(target / name)
    if _stays(target):
        # Never of two runs: the old files go before the first new one comes, and the manifest comes last.
        for name in (old.keys() | made) - {MANIFEST} | {MANIFEST}:
            (target / name).unlink(missing_ok=True)
        for name in sorted(made, key=lambda name: name == MANIFEST):
            os.replace(aside / name, target / name)
        return
    gone = made | {name.split("/")[0] for name in old}
    kept = [p for p in target.iterdir() if p.name not in gone and p != aside] if target.exists() else []
    for p in kept:  # linked, so that they are in both folders until one goes
        _link(p, aside / p.name)
    if kept or old or (target.exists() and any(target.iterdir())):
        _exchange(aside, target)
    else:
        aside.rename(target)  # refused by the system if another's results have come there since


def _link(source: Path, to: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        to.mkdir()
        for p in source.iterdir():
            _link(p, to / p.name)
        shutil.copystat(source, to)
        return
    try:
        os.link(source, to, follow_symlinks=False)
    except OSError:  # a file system without links
        shutil.copy2(source, to, follow_symlinks=False)


def _exchange(aside: Path, target: Path) -> None:
    """Let two folders change names, at one stroke where the system can."""
    with suppress(AttributeError, OSError):
        here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        if ctypes.CDLL(None).renameat2(here, os.fsencode(aside), here, os.fsencode(target), both) == 0:
            return
    with folder_aside(target) as old:
        target.rename(old / target.name)
        try:
            aside.rename(target)
        except BaseException:
            (old / target.name).rename(target)
            raise


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
