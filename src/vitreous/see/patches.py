"""What every explanation needs: the grid of patches, an undisturbed run, and the way from tokens back to patches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy, read
from ..blocks import Reduction
from ..errors import VitreousError


def grid_of(model: nn.Module, x: Tensor, purpose: str) -> tuple[Anatomy, tuple[int, int]]:
    """The anatomy of `model`, and the patch rows and columns that images like `x` give.

    Raises `VitreousError` for a model with no attention or no single grid of patches, and for `x` that is no batch of
    images.
    """
    check_images(x)
    anatomy = read(model)
    if not anatomy.attention:
        raise VitreousError(f"{purpose} shows attention, and {anatomy.kind} has none: use see.grad_cam")
    if anatomy.grid is None:
        raise VitreousError(f"{purpose} needs one grid of patches, and {anatomy.kind} tells of none: use see.grad_cam")
    embed: Any = getattr(model, "patch_embed", None)
    if getattr(model, "dynamic_img_size", False) and hasattr(embed, "dynamic_feat_size"):
        h, w = embed.dynamic_feat_size(tuple(x.shape[-2:]))
        return anatomy, (int(h), int(w))
    return anatomy, anatomy.grid


def check_images(x: Any) -> None:
    if not isinstance(x, Tensor) or x.ndim != 4 or not len(x):
        shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise VitreousError(f"images must be a tensor [B, C, H, W], not {shape}: x[None] adds a batch axis")


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, each module's own mode restored after: looking must not move batch statistics."""
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def run(model: nn.Module, x: Tensor) -> Any:
    try:
        return model(x)
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise VitreousError(f"{type(model).__name__} does not run on images {list(x.shape)}: {reason}") from error


def class_row(anatomy: Anatomy) -> bool:
    """Whether the model reads its answer from the class token, so that the row of the class token explains it."""
    return anatomy.class_token and anatomy.pool not in ("avg", "avgmax", "max", "map")


def before(trace: Sequence[Reduction], anatomy: Anatomy, block: str) -> list[Reduction]:
    """The reductions that ran before the attention of `block`; all of them for a name that is no block."""
    order = [b.name for b in anatomy.blocks]
    return [r for r in trace if block not in order or order.index(r.layer) < order.index(block)]


def shares(trace: Sequence[Reduction], like: Tensor, tokens: int) -> Tensor:
    """`[B, tokens left, tokens]`: the shares, summing to 1, of the first tokens in those that are left."""
    m = torch.eye(tokens, device=like.device).expand(len(like), -1, -1)
    for r in trace:
        m = r.matrix().float() @ m
    return m


def painting(trace: Sequence[Reduction], like: Tensor, tokens: int) -> Tensor:
    """`[B, tokens left, tokens]`: 1 where a token is part of one that is left: values per token paint all patches.

    What was given up is painted with its share of the token that gathers it, or 0 when there is none.
    """
    m = torch.eye(tokens, device=like.device).expand(len(like), -1, -1)
    for r in trace:
        share = r.matrix().float()
        part = (share > 0).float()
        if r.rest is not None and r.rest < r.tokens:
            part[:, r.rest] = share[:, r.rest]
        m = part @ m
    return m


def places(trace: Sequence[Reduction], like: Tensor, tokens: int) -> list[Tensor]:
    """At first and after each reduction `[B, tokens]`: which token each first token is part of, -1 once given up."""
    now = torch.arange(tokens, device=like.device).expand(len(like), -1)
    found = [now]
    for r in trace:
        new = r.into.gather(1, now.clamp_min(0))
        gone = now < 0 if r.rest is None else (now < 0) | (new == r.rest)
        now = new.masked_fill(gone, -1)
        found.append(now)
    return found


def on_grid(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, tokens]` to `[B, h, w]`: the patches come last in every sequence."""
    h, w = grid
    return values[:, -h * w :].unflatten(1, (h, w))
