"""A queue before what serves one caller at a time: whoever waits in it holds no thread, so nobody else is kept waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

T = TypeVar("T")


class Lane:
    """Runs functions one at a time, in the order in which they came, in a thread of its own.

    A call whose awaiting task is cancelled before its turn is never made.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """What `function(*arguments)` returns, or what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *arguments))
