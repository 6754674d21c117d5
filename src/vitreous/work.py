"""What a long computation tells and keeps while it runs, so that people see it move and a stopped one goes on.

`steps.slim` opens a `Work` around each step; the step's `fit` calls `tick`, and wraps parts that take minutes in `part`.
Outside of a `Work` both do nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .errors import VitreousError
from .files import write_whole

KEY = "vitreous"  # in a kept file's metadata: the fingerprint of its tensors
PLAIN = (bool, int, float, str, bytes, tuple, list, type(None), torch.dtype)


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

    The same work has the same fingerprint: step, model with its history, calibration images, version. Raises `VitreousError`
    when a kept file is broken, was changed, or cannot be written.
    """
    work = _CURRENT.get()
    if work is None or work.folder is None:
        return make()
    path = work.folder / f"{work.key}-{name}.safetensors"
    if path.exists():
        try:
            with safe_open(path, "pt") as file:
                kept = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
                told = (file.metadata() or {}).get(KEY)
        except Exception as error:  # safetensors has its own kinds
            raise VitreousError(f"cannot go on from {path}: {error}; delete it") from None
        if told != fingerprint(kept):
            raise VitreousError(f"cannot go on from {path}: it was changed since it was written; delete it")
        return kept
    made = {k: v.detach().contiguous() for k, v in make().items()}
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitreousError(f"cannot keep {path}: {error.strerror or error}") from error
    write_whole(path, save(made, {KEY: fingerprint(made)}))
    return made


def fingerprint(*things: object) -> str:
    """A short name for what a computation depends on.

    Tensors count by shape, precision and values; modules by the names, classes and plain attributes of all their parts and by
    their tensors, with names; mappings and sequences by what they hold; all else by its text.
    """
    digest = hashlib.sha256()
    _feed(digest, things)
    return digest.hexdigest()[:32]


def _feed(digest: Any, thing: object) -> None:
    digest.update(f"{type(thing).__qualname__}(".encode())
    if isinstance(thing, Tensor):
        digest.update(f"{tuple(thing.shape)} {thing.dtype} ".encode())
        digest.update(thing.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(thing, nn.Module):
        for name, m in thing.named_modules():
            kind = f"{type(m).__module__}.{type(m).__qualname__}"
            _feed(digest, (name, kind, {k: v for k, v in vars(m).items() if isinstance(v, PLAIN) or callable(v)}))
        _feed(digest, {**dict(thing.named_parameters()), **dict(thing.named_buffers()), **thing.state_dict()})
    elif isinstance(thing, Mapping):
        for key in sorted(thing, key=str):
            _feed(digest, (str(key), thing[key]))
    elif isinstance(thing, (list, tuple)) and type(thing).__repr__ in (list.__repr__, tuple.__repr__):
        for one in thing:
            _feed(digest, one)
    else:
        digest.update(re.sub(r" at 0x[0-9a-f]+", "", repr(thing)).encode())  # where a function lies decides nothing
    digest.update(b"),")
