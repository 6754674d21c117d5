"""Merging: soups of fine-tunings, and models of several tasks."""

from __future__ import annotations

import copy
import itertools
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import vitreous as vt

from .bench import Bench, Figures, Pair, experiment, keep


def start(bench: Bench, seed: int) -> nn.Module:
    """What all are fine-tuned from: a ViT trained twice as long as the plain run; kept in a file."""
    model, s = bench.vit(seed), bench.scale
    path = bench.kept / f"start-{s.width}-{s.images}-{seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.to(bench.device).eval()
    model = bench.teach(model, bench.train, times=2, seed=seed)
    keep(model, path)
    return model


@experiment("model-soups", baseline="best alone")
def soups(bench: Bench, seed: int) -> dict[str, Figures]:
    """Eight fine-tunings from one start; what is best, and what goes in, is chosen on held-out images."""
    base = start(bench, seed)
    runs: list[tuple[float, dict[str, Any]]] = [
        (lr, given) for lr in (3e-4, 1e-3) for given in ({}, {"mixup": 0.4}, {"augment": None}, {"cutmix": 1.0})
    ]
    even = bench.more[0][: len(bench.more[0]) // 2 * 2], bench.more[1][: len(bench.more[1]) // 2 * 2]
    models = [
        bench.teach(base, even, optimiser=vt.learn.AdamW(lr), times=0.3, seed=seed * 100 + i, **given).cpu()
        for i, (lr, given) in enumerate(runs)
    ]
    held = bench.held[0].cpu(), bench.held[1].cpu()
    alone = [bench.right(m, bench.held) for m in models]
    models = [m.cpu() for m in models]
    best = models[max(range(len(models)), key=lambda i: alone[i])]
    made: dict[str, Any] = {
        "best alone": best,
        "uniform soup": vt.merge(models, vt.learn.UniformSoup()),
        "greedy soup": vt.merge(models, vt.learn.GreedySoup(), data=held),
        "learned soup": vt.merge(models, vt.learn.LearnedSoup(steps=60), data=held),
    }
    changed = corrupted(bench.test, seed)
    n = len(runs)
    found = {
        name: {"accuracy": bench.right(m), "noise, blur, low contrast": bench.right(m, changed), "gradients": 2 + 0.3 * n}
        for name, m in made.items()
    }
    models = [m.to(bench.device) for m in models]

    def together(data: Pair) -> float:
        with torch.no_grad():
            right = [sum(m(x).softmax(1) for m in models).argmax(1) == y for x, y in zip(*(t.split(256) for t in data))]
        return 100 * float(torch.cat(right).float().mean())

    ensemble = {"accuracy": together(bench.test), "noise, blur, low contrast": together(changed), "gradients": 2 + 0.3 * n}
    return found | {"(all eight, answers averaged)": ensemble}


def corrupted(data: Pair, seed: int) -> Pair:
    """The test images three times: with noise, blurred, and at a third of their contrast."""
    x, y = data
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=g).to(x)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3, 1)
    return torch.cat([x + 0.5 * noise, blurred, x / 3]), y.repeat(3)


@experiment("opcm", baseline="mean of the models")
def opcm(bench: Bench, seed: int) -> dict[str, Figures]:
    """Four tasks, each with a head of its own: two halves of the classes, turned pictures, negatives. Mean over the tasks; OPCM
    over six orders of arrival."""
    base = start(bench, seed)
    x, y = bench.more
    xt, yt = bench.test
    low, low_t = y < 5, yt < 5
    tasks: dict[str, tuple[Pair, Pair]] = {
        "half": ((x[low], y[low]), (xt[low_t], yt[low_t])),
        "other half": ((x[~low], y[~low]), (xt[~low_t], yt[~low_t])),
        "turned": ((x.rot90(1, (2, 3)), y), (xt.rot90(1, (2, 3)), yt)),
        "negative": ((-x, y), (-xt, yt)),
    }
    tuned = [bench.teach(base, learn, times=0.5, seed=seed) for learn, _ in tasks.values()]
    heads = [copy.deepcopy(cast(nn.Module, m.head)) for m in tuned]

    def bare(model: nn.Module) -> nn.Module:
        model = copy.deepcopy(model).cpu()
        cast(Any, model).reset_classifier(0)
        return model

    root, bodies = bare(base), [bare(m) for m in tuned]

    def mean_accuracy(body: nn.Module) -> float:
        total = 0.0
        for head, (_, test) in zip(heads, tasks.values(), strict=True):
            whole = copy.deepcopy(body)
            cast(Any, whole).head = copy.deepcopy(head)
            total += bench.right(whole, test)
        return total / len(tasks)

    def arithmetic(scale: float) -> nn.Module:
        made, w0 = copy.deepcopy(root), root.state_dict()
        states = [b.state_dict() for b in bodies]
        summed: dict[str, Tensor] = {k: w + scale * torch.stack([s[k] - w for s in states]).sum(0) for k, w in w0.items()}
        made.load_state_dict(summed)
        return made

    def over_orders(rule: vt.learn.OPCM) -> float:
        orders = list(itertools.permutations(range(len(bodies))))[::4]
        return sum(mean_accuracy(vt.merge([bodies[i] for i in o], rule, base=root)) for o in orders) / len(orders)

    alone = sum(bench.right(m, test) for m, (_, test) in zip(tuned, tasks.values(), strict=True)) / len(tasks)
    n = 2 + 0.5 * len(tasks)
    found = {
        "mean of the models": mean_accuracy(vt.merge(bodies, vt.learn.UniformSoup())),
        "task arithmetic, 0.3": mean_accuracy(arithmetic(0.3)),
        "OPCM": over_orders(vt.learn.OPCM()),
        "OPCM, diagonal kept (the code)": over_orders(vt.learn.OPCM(zero_diagonal=False)),
        "(each alone on its task)": alone,
        "(the start, with their heads)": mean_accuracy(root),
    }
    return {name: {"accuracy": value, "gradients": n} for name, value in found.items()}


@experiment("pleas", baseline="mean of the weights")
def pleas(bench: Bench, seed: int) -> dict[str, Figures]:
    """Two models that learnt the same classes from different starts and other images; merged on images that both learnt from."""
    x, y = bench.pool
    halves = [(x[i::2], y[i::2]) for i in range(2)]
    models = [bench.teach(bench.vit(100 * seed + i), half, seed=100 * seed + i).cpu() for i, half in enumerate(halves)]
    data = (x[:512].cpu(), y[:512].cpu())
    rules: dict[str, vt.learn.MergingRule] = {
        "mean of the weights": vt.learn.UniformSoup(),
        "permuted, then the mean": vt.learn.PLeaS(squares=False),
        "PLeaS": vt.learn.PLeaS(),
        "PLeaS, 0.5 of the hidden units twice": vt.learn.PLeaS(ratio=0.5),
        "PLeaS, 0.9 of the hidden units twice": vt.learn.PLeaS(ratio=0.9),
    }
    found: dict[str, Figures] = {}
    for name, rule in rules.items():
        merged = vt.merge(models, rule, data=data if rule.needs_data else None)
        found[name] = {"accuracy": bench.right(merged), "thousand parameters": sum(p.numel() for p in merged.parameters()) / 1000}
    found["(each alone, their mean)"] = {"accuracy": sum(bench.right(m) for m in models) / 2}
    models = [m.to(bench.device) for m in models]
    with torch.no_grad():
        both = [sum(m(t).softmax(1) for m in models).argmax(1) for t in bench.test[0].split(256)]
    found["(both, answers averaged)"] = {"accuracy": 100 * float((torch.cat(both) == bench.test[1]).float().mean())}
    return found
