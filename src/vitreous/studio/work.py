"""Long work in a process of its own: the page stays quick, stopping is immediate, and a failure takes nothing else down."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ..errors import VitreousError

AT_ONCE = 1  # computations of all people together; others wait their turn
Say = Callable[[str, float], None]

_context = multiprocessing.get_context("spawn")
_turns = asyncio.Semaphore(AT_ONCE)


class Stopped(Exception):
    """Somebody cancelled the work."""


class Work:
    """One call of `function(*arguments, say)`, a function of a module, whose arguments and result can be pickled.

    `what` and `share` tell how far it is; they change while `result` is awaited.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.what, self.share = "waiting for another computation", 0.0
        self._call = function, arguments
        self._turn: asyncio.Future[Any] | None = None
        self._process: Any = None
        self._stopped = False

    async def result(self) -> Any:
        """What the function returns. Raises `VitreousError` when it fails or dies, and `Stopped` after `stop`."""
        self._turn = asyncio.ensure_future(_turns.acquire())
        try:
            await self._turn
        except asyncio.CancelledError:
            if self._stopped:
                raise Stopped from None
            raise
        try:
            self.what = "starting"
            receive, send = _context.Pipe(duplex=False)
            self._process = _context.Process(target=_child, args=(send, *self._call), daemon=True)
            try:
                await asyncio.to_thread(self._process.start)
                send.close()
                return await self._listen(receive)
            finally:
                receive.close()
                if self._process.is_alive():
                    self._process.terminate()
        finally:
            _turns.release()

    async def _listen(self, receive: Connection) -> Any:
        while True:
            if self._stopped:  # it may have been while the process was on its way, and could not be ended yet
                raise Stopped
            try:
                if not await asyncio.to_thread(receive.poll, 0.25):
                    continue
                kind, *rest = receive.recv()
            except (EOFError, OSError):
                if self._stopped:
                    raise Stopped from None
                raise VitreousError("the computation ended without an answer: it may have run out of memory") from None
            if kind == "done":
                return rest[0]
            if kind == "failed":
                raise VitreousError(rest[0])
            self.what, self.share = rest

    def stop(self) -> None:
        self._stopped = True
        if self._turn is not None:
            self._turn.cancel()  # which does nothing when it had come
        if self._process is not None and self._process.is_alive():
            self._process.terminate()


def _child(send: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        result = function(*arguments, lambda what, share: send.send(("progress", what, share)))
    except Exception as error:  # whatever it is, the page shows it and goes on
        send.send(("failed", str(error) if isinstance(error, VitreousError) else f"{type(error).__name__}: {error}"))
    else:
        send.send(("done", result))
