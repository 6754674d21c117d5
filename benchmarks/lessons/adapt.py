"""Adapters, proxies, frozen layers and registers, on a backbone that learnt half of the classes."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import vitreous as vt
from vitreous.learn.measure import accuracy_on
from vitreous.learn.objective import look

from .bench import Bench, Figures, Pair, experiment, keep

HALF = 5  # classes that the backbone learnt; the others are new to it


def backbone(bench: Bench, seed: int) -> nn.Module:
    """A ViT of at least four blocks that learnt the first classes from the whole pool; kept in a file."""
    s = bench.scale
    model = bench.vit(seed, depth=max(4, s.depth))
    cast(Any, model).reset_classifier(HALF)
    path = bench.kept / f"half-{s.width}-{s.pool}-{seed}.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.to(bench.device).eval()
    model = bench.teach(model, part(bench.pool, seen=True), seed=seed)
    keep(model, path)
    return model


def part(data: Pair, seen: bool) -> Pair:
    """The images of the classes that the backbone knows, or of the others; labels from 0 on."""
    x, y = data
    kept = (y < HALF) == seen
    return x[kept], y[kept] - (0 if seen else HALF)


def learns(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / 1000


def only(model: nn.Module, *words: str) -> nn.Module:
    """A copy in which what has one of these words in its name learns."""
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        p.requires_grad_(any(w in name for w in words))
    return model


@experiment("hst", baseline="linear probe")
def hst(bench: Bench, seed: int) -> dict[str, Figures]:
    """The classes that are new to the backbone, from a fifth of the images, each way at three rates; held-out images choose."""
    base = backbone(bench, seed)
    new = copy.deepcopy(base)
    torch.manual_seed(seed)
    cast(Any, new).reset_classifier(HALF)
    learn, held, test = (part(d, seen=False) for d in (bench.train, bench.held, bench.test))
    learn = learn[0][: bench.scale.images // 5], learn[1][: bench.scale.images // 5]
    arms = {
        "linear probe": only(new, "head"),
        "norms and head": only(new, "norm", "head"),
        "VPT, 10 prompts": vt.adapt.VPT().apply(new),
        "VPT, 10 prompts, biases": vt.adapt.VPT(biases=True).apply(new),
        "HST": vt.adapt.HST().apply(new),
        "everything": only(new, ""),
    }
    found = {}
    for name, model in arms.items():
        tried = [bench.teach(model, learn, optimiser=vt.learn.AdamW(lr), times=3, seed=seed) for lr in (5e-4, 2e-3, 8e-3)]
        best = max(tried, key=lambda m: accuracy_on(m, held, 256) or 0.0)
        found[name] = {"accuracy": bench.right(best, test), "gradients": 3.0, "thousand that learn": learns(model)}
    return found


@experiment("vpt-metric", baseline="proxies, new head alone")
def vpt_metric(bench: Bench, seed: int) -> dict[str, Figures]:
    """Retrieval among test images of classes that nothing was trained on; a run of the second pass counts as two gradients."""
    base = backbone(bench, seed)
    learn, test = part(bench.train, seen=True), part(bench.test, seen=False)
    embed, prompts = vt.adapt.Embed(dims=64), vt.adapt.VPT(biases=True)
    plain, semantic = vt.learn.SemanticProxies(classes=HALF, semantic=0.0), vt.learn.SemanticProxies(classes=HALF)
    arms: dict[str, tuple[nn.Module, Any, float]] = {
        "proxies, new head alone": (only(embed.apply(base), "head"), plain, 4.0),
        "proxies, everything": (embed.apply(base), plain, 4.0),
        "proxies, prompts and biases": (vt.slim(base, [prompts, embed]), plain, 4.0),
        "semantic proxies, prompts and biases": (vt.slim(base, [prompts, embed]), semantic, 2.0),
    }
    features = copy.deepcopy(base)
    cast(Any, features).reset_classifier(0)
    found = {"(features as they are)": retrieved(features, test)}
    for name, (model, objective, times) in arms.items():
        taught = bench.teach(model, learn, objective, vt.learn.AdamW(2e-3), times=times, seed=seed)
        found[name] = retrieved(taught, test) | {"gradients": 4.0, "thousand that learn": learns(model)}
    return found


@torch.no_grad()
def retrieved(model: nn.Module, data: Pair) -> Figures:
    features = torch.cat([model(x) for x in data[0].split(256)])
    found = vt.learn.retrieval(features, data[1], (1, 4))
    return {name: 100 * found[name] for name in ("recall@1", "recall@4", "map@r")}


@dataclass(frozen=True)
class AtRandom(vt.learn.SlimFit):
    """What stands still is drawn anew in each step."""

    def after_step(self, now: vt.learn.Now) -> None:
        super().after_step(now)
        scores = cast(Tensor, cast(Any, now.parts).scores)
        scores.copy_(torch.rand(len(scores)).to(scores))


@experiment("slimfit", baseline="everything")
def slimfit(bench: Bench, seed: int) -> dict[str, Figures]:
    """Fine-tuning on the classes that are new to the backbone; what is kept for the backward pass of a batch."""
    base = backbone(bench, seed)
    torch.manual_seed(seed)
    cast(Any, base).reset_classifier(HALF)
    learn, test = part(bench.train, seen=False), part(bench.test, seen=False)
    arms: dict[str, tuple[nn.Module, vt.learn.SlimFit | None]] = {
        "everything": (base, None),
        "SlimFit, 90 %": (base, vt.learn.SlimFit()),
        "SlimFit, 90 %, steps of each tensor's own": (base, vt.learn.SlimFit(scaled=True)),
        "SlimFit, 90 %, activations as they are": (base, vt.learn.SlimFit(compress=False)),
        "90 % at random, activations as they are": (base, AtRandom(compress=False)),
        "linear probe": (only(base, "head"), None),
    }
    found = {}
    for name, (model, objective) in arms.items():
        both = [vt.learn.CrossEntropy(), *([objective] if objective else [])]
        taught = bench.teach(model, learn, both, vt.learn.AdamW(3e-4), seed=seed)
        size = kept_bytes(model, objective, learn[0][: bench.scale.batch]) / bench.scale.batch / 1024
        found[name] = {"accuracy": bench.right(taught, test), "gradients": 1.0, "KiB an image": size}
    return found


def kept_bytes(model: nn.Module, objective: vt.learn.SlimFit | None, x: Tensor) -> float:
    """Bytes that a forward pass keeps for the backward pass beside the weights: the mean of 10 draws of what stands still."""
    total = 0
    for draw in range(10):
        torch.manual_seed(draw)
        new = copy.deepcopy(model).train()
        now = vt.learn.Now(new, parts=objective.parts(new) if objective else None)
        if objective:
            objective.before_step(now)
        weights, kept = {p.data_ptr() for p in new.parameters()}, {}

        def pack(t: Tensor, weights: set[int] = weights, kept: dict[int, int] = kept) -> Tensor:
            if t.data_ptr() not in weights:
                kept[t.data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), objective.around(now) if objective else nullcontext():
            loss = new(x).sum()  # held, for a place that is freed is used again
        total += sum(kept.values())
        del loss
    return total / 10


@experiment("ph-reg", baseline="as it was")
def ph_reg(bench: Bench, seed: int) -> dict[str, Figures]:
    """How far one pass is from the mean over 40 views, as a share of the spread of features, on test images; less is better.

    With `dinov2_vits14_224.safetensors` in the folder `--kept` on that backbone at 112 pixels, else on the small one.
    """
    weights = bench.kept / "dinov2_vits14_224.safetensors"
    x, test = bench.train[0][:256], bench.test[0][:64]
    if weights.exists():
        base = vt.open("vit_small_patch14_dinov2", checkpoint=weights, img_size=112, num_classes=0).to(bench.device)
        x, test = (nn.functional.interpolate(t, size=112, mode="bicubic") for t in (x, test))
    else:
        base = backbone(bench, seed)
    teach = lambda views: vt.learn.PHReg(base, views=views)
    torch.manual_seed(1000 + seed)
    with torch.no_grad():
        now = vt.learn.Now(base, teach=look)
        target = torch.cat([teach(40).targets(t, now) for t in test.split(8)])
    new = vt.adapt.Registers().apply(base)
    unlocked = only(base, *(n for n, p in new.named_parameters() if p.requires_grad and "registers" not in n))
    still = copy.deepcopy(new)
    cast(Any, still).blocks[0].registers.requires_grad_(False)
    given = dict(batch=8, augment=None, times=2 / bench.scale.epochs, warmup=0.1, seed=seed)
    arms = {
        "as it was": base,
        "16 registers, 10 views": bench.teach(new, (x, None), teach(10), vt.learn.AdamW(1e-4, 0.01), **given),
        "16 registers, 4 views": bench.teach(new, (x, None), teach(4), vt.learn.AdamW(1e-4, 0.01), **given),
        "16 registers that do not learn, 10 views": bench.teach(still, (x, None), teach(10), vt.learn.AdamW(1e-4, 0.01), **given),
        "no registers, 10 views": bench.teach(unlocked, (x, None), teach(10), vt.learn.AdamW(1e-4, 0.01), **given),
    }
    with torch.no_grad():
        spread, before = (target - target.mean((0, 1))).square().mean(), look(base, test, ("prefix",)).prefix
    found = {}
    for name, model in arms.items():
        with torch.no_grad():
            seen = look(model, test, ("patches", "prefix"))
        assert seen.patches is not None and seen.prefix is not None and before is not None
        drift = 1 - nn.functional.cosine_similarity(seen.prefix[:, 0], before[:, 0], dim=-1).mean()
        found[name] = {
            "distance": float(100 * (seen.patches - target).square().mean() / spread),
            "1 − cosine": float(1 - nn.functional.cosine_similarity(seen.patches, target, dim=-1).mean()),
            "class token's 1 − cosine to what it was": float(drift),
        } | ({} if name == "as it was" else {"gradients": 2.0})
    return found
