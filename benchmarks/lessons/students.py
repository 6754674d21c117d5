"""Distillation of masked autoencoders, across architectures, from stored crops, between students; and reliability balancing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import vitreous as vt
from vitreous.learn.collaborate import pixel_wise, together
from vitreous.learn.objective import Batch, Now, Seen, objective
from vitreous.models.masked_autoencoder import MaskedAutoencoder

from .bench import CLASSES, CNN, Bench, Figures, Pair, experiment, keep


def kept(bench: Bench, name: str, seed: int, model: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """What `make` trains of `model`, once: a file keeps it."""
    s = bench.scale
    path = bench.kept / f"{name}-{s.width}-{s.images}-{seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.to(bench.device).eval()
    made = make(model)
    keep(made, path)
    return made


@experiment("g2sd", baseline="neither stage")
def g2sd(bench: Bench, seed: int) -> dict[str, Figures]:
    """The teacher, twice as deep, was pretrained on the pool without labels; students see the training images alone. Whoever has
    no first stage learns as much longer in the second."""
    s, longer = bench.scale, 1.0
    patch = s.patch // 2
    torch.manual_seed(seed)
    size = dict(img_size=32, patch_size=patch, embed_dim=s.width, num_heads=s.width // 8 // 2 or 1, num_classes=CLASSES)
    auto = MaskedAutoencoder(decoder_width=s.width // 2, decoder_depth=4, decoder_heads=2, depth=s.depth, **size)
    unlabelled = bench.pool[0], None
    short = 0.5 * s.images / len(bench.pool[0]) * 10
    teacher = kept(bench, "mae", seed, auto, lambda m: bench.teach(m, unlabelled, vt.learn.MAE(), times=short, seed=seed))
    tuned = kept(bench, "mae-tuned", seed, copy.deepcopy(teacher), lambda m: bench.teach(m, bench.train, times=2, seed=seed))
    student = bench.vit(seed, "deit_tiny_distilled_patch16_224", patch_size=patch, depth=s.depth // 2)
    generic = vt.learn.GenericDistillation(teacher, layer=2, width=s.width // 2, depth=2, heads=2)
    started = bench.teach(student, bench.train, generic, times=longer, seed=seed)
    ce, specific = vt.learn.CrossEntropy(), vt.learn.SpecificDistillation(tuned)
    arms: dict[str, tuple[nn.Module, Any, float]] = {
        "neither stage": (student, ce, 1 + longer),
        "generic alone": (started, ce, 1),
        "specific alone": (student, specific, 1 + longer),
        "both (G2SD)": (started, specific, 1),
    }
    found = {
        name: {"accuracy": bench.right(bench.teach(model, bench.train, o, times=times, seed=seed)), "gradients": 1 + longer}
        for name, (model, o, times) in arms.items()
    }
    return found | {"(the teacher, fine-tuned)": {"accuracy": bench.right(tuned)}}


@experiment("scalekd", baseline="labels and the teacher's answers")
def scalekd(bench: Bench, seed: int) -> dict[str, Figures]:
    """A ViT that learnt from the whole pool teaches a CNN. Weights are larger than the published ones by as much as the grid is
    smaller, for the loss is a sum over places."""
    teacher = kept(bench, "vit-pool", seed, bench.vit(seed), lambda m: bench.teach(m, bench.pool, seed=seed))
    side = 32 // bench.scale.patch
    a, b = 0.08 * 49 / side**2, 0.06 * 49 / side**2
    given: dict[str, Any] = dict(names=("features.7", "features.11"), size=32, last=1, heads=(4, 4))
    torch.manual_seed(seed)
    student = CNN(bench.scale.width // 2)
    arms = {
        "labels alone": vt.learn.CrossEntropy(),
        "labels and the teacher's answers": vt.learn.ScaleKD(teacher, (0.0, 0.0), **given),
        "and features, one view": vt.learn.ScaleKD(teacher, (a, 0.0), **given),
        "and features, both views (ScaleKD)": vt.learn.ScaleKD(teacher, (a, b), **given),
    }
    found = {n: {"accuracy": bench.right(bench.teach(student, bench.train, o, seed=seed))} for n, o in arms.items()}
    return {n: f | {"gradients": 1.0} for n, f in found.items()} | {"(the teacher)": {"accuracy": bench.right(teacher)}}


@experiment("ferkd", baseline="soft labels (FKD)")
def ferkd(bench: Bench, seed: int) -> dict[str, Figures]:
    """A CNN that learnt from the whole pool labels eight crops of each training image. Thresholds are shares of its confidence:
    a twentieth is dropped, a fifth is calibrated."""
    teacher = bench.cnn(seed, bench.pool, "cnn-pool")
    data = bench.train[0][:3000].cpu(), bench.train[1][:3000].cpu()  # crops are made one by one, by the processor
    labels = vt.learn.label_crops(teacher, data, crops=8, seed=seed)
    low, middle = (float(labels.value[..., 0].quantile(q)) for q in (0.05, 0.25))
    none = dict(drop_below=0.0, calibrate_below=0.0)
    arms = {
        "the class alone": vt.learn.FerKD(labels, 0.0, 1.0, smoothing=0.0),
        "soft labels (FKD)": vt.learn.FerKD(labels, **none),
        "and the hardest dropped": vt.learn.FerKD(labels, low, low),
        "and the unsure calibrated": vt.learn.FerKD(labels, low, middle),
        "and SelfMix (FerKD)": vt.learn.FerKD(labels, low, middle, selfmix=0.5),
    }
    found: dict[str, Figures] = {}
    for name, rule in arms.items():
        taught = bench.teach(bench.vit(seed), data, augment=rule, seed=seed)
        shares = {f"{k} %": 100 * v for k, v in rule.shares().items() if k in ("dropped", "calibrated")}
        found[name] = {"accuracy": bench.right(taught), "gradients": 1.0, **shares}
    return found | {"(the teacher)": {"accuracy": bench.right(teacher)}}


@experiment("arbex", baseline="plain")
def arbex(bench: Bench, seed: int) -> dict[str, Figures]:
    """A long tail of 1 : 0.02 whose labels are wrong for a fifth; the tail is classes 7 to 9. "moved" is the largest change of a
    probability when an image is asked alone instead of among 64, the calibration error is of 15 bins."""
    x, y = bench.pool
    tail = vt.learn.long_tailed(y.cpu(), 0.02, seed).to(y.device)
    draw = np.random.default_rng(seed)
    labels = y[tail].clone()
    wrong = torch.from_numpy(draw.random(len(labels)) < 0.2)
    labels[wrong] = torch.from_numpy(draw.integers(CLASSES, size=int(wrong.sum())))
    data, start = (x[tail], labels), bench.vit(seed)
    plain, balanced = vt.learn.CrossEntropy(), vt.learn.ARBEx()
    arms: dict[str, tuple[nn.Module, Any]] = {
        "plain": (start, plain),
        "balance thrown away": (start, balanced),
        "balance kept (ARBEx)": (vt.learn.with_balance(start), balanced),
        "balance over the batch, as released": (vt.learn.with_balance(start, over="batch"), balanced),
    }
    some = torch.isin(bench.test[1], torch.tensor([7, 8, 9], device=bench.test[1].device))
    found: dict[str, Figures] = {}
    for name, (model, o) in arms.items():
        taught = bench.teach(model, data, o, times=2, seed=seed)
        with torch.no_grad():
            p = torch.cat([taught(part).softmax(1) for part in bench.test[0].split(64)])
            alone = torch.cat([taught(one[None]).softmax(1) for one in bench.test[0][:64]])
        found[name] = {
            "accuracy": bench.right(taught), "tail %": bench.right(taught, (bench.test[0][some], bench.test[1][some])),
            "calibration error %": 100 * calibration(p, bench.test[1]), "moved": float((p[:64] - alone).abs().max()),
            "gradients": 1.0,
        }  # fmt: skip
    return found


def calibration(p: Tensor, y: Tensor, bins: int = 15) -> float:
    """Expected calibration error of probabilities `[N, K]`."""
    sure, place = p.max(1)
    right, error = (place == y).float(), 0.0
    for i in range(bins):
        inside = (sure > i / bins) & (sure <= (i + 1) / bins)
        if inside.any():
            error += float(inside.float().mean() * (right[inside].mean() - sure[inside].mean()).abs())
    return error


class ViTSegmenter(nn.Module):
    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        size: Any = dict(img_size=side, patch_size=4, embed_dim=width, depth=3, num_heads=4, num_classes=0, in_chans=1)
        self.vit = timm.create_model("vit_tiny_patch16_224", **size)
        self.out = nn.Linear(width, CLASSES + 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.out(self.vit.forward_features(x)[:, 1:]).mT
        return tokens.unflatten(2, (x.shape[2] // 4, x.shape[3] // 4))


class CNNSegmenter(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()

        def stage(i: int, o: int, stride: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())

        self.low = nn.Sequential(stage(1, width, 2), stage(width, width, 2))
        self.high = nn.Sequential(stage(width, 2 * width, 1), stage(2 * width, 2 * width, 1))
        self.out = nn.Conv2d(2 * width, CLASSES + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.high(self.low(x)))


def pasted(n: int, side: int, seed: int, part: str) -> Pair:
    """Grey pictures of four Fashion-MNIST items each, `[N, 1, side, side]`, and whose pixel is whose: 0, or the class + 1."""
    data = vt.data.open_data("sample", vt.open())
    half = len(data) // 2
    places = np.arange(half) if part == "train" else np.arange(half, len(data))
    draw = np.random.default_rng((seed, part == "train"))
    items = data.tensor(range(len(data)))
    items = (items - items.amin()) / (items.amax() - items.amin())
    x, y = 0.1 * torch.randn(n, 1, side, side, generator=torch.Generator().manual_seed(seed)), torch.zeros(n, side, side).long()
    for i in range(n):
        for j in draw.choice(places, 4):
            top, left = draw.integers(0, side - 28, 2)
            on = items[j, 0] > 0.15
            x[i, 0, top : top + 28, left : left + 28][on] = items[j, 0][on]
            y[i, top : top + 28, left : left + 28][on] = int(data.labels[j]) + 1
    return x, y


@objective
@dataclass(frozen=True)
class Mutual(vt.learn.Collaborate):
    """Both teach each other everywhere, whoever is better."""

    def __call__(self, seen: Seen, batch: Batch, now: Now) -> dict[str, Tensor]:
        students: Any = now.model
        a, b = together(students.cnn(batch.images), students.vit(batch.images), batch.need_labels().shape[1:])
        everywhere = torch.ones(len(a), *a.shape[2:], device=a.device)
        terms = {f"cls {n}": F.cross_entropy(z, batch.need_labels()) for n, z in (("cnn", a), ("vit", b))}
        return terms | {"mutual": pixel_wise(a, b, everywhere) + pixel_wise(a, b, -everywhere)}


@experiment("cnn-vit-collaboration", baseline="each alone")
def collaboration(bench: Bench, seed: int) -> dict[str, Figures]:
    """Four items of Fashion-MNIST on a noisy ground, a class for each pixel; mean IoU of the ViT and of the CNN."""
    s, side = bench.scale, 64
    n = s.images // 2
    train, test = (pasted(m, side, seed, part) for m, part in ((n, "train"), (s.test // 8, "test")))
    train, test = (tuple(t.to(bench.device) for t in pair) for pair in (train, test))
    torch.manual_seed(seed)
    start = vt.learn.Students(CNNSegmenter(s.width // 2), ViTSegmenter(s.width, side))
    places = dict(low=("low", "vit.blocks.0"), high=("high", "vit.blocks.2"), size=side)
    make = lambda **weights: vt.learn.Collaborate(**places, **({"features": 0.0, "region": 0.0, "pixel": 0.0} | weights))
    arms = {
        "each alone": make(),
        "each from the other, everywhere": Mutual(**places),
        "low features": make(features=0.1),
        "and regions": make(features=0.1, region=0.5),
        "and pixels (whole)": make(features=0.1, region=0.5, pixel=1.0),
    }
    found: dict[str, Figures] = {}
    for name, o in arms.items():
        taught: Any = bench.teach(start, train, o, augment=None, batch=min(n, max(16, s.batch // 4)), seed=seed)
        both = {f"mIoU, {who}": iou(m, test) for who, m in (("ViT", taught.vit), ("CNN", taught.cnn))}
        found[name] = both | {"gradients": 1.0}
    return found


@torch.no_grad()
def iou(model: nn.Module, data: Pair) -> float:
    """Mean over the classes of intersection over union, %."""
    x, y = data
    out = torch.cat([F.interpolate(model(part), size=y.shape[1:], mode="bilinear").argmax(1) for part in x.split(64)])
    shares = []
    for c in range(CLASSES + 1):
        a, b = out == c, y == c
        if (a | b).any():
            shares.append(float((a & b).sum() / (a | b).sum()))
    return 100 * sum(shares) / len(shares)
