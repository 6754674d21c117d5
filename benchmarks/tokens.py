"""The figures of docs/tokens.md: every way to shorten the sequence, on one model, training-free and fine-tuned.

    python benchmarks/tokens.py speed                                     # ViT-S/16 at 224, random weights: MACs against speed
    python benchmarks/tokens.py bundled --data /usr/share/datasets/fashion-mnist
    python benchmarks/tokens.py cifar10 --weights W.safetensors --data cifar10-jpeg   # folders train/ and test/

`bundled` and `cifar10` fine-tune: the trained weights are kept in --out, and a run that was stopped goes on from them. `cifar10`
first fine-tunes DINOv2 ViT-S/14 at 98 × 98 pixels (49 patches). Needs `pip install -e ".[bench]"`. Writes
docs/results/tokens-<what>.json and docs/tokens-<what>.png, and prints the tables as Markdown.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import vitreous as vt
from vitreous.data.fashion import fashion_arrays
from vitreous.data.transform import preparation
from vitreous.prove import Proof
from vitreous.prove.cost import macs
from vitreous.ship import ship_all
from vitreous.steps import history_of

DOCS = Path(__file__).parent.parent / "docs"
Say = Callable[[str, float], None]


def methods(depth: int, patches: int) -> dict[str, list[vt.Step]]:
    """Every step of the family with its published settings for 196 patches and 12 blocks, scaled to these."""
    t, at = vt.tokens, tuple(depth * i // 4 for i in (1, 2, 3))

    def scaled(number: int) -> int:
        return max(1, round(number * patches / 196 * 12 / depth))

    return {
        "EViT": [t.EViT(keep=0.7, at=at)],
        "ToMe": [t.ToMe(r=scaled(13))],
        "MCTF": [t.MCTF(r=scaled(16))],
        "RandomChoice": [t.RandomChoice(keep=0.7, at=at)],
        "UniformPooling": [t.UniformPooling(at=(depth // 2,))],
        "TokenSlimming": [t.TokenSlimming()],
        "SemanticTokens": [t.SemanticTokens(tokens=16 if patches >= 64 else 9)],
        "Sparsifiner": [t.Sparsifiner(budget=0.25)],
    }


LEARNED = ("TokenSlimming", "SemanticTokens", "Sparsifiner")  # nothing before they are trained
SIMULATED = ("Sparsifiner",)  # no runtime multiplies its sparse maps


def speed(a: argparse.Namespace, folder: Path, say: Say) -> None:
    """Does the reduction reach the runtime? The speed-up at each batch size beside the one that the MACs promise."""
    torch.manual_seed(a.seed)
    original = vt.open("vit_small_patch16_224")
    images = torch.randn(64, 3, 224, 224, generator=torch.Generator().manual_seed(a.seed))
    found = {name: s for name, s in methods(12, 196).items() if name not in SIMULATED}
    models = {"original": original, **{name: vt.slim(original, s) for name, s in found.items()}}
    promise = {name: macs(original, images[:1]) / macs(m, images[:1]) for name, m in models.items()}
    shipped = {
        name: ship_all(m, [folder / f"{name}.onnx", folder / f"{name}.xml"], example=images[:4]) for name, m in models.items()
    }
    ways: dict[str, dict[str, Any]] = {
        "torch": models,
        "ONNX Runtime": {name: vt.Runtime(s[0].path, threads=a.threads) for name, s in shipped.items()},
        "OpenVINO": {name: vt.Runtime(s[1].path, threads=a.threads, precision="f32") for name, s in shipped.items()},
    }
    ratio: dict[str, dict[str, list[float]]] = {}
    for way, run in ways.items():
        proof = vt.prove(run, (images, None), batches=(1, 64), seconds=a.seconds, threads=a.threads, seed=a.seed, progress=say)
        ratio[way] = {m.name: [t.ratio.value if t.ratio else 1.0 for t in m.latency] for m in proof.models}
        stamp = f"{proof.threads} threads, {proof.machine.get('cpu', '')}, {proof.date}, seed {proof.seed}"
    rows = []
    for name in found:
        row = {"method": name, "promise": promise[name], **{way: ratio[way][name] for way in ways}}
        rows.append(row)
    write("speed", {"stamp": stamp, "machine": proof.machine, "rows": rows})
    print(f"\nViT-S/16 at 224, random weights, {stamp}\n")
    print(
        "| method | × by MACs | " + " | ".join(f"{way} b1 × | b64 ×" for way in ways) + " | best runtime, b64, of the promise |"
    )
    print("|" + "---|" * (3 + 2 * len(ways)))
    for row in rows:
        best = max(row[way][1] for way in ways if way != "torch") / row["promise"]
        cells = " | ".join(f"{row[way][0]:.2f} | {row[way][1]:.2f}" for way in ways)
        print(f"| {row['method']} | {row['promise']:.2f} | {cells} | {100 * best:.0f} % |")


def write(what: str, content: dict[str, Any]) -> None:
    (DOCS / "results").mkdir(exist_ok=True)
    (DOCS / "results" / f"tokens-{what}.json").write_text(json.dumps(content, indent=1) + "\n")


def train(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor, float], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    parameters: list[nn.Parameter],
    epochs: int,
    lr: float,
    seed: int,
    tick: Callable[[float], None],
) -> None:
    """AdamW with a warm-up and a cosine, mirrored pictures; `loss(images, labels, epoch)`."""
    g, size = torch.Generator().manual_seed(seed), 64
    steps = epochs * (len(x) // size)
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    warm = max(1, steps // 10)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min((i + 1) / warm, 0.5 + 0.5 * float(np.cos(np.pi * min(1, i / steps))))
    )
    torch.manual_seed(seed)
    model.train()
    done = 0
    for epoch in range(epochs):
        for pick in torch.randperm(len(x), generator=g)[: len(x) // size * size].split(size):
            mirrored = torch.rand(size, generator=g) < 0.5
            images = torch.where(mirrored[:, None, None, None], x[pick].flip(-1), x[pick])
            optimiser.zero_grad(set_to_none=True)
            loss(images, y[pick], epoch + done % (len(x) // size) * size / len(x)).backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            rate.step()
            done += 1
            tick(done / steps)
    model.eval()


def objective(name: str, model: nn.Module, teacher: nn.Module, epochs: int) -> Callable[[Tensor, Tensor, float], Tensor]:
    """What each method's paper trains it with; the cross entropy where it says no more."""
    if name == "MCTF":
        generator = torch.Generator().manual_seed(0)
        (fusion,) = (s for s in history_of(model).steps() if isinstance(s, vt.tokens.MCTF))
        return lambda x, y, _: vt.learn.token_reduction_consistency(model, x, y, r_max=max(1, fusion.r), generator=generator)
    if name == "Sparsifiner":
        return lambda x, y, _: vt.learn.sparsifiner_distillation(model, teacher, x, y)
    if name == "EViT":

        def scheduled(x: Tensor, y: Tensor, epoch: float) -> Tensor:
            vt.learn.set_keep(model, vt.learn.keep_rate(epoch, 0, epochs / 2, 0.7))
            return F.cross_entropy(model(x), y)

        return scheduled
    return lambda x, y, _: F.cross_entropy(model(x), y)


