"""Run the blocks of a model one by one, and only what comes after the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..anatomy.positions import Turn
from ..blocks import PlainBlock, plain_blocks
from ..copies.own import run
from ..errors import VitreousError
from ..outputs import answer


class Placed(nn.Module):
    """A block as a function of its stream alone: what else its model hands it (angles, a bias) is `given`."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.given: tuple[tuple[Any, ...], dict[str, Any]] = (), {}

    def forward(self, x: Tensor) -> Tensor:
        args, kwargs = self.given
        return self.block(x, *args, **kwargs)

    def position(self, x: Tensor) -> tuple[Turn | None, Tensor | None]:
        """The angles of each token of the stream `x` `[B, N, C]`, and what is added to their scores."""
        if not isinstance(self.block, PlainBlock):
            return None, None
        args, kwargs = self.given
        return self.block.entering(x, *args, **kwargs)[1:]


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


def lay_out(own: nn.Module, model: nn.Module, anatomy: Anatomy) -> str:
    """Make the blocks of `own`, a copy of the modules of `model`, such that they run one by one on one stream of tokens.

    Gives why they cannot; empty if they can. Blocks whose parts have other names, or that are handed positions, become ours.
    """
    if not anatomy.blocks:
        return f"{anatomy.kind} has no attention"
    for block in anatomy.blocks:
        if not block.plain:
            return f"'{block.name}' is not plain: {block.why_not}"
        if len(getattr(model.get_submodule(block.name), "reducers", ())):
            return f"'{block.name}' drops or merges tokens"
    if any(b.attention.position != "absolute" or not b.own_names for b in anatomy.blocks):
        if own is model:
            return f"the modules of {anatomy.kind} refuse to be copied"
        plain_blocks(own, "this analysis")
    return ""


@contextmanager
def trunk(own: nn.Module, x: Tensor, blocks: list[Placed], prefix: int) -> Iterator[Trunk | None]:
    """The stream of a model that is laid out, on images `x`; None for one that does something between its blocks.

    `prefix`: so many first tokens are perhaps all that is read.

    To run the tail, the forwards of the blocks, and of what was done before them, are shadowed while it runs by ones that do
    nothing, and give what they gave.
    """
    inner = [cast(Any, b.block) for b in blocks]
    inside = {m for b in inner for m in b.modules()}
    before: list[Any] = []
    after: list[Any] = []
    middle: list[Tensor] = []
    ahead: dict[nn.Module, Tensor] = {}  # what ended before the first block began, by the outermost module

    def entered(placed: Placed) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            first = next(k for k, v in (*enumerate(args), *kwargs.items()) if isinstance(v, Tensor))
            before.append(args[first] if isinstance(first, int) else kwargs[first])
            placed.given = args[1:], {k: v for k, v in kwargs.items() if k != first}

        return hook

    def ended(module: nn.Module, _: Any, out: Any) -> None:
        if not before and isinstance(out, Tensor) and next(module.parameters(), None) is not None:
            for child in module.modules():
                ahead.pop(child, None)
            ahead[module] = out.clone()  # some models go on in place

    handles = [b.block.register_forward_pre_hook(entered(b), with_kwargs=True) for b in blocks]
    handles += [b.register_forward_hook(lambda _, args, out: after.append(out)) for b in inner]
    handles += [b.norm2.register_forward_pre_hook(lambda _, args: middle.append(args[0])) for b in inner]
    handles += [m.register_forward_hook(ended) for m in own.modules() if m not in inside and m is not own]
    try:
        out = answer(run(own, x))
    finally:
        for handle in handles:
            handle.remove()
    joined = len(before) == len(after) == len(blocks) and all(a is b for a, b in zip(after, before[1:]))

    def tail(last: Tensor) -> Tensor:
        return torch.cat([one(part) for part in last.split(len(x))])

    def one(last: Tensor) -> Tensor:
        forwards: list[tuple[nn.Module, Callable[..., Any]]] = [(m, lambda *_, y=y, **__: y.clone()) for m, y in ahead.items()]
        forwards += [(b, lambda s, *_, **__: s) for b in inner[:-1]]
        forwards.append((inner[-1], lambda *_, **__: last))
        try:
            for module, forward in forwards:
                module.forward = forward
            return answer(run(own, x))
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
    yield Trunk([*before, after[-1]], middle, out, tail, prefix if prefix and same(prefix) else whole)
