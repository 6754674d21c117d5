"""Which heads matter: what is lost without each, and what gradients say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import Anatomy, read
from ..copies.own import run, still
from ..errors import VitreousError, nearest
from ..glass import glass
from ..outputs import answer, embeds
from ..score import two
from .ablation import HotBlock, hot_blocks, why_one_by_one, without_each_head
from .stream import Images, Means, batches, fitting, interval, side_by_side, tell
from .tail import lay_out

ABLATED = ("loss", "accuracy", "output")
GRADIENTS = ("taylor", "gradient_attention")
PRECISIONS = ("f32", "bf16")


@dataclass(frozen=True)
class HeadImportance:
    """How much each head matters, by each metric; `[metrics, layers, heads]`, NaN for heads that a layer does not have.

    Heads are numbered as the model has them now: where pruning removed some, those that are left move up.
    """

    images: int
    layers: tuple[str, ...]
    """Dotted names of the attention modules."""
    metrics: tuple[str, ...]
    values: np.ndarray
    low: np.ndarray
    high: np.ndarray
    agreement: np.ndarray
    """`[metrics, metrics]`: Kendall's τ-b of two metrics' ranking of all heads, and its 95 % interval over images."""
    agreement_low: np.ndarray
    agreement_high: np.ndarray
    shared: bool
    """Whether the ablations shared their prefix."""
    why_not: str

    def rows(self) -> list[dict[str, Any]]:
        """One row a head: layer, head, and each metric with the ends of its interval."""
        rows = []
        for layer, name in enumerate(self.layers):
            for head in range(self.values.shape[2]):
                if np.isnan(self.values[:, layer, head]).all():
                    continue
                row: dict[str, Any] = {"layer": layer, "name": name, "head": head}
                for m, metric in enumerate(self.metrics):
                    row[metric] = float(self.values[m, layer, head])
                    row[f"{metric}_low"] = float(self.low[m, layer, head])
                    row[f"{metric}_high"] = float(self.high[m, layer, head])
                rows.append(row)
        return rows


def head_importance(
    model: nn.Module,
    images: Images,
    labels: Tensor | None = None,
    metrics: Sequence[str] | None = None,
    batch: int = 4,
    seed: int = 0,
    precision: str = "f32",
    multi_label: bool = False,
) -> HeadImportance:
    """The importance of every head of `model`'s blocks over a data set, by pruning and by gradients, and how far they agree.

    After "How Does Attention Work in Vision Transformers? A Visual Analytics Attempt" (Li et al., 2023), whose abstract asks
    for multiple pruning-based metrics; which ones is our choice:

    - "loss": cross-entropy without the head minus with it. Positive where the head helps.
    - "accuracy": the share of images that are right with the head, minus without.
    - "output": Kullback-Leibler divergence of the class probabilities without the head from those with it, in nats; for a
      model that gives features, the distance |f − f'| / |f| of its features.
    - "taylor": |∂L/∂ξ| at ξ = 1, where ξ scales what the head gives (Michel et al., 2019, section 4.1, not normalised).
    - "gradient_attention": Σ |A ⊙ ∂L/∂A| over queries and keys. Its signed sum is ∂L/∂ξ, so it is never below "taylor".

    Each is a mean over images. L is the cross-entropy with `labels`; without labels, with the model's own answers, and
    "accuracy" is then agreement with them. One logit is taken for two classes. With `multi_label`, or marks for labels, each
    class is a question of its own, answered by sigmoid, and all is a mean over them. A model that gives features has "output",
    and gradients of its feature along a random direction, one for each image.

    Removing a head zeroes what it gives before the output projection. All heads of a block share what comes before them, in
    models of plain blocks that keep all their tokens, unquantized; others take one pass a head (`shared`, `why_not`). Blocks
    that are needed often enough run in OpenVINO.

    Args:
        images: `[N, C, H, W]`, a data set of `vt.data`, a loader or what else `vitreous.calibrate.images` takes, whose labels are
            used; `labels` `[N]`, or marks `[N, K]` of 0 and 1, go with a tensor.
        metrics: all that apply by default.
        batch: images at a time. Gradients keep all activations of a batch.
        precision: "f32", or "bf16": what runs in OpenVINO multiplies in bfloat16 on a processor that has it (others go on in
            float32). Outputs without a head are then right to some 1e-2, which hardly changes the order of the heads.

    Raises `VitreousError` for unknown metrics and precisions, a model without attention in blocks, and labels that do not fit.
    """
    if precision not in PRECISIONS:
        raise VitreousError(f"see.head_importance: precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    anatomy = read(model)
    if not anatomy.blocks:
        raise VitreousError(f"see.head_importance ranks attention heads, and {anatomy.kind} has none in its blocks")
    means, directions = Means(seed), torch.Generator().manual_seed(seed)
    chosen: tuple[str, ...] = ()
    with still(model) as own:
        why_not = lay_out(own, model, anatomy) or why_one_by_one(own, anatomy)
        laid_out = read(own)  # the same blocks, whose attention may have other names
        blocks = None if why_not else hot_blocks(own, laid_out, precision)
        for x, y in batches(images, labels, batch, model):
            classes = not embeds(model, x)
            chosen = chosen or _chosen(metrics, classes)
            found = _measure(own, x, y if classes else None, laid_out, chosen, classes, blocks, directions, multi_label)
            means.add(torch.stack([found[m] for m in chosen], 1))
            tell(means.n, images)
    values, drawn = means.mean(), means.resamples()
    low, high = interval(drawn)
    exist = ~np.isnan(values[0])
    taus = np.stack([kendall(v[:, exist]) for v in drawn])
    return HeadImportance(
        means.n, tuple(b.attention.name for b in anatomy.blocks), chosen, values, low, high,
        kendall(values[:, exist]), *interval(taus), not why_not, why_not,
    )  # fmt: skip


def _chosen(metrics: Sequence[str] | None, classes: bool) -> tuple[str, ...]:
    possible = (*ABLATED, *GRADIENTS) if classes else ("output", *GRADIENTS)
    chosen = tuple(dict.fromkeys(possible if metrics is None else metrics))
    if wrong := [m for m in chosen if m not in possible]:
        raise VitreousError(f"no importance metric {wrong[0]!r} here{nearest(wrong[0], possible)}: {', '.join(possible)}")
    if not chosen:
        raise VitreousError(f"see.head_importance needs at least one of {', '.join(possible)}")
    return chosen


def kendall(values: np.ndarray) -> np.ndarray:
    """Kendall's τ-b `[M, M]` between M rankings of n things, `[M, n]`; NaN with a constant one."""
    first, second = np.triu_indices(values.shape[1], 1)
    order = np.sign(values[:, first] - values[:, second])
    untied = np.sqrt((order**2).sum(1))
    with np.errstate(invalid="ignore"):
        return order @ order.T / np.outer(untied, untied)


