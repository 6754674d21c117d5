"""What requests are let in."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vitreous.studio.limits import BodyLimit, SameOrigin

HERE = {"host": "127.0.0.1:8080"}


def answer(app: Any, kind: str = "http", method: str = "GET", **headers: str) -> Any:
    """The status, None for a refused websocket, "reached" for what gets through."""
    sent: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        sent.append({"status": "reached"})

    async def receive() -> Any:
        return {"type": f"{kind}.connect" if kind == "websocket" else "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(app(inner)({"type": kind, "method": method, "headers": raw}, receive, send))
    assert sent[0].get("type") != "websocket.accept"
    return sent[0].get("status")


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:9090", "http://127.0.0.1:8080.evil.example", "http://localhost:8080", ""],
)
def test_another_sites_page_is_refused(kind: str, origin: str) -> None:
    assert answer(SameOrigin, kind, origin=origin, **HERE) == (403 if kind == "http" else None)


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_its_own_page_and_programs_are_let_in(kind: str) -> None:
    assert answer(SameOrigin, kind, origin="http://127.0.0.1:8080", **HERE) == "reached"
    assert answer(SameOrigin, kind, **HERE) == "reached"


def test_a_link_from_another_site_leads_here_but_nothing_is_included_there() -> None:
    assert answer(SameOrigin, sec_fetch_site="cross-site", sec_fetch_mode="navigate", **HERE) == "reached"
    for near in ("cross-site", "same-site"):
        assert answer(SameOrigin, sec_fetch_site=near, sec_fetch_mode="no-cors", **HERE) == 403
    assert answer(SameOrigin, sec_fetch_site="same-origin", sec_fetch_mode="no-cors", **HERE) == "reached"


@pytest.mark.parametrize(("length", "said"), [("10", "reached"), ("11", 413), ("-1", 413), ("", 413)])
def test_a_body_is_bounded(length: str, said: object) -> None:
    limit = lambda app: BodyLimit(app, 10)
    assert answer(limit, method="POST", content_length=length) == said
