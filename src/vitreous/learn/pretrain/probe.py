"""What a pretrained encoder is worth: nearest neighbours, a linear layer, fine-tuning; and whether it has collapsed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from ...anatomy import read
from ...data import Data
from ...errors import VitreousError, nearest
from ..batches import Pair, in_turn, seed_everything
from ..classify import BinaryCrossEntropy, CrossEntropy
from ..engine import train
from ..objective import look, pooled
from ..optimisers import AdamW

PROTOCOLS = ("knn", "linear", "finetune")
KS = (10, 20, 30)
Progress = Callable[[str, float], None]


@torch.inference_mode()
def features(
    model: nn.Module, data: Data | Pair, tokens: str = "pooled", block: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """`[N, C]` of the pictures of `data`, and their labels.

    tokens: "pooled", what the model's classifier reads or would read; "patches", the mean of the patch tokens after the final
    norm; with `block`, of those that leave that block.
    """
    if tokens not in ("pooled", "patches"):
        raise VitreousError(f"no tokens '{tokens}' to read: choose pooled or patches")
    device, training = next(model.parameters()).device, model.training
    model.eval()
    found: list[Tensor] = []
    labels: list[Any] = []
    for x, y in in_turn(data, size_on(device)):
        x = x.to(device)
        if block is not None:
            out = look(model, x, (), (block,)).blocks[block][:, read(model).prefix :].flatten(1, -2).mean(1)
        elif tokens == "patches":
            patches = look(model, x, {"patches"}).patches
            assert patches is not None
            out = patches.flatten(1, -2).mean(1)
        else:
            out = pooled(model, x).flatten(1)
        found.append(out.float().cpu())
        labels.append(y)
    model.train(training)
    return torch.cat(found), None if labels[0] is None else torch.cat(labels).cpu()


def rank_me(features: Tensor) -> float:
    """How many dimensions `features [N, C]` really have: exp of the entropy of their singular values.

    Garrido, Balestriero, Najman, LeCun, "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised
    Representations by Their Rank" (ICML 2023), eq. 1.
    """
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum().clamp_min(1e-12) + 1e-7
    return float((-p * p.log()).sum().exp())


def spread(features: Tensor) -> float:
    """√C times the standard deviation of the normalised features `[N, C]`: near 1 where they point everywhere, 0 where all
    pictures have the same (Chen & He, "Exploring Simple Siamese Representation Learning", CVPR 2021, section 4.1)."""
    return float(F.normalize(features.double(), dim=1).std(0).mean() * features.shape[1] ** 0.5)


def collapsed(features: Tensor) -> str | None:
    """A sentence where features `[N, C]` have collapsed, to one point or to one line; else None."""
    if (apart := spread(features)) < 0.02:
        return f"the encoder has collapsed: all pictures get nearly the same features (their spread is {apart:.4f}, 1 is full)"
    if (rank := rank_me(features - features.mean(0))) < 2:
        return f"the encoder has collapsed: its features differ along one direction only (rank {rank:.2f})"
    return None


def knn(train: Tensor, labels: Tensor, test: Tensor, classes: int, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Votes `[M, classes]` for `test [M, C]` of the k nearest of `train [N, C]` by cosine, each exp(cosine / temperature)
    (Wu et al., CVPR 2018, as in DINO)."""
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    votes = test.new_zeros(len(test), classes)
    k = min(k, len(train))
    for rows in torch.arange(len(test)).split(512):
        near, at = (test[rows] @ train.mT).topk(k, 1)
        votes[rows] = votes[rows].scatter_add(1, labels[at], (near / temperature).exp())
    return votes


def area_under_curve(scores: Tensor, labels: Tensor) -> list[float | None]:
    """Area under the ROC curve of each class, of `[N, K]` scores and 0/1 labels; None for one without positives or negatives."""
    areas: list[float | None] = []
    for s, y in zip(scores.T, labels.T.bool(), strict=True):
        yes, no = s[y].contiguous(), s[~y].sort().values
        if not len(yes) or not len(no):
            areas.append(None)
            continue
        below = torch.searchsorted(no, yes) + torch.searchsorted(no, yes, right=True)
        areas.append(float(below.double().mean() / 2 / len(no)))
    return areas


