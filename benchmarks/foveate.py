"""Log-polar images, turned and enlarged: a small convolutional network on images, on their inscribed circles, and foveated.

    python benchmarks/foveate.py --data /usr/share/datasets/fashion-mnist

Three networks alike in all but `adapt.Foveate` or a mask are trained on Fashion-MNIST, upright and as large as they are, without
augmentation; then tested on turned and on enlarged pictures. Writes docs/results/foveate.json and prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from token_architectures import fashion
from tokens import DOCS, train
from torch import Tensor, nn

import vitreous as vt
from vitreous.prove.machine import describe

TURNS, ZOOMS = (0, 15, 30, 60, 90, 180), (0.7, 0.85, 1.0, 1.2, 1.5)


class Circle(nn.Module):
    """The image inside of its inscribed circle, 0 around it."""

    def forward(self, x: Tensor) -> Tensor:
        at = (torch.arange(x.shape[-1]) + 0.5) / x.shape[-1] * 2 - 1
        return x * (at[:, None] ** 2 + at**2 <= 1)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 24), (24, 48), (48, 96)):
        layers += [nn.Conv2d(inputs, outputs, 3, 2 if inputs > 1 else 1, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


def moved(x: Tensor, turn: float, zoom: float) -> Tensor:
    """Pictures turned by `turn` degrees and enlarged by `zoom`, about their middle."""
    c, s = math.cos(math.radians(turn)) / zoom, math.sin(math.radians(turn)) / zoom
    grid = F.affine_grid(torch.tensor([[[c, s, 0.0], [-s, c, 0.0]]]).expand(len(x), -1, -1), list(x.shape), align_corners=False)
    return F.grid_sample(x - x.min(), grid, align_corners=False) + x.min()  # the ground stays what it was


def right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.inference_mode():
        return 100 * float(torch.cat([model(part).argmax(1) for part in x.split(500)]).eq(y).float().mean())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path)
    p.add_argument("--train", type=int, default=6000)
    p.add_argument("--test", type=int, default=2000)
    p.add_argument("--epochs", type=int, default=3)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    torch.set_num_threads(1)
    x, y = fashion("train", a)
    pick = torch.randperm(len(x), generator=torch.Generator().manual_seed(a.seed))[: a.train]
    x, y = x[pick], y[pick]
    models = {
        "image": network(a.seed),
        "circle": nn.Sequential(Circle(), network(a.seed)),
        "foveated": vt.slim(network(a.seed), vt.adapt.Foveate(inner=2**-3)),
    }
    test, labels = (part[: a.test] for part in fashion("test", a))
    print("| network | " + " | ".join([f"turned {t}°" for t in TURNS] + [f"× {z}" for z in ZOOMS]) + " |")
    print("|---" * (1 + len(TURNS) + len(ZOOMS)) + "|", flush=True)
    rows: dict[str, list[float]] = {}
    for name, model in models.items():
        loss = lambda images, labels, _, model=model: F.cross_entropy(model(images), labels)
        parameters = list(model.parameters())
        train(model, loss, x, y, parameters=parameters, epochs=a.epochs, lr=3e-3, seed=a.seed, tick=lambda _: None)
        ways = [(t, 1.0) for t in TURNS] + [(0, z) for z in ZOOMS]
        rows[name] = [right(model.eval(), moved(test, t, z), labels) for t, z in ways]
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in rows[name]) + " |", flush=True)
    result = {"train": a.train, "test": a.test, "epochs": a.epochs, "seed": a.seed, "turns": TURNS, "zooms": ZOOMS}
    (DOCS / "results" / "foveate.json").write_text(json.dumps({**result, "machine": describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
