"""Token steps and pruning beside their papers' claims: a ViT trained to its end, slimmed, and healed for as long as it gains.

    python benchmarks/claims.py queue --data cifar10-jpeg --dinov2 dinov2_vits14_224.safetensors --device cuda --processes 4
    python benchmarks/claims.py tables  # Markdown

The model is DINOv2 ViT-S/14 on 140 × 140 pixels (100 patches), all its weights trained on 45,000 pictures of CIFAR-10 (JPEG):
class folders train/ and test/. Each arm starts from what it became, is slimmed, and taught by `vitreous.heal` for `times` ×
`--epochs`; so is the original, which is the baseline. What each answers to every test image is kept, so that differences are
paired. A queue that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from lessons.bench import read
from side_by_side import failed, work_through, written
from torch import Tensor, nn

import vitreous as vt
from vitreous.prove.cost import macs
from vitreous.prove.machine import describe
from vitreous.prove.statistics import paired_difference
from vitreous.prune.subnet import Choice, Subnet, sort_units
from vitreous.steps import Recipe, history_of

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "claims.json"
BASELINE = {1: "original, as long", 2: "original, twice as long"}
SIDE = 140


@dataclass(frozen=True)
class Arm:
    """What is done to the original, and how many times `--epochs` it is healed; `uniform` (heads, share of hidden units) in every
    block alike, in place of steps."""

    steps: str
    times: int = 1
    uniform: tuple[int, float] | None = None


ARMS = {
    BASELINE[1]: Arm(""),
    "EViT": Arm("EViT(keep=0.7)"),
    "ten times, a": Arm("NViT(keep=0.5), EViT(keep=0.5, at=(2, 4, 6))", 2),
    "SemanticTokens": Arm("SemanticTokens(tokens=16)", 2),
    "TokenSlimming": Arm("TokenSlimming(keep=0.5, at=(4, 6, 8))", 2),
    "MCTF": Arm("MCTF(r=8)"),
    "NViT": Arm("NViT(keep=0.54)"),
    "uniform": Arm("", uniform=(4, 0.475)),
    "EViT, half": Arm("EViT(keep=0.5)", 2),
    BASELINE[2]: Arm("", 2),
    "ToMe": Arm("ToMe(r=7)"),
    "ten times, b": Arm("NViT(keep=0.35), EViT(keep=0.5, at=(2, 4, 6))", 2),
    "RandomChoice": Arm("RandomChoice(keep=0.7)"),
    "UniformPooling": Arm("UniformPooling()"),
    "Sparsifiner": Arm("Sparsifiner(budget=0.25)", 2),
}


def enlarged(small: Tensor) -> Tensor:
    """Pictures `[B, 3, 32, 32]` as the bench reads them, at the size and mean that the model knows."""
    mean, std = (torch.tensor(v, device=small.device)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (small + 2) * 64 / 255
    return (F.interpolate(pixels, SIDE, mode="bicubic", antialias=True).clamp(0, 1) - mean) / std


def original(weights: Path | None) -> nn.Module:
    """DINOv2's ViT-S with a new classifier; without weights, random ones."""
    torch.manual_seed(0)
    model = vt.open("vit_small_patch14_dinov2", img_size=SIDE, num_classes=10)
    if weights:
        model.load_state_dict(
            vt.open("vit_small_patch14_dinov2", checkpoint=weights, img_size=SIDE, num_classes=0).state_dict(), strict=False
        )
    return model


def slimmed(model: nn.Module, arm: Arm, images: Tensor) -> nn.Module:
    if arm.uniform is None:
        return vt.slim(model, Recipe.parse(arm.steps).steps, images) if arm.steps else model
    heads, share = arm.uniform
    depth, hidden = len(model.blocks), model.blocks[0].mlp.fc2.in_features
    sorted_ = sort_units(vt.slim(model, ()), images)
    return Subnet.of(Choice(depth, (heads,) * depth, (round(share * hidden),) * depth)).apply(sorted_)


_held: dict[str, Any] = {}


