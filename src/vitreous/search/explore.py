"""Try combinations of what is there, in the order in which they promise most, and keep what is best at each loss."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import scipy
from torch import Tensor, nn

from ..errors import VitreousError
from ..prove.energy import Counters
from ..prune import Heads
from ..steps import Recipe, Step, history_of, slim
from .budget import Loss
from .choose import Chooser
from .front import Point, front
from .predict import Predictor, counted_power, joined, shape, work
from .record import Record
from .shared import SharedRecord
from .trial import exported, timed

ORDER = ("heads", "mlp", "tokens", "bits")  # in which the steps of a recipe are applied
LEVELS = (1.0, 0.5, 2.0, 0.25)  # times the budget: a front is wanted around it
FAR = 2.0  # times the budget that a step may lose alone, to be combined at all
POLL = 1.0  # seconds between looks at what another process is at
SECONDS = 3.0  # of timing a trial
SHIPPED = 5  # points of the front that are timed against each other in the end


@dataclass
class Explorer:
    """One search: `options()` are the models on the front, for `Job` to time against each other, ship and prove.

    axes: ladders of steps from gentle to strong, by axis (`space`). minutes: of work in all, that of stopped runs counted.
    trials: recipes to try at most, None for as many as the time allows. folder: for files that come and go.
    """

    record: Record | SharedRecord
    axes: dict[str, list[list[Step]]]
    minutes: float
    trials: int | None
    folder: Path
    threads: int | None = None
    predictor: Predictor = field(default_factory=Predictor)
    learned: set[str] = field(default_factory=set)  # trials that the predictor knows

    def options(self, chooser: Chooser, images: Tensor) -> dict[str, nn.Module]:
        """Models of the front by their recipes, for `images` `[N, C, H, W]` to time them on."""
        self.chooser, self.images, self.goal = chooser, images, replace(chooser.goal, speedup=None)
        self.before = len(history_of(chooser.net).done)
        self.whole = shape(chooser.net, images[:1]) if self.axes.keys() & {"tokens", "heads", "mlp"} else None
        judge = chooser.judge
        self.budget = self.goal.allowed(judge.loss(judge.original, 1).criterion)
        self.began, self.spent = time.monotonic(), self.record.spent()
        self._anchor()
        seeds = [(), *self._chosen()]
        for wait in (False, True):  # first what no other process is at
            for i, recipe in enumerate(seeds):
                chooser.progress("trying what the chooser found", i / len(seeds))
                self._try(recipe, wait=wait)
        self._explore(self._alone(seeds))
        chooser.notes.append(self.accuracy())
        shutil.rmtree(self.folder, ignore_errors=True)
        return self._shipped()

    # ---- what is known

    def points(self) -> list[Point]:
        """Every recipe in every runtime that was measured."""
        return [Point.of(value, engine) for value in self.record.all("trial").values() for engine in value.get("runs", ())]

    def accuracy(self) -> str:
        """How well latencies were predicted before they were measured."""
        told = [(p.predicted, p.ms, p.macs) for p in self.points() if p.predicted]
        if len(told) < 3:
            return f"{len(told)} latencies were predicted before they were measured: too few to tell how well"
        guess, ms, macs = (np.array(column, float) for column in zip(*told, strict=True))
        error = 100 * float(np.mean(np.abs(guess / ms - 1)))
        tau, by_macs = (float(cast(Any, scipy.stats.kendalltau(x, ms)).statistic) for x in (guess, macs))
        return (
            f"latencies predicted before they were measured: {len(told)}, mean error {error:.1f} %, "
            f"Kendall's τ with the measured {tau:.2f} (of MACs {by_macs:.2f})"
        )

    def _tried(self) -> int:
        return sum(1 for v in self.record.all("trial").values() if v.get("explored"))

    def _over(self) -> bool:
        late = self.spent + time.monotonic() - self.began > 60 * self.minutes
        return late or (self.trials is not None and self._tried() >= self.trials)

    def _once(self, kind: str, key: str, make: Callable[[], dict[str, Any]], wait: bool = True) -> Any:
        """What is known, or what `make` finds. Where another process is at it, its answer, or with `wait` False None."""
        while (known := self.record.get(kind, key)) is None:
            if self.record.claim(kind, key):
                try:
                    return self.record.add(kind, key, make())
                except BaseException:
                    self.record.release(kind, key)
                    raise
            if not wait:
                return self.record.get(kind, key)
            time.sleep(POLL)
        return known

    # ---- the quick form first

    def _chosen(self) -> list[tuple[Step, ...]]:
        """The recipes of the models that the chooser would ship, by the axes that may change."""

        def choose() -> dict[str, Any]:
            models = self.chooser.options().values()
            found = [Recipe(tuple(history_of(m).steps()[self.before :])) for m in models]
            return {"recipes": [r.to_json() for r in found], "seconds": time.monotonic() - self.began}

        kept = self._once("chosen", "", choose)
        recipes = [Recipe.from_json(text).steps for text in kept["recipes"]]
        return [r for r in recipes if r and all(_axis(s) in self.axes for s in r)]

    def _anchor(self) -> None:
        """The original as it is shipped, which runs along with every trial: a trial's times are told by the anchor's first."""
        place = self.folder / "anchor"
        models = {"anchor": self.chooser.net}
        made, _ = exported(models, place, self.images, self.threads, self.goal, self.chooser.progress, self.chooser.notes)
        self.anchor = made[-1]

        def measure() -> dict[str, Any]:
            asked = replace(self.goal, speedup=1.0)
            timed([self.anchor], self.chooser.net, self.images, asked, self.chooser.progress, SECONDS)
            torch = [t * s for t, s in zip(self.anchor.times, self.anchor.speedups, strict=True)]
            return {"ms": list(self.anchor.times), "torch": torch}

        self._once("anchor", "", measure)

    def original(self) -> list[float]:
        """Milliseconds an image of the original in torch, at each batch."""
        return self.record.get("anchor", "")["torch"]

    def _alone(self, seeds: Sequence[tuple[Step, ...]]) -> dict[str, list[Step | None]]:
        """Of each axis what loses little enough by itself to be combined; None is to leave the axis as it is."""
        chosen = [s for r in seeds for s in r]  # among them integers that leave some layers in floats
        ladders = {axis: [*self.axes[axis], *([s] for s in chosen if _axis(s) == axis)] for axis in ORDER if axis in self.axes}
        found: dict[str, list[Step | None]] = {axis: [None] for axis in ORDER}
        for wait in (False, True):  # first the ladders that no other process is at
            found = {axis: [None] for axis in ORDER}
            for axis in ORDER:
                for ladder in ladders.get(axis, []):
                    for step in ladder:
                        if self._over():
                            return found
                        value = self._lost(axis, step, wait)
                        if value is None:
                            break
                        if "failed" in value or step in found[axis]:
                            continue
                        if value["lost"] > FAR * max(self.budget, value["error"]):
                            break
                        found[axis].append(step)
        return found

    def _lost(self, axis: str, step: Step, wait: bool) -> dict[str, Any] | None:
        """What a step loses alone, as torch computes it, and the shape that it leaves, or why it cannot be made; None where
        another process is at it and this one does not `wait`."""

        def alone() -> dict[str, Any]:
            began = time.monotonic()
            self.chooser.progress(f"what {step} loses alone", 0.0)
            try:
                model = slim(self.chooser.net, step, self.chooser.calibrate)
                lost = self.chooser.judge.keeps(model, self.goal)[1]
                left = shape(model, self.images[:1]).tolist() if axis in ("tokens", "heads", "mlp") else None
                known = {"lost": lost.value, "error": lost.error, "shape": left}
            except VitreousError as reason:
                known = {"failed": str(reason)}
            return {**known, "seconds": time.monotonic() - began}

        return self._once("alone", str(step), alone, wait)

    # ---- combinations

    def _explore(self, alone: dict[str, list[Step | None]]) -> None:
        recipes = [tuple(s for s in r if s is not None) for r in product(*(alone[axis] for axis in ORDER))]
        idle = 0
        while not self._over() and idle <= len(LEVELS):
            self.record.refresh()
            self._learn()
            taken = self.record.found.keys() | self.record.busy
            left = [r for r in recipes if ("trial", _key(r)) not in taken]
            # Told by the record alone, so that a search that was stopped goes on as it would have.
            pick = self._best(left, (self._tried() + idle) % (len(LEVELS) + 1))
            idle = 0 if pick else idle + 1
            if pick:
                said = f"trying {Recipe(pick)}"
                self.chooser.progress(said, min((self.spent + time.monotonic() - self.began) / (60 * self.minutes + 1e-9), 1.0))
                self._try(pick, explored=True, wait=False)

    def _best(self, left: list[tuple[Step, ...]], turn: int) -> tuple[Step, ...] | None:
        """What promises to be the cheapest at one level of loss, or with limits to reach them and lose least; None where nothing
        promises to be better than what was measured."""
        points, limit = self.points(), self.chooser.goal
        slack = self._slack(points)
        guesses = {r: (slack * self._sum(r), self._cheapest(r)) for r in left}
        bound = limit.latency or (self.original()[0] / limit.speedup if limit.speedup else None)
        if turn == len(LEVELS):
            if bound is None:
                return None
            reaching = [r for r in left if guesses[r][1] <= bound]
            pick = min(reaching, key=lambda r: guesses[r], default=None)
            known = min((p.lost for p in points if p.first <= bound), default=np.inf)
            return pick if pick and guesses[pick][0] < known else None
        level = LEVELS[turn] * self.budget
        within = [r for r in left if guesses[r][0] <= level]
        pick = min(within, key=lambda r: guesses[r][1], default=None)
        known = min((p.cost(limit) for p in points if p.lost <= level), default=np.inf)
        return pick if pick and guesses[pick][1] < known else None

    def _sum(self, recipe: tuple[Step, ...]) -> float:
        """What the steps lose alone, added up."""
        known = (self.record.get("alone", str(s)) for s in recipe)
        return sum(max(v["lost"], 0.0) for v in known if v and "lost" in v)

    def _slack(self, points: list[Point]) -> float:
        """How much more recipes of several steps lose than the sum of their steps, in the mean of those measured."""
        pairs = [(self._sum(p.steps), max(p.lost, 0.0)) for p in points if len(p.steps) > 1]
        return (1.0 + sum(s * lost for s, lost in pairs)) / (1.0 + sum(s * s for s, _ in pairs))

    def _shape(self, recipe: tuple[Step, ...]) -> np.ndarray | None:
        if self.whole is None:
            return None
        known = {_axis(s): (self.record.get("alone", str(s)) or {}).get("shape") for s in recipe if s.family != "quant"}
        return None if None in known.values() else joined(self.whole, {a: np.array(v) for a, v in known.items()})

    def _predicted(self, recipe: tuple[Step, ...], engine: str) -> list[float] | None:
        """Milliseconds an image at each batch."""
        rows, bits = self._shape(recipe), _bits(recipe)
        if rows is None:
            return None
        kinds = [(f"{engine} {bits} {b}", f"{engine} floats {b}") for b in self.goal.batches]
        found = [self.predictor(kind, rows, like) for kind, like in kinds]
        return None if None in found else [f for f in found if f is not None]

    def _cheapest(self, recipe: tuple[Step, ...]) -> float:
        """The predicted cost in the runtime that is ahead; of what there are no products to count, nothing is known."""
        rows = self._shape(recipe)
        goal = self.chooser.goal
        if rows is None:
            return 0.0
        if goal.latency is None and goal.speedup is None:
            if goal.macs or goal.memory:
                return float(work(rows)[:3].sum())
            if goal.energy and not Counters().there:
                return counted_power(rows)
        engines = {p.engine for p in self.points()}
        times = [t for e in engines if (t := self._predicted(recipe, e)) is not None]
        return min((float(np.exp(np.mean(np.log(t)))) for t in times), default=0.0)

    # ---- one trial

    def _try(self, recipe: tuple[Step, ...], explored: bool = False, wait: bool = True) -> None:
        """Make, ship, time and judge a recipe in both runtimes, unless that was done or is being done."""

        def measure() -> dict[str, Any]:
            began = time.monotonic()
            try:
                found = self._measured(recipe)
            except VitreousError as reason:
                found = {"failed": str(reason)}
            about = {"recipe": Recipe(recipe).to_json(), "explored": explored, "seconds": time.monotonic() - began}
            return {**found, **about}

        self._once("trial", _key(recipe), measure, wait)

    def _learn(self) -> None:
        """Let the predictor know what was measured since: here, in a stopped run, by others."""
        trials = self.record.all("trial")
        for key in [key for key in trials if key not in self.learned]:
            self.learned.add(key)
            recipe = Recipe.from_json(trials[key]["recipe"]).steps
            rows = self._shape(recipe)
            for engine, run in trials[key].get("runs", {}).items():
                for batch, ms in zip(self.goal.batches, run["ms"], strict=True):
                    if rows is not None:
                        self.predictor.learn(f"{engine} {_bits(recipe)} {batch}", rows, ms)

    def _measured(self, recipe: tuple[Step, ...]) -> dict[str, Any]:
        c = self.chooser
        model = slim(c.net, recipe, c.calibrate)
        counted = replace(self.goal, macs=self.goal.macs or 1.0)
        quiet = lambda what, share: None
        made, _ = exported({"trial": model}, self.folder / "trial", self.images, self.threads, counted, quiet, [])
        timed([self.anchor, *made], c.net, self.images, self.goal, quiet, SECONDS)
        first = self.record.get("anchor", "")["ms"]
        runs = {}
        for t in made:
            ms = [m / now * then for m, now, then in zip(t.times, self.anchor.times, first, strict=True)]
            lost: Loss = c.judge.loss(t.runtime)
            run = {"ms": ms, "lost": lost.value, "error": lost.error, "unit": lost.criterion.unit, "bytes": t.runtime.bytes}
            run |= {
                "macs": t.macs,
                "memory": t.memory,
                "energy": t.energy,
                "predicted": self._predicted(recipe, t.runtime.engine),
            }
            runs[t.runtime.engine] = run
        shutil.rmtree(self.folder / "trial", ignore_errors=True)
        return {"runs": runs if "runtime" in self.axes else dict([min(runs.items(), key=lambda r: r[1]["ms"])])}

    def _shipped(self) -> dict[str, nn.Module]:
        """The models of the front, the nearest to the budget where there are many."""
        goal, budget = self.chooser.goal, self.budget
        on = front(self.points(), goal)
        on.sort(key=lambda p: abs(p.lost - budget) if p.lost <= budget else np.inf)
        recipes = dict.fromkeys(p.steps for p in on)
        recipes = dict.fromkeys([*list(recipes)[:SHIPPED], ()])
        self.chooser.progress("making the models of the front", 0.0)
        return {str(Recipe(r)): slim(self.chooser.net, r, self.chooser.calibrate) for r in recipes}


def _key(recipe: Sequence[Step]) -> str:
    return json.dumps([s.to_dict() for s in recipe])


def _axis(step: Step) -> str:
    return {"tokens": "tokens", "quant": "bits"}.get(step.family, "heads" if isinstance(step, Heads) else "mlp")


def _bits(recipe: Sequence[Step]) -> str:
    return next((type(s).__name__ for s in recipe if s.family == "quant"), "floats")
