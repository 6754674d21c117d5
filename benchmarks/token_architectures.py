"""The architectures of the token family that are no step, trained from scratch beside a plain ViT of the same width and depth.

    python benchmarks/token_architectures.py --data /usr/share/datasets/fashion-mnist --out runs/token-architectures --only-train
    python benchmarks/token_architectures.py --data /usr/share/datasets/fashion-mnist --out runs/token-architectures

LookupViT, DependencyViT and its Lite variant, SparseFormer, and Dynamic Perceiver with the convolutional network that it is
built on, on Fashion-MNIST at 28 × 28: the same images, epochs and optimiser for all, and one convolutional stem for the ViTs.
Weights are kept in --out, model by model, and what is there is not trained again. `--only-train` stops before anything is timed
and says each model's accuracy.

Writes docs/results/token-architectures.json and prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import HybridEmbed, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from tokens import DOCS, keep, train
from torch import Tensor, nn

import vitreous as vt
from vitreous.data.fashion import fashion_arrays
from vitreous.models.bundled import MEAN, STD
from vitreous.models.dependencyvit import DependencyBlock, DependencyViT
from vitreous.models.dyn_perceiver import EXITS, DynPerceiver
from vitreous.models.dyn_perceiver.backbones import Backbone, resnet
from vitreous.models.early_exit import Calibration, calibrate_exits
from vitreous.models.lookupvit import LookupViT
from vitreous.models.sparseformer import SparseFormer
from vitreous.models.sparseformer.focus import V1
from vitreous.prove import Measured

WIDTH, DEPTH, HEADS = 64, 8, 4
PLAIN = "plain ViT"
SIDE: dict[str, Any] = dict(img_size=28, in_chans=1, embed_dim=WIDTH)
SHAPE: dict[str, Any] = dict(**SIDE, patch_size=4, num_classes=10, depth=DEPTH, num_heads=HEADS)
COMPRESSIONS = (2, 3, 4, 5)  # rows and columns of LookupViT's compressed tokens, of 7 × 7
BUDGETS = (0.1, 0.3, 0.6)  # of what lies between Dynamic Perceiver's first and last exit, as mean MACs of an image
HELD_OUT = 2000  # training images that nobody trains on, for the exits' thresholds

Loss = Callable[[Tensor, Tensor, float], Tensor]


def patches(**_: Any) -> HybridEmbed:
    """7 × 7 patches by a few narrow convolutions, as in the bundled model: with plain patches the ViT got only 76 % right."""
    stem = ConvStem(1, depth=4, channels=(8, 16, 32, 64), kernel_size=3, stride=(2, 1, 2, 1), act_layer=nn.GELU)
    return HybridEmbed(stem, patch_size=1, **SIDE)


def lookupvit() -> LookupViT:
    model = LookupViT(**SHAPE, compress=3)
    model.patch_embed = cast(PatchEmbed, patches())
    return model


def dependencyvit(lite: bool) -> DependencyViT:
    model = DependencyViT(**SHAPE, lite=lite)
    model.patch_embed = cast(PatchEmbed, patches())
    for block in model.blocks:
        assert isinstance(block, DependencyBlock)
        for scale in (block.ls1, block.ls2):
            nn.init.constant_(scale.gamma, 0.1)  # 1e-6 as published takes most of so short a training to grow
    return model


def sparseformer() -> SparseFormer:
    """As v1: a quarter of the patches as tokens, half the width while they focus, as many layers as the ViT has blocks."""
    style = dataclasses.replace(V1, heads=HEADS)
    return SparseFormer(
        style, (WIDTH // 2, WIDTH), DEPTH - 5, tokens=12, points=16, conv_dim=WIDTH // 2, num_classes=10, in_chans=1
    )


def backbone(in_chans: int = 3) -> Backbone:
    """A ResNet of four basic blocks, 24 to 192 channels, whose stem suits small pictures: maps of 14, 7, 4 and 2 pixels."""
    parts = resnet(0.375, (1, 1, 1, 1), False)
    width = parts.widths[0]
    stem = nn.Sequential(nn.Conv2d(in_chans, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return dataclasses.replace(parts, stem=stem, drop_rate=0.0)


def bare_backbone() -> nn.Module:
    parts = backbone(in_chans=1)
    return nn.Sequential(parts.stem, *parts.stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(parts.widths[-1], 10))


BUILD: dict[str, Callable[[], nn.Module]] = {
    PLAIN: lambda: VisionTransformer(**SHAPE, class_token=False, global_pool="avg", embed_layer=patches),
    "ResNet": bare_backbone,
    "Dynamic Perceiver": lambda: DynPerceiver(backbone, num_latents=16, SA_widening_factor=2, num_classes=10, in_chans=1),
    "SparseFormer": sparseformer,
    "LookupViT": lookupvit,
    "DependencyViT": lambda: dependencyvit(lite=False),
    "DependencyViT-Lite": lambda: dependencyvit(lite=True),
}


def objective(model: nn.Module, seed: int) -> Loss:
    """The cross entropy; LookupViT with a random compression each batch; Dynamic Perceiver's exits with the official weights,
    the first three also led by what the last one says."""
    if isinstance(model, DynPerceiver):

        def exits(x: Tensor, y: Tensor, _: float) -> Tensor:
            all_four = model(x)
            said = all_four[3].detach().softmax(1)
            loss = F.cross_entropy(all_four[3], y)
            for weight, logits in zip((0.5, 0.5, 1.0), all_four[:3], strict=True):
                loss = loss + weight * F.cross_entropy(logits, y)
                loss = loss + 0.5 * F.kl_div(logits.log_softmax(1), said, reduction="batchmean")
            return loss

        return exits
    draw = random.Random(seed)

    def loss(x: Tensor, y: Tensor, _: float) -> Tensor:
        if isinstance(model, LookupViT):
            model.compress = draw.choice(COMPRESSIONS)
        return F.cross_entropy(model(x), y)

    return loss


def fashion(split: str, a: argparse.Namespace) -> tuple[Tensor, Tensor]:
    pictures, labels = fashion_arrays(split, a.data)
    x = (torch.from_numpy(pictures.copy()).float()[:, None] / 255 - MEAN[0]) / STD[0]
    return x, torch.from_numpy(labels.copy()).long()


def taught(model: nn.Module, name: str, loss: Callable[..., Tensor], x: Tensor, y: Tensor, a: argparse.Namespace) -> nn.Module:
    """`model` with the weights of that name in --out, trained first where there are none."""
    path = a.out / f"{name.replace(' ', '-')}-{len(x)}x{a.epochs}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    began, told = time.time(), 0

    def tick(done: float) -> None:
        nonlocal told
        if int(10 * done) > told:
            told = int(10 * done)
            print(f"{name}: {told}0 % after {time.time() - began:.0f} s", flush=True)

    train(model, loss, x, y, parameters=list(model.parameters()), epochs=a.epochs, lr=a.lr, seed=a.seed, tick=tick)
    keep(model, path)
    return model


def trained(name: str, x: Tensor, y: Tensor, a: argparse.Namespace) -> nn.Module:
    torch.manual_seed(a.seed)
    model = BUILD[name]()
    return taught(model, name, objective(model, a.seed), x, y, a)


class StopsEarly(nn.Module):
    """A Dynamic Perceiver whose images each take the logits of the first exit that is as sure as its threshold."""

    simulated = "all exits are computed, to see where each image would stop: its time is put together from theirs"

    def __init__(self, model: DynPerceiver, calibration: Calibration) -> None:
        super().__init__()
        self.model, self.thresholds, self.macs = model, torch.tensor(calibration.thresholds), calibration.macs

    def where(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of all exits `[exits, B, K]`, and the exit `[B]` at which each image stops."""
        logits = torch.stack(list(self.model.exits(x)))
        sure = logits.softmax(-1).amax(-1) >= self.thresholds[:, None]
        return logits, sure.int().argmax(0)

    def forward(self, x: Tensor) -> Tensor:
        logits, exits = self.where(x)
        return logits[exits, torch.arange(len(x))]

    @torch.no_grad()
    def shares(self, x: Tensor) -> list[float]:
        """Of the images that stop at each exit."""
        exits = torch.cat([self.where(part)[1] for part in x.split(500)])
        return (exits.bincount(minlength=len(EXITS)) / len(x)).tolist()


