"""Attention rollout: attention multiplied through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..blocks import Reduction, traced
from ..copies.own import exact, run, still
from ..errors import VitreousError
from ..glass import glass
from .patches import Reading, grid_of, on_grid

FUSE = {"mean": lambda a: a.mean(1), "max": lambda a: a.amax(1), "min": lambda a: a.amin(1)}


def rollout(model: nn.Module, x: Tensor, fuse: Literal["mean", "max", "min"] = "mean", discard: float = 0.0) -> Tensor:
    """Heatmaps `[B, h, w]`: the share of each patch in what the model reads out, if attention alone moved information.

    Abnar & Zuidema, "Quantifying Attention Flow in Transformers" (2020), section 3: each layer's attention, fused over
    heads, plus the identity for the residual, every row divided by its sum; the product over the layers, row of the
    class token. What is read is found out by gradients of the answer: a model that averages its patches is read by the mean of
    their rows, also if it has a class token, one that reads several tokens by their shares, one that pools by attention by that.

    Where a token step shortens the sequence, the product goes on through the shares of the old tokens in the new ones.

    Args:
        x: images `[B, C, H, W]`.
        fuse: how to join the heads; "max" and "min", and `discard`, are not in the paper but in Gildenblat's
            vit-explain.
        discard: share in [0, 1) of each image's smallest attentions to drop in every layer; those among the class and
            other prefix tokens stay.

    Raises `VitreousError` when a layer does not attend over the whole sequence (windows, pooled keys, channels).
    """
    if fuse not in FUSE:
        raise VitreousError(f"see.rollout cannot fuse heads by {fuse!r}: choose mean, max or min")
    anatomy, grid = grid_of(model, x, "see.rollout")
    with (
        torch.no_grad(),
        still(model) as own,
        traced(own) as trace,
        glass(own, reduce=FUSE[fuse]) as g,
        Reading(own, anatomy) as reading,
    ):
        read = reading.groups(run(own, x))
    layers = [(v.name, v.attention.float()) for v in g.views if v.attention is not None]
    return multiply(x, layers, trace, anatomy, grid, read, discard, "see.rollout")


@exact
@torch.no_grad()
def multiply(
    x: Tensor,
    layers: Sequence[tuple[str, Tensor]],
    trace: Sequence[Reduction],
    anatomy: Anatomy,
    grid: tuple[int, int],
    read: Tensor,
    discard: float,
    purpose: str,
) -> Tensor:
    """Heatmaps `[B, h, w]`: the product over the `layers`, a name and `[B, N, N]` each, of row-normalised map plus identity.

    `read` are the shares in what is read, from `Reading.groups`. A layer of fewer queries than keys pools: what comes after it
    reads its queries alone.
    """
    if not 0 <= discard < 1:
        raise VitreousError(f"{purpose}: discard must lie in [0, 1), not {discard}")
    if not layers:
        raise VitreousError(f"no attention of {anatomy.kind} was seen while it ran: use see.grad_cam")
    block_of = {b.attention.name: b.name for b in anatomy.blocks}
    # Only one row of the product is wanted, so it is taken from the last layer to the first: vectors times matrices.
    tokens = trace[-1].tokens if trace else anatomy.prefix + grid[0] * grid[1]
    row = torch.zeros(len(x), 1, tokens, device=x.device)
    read = read.to(row)[:, None]
    row[..., : anatomy.prefix] = read[..., :-1]
    row[..., anatomy.prefix :] = read[..., -1:] / (tokens - anatomy.prefix)
    for name, a in reversed(layers):
        for r in reversed([r for r in trace if r.layer == block_of.get(name)]):
            row = row @ r.matrix().float()
            tokens = r.into.shape[1]
        pooling = a.ndim == 3 and a.shape[1] < a.shape[2]
        if a.ndim != 3 or len(a) != len(x) or a.shape[2] != tokens or (a.shape[1] != tokens and not pooling):
            raise VitreousError(
                f"{purpose} multiplies attention over one sequence of tokens; layer '{name}' of {anatomy.kind} "
                f"attends {' × '.join(map(str, a.shape[1:]))} where {tokens} tokens are (windows, pooling, channels): "
                "use see.grad_cam"
            )
        if pooling:
            row = a.mean(1, keepdim=True)
            continue
        a = _discard(a, discard, anatomy.prefix) + torch.eye(tokens, device=a.device)
        row = row @ (a / a.sum(-1, keepdim=True))
    return on_grid(row[:, 0], grid)


def _discard(a: Tensor, share: float, prefix: int) -> Tensor:
    """`[B, N, N]` without the `share` of entries that are smallest in each image."""
    low = a.flatten(1).topk(int(a[0].numel() * share), largest=False).indices
    kept = a.flatten(1).scatter(1, low, 0.0).view_as(a)
    kept[:, :prefix, :prefix] = a[:, :prefix, :prefix]
    return kept
