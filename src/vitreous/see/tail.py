"""Run only what comes after the last block of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..copies.own import run
from ..errors import VitreousError
from ..outputs import answer


@dataclass(frozen=True)
class Trunk:
    """One pass over images `[B, C, H, W]`: `stream[i]` `[B, N, C]` enters block i, the last leaves the last block.

    `middle[i]` is the stream between attention and MLP of block i. `tail` gives the outputs `[b, K]` for a stream that leaves
    the last block, for any number b that is a multiple of B; it reads the first `reads` tokens alone, and takes just those.
    """

    stream: list[Tensor]
    middle: list[Tensor]
    out: Tensor
    tail: Callable[[Tensor], Tensor]
    reads: int


def why_no_trunk(model: nn.Module, anatomy: Anatomy) -> str:
    """Why the blocks of `model` cannot be run one by one on one stream of tokens; empty if they can."""
    if not anatomy.blocks:
        return f"{anatomy.kind} has no attention"
    for block in anatomy.blocks:
        if not block.plain:
            return f"'{block.name}' is not plain: {block.why_not}"
        if block.attention.position != "absolute" or not block.own_names:
            return f"'{block.name}' has positions in its attention, or parts with other names"
        if len(getattr(model.get_submodule(block.name), "reducers", ())):
            return f"'{block.name}' drops or merges tokens"
    return ""


@contextmanager
def trunk(model: nn.Module, x: Tensor, anatomy: Anatomy) -> Iterator[Trunk | None]:
    """The stream of `model`, as `own.still` gives it, on images `x`; None for a model that does something between its blocks.

    To run the tail, the forwards of patch embedding and blocks are shadowed by ones that do nothing while it runs.
    """
    blocks = [model.get_submodule(b.name) for b in anatomy.blocks]
    embed = getattr(model, "patch_embed", None)
    before: list[Any] = []
    after: list[Any] = []
    middle: list[Tensor] = []
    embedded: list[Any] = []
    handles = [b.register_forward_pre_hook(lambda _, args: before.append(args[0])) for b in blocks]
    handles += [b.register_forward_hook(lambda _, args, out: after.append(out)) for b in blocks]
    handles += [b.get_submodule("norm2").register_forward_pre_hook(lambda _, args: middle.append(args[0])) for b in blocks]
    if isinstance(embed, nn.Module):
        handles.append(embed.register_forward_hook(lambda _, args, out: embedded.append(out)))
    try:
        out = answer(run(model, x))
    finally:
        for handle in handles:
            handle.remove()
    joined = len(before) == len(after) == len(blocks) and all(a is b for a, b in zip(after, before[1:]))

    def tail(last: Tensor) -> Tensor:
        times = len(last) // len(x)
        forwards: list[tuple[nn.Module, Callable[..., Any]]] = [(b, lambda s, *_, **__: s) for b in blocks[:-1]]
        forwards.append((blocks[-1], lambda *_, **__: last))
        if isinstance(embed, nn.Module) and len(embedded) == 1 and isinstance(embedded[0], Tensor):
            forwards.append((embed, lambda *_: embedded[0].repeat(times, *[1] * (embedded[0].ndim - 1))))
        try:
            for module, forward in forwards:
                module.forward = forward
            return answer(run(model, x.repeat(times, 1, 1, 1)))
        finally:
            for module, _ in forwards:
                module.__dict__.pop("forward", None)

    def same(tokens: int) -> bool:
        try:
            return torch.allclose(tail(after[-1][:, :tokens]), out, rtol=1e-6, atol=1e-6)
        except (VitreousError, IndexError):  # a pooling that misses the tokens that were left out
            return False

    if not joined or not same(whole := after[-1].shape[1]):
        yield None
        return
    prefix = anatomy.prefix
    yield Trunk([*before, after[-1]], middle, out, tail, prefix if prefix and same(prefix) else whole)