def variants(models: dict[str, nn.Module], held_out: Tensor) -> dict[str, nn.Module]:
    """What is compared: the plain ViT first, one entry for each setting that can be chosen without training again."""
    found: dict[str, nn.Module] = {PLAIN: models[PLAIN]}
    for side in COMPRESSIONS:
        view = copy.deepcopy(models["LookupViT"])
        assert isinstance(view, LookupViT)
        view.compress = side
        found[f"LookupViT, {side} × {side}"] = view
    found["DependencyViT"] = models["DependencyViT"]
    pruned = dependencyvit(lite=True)
    pruned.load_state_dict(models["DependencyViT"].state_dict())
    found["DependencyViT, leaves pruned untrained"] = pruned.eval()
    found["DependencyViT-Lite"] = models["DependencyViT-Lite"]
    found["SparseFormer"] = models["SparseFormer"]
    found["ResNet"] = models["ResNet"]
    perceiver = models["Dynamic Perceiver"]
    assert isinstance(perceiver, DynPerceiver)
    for i in range(len(EXITS)):
        fixed = copy.deepcopy(perceiver)
        fixed.exit = i
        found[exit_name(i)] = fixed
    costs = calibrate_exits(perceiver, held_out, shares=(0, 0, 0, 1)).macs
    for share in BUDGETS:
        budget = costs[0] + share * (costs[-1] - costs[0])
        calibration = calibrate_exits(perceiver, held_out, budget=budget)
        found[f"Dynamic Perceiver, within {budget / 1e6:.2f} MMACs"] = StopsEarly(copy.deepcopy(perceiver), calibration)
    return found