def finetune(name: str, model: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor, a: argparse.Namespace, say: Say) -> None:
    """Train a slimmed model as its paper does; in place, from --out where it is already there."""
    kept = a.out / f"{a.what}-{name}.safetensors"
    if kept.exists():
        model.load_state_dict(load_file(kept))
        return

    def go(what: str, loss: Callable[[Tensor, Tensor, float], Tensor], parameters: list[nn.Parameter], lr: float) -> None:
        tick = lambda done: say(what, done)
        train(model, loss, x, y, parameters=parameters, epochs=a.epochs, lr=lr, seed=a.seed, tick=tick)

    parameters = list(model.parameters())
    if name == "Sparsifiner":
        predictors = vt.learn.predictor_parameters(model)
        go("predictor of Sparsifiner", lambda x, y, _: vt.learn.connectivity_loss(model, x), predictors, 1e-3)
        parameters = [p for p in parameters if not any(p is q for q in predictors)]
    if name == "TokenSlimming":
        reverse = vt.learn.reverse_modules(model)

        def loss(x: Tensor, y: Tensor, _: float) -> Tensor:
            logits, distilled = vt.learn.frd(model, teacher, x, reverse)
            return F.cross_entropy(logits, y) + distilled

        go(name, loss, [*parameters, *reverse.parameters()], a.lr)
    else:
        go(name, objective(name, model, teacher, a.epochs), parameters, a.lr)
    keep(model, kept)


