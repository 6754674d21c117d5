"""The figures of docs/pretrain.md: methods of pretraining at equal time, beside none and beside supervised training.

    python benchmarks/pretrain.py queue --data cifar10-jpeg --seconds 280  # folders train/ and test/; goes on where it stopped
    python benchmarks/pretrain.py queue --data cifar10-jpeg --dinov2 dinov2_vits14_224.safetensors --only EVA
    python benchmarks/pretrain.py tables  # docs/results/pretrain.json into docs/pretrain.md

Each arm pretrains the same small ViT on the same pictures without labels for `--budget` seconds of the processor's time (which
other programs do not lengthen): its steps are timed first, and the epochs are what fits. Then k-NN over the labelled pictures,
and fine-tuning on a tenth of the labels.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import timm
import torch
from lessons.bench import read
from torch import nn

import vitreous as vt
from vitreous.prove.machine import describe

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results" / "pretrain.json"
POOL, FEW, TEST, BATCH = 4000, 400, 1000, 64
ARMS = {
    "no pretraining": "",
    "SimMIM, squares of 4": "SimMIM(cell=4)",
    "SimMIM, squares of 8": "SimMIM(cell=8)",
    "GMML": "GMML()",
    "MAE": "MAE(width=64, depth=2, heads=4)",
    "SemAIM": "SemAIM()",
    "SemAIM, raster": "SemAIM(order='raster')",
    "SelfPatch": "SelfPatch(local=2, prototypes=512, patch_prototypes=256)",
    "POA": "POA(local=2, prototypes=(512,))",
    "Mask & Match": "MaskAndMatch()",
    "EVA": "EVA(mask=0.4)",
}


def vit(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    size = dict(img_size=32, patch_size=4, embed_dim=96, depth=4, num_heads=3, num_classes=0)
    return timm.create_model("vit_tiny_patch16_224", **size).eval()


def arm(name: str, seed: int, a: argparse.Namespace) -> dict[str, float]:
    x, y = read(a.data / "train", POOL, a.kept / f"train-{POOL}.npz")
    test = read(a.data / "test", TEST, a.kept / f"test-{TEST}.npz")
    model, found = vit(seed), {}
    if ARMS[name]:
        teacher = vt.open("vit_small_patch14_dinov2", checkpoint=a.dinov2, img_size=112, num_classes=0) if name == "EVA" else None
        augment = None if name in ("SelfPatch", "POA") else "shift"
        given: dict[str, Any] = dict(teacher=teacher, batch=BATCH, augment=augment, seed=seed, warmup=0.1)
        optimiser, said = vt.learn.AdamW(lr=1e-3), []
        steps = 8
        vt.pretrain(model, (x[:BATCH], None), ARMS[name], optimiser, epochs=1, say=said.append, **given)  # what is loaded once
        began = time.process_time()
        vt.pretrain(model, (x[: BATCH * steps], None), ARMS[name], optimiser, epochs=1, say=said.append, **given)
        a_step = (time.process_time() - began) / steps
        epochs = max(0.1, a.budget / a_step / (POOL // BATCH))
        began = time.process_time()
        model = vt.pretrain(model, (x, None), ARMS[name], optimiser, epochs=epochs, say=said.append, **given)
        found = {
            "seconds": time.process_time() - began,
            "epochs": epochs,
            "collapsed": float(bool(said and "epochs" not in said[-1])),
        }
    judged = vt.probe(model, (x, y), test, ("knn",), tokens="patches")
    few = x[:FEW], y[:FEW]
    tuned = vt.probe(model, few, test, ("finetune",), epochs=15, batch=32, augment="shift", layer_decay=0.75, seed=seed)
    return {"knn": judged["knn"], "finetune": tuned["finetune"], "rankme": judged["rankme"], "spread": judged["spread"], **found}


def queue(a: argparse.Namespace) -> None:
    """Every arm with every seed that the results have not yet, until `--seconds` are over."""
    torch.set_num_threads(a.threads)
    held: dict[str, Any] = json.loads(a.results.read_text()) if a.results.exists() else {}
    until = time.monotonic() + a.seconds
    names = a.only or [n for n in ARMS if n != "EVA" or a.dinov2]
    for seed in range(a.seeds):
        for name in names:
            if str(seed) in held.get(name, {}) or time.monotonic() > until:
                continue
            here = describe()
            stamp = {"cpu": here["cpu"], "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "budget": a.budget}
            held.setdefault(name, {})[str(seed)] = arm(name, seed, a) | {"stamp": stamp}
            aside = a.results.with_suffix(".part")
            aside.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n")
            os.replace(aside, a.results)
            print(name, seed, held[name][str(seed)], flush=True)


def tables(a: argparse.Namespace) -> None:
    """Writes the table between the marks of docs/pretrain.md."""
    held = json.loads(a.results.read_text())
    rows = ["| | k-NN % | 10 % of the labels, fine-tuned % | epochs in the time | RankMe |", "|---|---|---|---|---|"]
    for name in ARMS:
        if runs := list(held.get(name, {}).values()):
            mean = lambda k, runs=runs: sum(r.get(k, 0.0) for r in runs) / len(runs)
            epochs = f"{mean('epochs'):.1f}" if ARMS[name] else "–"
            rows.append(f"| {name} | {100 * mean('knn'):.1f} | {100 * mean('finetune'):.1f} | {epochs} | {mean('rankme'):.1f} |")
    page = DOCS / "pretrain.md"
    before, _, rest = page.read_text().partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- end -->\n")
    page.write_text(before + "<!-- table -->\n" + "\n".join(rows) + "\n<!-- end -->\n" + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["queue", "tables"])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--dinov2", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(ARMS))
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of the processor for an arm")
    parser.add_argument("--seconds", type=float, default=280.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--kept", type=Path, default=Path("/tmp/vitreous-pretrain"), help="folder of decoded pictures")
    a = parser.parse_args()
    a.kept.mkdir(parents=True, exist_ok=True)
    {"queue": queue, "tables": tables}[a.what](a)


if __name__ == "__main__":
    main()
