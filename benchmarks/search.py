"""The figures of docs/search.md. Each piece is written into docs/results/search.json as it is done; what is there is not redone.

    python benchmarks/search.py fronts --minutes 5        # the Pareto front of each axis alone, and of all together
    python benchmarks/search.py peers                     # Torch-Pruning and NNCF in the same runtime (the bench extra)
    python benchmarks/search.py predictor                 # from the trials of `fronts`: latencies told before they were measured
    python benchmarks/search.py systems                   # what each step of prune/ loses: accuracy alone, no times
    python benchmarks/search.py tables                    # docs/results/search.json into docs/search.md

`fronts` and `peers` time: run them on a machine that does nothing else. A front stopped in its middle goes on from its folder.
The bundled model on Fashion-MNIST's sample: 40 % of its 1,000 test pictures choose, the rest prove; 128 others calibrate.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor, nn

import vitreous as vt
from vitreous.prove import compare, interleave
from vitreous.prove.machine import describe
from vitreous.search import Goal
from vitreous.search.front import Point
from vitreous.search.split import split
from vitreous.steps import Recipe
from vitreous.store import open_model

DOCS = Path(__file__).parent.parent / "docs"
AXES = {
    "tokens": ["tokens", "runtime"],
    "heads": ["heads", "runtime"],
    "hidden units": ["mlp", "runtime"],
    "integers": ["bits", "runtime"],
    "all": ["tokens", "heads", "mlp", "bits", "runtime"],
}
BUDGETS = (0.0, 0.5, 1.0, 2.0)  # points of accuracy at which fronts are compared
SYSTEMS: dict[str, Sequence[Any]] = {
    "Heads, a quarter gone": [vt.prune.Heads(share=0.25)],
    "NViT, 80 % of the time": [vt.prune.NViT(keep=0.8)],
    "Divergence, 80 % of each kind": [vt.prune.Divergence(keep=0.8)],
    "LPViT, 70 % of the products": [vt.prune.LPViT(keep=0.7)],
    "LPViT without power": [vt.prune.LPViT(keep=0.7, power=False)],
    "LPViT as released": [vt.prune.LPViT(keep=0.7, released=True)],
    "2:4": [vt.prune.TwoFour()],
    "2:4 both ways": [vt.prune.TwoFour(both=True)],
    "Sparse then Prune, 30 %": [vt.prune.SparseThenPrune(share=0.3)],
    "Sparse then Prune, 50 %": [vt.prune.SparseThenPrune(share=0.5)],
}


OURS: dict[str, Sequence[Any]] = {  # beside the peers
    "ours: NViT, 85 % of the time": [vt.prune.NViT(keep=0.85)],
    "ours: NViT, 70 % of the time": [vt.prune.NViT(keep=0.7)],
    "ours: NViT, 50 % of the time": [vt.prune.NViT(keep=0.5)],
    "ours: RepQ int8": [vt.quant.RepQ()],
    "ours: EViT in the first block": [vt.tokens.EViT(keep=0.2, at=(0,))],
}


class Results:
    """What is known, by table and row; on disk after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, table: str, row: str, make: Callable[[], Any]) -> None:
        rows = self.held.setdefault(table, {})
        if row in rows:
            return
        rows[row] = {"value": make(), "machine": describe(), "date": str(date.today())}
        self.path.write_text(json.dumps(self.held, indent=1, default=str) + "\n")
        print(f"{table}: {row}", flush=True)


def told(point: Point) -> dict[str, Any]:
    shown = {k: getattr(point, k) for k in ("engine", "ms", "first", "lost", "error", "unit", "bytes", "macs", "predicted")}
    return {"recipe": str(Recipe(point.steps)), **shown}


def fronts(a: argparse.Namespace, results: Results) -> None:
    for name, axes in AXES.items():
        if a.only and name not in a.only:
            continue

        def one(name: str = name, axes: list[str] = axes) -> dict[str, Any]:
            began = time.monotonic()
            found = vt.search.search(
                open_model(None), goal=Goal(budget=1.0), axes=axes, minutes=a.minutes, threads=a.threads,
                out=a.work / name.replace(" ", "-"), seed=a.seed,
            )  # fmt: skip
            chosen = found.proof["shipped"].answers.difference
            proof = None if chosen is None else (chosen.value, chosen.low, chosen.high)
            points, took = [told(p) for p in found.all], (time.monotonic() - began) / 60
            return {"original": found.original, "points": points, "proof": proof, "minutes": took}

        results.once("fronts", name, one)