def _begin(a: argparse.Namespace) -> Callable[[tuple[str, int]], dict[str, Any]]:
    """Each process holds the pictures, on the device."""
    torch.set_num_threads(a.threads)
    torch.set_float32_matmul_precision("high")
    train = read(a.data / "train", a.train, a.kept / f"train-{a.train}.npz")
    test = read(a.data / "test", a.test, a.kept / f"test-{a.test}.npz")
    large = torch.cat([enlarged(part.to(a.device)) for part in train[0].split(1000)])
    _held.update(a=a, train=(large, train[1].to(a.device)), test=test)
    return _do


def _answers(model: nn.Module) -> np.ndarray:
    a, (x, _) = _held["a"], _held["test"]
    model = copy.deepcopy(model).to(a.device).eval()
    with torch.inference_mode():
        return torch.cat([model(enlarged(p.to(a.device))).argmax(1).cpu() for p in x.split(250)]).numpy().astype(np.uint8)


def _teach(model: nn.Module, epochs: float, lr: float, seed: int, teacher: nn.Module | None) -> nn.Module:
    """`heal`, or `train` without a teacher; compiled where the objective runs the model without looking into it."""
    a = _held["a"]
    given: dict[str, Any] = dict(batch=a.batch, epochs=epochs, optimiser=vt.learn.AdamW(lr=lr), seed=seed, warmup=0.1)
    given["augment"] = "shift"
    if a.device == "cuda":
        looks = {"tokens.TokenSlimming", "tokens.MCTF", "tokens.Sparsifiner"}
        compiled = not looks & {s.name for s in history_of(model).steps()}
        given |= dict(accelerator="cuda", precision="bf16-mixed")
        if compiled:
            try:
                return _taught(model, teacher, given | {"compiled": True})
            except Exception:
                print(f"not compiled: {traceback.format_exc()[-1500:]}", flush=True)
    return _taught(model, teacher, given)


def _taught(model: nn.Module, teacher: nn.Module | None, given: dict[str, Any]) -> nn.Module:
    return vt.train(model, _held["train"], **given) if teacher is None else vt.heal(model, teacher, _held["train"], **given)


def _do(job: tuple[str, int]) -> dict[str, Any]:
    name, seed = job
    if name != "original":
        return _arm(name, seed)
    a = _held["a"]
    model = _teach(original(a.dinov2), a.first, a.lr, seed, None)
    vt.save(model, a.kept / f"original-{seed}.safetensors")
    np.savez(a.kept / f"answers-original-{seed}.npz", healed=_answers(model))
    return {}


def _arm(name: str, seed: int) -> dict[str, Any]:
    a, arm = _held["a"], ARMS[name]
    whole = vt.load(a.kept / f"original-{seed}.safetensors")
    place = a.device if "NViT" in arm.steps else "cpu"  # its gradients take long
    some = _held["train"][0][:64].to(place)
    small = slimmed(whole.to(place), arm, some).cpu()
    whole, some = whole.cpu(), some.cpu()
    untrained, cost = _answers(small), macs(small, some[:1])
    healed = _teach(small, a.epochs * arm.times, a.lr, seed + 1000, whole)
    vt.save(healed, a.kept / f"{name.replace(', ', '-')}-{seed}.safetensors")
    np.savez(a.kept / f"answers-{name}-{seed}.npz", healed=_answers(healed), untrained=untrained)
    return {"macs": cost, "of": macs(whole, some[:1]), "recipe": arm.steps or str(arm.uniform or ""), "times": arm.times}