def keep(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, aside)
    os.replace(aside, path)


def compare(
    original: nn.Module, x: Tensor, y: Tensor, data: Any, patches: int, a: argparse.Namespace, folder: Path, say: Say
) -> None:
    """Training-free and fine-tuned, beside the original and the original trained as long."""
    depth = len(original.blocks)
    found = methods(depth, patches)
    longer = copy.deepcopy(original)
    finetune("original", longer, original, x, y, a, say)
    free = {name: vt.slim(original, s) for name, s in found.items() if name not in LEARNED}
    tuned = {name: vt.slim(original, s) for name, s in found.items()}
    for name, model in tuned.items():
        finetune(name, model, original, x, y, a, say)
    if a.only_train:
        return
    models = {
        "original": original,
        **{f"{name}, training-free": m for name, m in free.items()},
        "original, fine-tuned as long": longer,
        **{f"{name}, fine-tuned": m for name, m in tuned.items()},
    }
    rounds = dict(batches=(1, 64), seconds=a.seconds, threads=a.threads, seed=a.seed, progress=say)
    proof = vt.prove(models, data, **rounds)
    runtimes = {}
    for name in ("original", *(n for n in found if n not in SIMULATED)):
        path = folder / f"{name}.xml"
        vt.ship(models.get(name) or models[f"{name}, fine-tuned"], path, example=x[:16])
        runtimes[name] = vt.Runtime(path, threads=a.threads, precision="f32")
    shipped = vt.prove(runtimes, (x[:64], None), **rounds)
    show(proof, shipped, a.what)