def predictor(a: argparse.Namespace, results: Results) -> None:
    """Mean error on recipes that were not yet measured when their time was told, and what picking by it costs.

    Picking: of random fives of these recipes, by how much the one told fastest is slower than the fastest; also by MACs."""

    def one() -> dict[str, Any]:
        points = [p for f in results.held.get("fronts", {}).values() for p in f["value"]["points"] if p["predicted"]]
        if len(points) < 8:
            raise SystemExit(f"{len(points)} predicted recipes: run fronts first, with more minutes")
        guess, ms, macs = (np.array([p[k] for p in points], float) for k in ("predicted", "ms", "macs"))
        draw = np.random.default_rng(a.seed)
        fives = [draw.choice(len(points), 5, replace=False) for _ in range(2000)]
        slower = lambda by: float(np.mean([ms[f[np.argmin(by[f])]] / ms[f].min() - 1 for f in fives]))
        tau = lambda by: float(cast(Any, kendalltau(by, ms)).statistic)
        return {
            "recipes": len(points),
            "error": float(np.mean(np.abs(guess / ms - 1))),
            "tau": {"predicted": tau(guess), "MACs": tau(macs)},
            "slower": {"predicted": slower(guess), "MACs": slower(macs)},
        }

    results.once("predictor", "held out", one)


