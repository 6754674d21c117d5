"""Kill what writes at random moments, and look at what is left: nothing half, nothing mixed, nothing in the next run's way.

    python benchmarks/reliability.py --kills 100 --out docs/results/reliability.json
    python benchmarks/reliability.py --table docs/results/reliability.json

Each run is forked from a process that has read the libraries, starts over what an earlier one wrote, and gets SIGKILL after a
time drawn evenly from how long the whole run takes, over and over until all kills are done. After each kill the place must hold
the files of one whole run, the earlier one's or the killed one's, which load and compute what that run's model computes; then the
work is done again in full, and no hidden file may be left beside it. `train` goes on from its checkpoint and must end in the very
weights of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
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
from safetensors.torch import load_file

import vitreous as vt
from vitreous.cli import main as command
from vitreous.data import open_data
from vitreous.files import write_whole
from vitreous.processor import saturates

KEEPS = (0.5, 0.8)  # the earlier run and the one that is killed: of two runs one can tell the files


class Halves(Exception):
    """What is left is half, or of two runs."""


def model(keep: float) -> torch.nn.Module:
    return vt.slim(vt.open(), vt.tokens.EViT(keep=keep))


def expected() -> tuple[torch.Tensor, list[torch.Tensor]]:
    x = open_data("sample", limit=8).tensor(range(8))
    with torch.no_grad():
        return x, [model(keep)(x) for keep in KEEPS]


def which(got: torch.Tensor, wanted: list[torch.Tensor], what: str) -> int:
    """The number of the run whose model answers so."""
    near = [i for i, w in enumerate(wanted) if (got - w).abs().max() < 1e-3]
    if len(near) != 1:
        raise Halves(f"{what} computes what neither run's model computes")
    return near[0]


class Saving:
    name = "save"

    def work(self, place: Path, run: int) -> None:
        vt.save(model(KEEPS[run]), place / "model.safetensors")

    def look(self, place: Path) -> int:
        x, wanted = expected()
        with torch.no_grad():
            return which(vt.load(place / "model.safetensors")(x), wanted, "model.safetensors")


class Shipping:
    name = "ship"

    def work(self, place: Path, run: int) -> None:
        vt.ship(model(KEEPS[run]), place / "model.xml", overwrite=True)

    def look(self, place: Path) -> int:
        x, wanted = expected()
        return which(vt.Runtime(place / "model.xml")(x), wanted, "model.xml")


class Slimming:
    name = "slim"

    def work(self, place: Path, run: int) -> None:
        words = ["slim", "--steps", f"EViT(keep={KEEPS[run]})", "--limit", "8", "--calibrate", "4", "--out", str(place / "out")]
        sys.argv = ["vitreous", *words, "--overwrite"]
        with contextlib.suppress(SystemExit):
            command()

    def look(self, place: Path) -> int:
        x, wanted = expected()
        with torch.no_grad():
            runs = {which(vt.load(place / "out" / "model.safetensors")(x), wanted, "model.safetensors")}
        runs |= {which(vt.Runtime(place / "out" / name)(x), wanted, name) for name in ("model.xml", "model.onnx")}
        proof, report = json.loads((place / "out" / "proof.json").read_text()), (place / "out" / "report.html").read_text()
        runs |= {i for i, keep in enumerate(KEEPS) if f"EViT(keep={keep})" in report}
        if len(runs) != 1 or not proof["models"]:
            raise Halves("the folder holds files of two runs")
        return runs.pop()


class Training:
    """`benchmarks/train_bundled.py`, two epochs of few pictures; a killed run goes on."""

    name = "train"

    def __init__(self) -> None:
        spec = importlib.util.spec_from_file_location("train_bundled", Path(__file__).parent / "train_bundled.py")
        assert spec and spec.loader
        self.script: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.script)
        self.data = Path(tempfile.mkdtemp())
        rng = np.random.default_rng(0)
        for stem, n in (("train", 64), ("t10k", 16)):
            for kind, sizes, content in (
                ("images-idx3", (n, 28, 28), rng.integers(0, 256, n * 784, np.uint8).tobytes()),
                ("labels-idx1", (n,), bytes(i % 10 for i in range(n))),
            ):
                head = bytes([0, 0, 8, len(sizes)]) + b"".join(s.to_bytes(4, "big") for s in sizes)
                (self.data / f"{stem}-{kind}-ubyte").write_bytes(head + content)
        self.whole = self.data / "whole"
        forked(lambda: self.train(self.whole))

    def train(self, out: Path) -> None:
        words = ["train_bundled.py", "--out", str(out), "--data", str(self.data), "--device", "cpu"]
        sys.argv = [*words, "--epochs", "3", "--batch", "16"]
        self.script.main()

    def work(self, place: Path, run: int) -> None:
        if run == 0:  # there is nothing before a run that goes on
            return
        self.train(place / "out")

    def look(self, place: Path) -> int:
        if (last := place / "out" / "last.pt").exists():
            torch.load(last, weights_only=True)
            rows = [json.loads(line) for line in (place / "out" / "log.jsonl").read_text().splitlines()]
            if [r["epoch"] for r in rows] != list(range(1, len(rows) + 1)):
                raise Halves("the log is not one run's")
        if not (place / "out" / "model.safetensors").exists():
            return 0
        one, other = load_file(place / "out" / "model.safetensors"), load_file(self.whole / "model.safetensors")
        if any(not torch.equal(one[k], other[k]) for k in other):
            raise Halves("a killed training ends elsewhere than one that nobody killed")
        return 1


def forked(work: Callable[[], None], after: float | None = None) -> float:
    """Run `work` in a process of its own, killed after so many seconds; how long it lasted, negative when it was killed."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    while after is None or time.monotonic() - began < after:
        if os.waitpid(child, os.WNOHANG)[0]:
            return time.monotonic() - began
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -(time.monotonic() - began)


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


