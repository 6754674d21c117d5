"""Long work in a process of its own: answers, failures, and stopping."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import studio_jobs

from vitreous.errors import VitreousError
from vitreous.studio.work import Stopped, Work


def test_answers_and_progress_come_back() -> None:
    work = Work(studio_jobs.count, 4)
    assert asyncio.run(work.result()) == 4
    assert work.what == "counting" and work.share == 0.75


@pytest.mark.parametrize(
    ("job", "said"), [(studio_jobs.refuse, "do something else"), (studio_jobs.stumble, "KeyError"), (studio_jobs.die, "memory")]
)
def test_failures_are_told(job: object, said: str) -> None:
    with pytest.raises(VitreousError, match=said):
        asyncio.run(Work(job).result())


def test_stopping_is_immediate(tmp_path: Path) -> None:
    work = Work(studio_jobs.last, str(tmp_path / "done"))

    async def stop_when_it_runs() -> None:
        result = asyncio.create_task(work.result())
        while work.what != "waiting":
            await asyncio.sleep(0.05)
        work.stop()
        await result

    with pytest.raises(Stopped):
        asyncio.run(stop_when_it_runs())
    assert not (tmp_path / "done").exists()


def test_what_is_still_starting_can_be_stopped_too(tmp_path: Path) -> None:
    work = Work(studio_jobs.last, str(tmp_path / "done"))

    async def stop_at_once() -> None:
        result = asyncio.create_task(work.result())
        while work.what != "starting":
            await asyncio.sleep(0)
        work.stop()
        await result

    with pytest.raises(Stopped):
        asyncio.run(stop_at_once())


def test_what_waits_can_be_stopped_too_and_at_once(tmp_path: Path) -> None:
    async def two() -> bool:
        first, second = Work(studio_jobs.last, str(tmp_path / "done")), Work(studio_jobs.count, 5)
        one, other = (asyncio.create_task(work.result()) for work in (first, second))
        while first.what != "waiting":
            await asyncio.sleep(0.05)
        second.stop()
        with pytest.raises(Stopped):
            await other
        before = not one.done()
        first.stop()
        with pytest.raises(Stopped):
            await one
        return before

    assert asyncio.run(two())
