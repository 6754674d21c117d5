"""The figures of docs/supernet.md: networks designed, stitched, and cut from supernets.

    python benchmarks/supernet.py queue --data sample --seconds 240    # goes on where it stopped
    python benchmarks/supernet.py queue --only proxies widths supernet --data cifar10-jpeg --device cuda --processes 4 --batch 256
    python benchmarks/supernet.py tables                               # docs/results/supernet.json as Markdown

An entry is a function of the data and a seed to named figures; the first seed of all comes before the second of any. Networks are
small, trained for `--epochs` from scratch, and measured on images that trained nothing and chose nothing. `proxies`, which trains
24 architectures, runs when it is asked for.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lessons.bench import Pair, read
from scipy.stats import kendalltau, rankdata
from side_by_side import failed, work_through, written
from torch import nn

import vitreous as vt
from vitreous.data import training_data
from vitreous.learn.measure import accuracy_on
from vitreous.models.deepmad import Stage
from vitreous.prove.cost import macs
from vitreous.prove.machine import describe
from vitreous.prune.subnet import Space, Subnet, sort_units
from vitreous.search.nets import as_vit, deepmad, stitch

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "supernet.json"
NETS = 24
Figures = dict[str, dict[str, float]]
QUEUE: dict[str, Callable[[argparse.Namespace, int], Figures]] = {}
SHAPES = ((96, 40, 5, 1), (384, 40, 5, 6), (384, 64, 5, 9), (1024, 104, 3, 10, 1), (672, 104, 5, 12))
R18 = deepmad.Structure(tuple(Stage(*shape) for shape in SHAPES))


def entry(run: Callable[[argparse.Namespace, int], Figures]) -> Callable[[argparse.Namespace, int], Figures]:
    QUEUE[run.__name__] = run
    return run


def trained(model: nn.Module, images: Pair, a: argparse.Namespace, seed: int, objective: Any = ()) -> nn.Module:
    given = dict(epochs=a.epochs, batch=a.batch, augment=None, seed=seed, accelerator=a.device)
    return vt.learn.train(model, images, objective, **given).to(a.device)


def pictures(a: argparse.Namespace) -> tuple[Pair, Pair]:
    """To train on and to measure by, on the device: the sample's, or `--images` of a folder with `train/` and `test/`."""
    return _pictures(a.data, a.images, a.kept, a.device)


@cache
def _pictures(data: str, images: int, kept: Path, device: str) -> tuple[Pair, Pair]:
    if Path(data).is_dir():
        found = [read(Path(data) / part, n, kept / f"{part}-{n}.npz") for part, n in (("train", images), ("test", 10_000))]
    else:
        held = training_data(data, vt.open("vit_tiny_patch16_224", img_size=28, in_chans=1))
        found = [(part.tensor(range(len(part))), torch.as_tensor(part.labels)) for part in held]
    first, second = ((x.to(device), y.to(device)) for x, y in found)
    return first, second


