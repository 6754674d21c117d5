"""Functions that tests run in a process of their own; it must be able to import them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import vitreous.search.job
import vitreous.search.trial
from vitreous.errors import VitreousError

Say = Callable[[str, float], None]


HELD = 19  # a recipe that is proven on so many pictures is never done


def recipe(source: Any, steps: str, images: int, folder: Any, say: Say) -> Any:
    """The studio's own, which takes less than half a minute for timing."""
    from vitreous.studio import apart

    while images == HELD:
        say("held", 0.1)
        time.sleep(0.1)
    vitreous.search.job.SECONDS = vitreous.search.trial.SECONDS = 0.1
    return apart.recipe(source, steps, images, folder, say)


def count(n: int, say: Say) -> int:
    for i in range(n):
        say("counting", i / n)
    return n


def refuse(say: Say) -> None:
    raise VitreousError("this cannot be done: do something else")


def stumble(say: Say) -> None:
    say("about to fail", 0.5)
    raise KeyError("missing")


def die(say: Say) -> None:
    os._exit(9)


def last(path: str, say: Say) -> None:
    say("waiting", 0.1)
    time.sleep(3600)  # whoever is not stopped is never done
    open(path, "w").close()
