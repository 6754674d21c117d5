"""The figures of docs/learn.md: each system beside its baseline, and what the engine costs over a bare loop of PyTorch.

    python benchmarks/learn.py queue --data cifar10-jpeg --seconds 480    # folders train/ and test/; goes on where it stopped
    python benchmarks/learn.py queue --data cifar10-jpeg --scale large --device cuda --processes 8
    python benchmarks/learn.py tables                             # docs/results/learn.json into docs/learn.md
    python benchmarks/learn.py overhead --rounds 6 --steps 24     # ViT of DeiT-Ti's width and 6 blocks on 64 × 64 pictures
    python benchmarks/learn.py memory                             # peak of a process that trains, each way in one of its own

The queue is the functions of benchmarks/lessons/, each with every seed: the first seed of all comes before the second of any.
`overhead` takes turns: a round of one, a round of the other, in an order drawn anew; a step is timed from one to the next,
the first two of a round left out. On a busy machine read the time that the processor spent, which waiting does not lengthen.
Each prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lessons
import numpy as np
import timm
import torch
import torch.nn.functional as F
from lessons.bench import QUEUE, SCALES, Bench, apart
from side_by_side import failed, work_through, written
from torch import Tensor, nn

import vitreous as vt
from vitreous.prove.machine import describe
from vitreous.prove.statistics import median_ratio

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results" / "learn.json"


def _begin(data: Path | None, scale: str, device: str, kept: Path, threads: int) -> Callable[[tuple[str, int]], Any]:
    assert lessons  # which fill the queue
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high")  # of a GPU: products in TF32
    bench = Bench(data, SCALES[scale], device, kept)
    return lambda job: QUEUE[job[0]].run(bench, job[1])


def queue(a: argparse.Namespace) -> None:
    """Every experiment with every seed that the results have not yet, until `--seconds` are over: then what runs is given up.
    Longest first, as far as is known. What fails leaves what it said beside the results, and is tried again by the next queue."""
    held: dict[str, Any] = json.loads(a.results.read_text()) if a.results.exists() else {}
    a.results.parent.mkdir(parents=True, exist_ok=True)
    until, here = time.monotonic() + a.seconds, describe()
    of = {n: held.get(n, {}).get(a.scale, {}) for n in QUEUE}
    took = {n: max((r["seconds"] for r in runs.values()), default=1e9) for n, runs in of.items()}
    longest = sorted(a.only or QUEUE, key=lambda n: -took[n])
    left = [(n, s) for s in range(a.seeds) for n in longest if str(s) not in of[n]]
    given = a.data, a.scale, a.device, a.kept, a.threads
    Bench(a.data, SCALES[a.scale], "cpu", a.kept)  # pictures are read once, not by every process
    for job, arms, wrong, seconds in work_through(left, _begin, given, a.processes, until):
        name, seed = job
        if wrong is not None:
            failed(a.results, (name, a.scale, seed), wrong, seconds)
            continue
        stamp = {"cpu": here["cpu"], "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "device": a.device}
        held.setdefault(name, {}).setdefault(a.scale, {})[str(seed)] = {"arms": arms, "seconds": seconds, **stamp}
        written(a.results, held)
        print(f"{name}, seed {seed}: {seconds:.0f} s", flush=True)
    print(f"{sum(str(s) not in held.get(n, {}).get(a.scale, {}) for n, s in left)} left", flush=True)


def table(name: str, scale: str, runs: dict[str, Any]) -> str:
    """Arms by figures, means over the seeds; the first figure against the baseline's: paired by seed (Student's t, 95 %), or of
    fewer than three seeds by the test images alone, as if they were not the same, which is wider than paired."""
    seeds = sorted(runs, key=int)
    arms = runs[seeds[0]]["arms"]
    figures = list(dict.fromkeys(k for arm in arms.values() for k in arm if k != "gradients"))
    first, baseline = figures[0], QUEUE[name].baseline
    values = {arm: {k: np.array([runs[s]["arms"][arm].get(k, np.nan) for s in seeds]) for k in figures} for arm in arms}
    heads = ["", "gradients", f"{first} %", "Δ [95 %]", *figures[1:]]
    rows = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm, found in arms.items():
        judged = arm != baseline and not arm.startswith("(")
        shown = apart(values[arm][first] / 100, values[baseline][first] / 100, SCALES[scale].test) if judged else "–"
        cost = f"{found['gradients']:g} ×" if "gradients" in found else "–"
        rest = ["–" if np.isnan(v := values[arm][k].mean()) else f"{v:.3g}" for k in figures[1:]]
        rows.append("| " + " | ".join([arm, cost, f"{values[arm][first].mean():.1f}", shown, *rest]) + " |")
    kind = "paired by seed" if len(seeds) > 2 else "of the test images alone, without what another seed would change"
    said = f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}; intervals {kind}; scale"
    return "\n".join([*rows, "", f"{said} `{scale}`, {stamp_of(runs)}."])


def stamp_of(runs: dict[str, Any]) -> str:
    dates = sorted({r["date"] for r in runs.values()})
    where = ", ".join(sorted({r["cpu"] if r["device"] == "cpu" else r["device"] for r in runs.values()}))
    versions = ", ".join(sorted({r["torch"] for r in runs.values()}))
    return f"{where}, torch {versions}, {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")


def tables(a: argparse.Namespace) -> None:
    """Between `<!-- table NAME -->` and `<!-- end -->` of docs/learn.md; those that have no place there are printed."""
    page = DOCS / "learn.md"
    text = page.read_text()
    for name, scales in json.loads(a.results.read_text()).items():
        made = "\n\n".join(table(name, scale, runs) for scale, runs in scales.items())
        place = re.compile(f"(<!-- table {name} -->\n).*?(<!-- end -->)", re.S)
        if place.search(text):
            text = place.sub(lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text)
        else:
            print(f"<!-- table {name} -->\n{made}\n<!-- end -->\n")
    page.write_text(text)


def student(size: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=8, depth=6, num_classes=10)


def pictures(n: int, size: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=g), torch.randint(0, 10, (n,), generator=g)


def now() -> tuple[float, float]:
    """On the clock, and of the processor."""
    return time.perf_counter(), time.process_time()


def bare(a: argparse.Namespace) -> np.ndarray:
    """The loop that anyone would write: AdamW, clipping, a schedule; seconds of each step, `[steps, 2]` as `now`."""
    model, (x, y) = student(a.size).train(), pictures(a.steps * a.batch, a.size)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, a.steps)
    order, took = torch.randperm(len(x)), []
    for places in order.split(a.batch):
        start = now()
        loss = F.cross_entropy(model(x[places]), y[places])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        loss.item()
        took.append(np.subtract(now(), start))
    return np.array(took[2:])


def engine(a: argparse.Namespace) -> np.ndarray:
    at: list[tuple[float, float]] = []
    data = pictures(a.steps * a.batch, a.size)
    vt.train(student(a.size), data, epochs=1, batch=a.batch, augment=None, progress=lambda *_: at.append(now()))
    return np.diff(np.array(at), axis=0)[1:]


def overhead(a: argparse.Namespace) -> None:
    ways, draw = {"bare": bare, "engine": engine}, np.random.default_rng(0)
    took: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    for way in ways.values():
        way(argparse.Namespace(**{**vars(a), "steps": 4}))
    for _ in range(a.rounds):
        for i in draw.permutation(2):
            name = list(ways)[i]
            took[name].append(np.median(ways[name](a), axis=0))
    print("| | bare loop, ms a step | `vt.train` | ratio |\n|---|---|---|---|")
    for i, clock in enumerate(("on the clock", "of the processor")):
        loop, ours = (np.array(took[name])[:, i] for name in ("bare", "engine"))
        ratio = median_ratio(ours, loop)
        said = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        print(f"| {clock} | {1000 * np.median(loop):.1f} | {1000 * np.median(ours):.1f} | {said} |")


def _peak(way: str, a: argparse.Namespace, queue: multiprocessing.Queue) -> None:
    {"bare": bare, "engine": engine}[way](a)
    queue.put(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def memory(a: argparse.Namespace) -> None:
    context = multiprocessing.get_context("spawn")
    print("| | peak, MiB |\n|---|---|")
    for way in ("bare", "engine"):
        queue = context.Queue()
        process = context.Process(target=_peak, args=(way, a, queue))
        process.start()
        print(f"| {way} | {queue.get():.0f} |")
        process.join()


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whats = {"queue": queue, "tables": tables, "overhead": overhead, "memory": memory}
    p.add_argument("what", choices=whats)
    p.add_argument("--data", type=Path, help="class folders train/ and test/ of 32 × 32 pictures; drawn ones without")
    p.add_argument("--scale", choices=SCALES, default="small")
    p.add_argument("--device", default="cpu")
    p.add_argument("--seconds", type=float, default=1e9, help="what still runs then is given up")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--only", nargs="*", choices=QUEUE)
    p.add_argument("--processes", type=int, default=2)
    p.add_argument("--threads", type=int, default=1, help="of each process")
    p.add_argument("--kept", type=Path, default=Path("runs/learn"), help="teachers, starts and pictures")
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--rounds", type=int, default=6)
    p.add_argument("--steps", type=int, default=24)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--size", type=int, default=64)
    a = p.parse_args()
    whats[a.what](a)
    if a.what in ("overhead", "memory"):
        here = describe()
        print(
            f"\n{here['cpu']}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}, seed 0, torch {torch.__version__}"
        )


if __name__ == "__main__":
    main()
