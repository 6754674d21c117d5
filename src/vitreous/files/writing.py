"""Files that are never half written, never mixed, and never put in the place of what is no file.

What is written goes aside first, under a name that tells the process at work, and takes its place by one rename. What dead
processes left aside is removed by the next who writes there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import VitreousError

MANIFEST = "manifest.json"
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket", stat.S_IFIFO: "a pipe", stat.S_IFLNK: "a link"}


def write_whole(path: str | Path, content: bytes | str) -> None:
    """Write aside, then rename: a reader never sees half a file, nor two writers' halves.

    A link is followed. Raises `VitreousError` when that cannot be done, and for a place that holds anything but a file.
    """
    target = replaceable(path)
    try:
        sweep(target)
        aside = _aside(target)
        try:
            aside.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
            os.replace(aside, target)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
        forget(target)
    except OSError as error:
        raise VitreousError(f"cannot write {path}: {error.strerror or error}; choose a folder with room to write in") from error


def replaceable(path: str | Path) -> Path:
    """`path`, links followed. Raises `VitreousError` where something stands that is no regular file, or nothing could stand."""
    target = Path(path)
    try:
        if target.is_symlink():
            if not target.exists():
                raise VitreousError(f"{path} is a link to nothing: give another name, or remove it")
            target = target.resolve()
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return target
    except (OSError, ValueError) as error:  # a name with a NUL byte is a ValueError
        raise VitreousError(f"cannot write {str(path)!r}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode):
        kind = KINDS.get(stat.S_IFMT(mode), "a device")
        raise VitreousError(f"{path} is {kind}, and only a file is ever replaced: give another name")
    return target


def writable(path: str | Path, overwrite: bool = False, option: str = "another name") -> Path:
    """`path`, tried out before the work whose result will be written there by `write_whole`.

    Raises `VitreousError` when it exists (without `overwrite`), is no file, or its folder is missing or cannot be written in;
    `option` is what the message tells to give instead, as in "another --out".
    """
    target = replaceable(path)
    if target.exists() and not overwrite:
        raise VitreousError(f"{path} exists: give {option}, or --overwrite")
    if not target.parent.is_dir():
        raise VitreousError(f"cannot write {path}: there is no folder {target.parent}; give {option}")
    aside = _aside(target)
    try:
        aside.touch()
        aside.unlink()
        if len(os.fsencode(target.name)) > os.pathconf(target.parent, "PC_NAME_MAX"):
            raise VitreousError(f"cannot write {path}: its name is too long; give {option}")
    except OSError as error:
        raise VitreousError(f"cannot write {path}: {error.strerror or error}; give {option}") from error
    return Path(path)


@contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write in, gone at the end whatever happens; `OSError` where there can be none."""
    sweep(path)
    aside = _aside(path)
    aside.mkdir()
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# ---- names aside, and what is left of dead processes


def _here() -> str:
    """The machine, or the container, whose process numbers can be asked about."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{zlib.crc32(f'{socket.gethostname()} {space}'.encode()):08x}"


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name[:50]}.{_here()}-{os.getpid()}-{secrets.token_hex(6)}.part")


def sweep(path: Path) -> None:
    """Remove what dead processes left aside of `path`."""
    pattern = re.compile(rf"\.{re.escape(path.name[:50])}\.{_here()}-(\d+)-[0-9a-f]+\.part")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            found = pattern.fullmatch(entry.name)
            if found is None or _alive(int(found[1])):
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                with suppress(OSError):
                    os.unlink(entry.path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


# ---- manifests: which files belong together


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Say in `folder` which files were written together, by their SHA-256."""
    files = {name: digest(folder / name) for name in sorted(names)}
    write_whole(folder / MANIFEST, json.dumps({"vitreous": 1, "files": files}, indent=1) + "\n")


def manifest(folder: Path) -> dict[str, str]:
    """The hashes of the files that were written together into `folder`; empty where no manifest of ours lies."""
    try:
        said = json.loads((folder / MANIFEST).read_bytes())
        files = said["files"] if said["vitreous"] == 1 else {}
        return {str(k): str(v) for k, v in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}


def check(path: Path) -> None:
    """Raise `VitreousError` when `path` is not the file that its folder's manifest tells of."""
    said = manifest(path.parent).get(path.name)
    if said is not None and path.is_file() and digest(path) != said:
        raise VitreousError(
            f"{path} is not the file that was written with the others in {path.parent} (see {MANIFEST} there): it was changed "
            f"or damaged, or comes from another run. Make the folder anew, or remove {MANIFEST} if you know why"
        )


def forget(path: Path) -> None:
    """`path` was written anew on purpose: its folder's manifest says nothing of it any more."""
    if path.name != MANIFEST and path.name in (said := manifest(path.parent)):
        del said[path.name]
        write_whole(path.with_name(MANIFEST), json.dumps({"vitreous": 1, "files": said}, indent=1) + "\n")


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
