"""What a long computation tells and keeps while it runs, so that people see it move and a stopped one goes on.

`steps.slim` opens a `Work` around each step; the step's `fit` calls `tick`, and wraps parts that take minutes in `part`.
Outside of a `Work` both do nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from .errors import VitreousError
from .files import write_whole


class Work:
    """Progress is told to `say` as a share of 1; parts are kept in `folder`, in files whose names hold `key`."""

    def __init__(self, say: Callable[[float], None] | None = None, folder: Path | None = None, key: str = "") -> None:
        self.say, self.folder, self.key = say, folder, key


_CURRENT: ContextVar[Work | None] = ContextVar("work", default=None)


@contextmanager
def working(work: Work) -> Iterator[None]:
    token = _CURRENT.set(work)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def tick(share: float) -> None:
    """Tell whoever watches that `share` of the step at work is done."""
    work = _CURRENT.get()
    if work is not None and work.say:
        work.say(share)


def part(name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of `make`, or those that an earlier run of the same work kept under `name`.

    The same work is the same step on the same weights with the same calibration images. Raises `VitreousError` when a kept
    file is broken or cannot be written.
    """
    work = _CURRENT.get()
    if work is None or work.folder is None:
        return make()
    path = work.folder / f"{work.key}-{name}.safetensors"
    if path.exists():
        try:
            return load_file(path)
        except Exception as error:  # safetensors has its own kinds
            raise VitreousError(f"cannot go on from {path}: {error}; delete it") from None
    made = {k: v.detach().contiguous() for k, v in make().items()}
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitreousError(f"cannot keep {path}: {error.strerror or error}") from error
    write_whole(path, save(made))
    return made


def fingerprint(*things: object) -> str:
    """A short name for what a computation depends on: tensors by their values, all else by its text."""
    digest = hashlib.sha256()
    for thing in things:
        if isinstance(thing, Tensor):
            digest.update(thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            digest.update(repr(thing).encode())
    return digest.hexdigest()[:16]