def linear(train: Tensor, labels: Tensor, test: Tensor, classes: int, epochs: int = 90, seed: int = 0) -> Tensor:
    """Scores `[M, classes]` of a linear layer taught on frozen features: batch norm without weights, LARS at 0.1 · batch / 256
    and without decay (MAE's protocol, on features of uncropped pictures)."""
    seed_everything(seed)
    mean, std = train.mean(0), (train.var(0, unbiased=False) + 1e-6).sqrt()
    x, layer = (train - mean) / std, nn.Linear(train.shape[1], classes)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    layer.to(train.device)
    batch = min(len(x), 4096)
    rate = max(0.1 * batch / 256, 0.1)
    opt = create_optimizer_v2(layer, opt="lars", lr=rate, weight_decay=0.0, momentum=0.9)
    steps = epochs * math.ceil(len(x) / batch)
    done = 0
    for _ in range(epochs):
        for at in torch.randperm(len(x)).split(batch):
            for group in opt.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done / steps))
            scores = layer(x[at])
            loss = (
                F.cross_entropy(scores, labels[at])
                if labels.ndim == 1
                else F.binary_cross_entropy_with_logits(scores, labels[at].float())
            )
            opt.zero_grad()
            loss.backward()
            opt.step()
            done += 1
    with torch.no_grad():
        return layer((test - mean) / std)


def judged(scores: Tensor, labels: Tensor, name: str) -> dict[str, float]:
    """Top-1 accuracy; of several classes a picture, the mean area under the ROC curve over the classes that have one."""
    if labels.ndim == 1:
        return {name: float((scores.argmax(1) == labels).double().mean())}
    areas = area_under_curve(scores, labels)
    known = [a for a in areas if a is not None]
    if not known:
        raise VitreousError("no class has pictures with it and without it to measure by")
    return {f"{name}_auc": sum(known) / len(known)} | {f"{name}_auc_{i}": a for i, a in enumerate(areas) if a is not None}


def probe(
    model: nn.Module,
    data: Data | Pair,
    check: Data | Pair,
    protocols: Sequence[str] = ("knn", "linear"),
    *,
    tokens: str = "pooled",
    block: int | None = None,
    epochs: float = 20,
    batch: int = 64,
    lr: float = 1e-3,
    layer_decay: float = 0.65,
    augment: Any = "crop",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Measure an encoder on labelled pictures: learnt from `data`, measured on `check`. The model is not changed.

    Returns shares in [0, 1]: "knn" (the best of k = 10, 20, 30, and of each: "knn_10" …; not for several classes a picture),
    "linear", "finetune" (accuracy after `epochs` of AdamW with `layer_decay`), or "linear_auc", "linear_auc_0" …; and "rankme"
    and "spread" of the features of `check`. tokens, block: what k-NN and the linear layer read (`features`).

    Raises `VitreousError` for an unknown protocol, and for pictures without labels.
    """
    if wrong := [p for p in protocols if p not in PROTOCOLS]:
        raise VitreousError(f"no protocol '{wrong[0]}'{nearest(wrong[0], PROTOCOLS) or ': choose ' + ', '.join(PROTOCOLS)}")
    if not protocols:
        raise VitreousError(f"name a protocol: {', '.join(PROTOCOLS)}")
    ours, y = features(model, data, tokens, block)
    theirs, truth = features(model, check, tokens, block)
    if y is None or truth is None:
        raise VitreousError("these pictures have no labels to measure by: give a folder of class folders")
    classes = y.shape[1] if y.ndim == 2 else int(max(y.max(), truth.max())) + 1
    found: dict[str, float] = {}
    device = next(model.parameters()).device
    held = ours.to(device), y.to(device), theirs.to(device)
    if "knn" in protocols and y.ndim == 1:
        found |= {f"knn_{k}": judged(knn(*held, classes, k).cpu(), truth, "a")["a"] for k in KS}
        found["knn"] = max(found.values())
    if "linear" in protocols:
        found |= judged(linear(*held, classes, seed=seed).cpu(), truth, "linear")
    if "finetune" in protocols:
        student: Any = copy.deepcopy(model)
        if not hasattr(student, "reset_classifier"):
            raise VitreousError(f"{type(model).__name__} cannot be given a classifier: fine-tune a model of timm")
        seed_everything(seed)
        student.reset_classifier(classes)
        learns = CrossEntropy() if y.ndim == 1 else BinaryCrossEntropy()
        settings: dict[str, Any] = dict(epochs=epochs, batch=min(batch, len(y)), augment=augment, seed=seed, progress=progress)
        tuned = train(student, data, learns, AdamW(lr=lr, layer_decay=layer_decay), accelerator=device.type, **settings)
        tuned.to(device)
        with torch.inference_mode():
            scores = torch.cat([look(tuned, x.to(device)).logits.cpu() for x, _ in in_turn(check, size_on(device))])
        found |= judged(scores, truth, "finetune")
    return found | {"rankme": rank_me(theirs), "spread": spread(theirs)}


def size_on(device: torch.device) -> int:
    """Pictures at once: on a GPU as many as keep it busy."""
    return 64 if device.type == "cpu" else 512
