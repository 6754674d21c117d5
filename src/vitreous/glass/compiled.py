"""While somebody looks into a compiled model it runs as it is written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import nn

_LOCK = Lock()
_OPEN: list[nn.Module] = []  # one for each who looks: torch knows one stance for all threads
_STANCE: list[Any] = []  # what puts it back


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Nothing is compiled while this is open, in any thread, when `model` is compiled or holds compiled modules."""
    if not any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in model.modules()):
        yield
        return
    with _LOCK:
        if not _OPEN:
            _STANCE.append(torch.compiler.set_stance("force_eager"))
        _OPEN.append(model)
    try:
        yield
    finally:
        with _LOCK:
            _OPEN.pop()
            if not _OPEN:
                _STANCE.pop().__exit__(None, None, None)
