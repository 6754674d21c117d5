"""Optimisers, sharpness, experts and patch mixing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import vitreous as vt
from vitreous.learn.optimisers import Optimiser

from .bench import CLASSES, Bench, Figures, experiment


@experiment("sam-vit", baseline="AdamW, twice as long")
def sam(bench: Bench, seed: int) -> dict[str, Figures]:
    """SAM takes two gradients a step, so AdamW for twice as many steps is what it must beat."""
    adam = vt.learn.AdamW()
    arms = {
        "AdamW": (adam, 1.0),
        "AdamW, twice as long": (adam, 2.0),
        "SAM, ρ = 0.1": (vt.learn.SAM(adam, 0.1), 1.0),
        "ASAM, ρ = 1": (vt.learn.SAM(adam, 1.0, adaptive=True), 1.0),
    }
    x, y = bench.train[0][:256], bench.train[1][:256]
    loss = lambda model: F.cross_entropy(model(x), y)
    found = {}
    for name, (optimiser, times) in arms.items():
        model = bench.teach(bench.vit(seed), bench.train, optimiser=optimiser, times=times, seed=seed)
        found[name] = {
            "accuracy": bench.right(model),
            "gradients": times * (2 if isinstance(optimiser, vt.learn.SAM) else 1),
            "largest eigenvalue": vt.learn.largest_eigenvalue(model, loss),
            "loss there": float(loss(model)),
            "loss at distance 0.5": vt.learn.neighbourhood_loss(model, loss, rho=0.5),
        }
    return found


@dataclass(frozen=True)
class ByShape(Optimiser):
    """Momentum with the rate times √(n − 1) for a tensor of n numbers: what SGD-SaI comes to for gradients of mean zero."""

    momentum: float = 0.9

    def _make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made = []
        for group in groups:
            for p in group["params"]:
                made.append(group | {"params": [p], "lr_scale": max(p.numel() - 1, 1) ** 0.5})
        return torch.optim.SGD([{"lr": self.lr, **g} for g in made], self.lr, self.momentum, dampening=self.momentum)


@experiment("lion", "sgd-sai", baseline="AdamW")
def optimisers(bench: Bench, seed: int) -> dict[str, Figures]:
    """Each at five rates, a factor 3 apart; the rate is chosen on held-out images. Half the steps of the other experiments."""
    kinds: dict[str, tuple[Any, float]] = {
        "AdamW": (lambda lr: vt.learn.AdamW(lr), 1e-3),
        "Lion": (lambda lr: vt.learn.Lion(lr, 5e-5 / lr), 2e-4),
        "SGD with momentum": (lambda lr: vt.learn.SGD(lr), 0.1),
        "SGD-SaI": (lambda lr: vt.learn.SGDSaI(lr), 3e-3),
        "momentum, rate by shape": (lambda lr: ByShape(lr, 0.01), 3e-3),
    }
    found = {}
    for name, (make, centre) in kinds.items():
        tried = []
        for lr in centre * 3.0 ** np.arange(-2, 3):
            try:
                model = bench.teach(bench.vit(seed), bench.train, optimiser=make(lr), times=0.5, seed=seed)
                tried.append((bench.right(model, bench.held), lr, bench.right(model)))
            except vt.VitreousError:  # diverged
                tried.append((0.0, lr, 100 / CLASSES))
        best = max(tried)
        usable = sum(t[0] > best[0] - 3 for t in tried)
        state = 2 if name == "AdamW" else 1
        found[name] = {
            "accuracy": best[2], "gradients": 0.5, "best rate": best[1], "rates of 5 within 3 points": usable,
            "numbers kept a weight": state,
        }  # fmt: skip
    return found


@dataclass(frozen=True)
class ScaledMLP(vt.learn.AdamW):
    """AdamW whose rate is `times` as high in the MLPs of every second block: where EWA has its experts."""

    times: float = 1.0

    def make(self, model: nn.Module, parts: nn.Module) -> torch.optim.Optimizer:
        inside = {id(p) for n, p in model.named_parameters() if ".mlp." in n and int(n.split(".")[1]) % 2}
        decayed = [(p, p.ndim > 1) for p in model.parameters()]
        groups = [
            {"params": [p for p, d in decayed if d == decay and (id(p) in inside) == mlp],
             "weight_decay": self.weight_decay if decay else 0.0, "lr_scale": self.times if mlp else 1.0}
            for decay in (True, False) for mlp in (True, False)
        ]  # fmt: skip
        return self._make(groups)


@experiment("ewa", baseline="plain")
def ewa(bench: Bench, seed: int) -> dict[str, Figures]:
    """Four experts in every second block, beside what else could explain a gain: another rate in those MLPs, averaged weights."""
    ce, vit = vt.learn.CrossEntropy(), bench.vit(seed)
    experts = vt.learn.with_experts(vit)
    found = {}
    for name, model, objectives, more in (
        ("plain", vit, [ce], {}),
        ("rate of those MLPs × ½", vit, [ce], {"optimiser": ScaledMLP(times=0.5)}),
        ("rate of those MLPs × 2", vit, [ce], {"optimiser": ScaledMLP(times=2.0)}),
        ("averaged weights (EMA 0.99)", vit, [ce], {"ema": 0.99}),
        ("experts, averaged at the end alone", experts, [ce, vt.learn.EWA(0.0)], {}),
        ("EWA, share up to 0.3", experts, [ce, vt.learn.EWA(0.3)], {}),
        ("EWA, share up to 0.75", experts, [ce, vt.learn.EWA(0.75)], {}),
    ):
        taught = vt.learn.merged(bench.teach(model, bench.train, objectives, seed=seed, **more))
        found[name] = {"accuracy": bench.right(taught), "gradients": 1.0}
    return found


@experiment("patch-mixing", baseline="CNN, no mixing")
def patch_mixing(bench: Bench, seed: int) -> dict[str, Figures]:
    """A grid of 4 × 4 patches; accuracy when a share of them is another picture's."""
    from .bench import CNN

    torch.manual_seed(seed)
    found = {}
    for kind, model in (("CNN", CNN(bench.scale.width // 2)), ("ViT", bench.vit(seed))):
        for name, given in (
            ("no mixing", {}),
            ("CutMix", {"cutmix": 1.0}),
            ("Patch Mixing", {"mix": vt.learn.PatchMixing(CLASSES, grid=4)}),
        ):
            taught = bench.teach(model, bench.train, seed=seed, **given)
            x, y = bench.test
            curve = vt.learn.replacement_curve(taught, x, y, (0, 0.25, 0.5, 0.75), grid=4)
            labels = ("a half replaced", "clean", "a quarter", "three quarters")
            values = (curve[2], curve[0], curve[1], curve[3])
            found[f"{kind}, {name}"] = {n: 100 * v for n, v in zip(labels, values, strict=True)} | {"gradients": 1.0}
    return found
