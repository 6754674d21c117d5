"""Export every option, run each file, and take the best that keeps to the goal."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from ..errors import VitreousError
from ..processor import multiplies_bf16
from ..prove import interleave
from ..prove.cost import cost
from ..prove.energy import Counters
from ..prune.lpvit import power
from ..ship import Runtime, Shipment, ship_all
from .budget import Goal, Loss

SECONDS = 4.0
MISSED = "nothing "  # how a note begins that says what was asked for and not found


@dataclass
class Trial:
    """One option in one runtime: milliseconds an image at each of the goal's batches, and what it loses (None: not asked)."""

    option: str
    path: Path
    precision: str | None
    runtime: Runtime
    times: tuple[float, ...] = ()
    speedups: tuple[float, ...] = ()
    lost: Loss | None = None
    macs: int | None = None  # of an image, and bytes to run a batch: counted where they are asked for
    memory: int | None = None
    power: float | None = None  # counted by LPViT's model
    energy: float | None = None  # share of what the original takes

    @property
    def name(self) -> str:
        return f"{self.option} in {self.runtime.engine}{', the rest in bf16' if self.precision else ''}"

    @property
    def time(self) -> float:
        """The geometric mean over the batch sizes."""
        return float(np.exp(np.mean(np.log(self.times))))

    @property
    def speedup(self) -> float:
        return float(np.exp(np.mean(np.log(self.speedups)))) if self.speedups else 1.0

    def reaches(self, goal: Goal) -> bool:
        return (
            (goal.speedup is None or self.speedup >= goal.speedup)
            and (goal.latency is None or self.times[0] <= goal.latency)
            and (goal.megabytes is None or self.runtime.bytes <= goal.megabytes * 1e6)
            and (goal.macs is None or (self.macs is not None and self.macs <= goal.macs))
            and (goal.memory is None or (self.memory is not None and self.memory <= goal.memory * 1e6))
            and (goal.energy is None or (self.energy is not None and self.energy <= goal.energy))
        )

    def cost(self, goal: Goal) -> float:
        """What is to be small: the one thing that has a limit where it is no time, else time."""
        if goal.speedup is None and goal.latency is None:
            known = (self.runtime.bytes, self.macs, self.memory, self.energy)
            for limit, value in zip(goal.sizes, known, strict=True):
                if limit is not None and value is not None:
                    return float(value)
        return self.time

    def keeps(self, goal: Goal) -> bool:
        return self.lost is None or self.lost.within(goal.allowed(self.lost.criterion))


def exported(
    options: Mapping[str, nn.Module],
    folder: Path,
    images: Tensor,
    threads: int | None,
    goal: Goal,
    progress: Callable[[str, float], None],
    notes: list[str],
) -> tuple[list[Trial], dict[str, list[Shipment]]]:
    """Every option in both runtimes, in folders of their own below `folder`. Raises `VitreousError` when none can be shipped."""
    trials: list[Trial] = []
    shipments: dict[str, list[Shipment]] = {}
    refused: VitreousError | None = None
    for i, (option, model) in enumerate(options.items()):
        progress(f"exporting and checking {option}", i / len(options))
        paths = [folder / str(i) / name for name in ("model.onnx", "model.xml")]
        try:
            shipments[option] = ship_all(model, paths, example=images)
        except VitreousError as reason:
            refused = reason
            notes.append(f"{option} was not shipped: {reason}")
            continue
        for path in paths:
            for precision in ("bf16", None) if path.suffix == ".xml" and multiplies_bf16() else (None,):
                trials.append(Trial(option, path, precision, Runtime(path, threads=threads, precision=precision)))
                if goal.macs is not None or goal.memory is not None:
                    costs = cost(option, model, images[np.arange(goal.batches[0]) % len(images)])
                    trials[-1].macs, trials[-1].memory = costs.macs, costs.memory
                trials[-1].power = None if goal.energy is None else power(model, images[:1])
    if not trials:
        raise refused or VitreousError("there is nothing to ship")
    return trials, shipments


