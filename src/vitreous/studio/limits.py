"""A bound on what a request may carry, refused before a byte of it is read."""

from __future__ import annotations

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: a request that announces more than `limit` bytes, or does not say how many, gets status 413."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in ("POST", "PUT", "PATCH"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            if not length.isdigit() or int(length) > self.limit:
                await PlainTextResponse(f"at most {self.limit >> 20} MB", 413)(scope, receive, send)
                return
        await self.app(scope, receive, send)