def exit_name(i: int) -> str:
    return f"Dynamic Perceiver, exit {i + 1}"


def compare(models: dict[str, nn.Module], x: Tensor, y: Tensor, a: argparse.Namespace) -> None:
    say = lambda what, share: print(f"{what}: {100 * share:.0f} %", flush=True) if share in (0.0, 1.0) else None
    rounds: dict[str, Any] = dict(batches=(1, 64), seconds=a.seconds, threads=a.threads, seed=a.seed, progress=say)
    proof = vt.prove(models, (x, y), **rounds)
    with tempfile.TemporaryDirectory() as folder:
        runtimes = {}
        for i, (name, model) in enumerate(models.items()):
            if not isinstance(model, StopsEarly):
                path = Path(folder) / f"{i}.xml"
                vt.ship(model, path, example=x[:16])
                runtimes[name] = vt.Runtime(path, threads=a.threads, precision="f32")
        shipped = vt.prove(runtimes, (x[:64], None), **rounds)
    ways = {"torch": ratios(proof.models), "openvino": ratios(shipped.models)}
    rows = []
    for m in proof.models:
        accuracy, d, model = m.answers.accuracy, m.answers.difference, models[m.name]
        assert accuracy is not None and m.cost.macs is not None
        row: dict[str, Any] = {
            "model": m.name,
            "accuracy": accuracy.value,
            "difference": [d.value, d.low, d.high] if d else None,
            "macs": m.cost.macs,
            "parameters": m.cost.parameters,
            **{way: found.get(m.name) for way, found in ways.items()},
        }
        if isinstance(model, StopsEarly):
            row["shares"] = shares = model.shares(x)
            row["macs"] = sum(s * c for s, c in zip(shares, model.macs, strict=True))
            for way, found in ways.items():  # one image at a time: a batch would wait for its slowest
                row[way] = [1 / sum(s / found[exit_name(i)][0] for i, s in enumerate(shares))]
        rows.append(row)
    stamp = (
        f"Fashion-MNIST, {a.train} training images, {a.epochs} epochs, {proof.images} test images, {proof.threads} threads, "
        f"{proof.machine.get('cpu', '')}, {proof.date}"
    )
    result = {"stamp": stamp, "seed": a.seed, "machine": proof.machine, "rows": rows}
    (DOCS / "results").mkdir(exist_ok=True)
    (DOCS / "results" / "token-architectures.json").write_text(json.dumps(result, indent=1) + "\n")
    show(rows, stamp)


def ratios(measured: list[Measured]) -> dict[str, list[float]]:
    """Times faster than the first, at each batch size."""
    return {m.name: [t.ratio.value if t.ratio else 1.0 for t in m.latency] for m in measured if m.latency}


def show(rows: list[dict[str, Any]], stamp: str) -> None:
    print(f"\n{stamp}\n")
    print("| model | accuracy % | Δ points [95 %] | MMACs | of the ViT's | k parameters | torch × b1, b64 | OpenVINO × b1, b64 |")
    print("|---|---|---|---|---|---|---|---|")
    for r in rows:
        d = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*(100 * v for v in r["difference"])) if r["difference"] else "–"
        cost = f"{r['macs'] / 1e6:.2f} | {100 * r['macs'] / rows[0]['macs']:.0f} % | {r['parameters'] / 1e3:.0f}"
        speeds = " | ".join(", ".join([f"{v:.2f}" for v in r[way]] + ["–"] * (2 - len(r[way]))) for way in ("torch", "openvino"))
        print(f"| {r['model']} | {100 * r['accuracy']:.2f} | {d} | {cost} | {speeds} |")


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    right = sum(int((model(u).argmax(1) == v).sum()) for u, v in zip(x.split(500), y.split(500), strict=True))
    return right / len(y)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", default=None, help="folder of Fashion-MNIST's IDX files")
    p.add_argument("--out", type=Path, default=Path("runs/token-architectures"))
    p.add_argument("--train", type=int, default=12000, help="training images")
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--seconds", type=float, default=120.0, help="for timing, in each runtime")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only-train", action="store_true")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    x, y = fashion("train", a)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(a.seed))
    pick, held_out = order[: a.train], order[-HELD_OUT:]
    models = {name: trained(name, x[pick], y[pick], a) for name in BUILD}
    test = fashion("test", a)
    found = variants(models, x[held_out])
    if a.only_train:
        for name, model in found.items():
            print(f"{name}: {100 * accuracy(model, *test):.2f} %", flush=True)
        return
    compare(found, *test, a)


if __name__ == "__main__":
    main()
