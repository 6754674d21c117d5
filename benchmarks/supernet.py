"""The figures of docs/supernet.md: networks designed, stitched, and cut from supernets.

    python benchmarks/supernet.py queue --data sample --seconds 240    # goes on where it stopped
    python benchmarks/supernet.py queue --only proxies --data cifar10  # long: trains 24 architectures
    python benchmarks/supernet.py tables                               # docs/results/supernet.json as Markdown

An entry is a function of the data and a seed to named figures; the first seed of all comes before the second of any. Networks are
small, trained for `--epochs` from scratch, and measured on images that trained nothing and chose nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, rankdata
from torch import nn

import vitreous as vt
from vitreous.data import Data, training_data
from vitreous.learn.measure import accuracy_on
from vitreous.models.as_vit import AsViT
from vitreous.models.deepmad import Stage
from vitreous.prove.cost import macs
from vitreous.prove.machine import describe
from vitreous.prune.subnet import Space, Subnet, sort_units
from vitreous.search.nets import as_vit, deepmad, stitch

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "supernet.json"
Figures = dict[str, dict[str, float]]
QUEUE: dict[str, Callable[[argparse.Namespace, int], Figures]] = {}
SHAPES = ((96, 40, 5, 1), (384, 40, 5, 6), (384, 64, 5, 9), (1024, 104, 3, 10, 1), (672, 104, 5, 12))
R18 = deepmad.Structure(tuple(Stage(*shape) for shape in SHAPES))


def entry(run: Callable[[argparse.Namespace, int], Figures]) -> Callable[[argparse.Namespace, int], Figures]:
    QUEUE[run.__name__] = run
    return run


def trained(model: nn.Module, images: Data, a: argparse.Namespace, seed: int, objective: Any = ()) -> nn.Module:
    return vt.learn.train(model, images, objective, epochs=a.epochs, batch=64, augment=None, seed=seed)


def parts(model: nn.Module, a: argparse.Namespace) -> tuple[Data, Data]:
    return training_data(a.data, model)


def vit(width: int, depth: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    shape = dict(img_size=28, in_chans=1, patch_size=7, num_classes=10, embed_dim=width, depth=depth, num_heads=4)
    return vt.open("vit_tiny_patch16_224", **shape)


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
    small, large = vit(48, 4, seed), vit(96, 4, seed)
    images, check = parts(small, a)
    small, large = (trained(m, images, a, seed) for m in (small, large))
    nets: dict[str, Any] = {"least squares": stitch.stitch(small, large, images.tensor(range(min(100, len(images)))), 16)}
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
    model = vit(64, 4, seed)
    images, check = parts(model, a)
    plain = trained(model, images, a, seed)
    tuned = trained(model, images, a, seed, vt.learn.InstaTune(depth=2, width=width))
    sorted_ = sort_units(vt.slim(plain, ()), images.tensor(range(64)))
    space, draw = Space.of(plain, 2, width=width), random.Random(seed)
    choices = [space.smallest, *(space.draw(draw) for _ in range(9))]
    found: Figures = {}
    for name, net in (("plain", plain), ("plain, sorted", sorted_), ("InstaTune", tuned)):
        scores = [100 * (accuracy_on(Subnet.of(c).apply(net), check) or 0.0) for c in choices]
        whole = 100 * (accuracy_on(net, check) or 0.0)
        found[name] = {"whole %": whole, "ten sub-networks, mean %": float(np.mean(scores)), "smallest %": scores[0]}
    return found


@entry
def proxies(a: argparse.Namespace, seed: int) -> Figures:
    """Kendall's τ of As-ViT's measures, of parameters and of MACs with the accuracy of 24 nets trained alike, with its 95 %
    interval over draws of nets. What is done of each net is kept in `runs`, so that a run that was stopped goes on."""
    draw, options = random.Random(seed), as_vit.choices()
    kept = Path("runs") / f"proxies-{a.data}-{a.epochs:g}-{seed}.json"
    rows: list[list[float]] = json.loads(kept.read_text()) if kept.exists() else []
    for i in range(24):
        genotype = as_vit._written(options, [draw.randrange(len(o)) for o in options], 32)
        if i < len(rows):
            continue
        model = vt.open("as_vit_seed", img_size=32, num_classes=10, genotype=as_vit.numbers(genotype))
        images, check = parts(model, a)
        told = as_vit.complexity(genotype, inits=3, seed=seed)
        accuracy = accuracy_on(trained(model, images, a, seed), check) or 0.0
        assert isinstance(model, AsViT)
        cost = macs(model, torch.zeros(1, 3, 32, 32))
        size = float(sum(p.numel() for p in model.parameters()))
        rows.append([accuracy, -told.kappa, told.length, size, float(cost)])
        kept.parent.mkdir(exist_ok=True)
        kept.with_suffix(".part").write_text(json.dumps(rows))
        os.replace(kept.with_suffix(".part"), kept)
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
    return found


def queue(a: argparse.Namespace) -> None:
    held: dict[str, Any] = json.loads(a.results.read_text()) if a.results.exists() else {}
    until = time.monotonic() + a.seconds
    wanted = a.only or [n for n in QUEUE if n != "proxies"]
    left = [(n, s) for s in range(a.seeds) for n in wanted if str(s) not in held.get(n, {})]
    for name, seed in left:
        if time.monotonic() > until:
            break
        began = time.monotonic()
        arms = QUEUE[name](a, seed)
        stamp = {"cpu": describe()["cpu"], "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "data": a.data}
        held.setdefault(name, {})[str(seed)] = {"arms": arms, "epochs": a.epochs, "seconds": time.monotonic() - began, **stamp}
        aside = a.results.with_suffix(".part")
        aside.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n")
        os.replace(aside, a.results)
        print(f"{name}, seed {seed}: {time.monotonic() - began:.0f} s", flush=True)


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
    parser.add_argument("--only", nargs="+", choices=QUEUE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    a = parser.parse_args()
    (queue if a.what == "queue" else tables)(a)


if __name__ == "__main__":
    main()