def queue(a: argparse.Namespace) -> None:
    """The originals first, then every arm with every seed that is not there yet, until `--seconds` are over: then what runs is
    given up."""
    for part, n in (("train", a.train), ("test", a.test)):
        read(a.data / part, n, a.kept / f"{part}-{n}.npz")  # decoded once, not by every process
    found: dict[str, Any] = json.loads(a.results.read_text()) if a.results.exists() else {}
    labels, until = np.load(a.kept / f"test-{a.test}.npz")["y"], time.monotonic() + a.seconds
    device = torch.cuda.get_device_name() if a.device == "cuda" else describe()["cpu"]
    stamp = {"device": device, "torch": torch.__version__, "timm": timm.__version__, "date": time.strftime("%Y-%m-%d")}
    stamp |= {k: getattr(a, k) for k in ("first", "epochs", "lr", "batch", "train", "test")}
    for names in (["original"], a.only or list(ARMS)):
        started = [s for s in range(a.seeds) if names == ["original"] or f"original/{s}" in found]
        left = [(n, s) for s in started for n in names if f"{n}/{s}" not in found]
        for job, made, wrong, seconds in work_through(left, _begin, (a,), a.processes, until):
            if wrong is not None:
                failed(a.results, job, wrong, seconds)
                continue
            name, seed = job
            answers = np.load(a.kept / f"answers-{name}-{seed}.npz")
            right = {k: int((answers[k] == labels).sum()) for k in answers.files}
            found[f"{name}/{seed}"] = made | right | stamp | {"seconds": seconds}
            _pair(found, a.kept, labels)
            written(a.results, found)
            print(f"{name}, seed {seed}: {found[f'{name}/{seed}']}", flush=True)


def _pair(found: dict[str, Any], kept: Path, labels: np.ndarray) -> None:
    """Of each arm: test images that it lost and gained against the original taught as long, from the same start."""
    for key, made in found.items():
        name, seed = key.rsplit("/", 1)
        if name == "original":
            continue
        both = [kept / f"answers-{n}-{seed}.npz" for n in (name, BASELINE[ARMS[name].times])]
        if all(p.exists() for p in both):
            mine, base = (np.load(p)["healed"] == labels for p in both)
            made |= {"lost": int((base & ~mine).sum()), "gained": int((mine & ~base).sum())}


def tables(a: argparse.Namespace) -> None:
    """One row an arm: sums over the seeds, the interval over images."""
    found: dict[str, Any] = json.loads(a.results.read_text())
    print("| | recipe | MACs | untrained % | healed % | Δ points [95 %] |\n|---|---|---|---|---|---|")
    for name in ("original", *ARMS):
        runs = [r for k, r in found.items() if k.rsplit("/", 1)[0] == name]
        if not runs:
            continue
        n = sum(r["test"] for r in runs)
        right = f"{100 * sum(r['healed'] for r in runs) / n:.2f}"
        if name == "original":
            print(f"| original | – | 100 % | – | {right} | – |")
            continue
        shown = "–"
        if name not in BASELINE.values() and all("lost" in r for r in runs):
            d = paired_difference(sum(r["lost"] for r in runs), sum(r["gained"] for r in runs), n)
            shown = f"{100 * d.value:+.2f} [{100 * d.low:+.2f}, {100 * d.high:+.2f}]"
        untrained = f"{100 * sum(r['untrained'] for r in runs) / n:.2f}"
        r = runs[0]
        print(f"| {name} | `{r['recipe'] or '–'}` | {100 * r['macs'] / r['of']:.0f} % | {untrained} | {right} | {shown} |")
    print(
        "\n"
        + ", ".join(f"{k} {r[k]}" for k in ("device", "torch", "timm", "date", "first", "epochs", "lr", "batch", "train", "test"))
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    whats = {"queue": queue, "tables": tables}
    p.add_argument("what", choices=whats)
    p.add_argument("--data", type=Path)
    p.add_argument("--dinov2", type=Path)
    p.add_argument("--device", default="cpu")
    p.add_argument("--processes", type=int, default=1)
    p.add_argument("--threads", type=int, default=2, help="of each process")
    p.add_argument("--seconds", type=float, default=1e9, help="then what runs is given up")
    p.add_argument("--seeds", type=int, default=1)
    p.add_argument("--only", nargs="*", choices=ARMS)
    p.add_argument("--first", type=float, default=6, help="epochs of the original")
    p.add_argument("--epochs", type=float, default=2, help="of healing, where an arm takes them once")
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--batch", type=int, default=256)
    p.add_argument("--train", type=int, default=45_000)
    p.add_argument("--test", type=int, default=10_000)
    p.add_argument("--kept", type=Path, default=Path("runs/claims"), help="pictures, models, answers")
    p.add_argument("--results", type=Path, default=RESULTS)
    a = p.parse_args()
    a.kept.mkdir(parents=True, exist_ok=True)
    whats[a.what](a)


if __name__ == "__main__":
    main()