def beside(place: Path) -> list[str]:
    return sorted(p.name for p in place.rglob(".*"))


def try_out(job: Any, kills: int, seed: int) -> dict[str, Any]:
    rng = random.Random(f"{seed} {job.name}")
    root = Path(tempfile.mkdtemp())
    first = root / "first"
    first.mkdir()
    forked(lambda: job.work(first, 0))
    took = []
    for i in range(2):
        shutil.copytree(first, root / f"timed{i}")
        took.append(forked(lambda i=i: job.work(root / f"timed{i}", 1)))
    row: dict[str, Any] = {"work": job.name, "seconds": round(max(took), 2), "kills": 0, "old": 0, "new": 0, "half or mixed": 0}
    row |= {"left aside": 0, "then in the way": 0}
    while row["kills"] < kills:
        place = root / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(first, place)
        if forked(lambda place=place: job.work(place, 1), rng.uniform(0, 1.05 * max(took))) > 0:
            continue  # it was through before
        row["kills"] += 1
        row["left aside"] += bool(beside(place))
        found = looked(job, place)
        row[("old", "new")[found] if isinstance(found, int) else "half or mixed"] += 1
        forked(lambda place=place: job.work(place, 1))
        again = looked(job, place)
        clean = again == 1 and not beside(place)
        for wrong in (found, again):
            if isinstance(wrong, str):
                print(f"{job.name}: {wrong}", flush=True)
        row["then in the way"] += not clean
    shutil.rmtree(root)
    return row


def table(results: dict[str, Any]) -> str:
    columns = list(results["rows"][0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(r[c]) for c in columns) + " |" for r in results["rows"]])


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} cores, {'without' if saturates() else 'with'} VNNI"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=100, help="of each kind of work")
    p.add_argument("--only", action="append", choices=("save", "ship", "slim", "train"))
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, help="JSON to write")
    p.add_argument("--table", type=Path, help="print the table of such a JSON file, and run nothing")
    a = p.parse_args()
    if a.table:
        print(table(json.loads(a.table.read_text())))
        return
    torch.set_num_threads(1)
    jobs: dict[str, Callable[[], Any]] = {"save": Saving, "ship": Shipping, "slim": Slimming, "train": Training}
    rows = []
    results = {"machine": machine(), "date": str(datetime.date.today()), "seed": a.seed, "vitreous": vt.__version__, "rows": rows}
    results |= {"torch": str(torch.__version__), "python": platform.python_version()}
    for name in a.only or jobs:
        rows.append(try_out(jobs[name](), a.kills, a.seed))
        print(table(results).splitlines()[-1], flush=True)
        if a.out:
            write_whole(a.out, json.dumps(results, indent=1) + "\n")
    sys.exit(any(r["half or mixed"] or r["then in the way"] for r in rows))


if __name__ == "__main__":
    main()