def _measure(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    anatomy: Anatomy,
    metrics: Sequence[str],
    classes: bool,
    blocks: Sequence[HotBlock] | None,
    directions: torch.Generator,
    multi_label: bool,
) -> dict[str, Tensor]:
    """For each metric `[B, layers, heads]`, NaN where there is no head."""
    found: dict[str, Tensor] = {}
    multi_label = classes and (multi_label if y is None else y.ndim == 2)
    if set(metrics) & set(GRADIENTS):
        found |= _gradients(model, x, y, anatomy, classes, directions, multi_label)
    if set(metrics) & set(ABLATED):
        out, removed = without_each_head(model, x, anatomy, blocks)
        if classes and not multi_label:
            out, removed = two(out), [two(r) for r in removed]
        if classes:
            y = ((out > 0).long() if multi_label else out.argmax(1)) if y is None else fitting(y, out)
        layers = [(_lost_marks if multi_label else _lost)(out, without, y) for without in removed]
        found |= {m: side_by_side([layer[m] for layer in layers]) for m in layers[0]}
    return found


def _lost(out: Tensor, without: Tensor, y: Tensor | None) -> dict[str, Tensor]:
    """Each metric `[B, heads]`, from the outputs `[B, K]` of the model and `[heads, B, K]` without each head."""
    if y is None:
        moved, size = (without - out).flatten(2).norm(dim=-1), out.flatten(1).norm(dim=-1)
        return {"output": (moved / size.clamp_min(1e-12)).T}
    before, after = out.log_softmax(-1), without.log_softmax(-1)
    truth = y.expand(len(after), -1)[..., None]
    return {
        "loss": (before.gather(1, y[:, None]) - after.gather(2, truth)[..., 0].T),
        "accuracy": (out.argmax(1) == y).float()[:, None] - (without.argmax(2) == y).float().T,
        "output": F.kl_div(after, before.expand_as(after), reduction="none", log_target=True).sum(-1).T,
    }


def _lost_marks(out: Tensor, without: Tensor, y: Tensor | None) -> dict[str, Tensor]:
    """As `_lost`, for labels `[B, K]` that say of each class whether it is there."""
    assert y is not None
    truth, p = y.to(out).expand_as(without), out.sigmoid()
    loss = F.binary_cross_entropy_with_logits
    by_model = loss(without, p.expand_as(without), reduction="none") - loss(out, p, reduction="none")
    return {
        "loss": (loss(without, truth, reduction="none") - loss(out, y.to(out), reduction="none")).mean(2).T,
        "accuracy": (((out > 0) == (y > 0)).float() - ((without > 0) == (truth > 0)).float()).mean(2).T,
        "output": by_model.mean(2).T,
    }


def _gradients(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    anatomy: Anatomy,
    classes: bool,
    directions: torch.Generator,
    multi_label: bool,
) -> dict[str, Tensor]:
    names = [b.attention.name for b in anatomy.blocks]
    # The images ask for gradients, so that a frozen model has them too; its weights' are never computed.
    with torch.inference_mode(False), torch.enable_grad(), glass(model, layers=names, grad=True) as g:
        out = answer(run(model, x.clone().requires_grad_()))
        if multi_label:
            truth = (out > 0).float() if y is None else fitting(y, out).to(out)
            loss = F.binary_cross_entropy_with_logits(out, truth, reduction="none").mean(1).sum()
        elif classes:
            out = two(out)
            loss = F.cross_entropy(out, out.argmax(1) if y is None else fitting(y, out), reduction="sum")
        else:
            way = F.normalize(torch.randn(out.shape, generator=directions).flatten(1), dim=1).view_as(out)
            loss = (way.to(out) * out).sum()
        maps = [a for name in names if (a := g[name].attention) is not None]
        gradients = torch.autograd.grad(loss, maps)
    if any(a.ndim != 4 or len(a) != len(x) for a in maps):
        raise VitreousError(f"{anatomy.kind} attends in windows: choose metrics among {', '.join(ABLATED)}")
    products = [(a * d).detach().float() for a, d in zip(maps, gradients, strict=True)]
    return {
        "taylor": side_by_side([p.sum((2, 3)).abs() for p in products]),
        "gradient_attention": side_by_side([p.abs().sum((2, 3)) for p in products]),
    }
