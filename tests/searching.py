"""A search whose runtimes, times and losses are stood in for."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import small_vit
from torch import Tensor, nn

from vitreous.prune import Heads
from vitreous.search import explore
from vitreous.search.budget import AGREEMENT, Goal, Loss
from vitreous.search.explore import Explorer
from vitreous.search.predict import shape, work
from vitreous.search.record import Record
from vitreous.search.trial import Trial
from vitreous.steps import Recipe, history_of, slim
from vitreous.tokens import EViT, ToMe

ABOUT = {"model": "a", "machine": "b"}


class Tried:
    """A chooser's surroundings in which every step loses what it is told to, and time is work done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, goal: Goal, images: Tensor) -> None:
        self.net, self.calibrate, self.goal, self.notes = small_vit(), images, goal, []
        self.made: list[str] = []
        self.judge = SimpleNamespace(original=self.net, loss=self.loss, keeps=lambda model, goal: (True, self.loss(model)))
        monkeypatch.setattr(explore, "exported", self.exported)
        monkeypatch.setattr(explore, "timed", self.timed)
        self.images = images

    def progress(self, what: str, share: float) -> None:
        pass

    def options(self) -> dict[str, nn.Module]:
        return {"strongest": slim(self.net, ToMe(r=1))}

    def loss(self, model: Any, batches: int | None = None) -> Loss:
        steps = history_of(getattr(model, "module", model)).steps()
        each = {"EViT": lambda s: 4 * (1 - s.keep), "ToMe": lambda s: 0.6 * s.r, "Heads": lambda s: 2 * s.share}
        return Loss(AGREEMENT, sum(each.get(type(s).__name__, lambda s: 0.5)(s) for s in steps), 0.1)

    def exported(self, options: dict[str, nn.Module], folder: Path, *_: Any) -> tuple[list[Trial], dict[str, Any]]:
        made = []
        for name, model in options.items():
            if name == "trial":
                self.made.append(str(Recipe(tuple(history_of(model).steps()))))
            for engine, speed in (("ONNX Runtime", 1.0), ("OpenVINO", 2.0)):
                runtime: Any = SimpleNamespace(engine=engine, bytes=10, module=model, speed=speed)
                made.append(Trial(name, folder, None, runtime, macs=7))
        return made, {}

    def timed(self, trials: list[Trial], net: nn.Module, images: Tensor, goal: Goal, *_: Any) -> None:
        for t in trials:
            runtime: Any = t.runtime
            ms = 1e-6 * float(work(shape(runtime.module, self.images))[:5].sum()) / runtime.speed
            t.times, t.speedups = (ms,) * len(goal.batches), (3.0,) * len(goal.batches)

    def dies(self, monkeypatch: pytest.MonkeyPatch, after: int, pause: float = 0.0) -> None:
        """Let this process be killed, as by kill -9, when it times once more than `after` times."""
        count = 0

        def killed(*given: Any) -> None:
            nonlocal count
            count += 1
            time.sleep(pause)
            if count > after:
                os.kill(os.getpid(), signal.SIGKILL)
            self.timed(*given)

        monkeypatch.setattr(explore, "timed", killed)

    def search(self, folder: Path, trials: int, record: Any = None) -> tuple[Explorer, dict[str, nn.Module]]:
        ladders: Any = {"tokens": [[EViT(keep=0.9), EViT(keep=0.6)]], "heads": [[Heads(share=0.25)]]}
        folder.mkdir(exist_ok=True)
        record = record or Record(folder / "trials.jsonl", ABOUT)
        explorer = Explorer(record, {**ladders, "runtime": []}, 10, trials, folder / "tried")
        return explorer, explorer.options(self, self.images)