def judged(models: dict[str, Any], batches: Any, classes: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """What each loses against the first, in points of accuracy, with its paired 95 % interval."""
    found = compare(models, batches, classes=classes)[0]
    rows = {}
    for name in list(models)[1:]:
        off = found[name].difference
        assert off is not None
        rows[name] = (-100 * off.value, -100 * off.high, -100 * off.low)
    return rows


def systems(a: argparse.Namespace, results: Results) -> None:
    net = open_model(None)
    images = split("sample", net, choosing=False, seed=a.seed)
    data = images.prove
    batches = [(x, y.numpy()) for x, y in data.batches(64)]
    for name, steps in SYSTEMS.items():

        def one(name: str = name, steps: Sequence[Any] = steps) -> dict[str, Any]:
            small = vt.slim(net, steps, images.calibrate)
            lost = judged({"original": net, name: small}, batches, data.classes)[name]
            weights = sum(int((p != 0).sum()) for p in small.parameters()) / sum(p.numel() for p in net.parameters())
            return {"lost": lost, "weights": weights, "steps": str(Recipe(tuple(steps))), "images": len(data), "seed": a.seed}

        results.once("systems", name, one)


def peers(a: argparse.Namespace, results: Results) -> None:
    """Others' pruning and integers of the same model, and ours, in OpenVINO, timed in turns with the original there."""
    net = open_model(None)
    images = split("sample", net, choosing=False, seed=a.seed)
    batches = [(x, y.numpy()) for x, y in images.prove.batches(64)]
    x = images.prove.tensor(range(16))

    def measured(name: str, made: nn.Module | Any) -> dict[str, Any]:
        a.work.mkdir(parents=True, exist_ok=True)
        run = made
        if isinstance(made, nn.Module):
            vt.ship(made, a.work / "peer.xml", example=images.calibrate[:16], overwrite=True)
            run = vt.Runtime(a.work / "peer.xml", threads=a.threads)
        vt.ship(net, a.work / "original.xml", example=images.calibrate[:16], overwrite=True)
        beside = vt.Runtime(a.work / "original.xml", threads=a.threads)
        taken = {"batch 1": x[:1], "batch 16": x}
        ms = {}
        for batch, given in taken.items():
            calls = {"original": lambda given=given: beside(given), name: lambda given=given: run(given)}
            times = interleave(calls, seconds=a.seconds)
            ms[batch] = [float(np.median(times[k])) * 1000 / len(given) for k in ("original", name)]
        return {"lost": judged({"original": net, name: run}, batches, images.prove.classes)[name], "ms": ms}

    for share in (0.1, 0.2, 0.3):
        made = lambda share=share: measured("tp", torch_pruning(net, images.calibrate[:64], share))
        results.once("peers", f"Torch-Pruning, {share:.0%}", made)
    from spine import nncf_int8

    original = a.work / "original.xml"
    results.once("peers", "NNCF int8", lambda: measured("nncf", nncf_int8(original, images.calibrate, a.threads)))
    for name, steps in OURS.items():
        made = lambda name=name, steps=steps: measured(name, vt.slim(net, steps, images.calibrate))
        results.once("peers", name, made)


def torch_pruning(net: nn.Module, x: Tensor, share: float) -> nn.Module:
    """Its Taylor importance over groups, heads whole, as its own example for ViTs."""
    import copy

    import torch_pruning as tp  # pyright: ignore[reportMissingImports]

    model: Any = copy.deepcopy(net).requires_grad_()
    heads = {b.attn.qkv: b.attn.num_heads for b in model.blocks}
    pruner = tp.pruner.MetaPruner(
        model, x[:1], importance=tp.importance.TaylorImportance(), pruning_ratio=share, ignored_layers=[model.head],
        num_heads=heads, prune_num_heads=False, prune_head_dims=True, global_pruning=False,
    )  # fmt: skip
    out = model(x)
    nn.functional.cross_entropy(out, out.argmax(1)).backward()
    pruner.step()
    for b in model.blocks:
        b.attn.head_dim = b.attn.qkv.out_features // (3 * b.attn.num_heads)
        b.attn.attn_dim = b.attn.head_dim * b.attn.num_heads
    return model.zero_grad(set_to_none=True) or model.eval()


# ---- tables


def of_systems(rows: dict[str, Any]) -> str:
    lines = ["| step | points lost (95 %) | weights left |", "|---|---|---|"]
    for name, row in rows.items():
        lost, low, high = row["value"]["lost"]
        lines.append(f"| {name} | {lost:+.1f} ({low:+.1f} … {high:+.1f}) | {row['value']['weights']:.0%} |")
    return "\n".join(lines)


def of_fronts(rows: dict[str, Any]) -> str:
    lines = ["| may change | " + " | ".join(f"at most {b:g}" for b in BUDGETS) + " | recipes | minutes |"]
    lines.append("|---" * (len(BUDGETS) + 3) + "|")
    for name, row in rows.items():
        value = row["value"]
        first = float(np.exp(np.mean(np.log(value["original"]))))
        within = [[p for p in value["points"] if p["lost"] <= b] for b in BUDGETS]
        cells = [f"{first / min(p['ms'] for p in some):.2f} ×" if some else "–" for some in within]
        recipes = len({p["recipe"] for p in value["points"]})
        lines.append(f"| {name} | {' | '.join(cells)} | {recipes} | {value['minutes']:.0f} |")
    return "\n".join(lines)


def of_predictor(rows: dict[str, Any]) -> str:
    v = rows["held out"]["value"]
    lines = ["| told by | mean error | Kendall's τ | pick of five slower than the fastest by |", "|---|---|---|---|"]
    lines.append(f"| predictor | {v['error']:.1%} | {v['tau']['predicted']:.2f} | {v['slower']['predicted']:.1%} |")
    lines.append(f"| MACs | – | {v['tau']['MACs']:.2f} | {v['slower']['MACs']:.1%} |")
    return "\n".join(lines) + f"\n\n{v['recipes']} recipes in a runtime each."


def of_peers(rows: dict[str, Any]) -> str:
    lines = ["| | points lost (95 %) | times the original in OpenVINO, batch 1 | batch 16 |", "|---|---|---|---|"]
    for name, row in rows.items():
        lost, low, high = row["value"]["lost"]
        fast = [f"{t[0] / t[1]:.2f} ×" for t in row["value"]["ms"].values()]
        lines.append(f"| {name} | {lost:+.1f} ({low:+.1f} … {high:+.1f}) | {' | '.join(fast)} |")
    return "\n".join(lines)


def tables(a: argparse.Namespace, results: Results) -> None:
    """Between `<!-- table NAME -->` and `<!-- end -->` of docs/search.md."""
    page = DOCS / "search.md"
    text = page.read_text()
    made = {"systems": of_systems, "fronts": of_fronts, "predictor": of_predictor, "peers": of_peers}
    for name, rows in results.held.items():
        if name in made and rows:
            body = made[name](rows)
            text = re.sub(f"(<!-- table {name} -->\n).*?(<!-- end -->)", lambda m, b=body: f"{m[1]}{b}\n{m[2]}", text, flags=re.S)
    page.write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fronts", "peers", "predictor", "systems", "tables"])
    parser.add_argument("--results", type=Path, default=DOCS / "results" / "search.json")
    parser.add_argument("--work", type=Path, default=Path("runs/search"))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=AXES, help="of the fronts")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    globals()[given.what](given, Results(given.results))
