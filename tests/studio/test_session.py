"""What a page holds: its link, its uploads, and nothing of another's."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl

import numpy as np
import pytest
import torch
from PIL import Image

from vitreous import see
from vitreous.data.pictures import read_picture
from vitreous.errors import VitreousError
from vitreous.studio import session as module
from vitreous.studio.opened import Opened, Source
from vitreous.studio.session import Session, State, Superseded


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


def send(session: Session, name: str, content: bytes) -> int:
    return asyncio.run(session.upload(name, io.BytesIO(content)))


def test_a_link_restores_the_view() -> None:
    state = State(view="heads", image=7, layer=2, head=1, patch=3, methods="rollout,lrp", removed="1.2,3.1")
    assert State.of(dict(parse_qsl(state.query()))) == state
    assert State().query() == "" and State.of({"layer": "many", "bogus": "1"}) == State()


def test_a_link_from_elsewhere_is_mended(opened: Opened) -> None:
    made = Session([opened], State(model=4, image=-3, layer=99, head=50, patch=5000, removed="0.0,9.9,x.y,1.0"))
    assert (made.state.model, made.state.image, made.state.layer, made.state.head, made.state.patch) == (0, 0, 7, -1, -1)
    assert made.removed() == {0: [0], 1: [0]}
    made.close()


def test_the_models_own_names_of_its_classes_come_before_the_datas(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.zeros(10).index_fill(0, torch.tensor(3), 9.0)
    monkeypatch.setattr(opened.net, "pretrained_cfg", {})
    assert f"Answer: {opened.data.classes[3]} " in opened.answer(logits)
    monkeypatch.setattr(opened.net, "pretrained_cfg", {"label_names": tuple("abcdefghij")})
    assert "Answer: d 9" in opened.answer(logits)
    assert opened.answer(torch.zeros(1)) == "Answer: class 0 50.0 %", "one logit says yes or no"


def test_listeners_hear_of_changes_only(session: Session) -> None:
    heard = []

    async def listen() -> None:
        heard.append(session.state.layer)

    session.listeners.append(listen)
    asyncio.run(session.change(layer=session.state.layer))
    asyncio.run(session.change(layer=1))
    assert heard == [1]


def test_uploads_are_prepared_for_the_model_and_belong_to_one_page(session: Session, opened: Opened) -> None:
    number = send(session, "mine.png", png())
    picture, x = session.pictured(opened, number)
    assert x.shape == (1, 1, 28, 28) and picture.size == (28, 28) and session.named(number) == "mine.png"
    other = Session([opened], State(image=number))
    assert other.state.image == 0 and not other.uploads
    other.close()


def test_what_is_no_picture_or_too_large_is_refused(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VitreousError, match=r"broken\.png cannot be used"):
        send(session, "broken.png", png()[:60])
    with pytest.raises(VitreousError, match="known format"):
        send(session, "notes.txt", b"hello")
    monkeypatch.setattr("vitreous.data.pictures.MAX_PIXELS", 1000)
    with pytest.raises(VitreousError, match="pixels"):
        send(session, "vast.png", png((50, 50)))
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(VitreousError, match="at most"):
        send(session, "large.png", png())
    assert not session.uploads


def test_the_oldest_upload_goes(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_UPLOADS", 2)
    numbers = [send(session, f"{i}.png", png()) for i in range(3)]
    assert list(session.uploads) == numbers[1:]


def test_uploads_leave_no_file(session: Session) -> None:
    send(session, "mine.png", png())
    assert not list(Path(session.folder.name).iterdir())


def test_without_heads_answers_change(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitreous.studio.opened.IMAGES", 64)
    few = asyncio.run(opened.without({0: [0]}))
    all_of_it = asyncio.run(opened.without({i: list(range(n)) for i, n in enumerate(opened.heads)}))
    assert few.accuracy and all_of_it.accuracy and few.same is not None and all_of_it.same is not None
    assert few.accuracy[0] == all_of_it.accuracy[0] > 0.8
    assert all_of_it.accuracy[1] < 0.5 and 0 < few.moved.mean() < all_of_it.moved.mean()
    assert np.all(asyncio.run(opened.without({})).moved == 0) and "accuracy" in str(few)


def test_who_waits_for_slow_answers_keeps_nobody_from_a_quick_one(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the order of events: while twenty pages wait behind an explanation that does not end, a click is answered."""
    go_on, order, waiting = threading.Event(), [], 20
    threads = threading.active_count()

    def slow(net: object, x: torch.Tensor) -> torch.Tensor:
        assert go_on.wait(600)
        order.append(int(x[0, 0, 0, 0]))
        return torch.zeros(1, 7, 7)

    monkeypatch.setitem(see.METHODS, "slow", slow)

    async def people() -> None:
        asked = [asyncio.ensure_future(opened.explain("slow", torch.full((1, 1, 28, 28), float(i)))) for i in range(waiting)]
        clicking = Session([opened], State())
        for image in range(8):
            await clicking.look(0, image, 7)
            await asyncio.to_thread(clicking.thumb, image)
        clicking.close()
        assert not order and not any(task.done() for task in asked)
        assert threading.active_count() < threads + waiting / 2, "whoever waits holds no thread"
        asked.pop(3).cancel()
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(*asked)

    asyncio.run(people())
    assert order == [i for i in range(waiting) if i != 3], "in turn, and nothing for who went away"


def test_a_newer_question_takes_the_place_of_an_older_one(session: Session) -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    async def two() -> str:
        first = asyncio.ensure_future(session.newest("explanation", never()))
        await asyncio.sleep(0)
        other = asyncio.ensure_future(session.newest("head", asyncio.sleep(0, "of another kind")))
        second = await session.newest("explanation", asyncio.sleep(0, "new"))
        with pytest.raises(Superseded):
            await first
        assert await other == "of another kind"
        return second

    assert asyncio.run(two()) == "new"


def test_pictures_are_decoded_one_at_a_time(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    busy, most = [0], [0]

    def reading(path: Path) -> Image.Image:
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        picture = read_picture(path)
        busy[0] -= 1
        return picture

    monkeypatch.setattr(module, "read_picture", reading)

    async def many() -> None:
        await asyncio.gather(*(session.upload(f"{i}.png", io.BytesIO(png())) for i in range(20)))

    asyncio.run(many())
    assert most == [1] and len(session.uploads) == 20


def test_one_logit_and_marks_are_answers_of_yes_and_no(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = torch.tensor([[3.0], [-1.0], [2.0], [-2.0]]), torch.tensor([[1.0], [1.0], [2.0], [-2.0]])
    monkeypatch.setitem(vars(opened), "_tested", (torch.zeros(4), before))
    monkeypatch.setattr(opened, "_answers", lambda x, removed: after)
    monkeypatch.setattr(opened, "data", SimpleNamespace(labels=np.array([1, 0, 0, 0])))
    lost = asyncio.run(opened.without({0: [0]}))
    assert (lost.accuracy, lost.same) == ((0.75, 0.5), 0.75)
    monkeypatch.setattr(opened, "data", SimpleNamespace(labels=np.array([[1, 1, 0]]), classes=("a", "b", "c")))
    monkeypatch.setattr(opened.net, "pretrained_cfg", {})
    assert opened.answer(torch.tensor([2.0, 1.0, -9.0])) == "Answer: a 88.1 %, b 73.1 %, c 0.0 %"