def timed(
    trials: list[Trial],
    net: nn.Module,
    images: Tensor,
    goal: Goal,
    progress: Callable[[str, float], None],
    seconds: float = SECONDS,
) -> None:
    """Fill in the times of all trials, interleaved, and their energy where it has a limit; the original runs along where a
    speedup is asked for, or energy can be measured."""
    calls: dict[str, Callable[[Tensor], object]] = {t.name: t.runtime for t in trials}
    counters = Counters() if goal.energy is not None else None
    if goal.speedup is not None or (counters and counters.there):
        calls["original"] = net
    spent: dict[str, list[float]] = {name: [] for name in calls}
    medians: dict[str, list[float]] = {name: [] for name in calls}
    for i, batch in enumerate(goal.batches):
        x = images[np.arange(batch) % len(images)]
        runs = {name: (lambda call=call, x=x: call(x)) for name, call in calls.items()}
        if counters and counters.there and i == 0:
            runs = {name: _metered(run, counters, spent[name]) for name, run in runs.items()}
        told = lambda done, i=i: progress("trying the ways to run it", (i + done) / len(goal.batches))
        found = interleave(runs, seconds=seconds / len(goal.batches), tick=told)
        for name, taken in found.items():
            medians[name].append(float(np.median(taken)) * 1000 / batch)
    for trial in trials:
        trial.times = tuple(medians[trial.name])
        if goal.speedup is not None:
            trial.speedups = tuple(a / b for a, b in zip(medians["original"], trial.times, strict=True))
    if counters:
        whole = float(np.mean(spent["original"])) if counters.there else power(net, images[:1])
        for trial in trials:
            took = float(np.mean(spent[trial.name])) if counters.there else trial.power
            trial.energy = took / whole if took is not None and whole else None


def _metered(run: Callable[[], object], counters: Counters, spent: list[float]) -> Callable[[], object]:
    """`run`, which adds to `spent` the joules of each call: steps of a counter's millisecond, right in the mean."""

    def call() -> object:
        before = counters()
        made = run()
        spent.append(counters() - before)
        return made

    return call


def best(trials: list[Trial], goal: Goal, notes: list[str], loss: Callable[[Trial], Loss | None]) -> Trial:
    """The fastest trial within the budget; with targets, of those that reach them the one that loses least. Where nothing does,
    the closest, which is said. What a trial loses is asked only where it decides, in the order of what they cost."""
    within: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.cost(goal), t.time)):
        trial.lost = loss(trial)
        if trial.keeps(goal):
            within.append(trial)
            if not goal.targets:
                return trial
    if not within:
        chosen = min(trials, key=lambda t: t.lost.value if t.lost else 0.0)
        notes.append(f"{MISSED}keeps to the budget: {chosen.name} comes closest, with {chosen.lost}")
        return chosen
    reaching = [t for t in within if t.reaches(goal)]
    if reaching:
        return min(reaching, key=lambda t: (t.lost.value if t.lost else 0.0, t.time))
    chosen = within[0]
    got = f"{chosen.times[0]:.2g} ms an image at batch {goal.batches[0]}, {chosen.runtime.bytes / 1e6:.1f} MB"
    got += f", {chosen.speedup:.2g} times the speed" if chosen.speedups else ""
    got += f", {chosen.macs:.3g} MACs" if chosen.macs is not None else ""
    got += f", {chosen.memory / 1e6:.1f} MB of memory" if chosen.memory is not None else ""
    got += f", {chosen.energy:.2g} of the energy" if chosen.energy is not None else ""
    notes.append(f"{MISSED}within the budget reaches {goal.targets}: {chosen.name} comes closest, {got}")
    return chosen


def kept(chosen: Trial, trials: list[Trial], shipments: dict[str, list[Shipment]], folder: Path, notes: list[str]) -> Runtime:
    """Leave only the files of the chosen option in `folder`, and say how the others did; the chosen file, ready to run."""
    for s in shipments[chosen.option]:
        for file in s.files:
            file.replace(folder / file.name)
        notes.append(str(replace(s, path=Path(s.path.name))))
    for parent in {t.path.parent for t in trials}:
        shutil.rmtree(parent, ignore_errors=True)
    notes.append(f"shipped as {chosen.name}; beside it, on the images to choose on:")
    for t in trials:
        lost = f", {t.lost}" if t.lost else ""
        notes.append(f"{t.name}: {t.time / chosen.time:.2f} × its time{lost}")
    return Runtime(folder / chosen.path.name, threads=chosen.runtime.threads, precision=chosen.precision)
