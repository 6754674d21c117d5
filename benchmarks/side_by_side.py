"""Jobs that several processes do at once: what fails is told and the others go on, and when the time is over all stop. What comes
of them is written whole or not at all."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
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
    workers: dict[Connection, Any] = {}
    busy: dict[Connection, Any] = {}
    idle: list[Connection] = []
    try:
        while (left or busy) and time.monotonic() < until:
            while left and len(busy) < processes:
                if not idle:
                    ours, its = context.Pipe()
                    workers[ours] = context.Process(target=_work, args=(its, begin, given))
                    workers[ours].start()
                    its.close()
                    idle.append(ours)
                pipe = idle.pop()
                try:
                    pipe.send(left[0])
                except OSError:  # it died while it had nothing to do: another takes the job
                    continue
                busy[pipe] = left.pop(0)
            ready = wait(list(busy), min(max(until - time.monotonic(), 0), 60))  # the system takes no timeout of years
            for pipe in [p for p in busy if p in ready]:
                job = busy.pop(pipe)
                try:
                    result, wrong, seconds = pipe.recv()
                except EOFError:
                    result, wrong, seconds = None, "its process died", 0.0
                if wrong is None:
                    idle.append(pipe)
                yield job, result, wrong, seconds
    finally:
        for worker in workers.values():
            worker.kill()


def failed(results: Path, job: Sequence[Any], wrong: str, seconds: float) -> None:
    """Keep what a job said as it failed beside the results, and print its last line."""
    name = "-".join(map(str, job)).replace(" ", "-")
    results.with_name(f"failed-{name}.txt").write_text(wrong)
    print(f"{', '.join(map(str, job))}: FAILED after {seconds:.0f} s: {wrong.strip().splitlines()[-1][:200]}", flush=True)


def written(path: Path, found: Any) -> None:
    aside = path.with_suffix(f".{os.getpid()}.part")
    aside.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    os.replace(aside, path)
