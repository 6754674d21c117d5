"""Jobs that several processes do at once: what fails is told and the others go on, and when the time is over all stop."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any


def _work(jobs: Connection, begin: Callable[..., Callable[[Any], Any]], given: Sequence[Any]) -> None:
    """After a failure it ends, for what has gone wrong on a GPU would go wrong again."""
    do = begin(*given)
    while True:
        job, began = jobs.recv(), time.monotonic()
        try:
            jobs.send((do(job), None, time.monotonic() - began))
        except Exception:
            jobs.send((None, traceback.format_exc(), time.monotonic() - began))
            return


def work_through(
    jobs: Sequence[Any], begin: Callable[..., Callable[[Any], Any]], given: Sequence[Any], processes: int, until: float
) -> Iterator[tuple[Any, Any, str | None, float]]:
    """As they are done: a job, what came of it, what went wrong if anything did, seconds. `begin(*given)` makes, once in each
    process, what does a job. At `until`, by `time.monotonic`, what still runs is given up."""
    context, left = multiprocessing.get_context("spawn"), list(jobs)
    workers: dict[Any, Any] = {}
    busy: dict[Any, Any] = {}
    idle: list[Any] = []
    try:
        while (left or busy) and time.monotonic() < until:
            while left and len(busy) < processes:
                if not idle:
                    ours, its = context.Pipe()
                    workers[ours] = context.Process(target=_work, args=(its, begin, given))
                    workers[ours].start()
                    its.close()
                    idle.append(ours)
                pipe, job = idle.pop(), left.pop(0)
                pipe.send(job)
                busy[pipe] = job
            for pipe in wait(list(busy), max(until - time.monotonic(), 0)):
                job = busy.pop(pipe)
                try:
                    result, wrong, seconds = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    result, wrong, seconds = None, "its process died", 0.0
                if wrong is None:
                    idle.append(pipe)
                yield job, result, wrong, seconds
    finally:
        for worker in workers.values():
            worker.kill()