def show(proof: Proof, shipped: Proof, what: str) -> None:
    first = proof.models[0]
    vino = {m.name: [t.ratio.value if t.ratio else 1.0 for t in m.latency] for m in shipped.models}
    rows = []
    for m in proof.models:
        name, _, kind = m.name.partition(", ")
        accuracy, d = m.answers.accuracy, m.answers.difference
        assert accuracy is not None and m.cost.macs and first.cost.macs
        row = {
            "method": name,
            "kind": kind,
            "accuracy": accuracy.value,
            "difference": [d.value, d.low, d.high] if d else None,
            "macs": m.cost.macs,
            "saved": 1 - m.cost.macs / first.cost.macs,
            "drift": m.drift.total_variation.value if m.drift else None,
            "torch": [t.ratio.value if t.ratio else 1.0 for t in m.latency] if name not in SIMULATED else None,
            "openvino": vino.get(name) if kind != "fine-tuned as long" else None,
        }
        rows.append(row)
    stamp = f"{proof.data}, {proof.images} test images, {proof.threads} threads, {proof.machine.get('cpu', '')}, {proof.date}"
    write(what, {"stamp": stamp, "seed": proof.seed, "machine": proof.machine, "rows": rows})
    print(f"\n{stamp}, seed {proof.seed}\n")
    print("| method | | accuracy % | Δ points [95 %] | MMACs | saved | torch × b1, b64 | OpenVINO × b1, b64 | drift |")
    print("|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        d = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * v for v in r["difference"])) if r["difference"] else "–"
        speeds = " | ".join(", ".join(f"{v:.2f}" for v in r[way]) if r[way] else "–" for way in ("torch", "openvino"))
        moved = f"{r['drift']:.3f}" if r["drift"] is not None else "–"
        cells = f"{100 * r['accuracy']:.2f} | {d} | {r['macs'] / 1e6:.1f} | {100 * r['saved']:.0f} % | {speeds} | {moved}"
        print(f"| {r['method']} | {r['kind']} | {cells} |")
    draw(rows, what, stamp)


def draw(rows: list[dict[str, Any]], what: str, stamp: str) -> None:
    """Accuracy against OpenVINO's speed-up at batch 64, with the front that nobody beats in both."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    timed = [r for r in rows if r["openvino"]]
    for kind, marker in (("training-free", "o"), ("fine-tuned", "s"), ("", "*")):
        points = [(r["openvino"][1], 100 * r["accuracy"], r["method"]) for r in timed if r["kind"] == kind]
        axes.scatter([p[0] for p in points], [p[1] for p in points], marker=marker, s=60, label=kind or "original", zorder=3)
        for i, (x, y, name) in enumerate(sorted(points, key=lambda p: p[1])):  # names right and left in turn, else they meet
            side, away = ("right", -7) if i % 2 else ("left", 7)
            axes.annotate(name, (x, y), xytext=(away, -3), textcoords="offset points", fontsize=8, ha=side)
    points = sorted(((r["openvino"][1], 100 * r["accuracy"]) for r in timed), reverse=True)
    front = [p for i, p in enumerate(points) if all(q[1] < p[1] for q in points[:i])]
    axes.plot([p[0] for p in front], [p[1] for p in front], color="0.6", lw=1, zorder=1, label="Pareto front")
    axes.set(xlabel="times faster than the original in OpenVINO, batch 64", ylabel="accuracy, %", title=stamp)
    axes.title.set_fontsize(8)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(DOCS / f"tokens-{what}.png", dpi=120)


def bundled(a: argparse.Namespace, folder: Path, say: Say) -> None:
    original = vt.open()
    data = vt.data.open_data("fashion-mnist", original, root=a.data, limit=a.test, seed=a.seed)
    x, y = trained_on("fashion-mnist", original, a)
    compare(original, x, y, data, 49, a, folder, say)


def trained_on(source: str, model: nn.Module, a: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """`--train` training images, drawn from the seed."""
    if source == "fashion-mnist":
        pictures, labels = fashion_arrays("train", a.data)
        pick = np.random.default_rng(a.seed).permutation(len(labels))[: a.train]
        prepare = preparation(model)
        x = torch.stack([prepare.to_tensor(Image.fromarray(p)) for p in pictures[pick]])
        return x, torch.from_numpy(labels[pick].astype(np.int64))
    data = vt.data.open_data(Path(source), model)
    pick = np.random.default_rng(a.seed).permutation(len(data))[: a.train]
    return data.tensor(pick), torch.from_numpy(data.labels[pick])


def cifar10(a: argparse.Namespace, folder: Path, say: Say) -> None:
    original = vt.open("vit_small_patch14_dinov2", checkpoint=a.weights, img_size=98)
    original.reset_classifier(10)
    original.num_classes = 10
    data = vt.data.open_data(Path(a.data) / "test", original, limit=a.test, seed=a.seed)
    data.name = "CIFAR-10 (JPEG)"
    x, y = trained_on(str(Path(a.data) / "train"), original, a)
    if not (a.out / f"{a.what}-base.safetensors").exists():
        probe(original, x, y)
    finetune("base", original, original, x, y, a, say)
    compare(original, x, y, data, 49, a, folder, say)


def probe(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Fit the head alone first, by logistic regression: from a random one, so short a training reaches 61 %."""
    with torch.no_grad():
        features = torch.cat([model.forward_head(model.forward_features(part), pre_logits=True) for part in x.split(50)])
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    optimiser = torch.optim.LBFGS(model.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(model.head(features), y) + 1e-4 * model.head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=("speed", "bundled", "cifar10"))
    p.add_argument("--data", default=None, help="folder of Fashion-MNIST's IDX files, or with CIFAR-10's train/ and test/")
    p.add_argument("--weights", type=Path, help="DINOv2 ViT-S/14 under timm's names")
    p.add_argument("--out", type=Path, default=Path("runs/tokens"))
    p.add_argument("--train", type=int, default=5000, help="training images")
    p.add_argument("--test", type=int, default=None, help="test images, all by default")
    p.add_argument("--only-train", action="store_true", help="stop when all are trained; measure later, on an idle machine")
    p.add_argument("--epochs", type=int, default=1)
    p.add_argument("--lr", type=float, default=5e-5)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seconds", type=float, default=60.0)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    with tempfile.TemporaryDirectory() as folder, Progress() as bar:
        tasks: dict[str, Any] = {}

        def say(what: str, share: float) -> None:
            tasks[what] = tasks[what] if what in tasks else bar.add_task(what, total=1.0)
            bar.update(tasks[what], completed=share)

        {"speed": speed, "bundled": bundled, "cifar10": cifar10}[a.what](a, Path(folder), say)


if __name__ == "__main__":
    main()
