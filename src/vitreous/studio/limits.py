"""What a request must be, refused before a byte of its body is read: from this page, and of bounded size."""

from __future__ import annotations

from urllib.parse import urlsplit

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


class SameOrigin:
    """ASGI middleware: requests and websockets that another site's page makes get status 403; its links still lead here.

    Browsers name the page that asks (`Origin`) with every websocket and cross-site call; with the rest they say how near it is
    (`Sec-Fetch-Site`).
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            told = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            strange = "origin" in told and urlsplit(told["origin"]).netloc != told.get("host")
            included = told.get("sec-fetch-site") in ("cross-site", "same-site") and told.get("sec-fetch-mode") != "navigate"
            if strange or included:
                if scope["type"] == "websocket":
                    await receive()
                    await send({"type": "websocket.close", "code": 1008})  # before it is accepted: the handshake gets 403
                else:
                    await PlainTextResponse("only the studio's own page may ask", 403)(scope, receive, send)
                return
        await self.app(scope, receive, send)
