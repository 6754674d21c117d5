"""Kill what writes at random moments, and look at what is left: nothing half, nothing mixed, nothing in the next run's way.

    python benchmarks/reliability.py --kills 100 --out docs/results/reliability.json                 # goes on where it was
    python benchmarks/reliability.py --table docs/results/reliability.json

Each run is forked from a process that has read the libraries, works over what the runs before it left, and gets SIGKILL. The
moment is drawn evenly from the time that a run takes; every other one from the last quarter of it, where files are written and
take their places. After each kill the place must hold the files of one whole run, the one before or the killed one, which load
and compute what that run's model computes. Every tenth run is let through: it must succeed, and no hidden file may be left.
`train` goes on from its checkpoint and must end in the very weights of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import vitreous as vt
from vitreous.cli import main as command
from vitreous.files import write_whole
from vitreous.processor import saturates
from vitreous.search import job as search_job
from vitreous.ship.export import trace

SHAPE: dict[str, Any] = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=1, num_classes=2)
KEEPS = (0.25, 0.5)  # the two runs that take turns: by them one can tell whose the files are
PAUSE, LIMIT = 0.001, 300.0  # seconds: between two looks at a run, and after which it hangs
THROUGH = 10  # every so many runs one is let through
COUNTS = ("kills", "old", "new", "half or mixed", "left aside", "let through", "failed")


class Halves(Exception):
    """What is left is half, or of two runs."""


class Writing:
    """What the jobs that write files have in common: two models that a look can tell apart."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        base = vt.open("vit_tiny_patch16_224", **SHAPE)
        for p in base.parameters():
            if p.ndim > 1:
                torch.nn.init.normal_(p, std=0.3)
        self.home = Path(tempfile.mkdtemp())
        self.base = self.home / "base.safetensors"
        vt.save(base, self.base)
        self.models = [vt.slim(base, vt.tokens.EViT(keep=keep, at=(0,))) for keep in KEEPS]
        self.x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            self.wanted = [m(self.x) for m in self.models]
        trace(self.models[0], self.x, dynamic=True)  # what the exporter sets up once, it need not in every fork

    def which(self, answer: Callable[[torch.Tensor], torch.Tensor], what: str) -> int:
        """The number of the run whose model answers so."""
        with torch.no_grad():
            got = answer(self.x)
        near = [i for i, w in enumerate(self.wanted) if (got - w).abs().max() < 1e-4 * w.abs().max()]
        if len(near) != 1:
            raise Halves(f"{what} computes what neither run's model computes")
        return near[0]


class Saving(Writing):
    def work(self, place: Path, run: int) -> None:
        vt.save(self.models[run], place / "model.safetensors")

    def look(self, place: Path) -> int:
        return self.which(vt.load(place / "model.safetensors"), "model.safetensors")


class Shipping(Writing):
    def work(self, place: Path, run: int) -> None:
        vt.ship(self.models[run], place / "model.xml", overwrite=True)

    def look(self, place: Path) -> int:
        return self.which(vt.Runtime(place / "model.xml"), "model.xml")


class Slimming(Writing):
    """The command, with pictures of noise and no patience for timing."""

    def __init__(self) -> None:
        super().__init__()
        search_job.SECONDS = 0.01
        rng = np.random.default_rng(0)
        for i in range(24):
            picture = self.home / "pictures" / ("odd" if i % 2 else "even") / f"{i}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(picture)

    def work(self, place: Path, run: int) -> None:
        steps = f"EViT(keep={KEEPS[run]}, at=(0,))"
        words = ["slim", str(self.base), "--data", str(self.home / "pictures"), "--steps", steps, "--out", str(place / "out")]
        sys.argv = ["vitreous", *words, "--limit", "8", "--calibrate", "4", "--overwrite"]
        try:
            command()
        except SystemExit as stop:
            if stop.code:
                raise Halves(f"the command ended with {stop.code}") from None

    def look(self, place: Path) -> int:
        out = place / "out"
        runs = {self.which(vt.load(out / "model.safetensors"), "model.safetensors")}
        runs |= {self.which(vt.Runtime(out / name), name) for name in ("model.xml", "model.onnx")}
        report = (out / "report.html").read_text()
        runs |= {i for i, keep in enumerate(KEEPS) if f"EViT(keep={keep}" in report}
        if len(runs) != 1 or not json.loads((out / "proof.json").read_text())["models"]:
            raise Halves("the folder holds files of two runs")
        return runs.pop()


class Training:
    """`vitreous.train`: a killed run goes on. Run 1 is the whole of it; what lies there is 1 when it is done."""

    def __init__(self) -> None:
        self.whole = Path(tempfile.mkdtemp()) / "whole"
        forked(lambda: self.work(self.whole, 1))

    def work(self, place: Path, run: int) -> None:
        g = torch.Generator().manual_seed(0)
        data = torch.randn(64, 3, 32, 32, generator=g), torch.randint(0, 2, (64,), generator=g)
        torch.manual_seed(0)
        model = vt.open("vit_tiny_patch16_224", **SHAPE)
        vt.train(model, data, vt.learn.CrossEntropy(), epochs=6, batch=16, check=data, out=place / "out", seed=0)

    def look(self, place: Path) -> int:
        out = place / "out"
        if (out / "last.pt").exists():
            torch.load(out / "last.pt", weights_only=True)
        if (out / "best.safetensors").exists():
            vt.load(out / "best.safetensors")
        if not (out / "model.safetensors").exists():
            return 0
        one, other = load_file(out / "model.safetensors"), load_file(self.whole / "out" / "model.safetensors")
        if any(not torch.equal(one[k], other[k]) for k in other):
            raise Halves("a killed training ends elsewhere than one that nobody killed")
        return 1


