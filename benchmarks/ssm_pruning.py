"""Tokens dropped from a state space model that is not trained for it: what is chosen, and whether memories fade on.

    python benchmarks/ssm_pruning.py --data DIR --out runs/ssm-pruning

Trains a small Adventurer (49 patches, width 64, 4 blocks, with convolutions for patches) on Fashion-MNIST once, and keeps it in
--out; then drops patches in three blocks, with each score, with and without hidden state alignment. Random choice is drawn three
times. Times are those of torch, interleaved. Each row is kept in --out: a run that was stopped goes on. Writes
docs/results/ssm-pruning.json and prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from token_architectures import fashion, patches, taught
from tokens import DOCS
from torch import Tensor, nn

import vitreous as vt
from vitreous.models.adventurer import Adventurer
from vitreous.prove.cost import macs
from vitreous.prove.machine import describe

AT = (0, 1, 2)
KEEP = (0.9, 0.7, 0.5)


def made(x: Tensor, y: Tensor, a: argparse.Namespace) -> nn.Module:
    torch.manual_seed(a.seed)
    model = Adventurer(img_size=28, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=4)
    model.patch_embed = cast(PatchEmbed, patches())
    loss = lambda images, labels, _: F.cross_entropy(model(images), labels)
    return taught(model, "adventurer", loss, x, y, a)


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.inference_mode():
        return 100 * float(torch.cat([model(part).argmax(1) for part in x.split(250)]).eq(y).float().mean())


def seconds(models: list[nn.Module], x: Tensor, rounds: int) -> list[float]:
    """The least of `rounds` interleaved passes of each."""
    best = [float("inf")] * len(models)
    with torch.inference_mode():
        for _ in range(rounds):
            for i, model in enumerate(models):
                began = time.perf_counter()
                model(x)
                best[i] = min(best[i], time.perf_counter() - began)
    return best


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path)
    p.add_argument("--out", type=Path, default=Path("runs/ssm-pruning"))
    p.add_argument("--train", type=int, default=6000)
    p.add_argument("--test", type=int, default=2000)
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    a.out.mkdir(parents=True, exist_ok=True)
    x, y = fashion("train", a)
    pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(a.seed))[: a.train]
    model = made(x[pick], y[pick], a)
    x, y = (part[: a.test] for part in fashion("test", a))
    say = lambda steps: right(vt.slim(model, steps), x, y)
    kept = a.out / "rows.json"
    rows: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    whole = macs(model, x[:1])
    if "all" not in rows:
        rows["all"] = {"accuracy": right(model, x, y), "macs": whole}
    print(f"not pruned: {rows['all']['accuracy']:.2f} % right, {whole / 1e6:.1f} MMACs\n")
    print("| keep | MACs | torch ×, b64 | clipped, aligned | clipped | signed, aligned | signed | random, aligned | random |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for share in KEEP:
        row = rows.get(str(share)) or {}
        for score in ("clipped", "signed", "random"):
            for align in (True, False):
                seeds = range(3) if score == "random" else (0,)
                name = f"{score}{', aligned' if align else ''}"
                row[name] = row.get(name) or [say(vt.tokens.SSMPruning(share, AT, align, score, s)) for s in seeds]
                rows[str(share)] = row
                kept.write_text(json.dumps(rows))
        if "speed" not in row:
            small = vt.slim(model, vt.tokens.SSMPruning(share, AT))
            times = seconds([model, small], x[:64], 30)
            row |= {"macs": macs(small, x[:1]) / whole, "speed": times[0] / times[1]}
            kept.write_text(json.dumps(rows))
        cells = [f"{sum(row[k]) / len(row[k]):.2f}" for k in row if k not in ("macs", "speed")]
        print(f"| {share} | {100 * row['macs']:.0f} % | {row['speed']:.2f} | {' | '.join(cells)} |", flush=True)
    result = {"train": a.train, "epochs": a.epochs, "test": a.test, "seed": a.seed, "machine": describe(), "rows": rows}
    (DOCS / "results" / "ssm-pruning.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
