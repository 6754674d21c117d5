"""What every experiment stands on: pictures, a small ViT and a small CNN, training, and the queue.

An experiment is a function of the bench and a seed, under `@experiment`, that gives the figures of each arm:

    @experiment("nkd", baseline="cross-entropy")
    def nkd(bench, seed):
        return {"cross-entropy": {"accuracy": …, "gradients": 1.0}, "NKD": {…}}

"gradients" is how many gradients of an image the arm takes, as a multiple of the plain run's; the first other figure is the one
that is compared with the baseline, which takes as many gradients as what is judged.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import t as student_t
from torch import Tensor, nn

import vitreous as vt
from vitreous.learn.measure import accuracy_on

Pair = tuple[Tensor, Tensor]
Figures = dict[str, float]
CLASSES = 10


@dataclass(frozen=True)
class Scale:
    """Sizes: the ViT's, images to learn from (and to draw long tails and fine-tunings from), to choose by and to test on."""

    width: int
    depth: int
    patch: int
    images: int
    pool: int
    held: int
    test: int
    epochs: int
    batch: int


SCALES = {
    "small": Scale(64, 4, 8, 1000, 4000, 1000, 2000, 10, 32),  # two cores of a processor
    "large": Scale(128, 6, 4, 10_000, 20_000, 5000, 10_000, 10, 256),  # a GPU
    "tiny": Scale(24, 2, 8, 80, 200, 40, 40, 1, 16),  # of the tests
}


@dataclass(frozen=True)
class Experiment:
    slugs: tuple[str, ...]
    baseline: str
    run: Callable[[Bench, int], dict[str, Figures]]


QUEUE: dict[str, Experiment] = {}


def experiment(*slugs: str, baseline: str) -> Callable[[Callable[[Bench, int], dict[str, Figures]]], Callable]:
    """Put a function into the queue, for the systems `slugs`."""

    def put(run: Callable[[Bench, int], dict[str, Figures]]) -> Callable:
        QUEUE[run.__name__] = Experiment(slugs, baseline, run)
        return run

    return put


class Bench:
    """Data on the device, students, teachers, and one way to train them all."""

    def __init__(self, data: Path | None, scale: Scale, device: str, kept: Path) -> None:
        self.scale, self.device, self.kept = scale, device, kept
        s, found = scale, []
        for part, counts in (("train", (s.pool, s.held)), ("test", (s.test,))):
            x, y = drawn(s.pool) if data is None else read(data / part, sum(counts), kept / f"{part}-{sum(counts)}.npz")
            first = 0
            for n in counts:
                found.append((x[first : first + n].to(device), y[first : first + n].to(device)))
                first += n
        self.pool, self.held, self.test = found
        self.train = self.pool[0][: s.images], self.pool[1][: s.images]
        self.more = self.pool[0][s.images :], self.pool[1][s.images :]  # of the pool, what `train` has not

    def vit(self, seed: int, name: str = "vit_tiny_patch16_224", **given: Any) -> nn.Module:
        s = self.scale
        size = dict(img_size=32, patch_size=s.patch, embed_dim=s.width, depth=s.depth, num_heads=s.width // 8 // 2 or 1)
        torch.manual_seed(seed)
        return timm.create_model(name, num_classes=CLASSES, **(size | given))

    def teach(self, model: nn.Module, data: Pair, objective: Any = (), optimiser: Any = None, **given: Any) -> nn.Module:
        """Train a copy; `times` as many epochs as the plain run, and the other arguments are those of `vt.train`."""
        return vt.train(model, data, objective, optimiser, **self._given(data, given)).to(self.device)

    def heal(self, model: nn.Module, teacher: nn.Module, data: Pair, **given: Any) -> nn.Module:
        return vt.heal(model, teacher, data, **self._given(data, given)).to(self.device)

    def _given(self, data: Pair, given: dict[str, Any]) -> dict[str, Any]:
        s = self.scale
        given = dict(batch=min(s.batch, len(data[0])), augment="shift", warmup=0.1, times=1.0) | given
        if self.device == "cuda":  # in float32: at this size a step takes as long as its launches, and autocast launches more
            given = dict(accelerator="cuda") | given
        return given | {"epochs": s.epochs * given.pop("times")}

    def cnn(self, seed: int, data: Pair | None = None, name: str = "cnn", **given: Any) -> nn.Module:
        """A small CNN trained on `data` (by default on what the students learn from): kept in a file, for all who need it."""
        s = self.scale
        torch.manual_seed(seed)
        model = CNN(s.width // 2)
        path = self.kept / f"{name}-{s.width}-{s.images}-{seed}.safetensors"
        if path.exists():
            model.load_state_dict(load_file(path))
            return model.to(self.device).eval()
        model = self.teach(model, data or self.train, times=2, seed=seed, **given)
        keep(model, path)
        return model

    def right(self, model: nn.Module, data: Pair | None = None) -> float:
        """Accuracy on the test images, %."""
        found = accuracy_on(model.to(self.device), data or self.test, 256)
        assert found is not None
        return 100 * found


class CNN(nn.Module):
    """Three convolutions, each with batch norm and pooling; an architecture unlike the ViT, to teach it or to stand beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def keep(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.part")
    save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, aside)
    os.replace(aside, path)


def read(folder: Path, n: int, cache: Path) -> Pair:
    """`n` pictures of class folders, as many of each class, class by class in turn, at mean 0 and about unit spread."""
    if not cache.exists():
        names = sorted(p for p in folder.iterdir() if p.is_dir())
        draw, files = np.random.default_rng(0), []
        for label, name in enumerate(names):
            found = sorted(name.iterdir())
            files.append([(found[i], label) for i in draw.permutation(len(found))[: -(-n // len(names))]])
        mixed = [pair for row in zip(*files, strict=True) for pair in row][:n]
        with ThreadPoolExecutor(16) as readers:
            pixels = np.stack(list(readers.map(lambda pair: np.asarray(Image.open(pair[0]).convert("RGB")), mixed)))
        cache.parent.mkdir(parents=True, exist_ok=True)
        aside = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(aside, x=pixels, y=np.array([y for _, y in mixed]))
        os.replace(aside, cache)
    held = np.load(cache)
    return torch.from_numpy(held["x"]).permute(0, 3, 1, 2).float() / 64 - 2, torch.from_numpy(held["y"])


def drawn(n: int) -> Pair:
    """Noise with a colour for a class: pictures where there are none, to try the queue on."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(2 * n) % CLASSES
    return torch.randn(2 * n, 3, 32, 32, generator=g) + torch.randn(CLASSES, 3, 1, 1, generator=g)[y], y


def apart(ours: np.ndarray, theirs: np.ndarray, images: int) -> str:
    """How far shares, one a seed, are apart, in points, with 95 %: paired by seed (Student's t); of fewer than three seeds by the
    test images alone, as if they were not the same, which is wider than paired."""
    n, points = len(ours), 100 * (ours - theirs)
    if n > 2:
        half = student_t.ppf(0.975, n - 1) * points.std(ddof=1) / n**0.5
    else:
        half = 196 * (sum(p * (1 - p) for p in (ours.mean(), theirs.mean())) / images / n) ** 0.5
    return f"{points.mean():+.1f} [{points.mean() - half:+.1f}, {points.mean() + half:+.1f}]"
