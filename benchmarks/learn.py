"""What the training engine costs over a bare loop of PyTorch: the figures of docs/learn.md.

    python benchmarks/learn.py overhead --rounds 6 --steps 24     # ViT of DeiT-Ti's width and 6 blocks on 64 × 64 pictures
    python benchmarks/learn.py memory                             # peak of a process that trains, each way in one of its own

`overhead` takes turns: a round of one, a round of the other, in an order drawn anew; a step is timed from one to the next,
the first two of a round left out. Each prints Markdown.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitreous as vt
from vitreous.prove.machine import describe
from vitreous.prove.statistics import median_ratio


def student(size: int) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=8, depth=6, num_classes=10)


def pictures(n: int, size: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 3, size, size, generator=g), torch.randint(0, 10, (n,), generator=g)


def bare(a: argparse.Namespace) -> list[float]:
    """The loop that anyone would write: AdamW, clipping, a schedule; seconds of each step."""
    model, (x, y) = student(a.size).train(), pictures(a.steps * a.batch, a.size)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, a.steps)
    order, took = torch.randperm(len(x)), []
    for places in order.split(a.batch):
        start = time.perf_counter()
        loss = F.cross_entropy(model(x[places]), y[places])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        loss.item()
        took.append(time.perf_counter() - start)
    return took[2:]


def engine(a: argparse.Namespace) -> list[float]:
    at: list[float] = []
    data = pictures(a.steps * a.batch, a.size)
    vt.train(student(a.size), data, epochs=1, batch=a.batch, augment=None, progress=lambda *_: at.append(time.perf_counter()))
    return np.diff(at)[1:].tolist()


def overhead(a: argparse.Namespace) -> None:
    ways, draw = {"bare": bare, "engine": engine}, np.random.default_rng(0)
    took: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(argparse.Namespace(**{**vars(a), "steps": 4}))
    for _ in range(a.rounds):
        for i in draw.permutation(2):
            name = list(ways)[i]
            took[name].append(float(np.median(ways[name](a))))
    ratio = median_ratio(np.array(took["engine"]), np.array(took["bare"]))
    print("| | ms a step | share of a bare step |\n|---|---|---|")
    print(f"| bare loop | {1000 * np.median(took['bare']):.1f} | – |")
    said = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
    print(f"| `vt.train` | {1000 * np.median(took['engine']):.1f} | {said} |")


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
    p.add_argument("what", choices=("overhead", "memory"))
    p.add_argument("--rounds", type=int, default=6)
    p.add_argument("--steps", type=int, default=24)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--size", type=int, default=64)
    a = p.parse_args()
    {"overhead": overhead, "memory": memory}[a.what](a)
    here = describe()
    print(f"\n{here['cpu']}, {torch.get_num_threads()} threads, {time.strftime('%Y-%m-%d')}, seed 0, torch {torch.__version__}")


if __name__ == "__main__":
    main()
