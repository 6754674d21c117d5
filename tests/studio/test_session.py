"""What a page holds: its link, its uploads, and nothing of another's."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from urllib.parse import parse_qsl

import numpy as np
import pytest
from PIL import Image

from vitreous.errors import VitreousError
from vitreous.studio import session as module
from vitreous.studio.opened import Opened, Source
from vitreous.studio.session import Session, State


@pytest.fixture(scope="module")
def opened() -> Opened:
    return Opened(Source())


@pytest.fixture
def session(opened: Opened) -> Iterator[Session]:
    made = Session([opened], State())
    yield made
    made.close()


def png(size: tuple[int, int] = (40, 30)) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", size, "orange").save(held, "PNG")
    return held.getvalue()


def test_a_link_restores_the_view() -> None:
    state = State(view="heads", image=7, layer=2, head=1, patch=3, methods="rollout,lrp", removed="1.2,3.1")
    assert State.of(dict(parse_qsl(state.query()))) == state
    assert State().query() == "" and State.of({"layer": "many", "bogus": "1"}) == State()


def test_a_link_from_elsewhere_is_mended(opened: Opened) -> None:
    made = Session([opened], State(model=4, image=-3, layer=99, head=50, patch=5000, removed="0.0,9.9,x.y,1.0"))
    assert (made.state.model, made.state.image, made.state.layer, made.state.head, made.state.patch) == (0, 0, 7, -1, -1)
    assert made.removed() == {0: [0], 1: [0]}
    made.close()


def test_listeners_hear_of_changes_only(session: Session) -> None:
    heard = []

    async def listen() -> None:
        heard.append(session.state.layer)

    session.listeners.append(listen)
    asyncio.run(session.change(layer=session.state.layer))
    asyncio.run(session.change(layer=1))
    assert heard == [1]


def test_uploads_are_prepared_for_the_model_and_belong_to_one_page(session: Session, opened: Opened) -> None:
    number = session.upload("mine.png", png())
    picture, x = session.pictured(opened, number)
    assert x.shape == (1, 1, 28, 28) and picture.size == (28, 28) and session.named(number) == "mine.png"
    other = Session([opened], State(image=number))
    assert other.state.image == 0 and not other.uploads
    other.close()


def test_what_is_no_picture_or_too_large_is_refused(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VitreousError, match=r"broken\.png cannot be used"):
        session.upload("broken.png", png()[:60])
    with pytest.raises(VitreousError, match="known format"):
        session.upload("notes.txt", b"hello")
    monkeypatch.setattr("vitreous.data.pictures.MAX_PIXELS", 1000)
    with pytest.raises(VitreousError, match="pixels"):
        session.upload("vast.png", png((50, 50)))
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(VitreousError, match="at most"):
        session.upload("large.png", png())
    assert not session.uploads


def test_the_oldest_upload_goes(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UPLOADS", 2)
    numbers = [session.upload(f"{i}.png", png()) for i in range(3)]
    assert list(session.uploads) == numbers[1:]


def test_uploads_leave_no_file(session: Session) -> None:
    from pathlib import Path

    session.upload("mine.png", png())
    assert not list(Path(session.folder.name).iterdir())


def test_without_heads_answers_change(opened: Opened) -> None:
    few = opened.without({0: [0]})
    all_of_it = opened.without({i: list(range(n)) for i, n in enumerate(opened.heads)})
    assert few.accuracy and all_of_it.accuracy and few.same is not None and all_of_it.same is not None
    assert few.accuracy[0] == all_of_it.accuracy[0] > 0.8
    assert all_of_it.accuracy[1] < 0.5 and 0 < few.moved.mean() < all_of_it.moved.mean()
    assert np.all(opened.without({}).moved == 0) and "accuracy" in str(few)
