"""A size that comes again gets a graph of its own, if that is worth it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from vitreous.ship.sizes import MOST, BySize, Run


def slow(images: np.ndarray) -> list[np.ndarray]:
    time.sleep(0.05)
    return [2 * images]


def made(run: Run, asked: list[int]) -> Callable[[int], Run]:
    def fixed(size: int) -> Run:
        asked.append(size)
        return run

    return fixed


def test_the_second_call_compiles_and_the_third_gains() -> None:
    asked: list[int] = []
    run = BySize(slow, made(lambda images: [2.0001 * images], asked), 1e-3)
    answers = [float(run(np.ones((4, 1)))[0][0, 0]) for _ in range(4)]
    assert asked == [4] and answers == [2, 2, 2.0001, 2.0001]
    run(np.ones((3, 1)))
    assert asked == [4]  # once is not again


@pytest.mark.parametrize("wrong", [2.01, np.nan])
def test_what_answers_otherwise_is_not_taken(wrong: float) -> None:
    asked: list[int] = []
    run = BySize(slow, made(lambda images: [wrong * images], asked), 1e-3)
    assert all(run(np.ones((4, 1)))[0][0, 0] == 2 for _ in range(4)) and asked == [4]


def test_what_is_no_faster_or_does_not_compile_is_not_taken() -> None:
    def refused(size: int) -> Run:
        raise RuntimeError

    def slower(images: np.ndarray) -> list[np.ndarray]:
        return slow(images) if time.sleep(0.05) is None else []

    for fixed in (made(slower, []), refused):
        run = BySize(slow, fixed, 1e-3)
        for _ in range(3):
            run(np.ones((4, 1)))
        assert run.fixed == {4: None}


def test_few_sizes_are_compiled() -> None:
    asked: list[int] = []
    run = BySize(lambda images: [images], made(lambda images: [images], asked), 1e-3)
    for size in [*range(1, 9)] * 2:
        run(np.ones((size, 1)))
    assert asked == [*range(1, MOST + 1)]
