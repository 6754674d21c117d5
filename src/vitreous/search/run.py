"""`search`: the whole of `vitreous search`, and of `vitreous slim` without a recipe when it is given more time."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..files import writable, write_whole
from ..files.folders import folder, locked
from ..prove import Proof
from ..work import fingerprint
from .budget import Goal
from .choose import Chooser
from .explore import Explorer
from .front import Point, drawn, front, written
from .job import Job
from .record import Record
from .shared import SharedRecord, opened
from .space import space, told_by
from .trial import MISSED

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Found:
    """What a search found. front: from the point that loses least; `all`: every point measured. proof: of the shipped one, on
    images that chose nothing. original: milliseconds an image of the original in torch. notes, log: what one must know, and what
    was tried. missed: where nothing keeps to the budget or reaches the limits, that and what comes closest; else empty."""

    front: list[Point]
    all: list[Point]
    proof: Proof
    original: float
    notes: list[str]
    log: list[str]
    missed: str = ""


def search(
    model: nn.Module,
    data: str = "sample",
    *,
    goal: Goal | None = None,
    axes: Sequence[str] | None = None,
    minutes: float = 10.0,
    trials: int | None = None,
    out: str | Path = "vitreous-search",
    storage: str | None = None,
    plot: str | Path | None = None,
    limit: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    download: bool = False,
    progress: Progress = lambda what, share: None,
) -> Found:
    """Try combinations of token steps, removed heads and hidden units, integers and runtimes; ship the best within the budget.

    First comes what `vitreous slim` does by itself; then, as long as `minutes` (of all runs in this folder) and `trials` allow,
    what promises most by what each step loses alone and by a latency predicted from what was measured. `out` holds `trials.jsonl`
    (a search that was stopped goes on from it, repeating no trial), the front with its recipes, and in `best/` the shipped files
    with proof and report.

    storage: what is tried is kept there instead, for other processes and machines to share (`SharedRecord`): a database's URL, or
    a file that all can reach. Each of them needs an `out` of its own, has `minutes` of its own, and ships the best of all.

    Raises `VitreousError` for an axis that the model does not have, limits that no axis can help with, a model that is quantized
    already, and a folder or storage with the search of another model, of other images or of another kind of machine.
    """
    goal = goal or Goal()
    if not minutes >= 0 or (trials is not None and trials < 0):
        raise VitreousError("give a number of minutes, and of trials, of at least 0")
    if not minutes and trials:
        raise VitreousError(f"0 minutes leave no time for {trials} trials: give more minutes, or no trials")
    ladders, out = space(model, axes, goal), Path(out)
    if storage is not None:
        opened(storage)
    if plot is not None:
        writable(plot, overwrite=True, option="another --plot")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VitreousError(f"cannot write in {out}: {error.strerror or error}; give another --out") from error
    with locked(out), folder(out / "best", overwrite=True) as (aside, _):
        held: list[Explorer] = []

        def explored(chooser: Chooser, images: Tensor) -> dict[str, nn.Module]:
            _room(goal, images)
            about = _about(chooser, data, goal, threads)
            record = SharedRecord(storage, about) if storage is not None else Record(out / "trials.jsonl", about)
            held.append(Explorer(record, ladders, minutes, trials, aside / "tried", threads))
            return held[0].options(chooser, images)

        job = Job(aside, data, seed, threads, goal, limit, progress, options=explored)
        proof = job.run(model, None, download=download)
        points = held[0].points()
        on = front(points, goal)
        written(on, out)
        if plot is not None:
            title = f"{len(held[0].record.all('trial'))} recipes of {type(model).__name__}"
            write_whole(plot, drawn(points, goal, held[0].budget, title))
        original = held[0].original()
    mean = float(torch.tensor(original).log().mean().exp())
    missed = next((note for note in job.notes if note.startswith(MISSED)), "")
    return Found(on, points, proof, mean, job.notes, job.log, missed)


def _room(goal: Goal, images: Tensor) -> None:
    """Raise `VitreousError` where a batch of pictures alone takes more memory than may be taken."""
    needed = images[0].nbytes * goal.batches[0]
    if goal.memory is not None and needed > goal.memory * 1e6:
        raise VitreousError(
            f"{goal.memory * 1e6:.0f} bytes of memory do not hold a batch of {goal.batches[0]} pictures, which takes {needed}: "
            "allow more, or a smaller batch"
        )


def _about(chooser: Chooser, data: str, goal: Goal, threads: int | None) -> dict[str, Any]:
    """What a record is of, in words that a refusal can show."""
    batches = chooser.judge.batches
    cores = threads or torch.get_num_threads()
    return {
        "model": fingerprint(chooser.net)[:12],
        "set of images": f"{data} {fingerprint(batches[0][0], sum(len(x) for x, _ in batches), chooser.calibrate)[:12]}",
        "machine": f"{platform.machine()} {_processor()}, {cores} threads",
        "batch": list(goal.batches),
    } | ({} if goal.energy is None else {"way to tell energy": told_by().partition(" (")[0]})


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