def vit(width: int, depth: int, images: Pair, seed: int) -> nn.Module:
    _, channels, side, _ = images[0].shape
    torch.manual_seed(seed)
    shape = dict(img_size=side, in_chans=channels, patch_size=side // 4, num_classes=10)
    return vt.open("vit_tiny_patch16_224", embed_dim=width, depth=depth, num_heads=4, **shape)


@entry
def designed(a: argparse.Namespace, seed: int) -> Figures:
    """DeepMAD's program against the structure that the authors released, within what that one takes."""
    released = deepmad.figures(R18)
    began = time.monotonic()
    found = deepmad.figures(deepmad.design(released.flops, released.params, 0.3, seed=seed))
    told = lambda f: {"score": f.score, "rho": f.effectiveness, "GFLOPs": f.flops / 1e9, "M": f.params / 1e6}
    return {"released": told(released), "designed": {**told(found), "seconds": time.monotonic() - began}}


@entry
def stitched(a: argparse.Namespace, seed: int) -> Figures:
    """Two trained ViTs stitched: the front of routes by least squares alone, and after training on routes."""
    images, check = pictures(a)
    small, large = (trained(vit(width, 4, images, seed), images, a, seed) for width in (48, 96))
    nets: dict[str, Any] = {"least squares": stitch.stitch(small, large, images[0][:100], 16)}
    nets["trained"] = trained(nets["least squares"], images, a, seed, vt.learn.Stitched())
    found: Figures = {}
    for name, net in nets.items():
        routes = stitch.measure(net, check)
        best = stitch.front(routes)
        middle = [m for m in routes if net.macs(0) < m.macs < net.macs(1)]
        found[name] = {
            "small %": 100 * next(m.accuracy for m in routes if m.route == 0),
            "large %": 100 * next(m.accuracy for m in routes if m.route == 1),
            "best between %": 100 * max(m.accuracy for m in middle),
            "worst between %": 100 * min(m.accuracy for m in middle),
            "on the front": len(best),
            "routes": len(routes),
        }
    return found


@entry
def supernet(a: argparse.Namespace, seed: int) -> Figures:
    """Sub-networks of a ViT after InstaTune, after plain training of as many epochs, and of that one after sorting."""
    return subnetworks(a, seed, 1.0)


@entry
def widths(a: argparse.Namespace, seed: int) -> Figures:
    """The same, the tokens from half as wide."""
    return subnetworks(a, seed, 0.5)


def subnetworks(a: argparse.Namespace, seed: int, width: float) -> Figures:
    images, check = pictures(a)
    model = vit(64, 4, images, seed)
    plain = trained(model, images, a, seed)
    tuned = trained(model, images, a, seed, vt.learn.InstaTune(depth=2, width=width))
    sorted_ = sort_units(vt.slim(plain, ()), images[0][:64])
    space, draw = Space.of(plain, 2, width=width), random.Random(seed)
    choices = [space.smallest, *(space.draw(draw) for _ in range(9))]
    found: Figures = {}
    for name, net in (("plain", plain), ("plain, sorted", sorted_), ("InstaTune", tuned)):
        scores = [100 * (accuracy_on(Subnet.of(c).apply(net), check) or 0.0) for c in choices]
        whole = 100 * (accuracy_on(net, check) or 0.0)
        found[name] = {"whole %": whole, "ten sub-networks, mean %": float(np.mean(scores)), "smallest %": scores[0]}
    return found


def proxy(a: argparse.Namespace, seed: int, i: int) -> list[float]:
    """Of the net number `i` of As-ViT's space: accuracy, κ below zero, length, parameters, MACs."""
    draw, options = random.Random(seed), as_vit.choices()
    genotype = [as_vit._written(options, [draw.randrange(len(o)) for o in options], 32) for _ in range(i + 1)][-1]
    torch.manual_seed(seed)
    model = vt.open("as_vit_seed", img_size=32, num_classes=10, genotype=as_vit.numbers(genotype))
    cost, size = macs(model, torch.zeros(1, 3, 32, 32)), sum(p.numel() for p in model.parameters())
    told = as_vit.complexity(genotype, inits=3, seed=seed)
    images, check = pictures(a)
    accuracy = accuracy_on(trained(model, images, a, seed), check, 256) or 0.0
    return [accuracy, -told.kappa, told.length, float(size), float(cost)]


def proxies(rows: list[list[float]], seed: int) -> Figures:
    """Kendall's τ of As-ViT's measures, of parameters and of MACs with the accuracy of `NETS` nets trained alike, with its 95 %
    interval over draws of nets."""
    accuracy, *measures = np.array(rows).T
    both = sum(rankdata(m) for m in measures[:2])  # As-ViT's sum of ranks
    named = dict(
        zip(("smaller κ", "length", "both ranks", "parameters", "MACs"), (*measures[:2], both, *measures[2:]), strict=True)
    )
    again = np.random.default_rng(seed).integers(0, len(rows), (1000, len(rows)))
    tau = lambda x, some: float(getattr(kendalltau(x[some], accuracy[some]), "statistic"))  # noqa: B009  no field of scipy's type
    found: Figures = {}
    for name, x in named.items():
        low, high = np.nanpercentile([tau(x, some) for some in again], (2.5, 97.5))
        found[name] = {"τ": tau(x, np.arange(len(rows))), "from": float(low), "to": float(high)}
    return found | {"(accuracy, %)": {"τ": 100 * accuracy.mean(), "from": 100 * accuracy.min(), "to": 100 * accuracy.max()}}


def _begin(a: argparse.Namespace) -> Callable[[tuple[str, int, int]], Any]:
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # of a GPU: products in TF32
    return lambda job: proxy(a, *job[1:]) if job[0] == "proxies" else QUEUE[job[0]](a, job[1])


def queue(a: argparse.Namespace) -> None:
    """What the results have not yet; each net of `proxies` is a piece of work of its own, kept in a file beside the results."""
    held: dict[str, Any] = json.loads(a.results.read_text()) if a.results.exists() else {}
    a.results.parent.mkdir(parents=True, exist_ok=True)
    beside = a.results.with_name("proxies.json")
    rows: dict[str, list[float]] = json.loads(beside.read_text()) if beside.exists() else {}
    of_net = lambda seed, i: f"{a.data}, {a.epochs:g} epochs, seed {seed}, net {i}"
    left: list[tuple[str, int, int]] = []
    for seed in range(a.seeds):
        for name in a.only or QUEUE:
            if str(seed) not in held.get(name, {}):
                pieces = range(NETS if name == "proxies" else 1)
                left += [(name, seed, i) for i in pieces if name != "proxies" or of_net(seed, i) not in rows]
    if left and Path(a.data).is_dir():
        pictures(argparse.Namespace(**{**vars(a), "device": "cpu"}))  # are read once, not by every process
    for job, made, wrong, seconds in work_through(left, _begin, (a,), a.processes, time.monotonic() + a.seconds):
        name, seed, i = job
        if wrong is not None:
            failed(a.results, job, wrong, seconds)
            continue
        print(f"{name}, seed {seed}, {i}: {seconds:.0f} s", flush=True)
        if name == "proxies":
            rows[of_net(seed, i)] = made
            written(beside, rows)
            mine = [rows[of_net(seed, j)] for j in range(NETS) if of_net(seed, j) in rows]
            if len(mine) < NETS:
                continue
            made = proxies(mine, seed)
        stamp = {"cpu": describe()["cpu"], "device": a.device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        stamp |= {"epochs": a.epochs, "seconds": seconds, "data": Path(a.data).name}
        held.setdefault(name, {})[str(seed)] = {"arms": made, **stamp}
        written(a.results, held)


def tables(a: argparse.Namespace) -> None:
    for name, runs in json.loads(a.results.read_text()).items():
        arms = next(iter(runs.values()))["arms"]
        columns = list(dict.fromkeys(k for arm in arms.values() for k in arm))
        print(f"\n| {name} | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
        for arm in arms:
            values = [np.mean([r["arms"][arm].get(c, np.nan) for r in runs.values()]) for c in columns]
            print(f"| {arm} | " + " | ".join("–" if np.isnan(v) else f"{v:.5g}" for v in values) + " |")
        r = next(iter(runs.values()))
        print(f"\n{len(runs)} seed(s), {r['data']}, {r['epochs']:g} epochs, {r['cpu']}, torch {r['torch']}, {r['date']}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("queue", "tables"))
    parser.add_argument("--data", default="sample")
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--only", nargs="+", choices=(*QUEUE, "proxies"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--images", type=int, default=45_000, help="of a folder, to train on")
    parser.add_argument("--kept", type=Path, default=Path("runs/learn"), help="the pictures of a folder, read")
    parser.add_argument("--results", type=Path, default=RESULTS)
    a = parser.parse_args()
    (queue if a.what == "queue" else tables)(a)


if __name__ == "__main__":
    main()
