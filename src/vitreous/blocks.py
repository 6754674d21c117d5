"""One plain attention and one plain block of ours, which hold the submodules of the block they replace under the same names.

Token steps hook in between attention and MLP (`PlainBlock.reducers`), quantizers inside attention (`PlainAttention.operands`).
State-dict names do not change, so weights move freely between a model and its slimmed form.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .anatomy import branch, emit, project, read
from .errors import VitreousError


@dataclass
class Reduction:
    """What one reducer did: token `i` of the `[B, N]` that came in is now part of token `into[b, i]` of `tokens`.

    `weight[b, i]` is the factor with which it entered. `rest` is the index of a token that gathers what was given up, if any:
    its members count as dropped when survival is drawn.
    """

    layer: str
    into: Tensor
    weight: Tensor
    tokens: int
    rest: int | None = None

    def matrix(self) -> Tensor:
        """`[B, tokens, N]`: row j gives the shares, summing to 1, of the incoming tokens in token j."""
        into = self.into[:, None] == torch.arange(self.tokens, device=self.into.device)[:, None]
        m = into * self.weight[:, None]
        return m / m.sum(-1, keepdim=True).clamp_min(1e-12)


@dataclass
class Flow:
    """What travels along the blocks of one forward pass beside the tokens."""

    size: Tensor | None = None  # [B, N, 1]: how many patches each token stands for, when a reducer merges
    trace: list[Reduction] | None = field(default=None, repr=False)


class PlainAttention(nn.Module):
    """Softmax attention from the parts of a plain attention module; `[B, N, C]` to `[B, N, C]`.

    `operands`, when set, quantizes what enters the two products: keys "q", "k", "v" and "probs".
    """

    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        _adopt(self, attn)
        for name in ("num_heads", "head_dim", "attn_dim", "scale"):
            if hasattr(attn, name):
                setattr(self, name, getattr(attn, name))
        self.operands: nn.ModuleDict | None = None
        self.train(attn.training)

    def forward(self, x: Tensor, bias: Tensor | None = None, look: bool = False) -> Any:
        """The output; with `look` also the queries and keys `[B, heads, N, d]`. `bias` is added to the scaled scores."""
        q, k, v = project(self, x)
        scale, drop = cast(float, self.scale), cast(Any, getattr(self, "attn_drop", None))
        p = drop.p if drop is not None and self.training else 0.0
        if self.operands is None:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p, scale=scale)
        else:
            o = self.operands
            scores = o["q"](q * scale) @ o["k"](k).mT
            probs = F.softmax(scores if bias is None else scores + bias, dim=-1)
            mixed = o["probs"](F.dropout(probs, p) if p > 0 else probs) @ o["v"](v)
        y = emit(self, mixed, x)
        return (y, q, k) if look else y


class PlainBlock(nn.Module):
    """A pre-norm block from the parts of another, with a hook point between attention and MLP; `[B, N, C]` to `[B, N', C]`."""

    def __init__(self, block: nn.Module, name: str, flow: Flow, first: bool) -> None:
        super().__init__()
        _adopt(self, block)
        if not isinstance(self.attn, PlainAttention):
            self.attn = PlainAttention(cast(nn.Module, self.attn))
        self.name, self.flow, self.first = name, flow, first
        self.reducers = nn.ModuleList()
        self.train(block.training)

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        # BEiT and EVA hand every block their positions and masks, which are None where the block is plain.
        if unknown := [k for k, v in given.items() if v is not None and v is not False]:
            raise VitreousError(f"block '{self.name}' was slimmed for a plain sequence: it cannot use {unknown[0]}=")
        if self.first:
            self.flow.size = None
        size = self.flow.size
        # Proportional attention (ToMe, section 3): a token that stands for s patches counts s times.
        bias = None if size is None else size.log().mT[:, None]
        y, q, k = self.attn(cast(nn.Module, self.norm1)(x), bias, look=True)
        x = x + branch(self, 1, y)
        for reducer in self.reducers:
            x = reducer(x, q, k, bias, self)
            q = k = None  # a second reducer in the same block would need the keys of tokens that are gone
        return x + branch(self, 2, cast(nn.Module, self.mlp)(cast(nn.Module, self.norm2)(x)))


def plain_blocks(model: nn.Module, step: str) -> list[PlainBlock]:
    """Replace every attention block of `model`, in place, by a `PlainBlock`; refuse with the reason where one is not plain."""
    anatomy = read(model)
    anatomy.require_plain(step)
    flow = Flow()
    blocks = []
    for i, found in enumerate(anatomy.blocks):
        block = model.get_submodule(found.name)
        if isinstance(block, PlainBlock):
            flow = block.flow
        else:
            block = PlainBlock(block, found.name, flow, first=i == 0)
            parent, _, child = found.name.rpartition(".")
            setattr(model.get_submodule(parent), child, block)
        blocks.append(block)
    return blocks


@contextmanager
def traced(model: nn.Module) -> Iterator[list[Reduction]]:
    """`with traced(model) as trace: model(x)`: every reduction of tokens in the order in which they ran; empty if none does."""
    flow = next((m.flow for m in model.modules() if isinstance(m, PlainBlock)), Flow())
    flow.trace = []
    try:
        yield flow.trace
    finally:
        flow.trace = None


def _adopt(new: nn.Module, old: nn.Module) -> None:
    for name, child in old.named_children():
        new.add_module(name, child)
    for name, value in old.named_parameters(recurse=False):
        new.register_parameter(name, value)
    for name, value in old.named_buffers(recurse=False):
        new.register_buffer(name, value, persistent=name not in old._non_persistent_buffers_set)