JOBS: dict[str, Callable[[], Any]] = {"save": Saving, "ship": Shipping, "slim": Slimming, "train": Training}


# ---- runs in processes of their own


def forked(work: Callable[[], None], after: float = LIMIT) -> tuple[str, float]:
    """Run `work` in a process of its own, killed after so many seconds.

    How it ended ("done", "failed", "hung" or "killed"), and how long it lasted.
    """
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, "a fork of a process with threads may wait for ever for one of them"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch makes its pool anew in a fork when it is first asked for: not by two threads at once
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            try:
                work()
                os._exit(0)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
    while (lasted := time.monotonic() - began) < after:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return ("failed" if status else "done"), lasted
        time.sleep(PAUSE)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return ("hung" if after >= LIMIT else "killed"), lasted


def looked(job: Any, place: Path) -> int | str:
    """What `job` finds there, found in a process of its own (threads of a runtime do not survive a fork); or what is wrong."""
    tell, told = os.pipe()

    def look() -> None:
        try:
            found: Any = job.look(place)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        os.write(told, json.dumps(found).encode()[:4000])

    forked(look)
    os.close(told)
    with open(tell) as read:
        return json.loads(read.read() or '"nothing was found out"')


def try_out(job: Any, row: dict[str, Any], kills: int, seed: int, until: float, keep: Callable[[], None]) -> None:
    """Go on with `row` to so many kills, or until that time."""
    root = Path(tempfile.mkdtemp())
    place = root / "place"
    fresh = isinstance(job, Training)

    def begin() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if not fresh and (ended := forked(lambda: job.work(place, 0)))[0] != "done":
            raise SystemExit(f"{row['work']}: a run that nobody killed {ended[0]}")

    begin()
    took = forked(lambda: job.work(place, 1))[1]
    row["seconds"] = round(took, 2)
    begin()
    has, runs = 0, row["kills"] + row["let through"]
    while row["kills"] < kills and time.monotonic() < until:
        rng = random.Random(f"{seed} {row['work']} {runs}")
        runs += 1
        through = runs % THROUGH == 0
        moment = took * (rng.uniform(0.75, 1.02) if runs % 2 else rng.uniform(0, 1.02))
        wanted = 1 if fresh else 1 - has
        ended, lasted = forked(lambda wanted=wanted: job.work(place, wanted), LIMIT if through else moment)
        if ended == "done":
            took = lasted
        hidden = sorted(p.name for p in place.rglob(".*"))
        found = looked(job, place)
        row["kills"] += ended == "killed"
        row["let through"] += ended == "done"
        row["left aside"] += ended == "killed" and bool(hidden)
        if ended in ("failed", "hung") or (ended == "done" and (hidden or found != wanted)):
            row["failed"] += 1
            print(f"{row['work']}: a run {ended}, and left {found!r} and {hidden}", flush=True)
        if isinstance(found, str):
            row["half or mixed"] += 1
            print(f"{row['work']}: {found}", flush=True)
        elif ended == "killed":
            row["old" if found == has else "new"] += 1
        has = found if isinstance(found, int) else 0
        if isinstance(found, str) or (fresh and found == 1):
            begin()
            has = 0
        keep()
    shutil.rmtree(root)


def table(results: dict[str, Any]) -> str:
    columns = ("work", "seconds", *COUNTS)
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(r[c]) for c in columns) + " |" for r in results["rows"].values()])


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} cores, {'without' if saturates() else 'with'} VNNI"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=100, help="of each kind of work")
    p.add_argument("--only", action="append", choices=tuple(JOBS))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; the next call goes on")
    p.add_argument("--out", type=Path, help="JSON to write, and to go on from")
    p.add_argument("--table", type=Path, help="print the table of such a JSON file, and run nothing")
    a = p.parse_args()
    if a.table:
        print(table(json.loads(a.table.read_text())))
        return
    torch.set_num_threads(1)
    until = time.monotonic() + a.seconds
    rows: dict[str, Any] = json.loads(a.out.read_text())["rows"] if a.out and a.out.exists() else {}
    results = {"machine": machine(), "date": str(datetime.date.today()), "seed": a.seed, "vitreous": vt.__version__, "rows": rows}
    results |= {"torch": str(torch.__version__), "python": platform.python_version()}

    def keep() -> None:
        if a.out:
            write_whole(a.out, json.dumps(results, indent=1) + "\n")

    for name in a.only or JOBS:
        row = rows.setdefault(name, {"work": name, "seconds": 0.0, **dict.fromkeys(COUNTS, 0)})
        if row["kills"] < a.kills and time.monotonic() < until:
            try_out(JOBS[name](), row, a.kills, a.seed, until, keep)
            print(table(results).splitlines()[-1], flush=True)
    sys.exit(any(r["half or mixed"] or r["failed"] for r in rows.values()))


if __name__ == "__main__":
    main()
