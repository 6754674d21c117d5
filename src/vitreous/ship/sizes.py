"""A file for any batch, compiled for the sizes that it is really asked for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np

MOST = 4  # sizes that are tried
FASTER = 0.95  # of the time for any batch is worth a second set of weights in memory

Run = Callable[[np.ndarray], list[np.ndarray]]


def requests(compiled: Any) -> Run:
    """Runs a compiled model of OpenVINO: a request holds the images and answers of one call, so no two calls share one."""
    idle: deque[Any] = deque()

    def run(images: np.ndarray) -> list[np.ndarray]:
        try:
            request = idle.pop()
        except IndexError:
            request = compiled.create_infer_request()
        answers = request.infer([images], share_inputs=True, share_outputs=False)  # copies
        idle.append(request)
        return list(answers.values())

    return run


class BySize:
    """Runs `whole`, and for a batch size that comes again `fixed(size)`, once that has given the same answer in less time.

    OpenVINO takes many times as long for some graphs of any batch, and for others no longer at all; and what it computes with
    fixed sizes is not always the same. tolerance: largest relative L2 difference of an output.
    """

    def __init__(self, whole: Run, fixed: Callable[[int], Run], tolerance: float) -> None:
        self.whole, self.compile, self.tolerance = whole, fixed, tolerance
        self.seen: set[int] = set()
        self.fixed: dict[int, Run | None] = {}
        self.compiling = Lock()

    def __call__(self, images: np.ndarray) -> list[np.ndarray]:
        size = len(images)
        if (run := self.fixed.get(size)) is not None:
            return run(images)
        answers = self.whole(images)
        again = size in self.seen
        self.seen.add(size)
        if again and size not in self.fixed and len(self.fixed) < MOST and self.compiling.acquire(blocking=False):
            try:
                self.fixed[size] = self._better(images, answers)
            finally:
                self.compiling.release()
        return answers

    def _better(self, images: np.ndarray, answers: list[np.ndarray]) -> Run | None:
        try:
            run = self.compile(len(images))
        except RuntimeError:  # of a graph that it takes with any batch only
            return None
        got = run(images)
        off = [np.linalg.norm(a - b) - self.tolerance * np.linalg.norm(b) for a, b in zip(got, answers, strict=True)]
        if not all(difference <= 0 for difference in off):  # so that NaN is not the same
            return None
        return run if _seconds(run, images) <= FASTER * _seconds(self.whole, images) else None


def _seconds(run: Run, images: np.ndarray) -> float:
    start = time.perf_counter()
    run(images)
    return time.perf_counter() - start
