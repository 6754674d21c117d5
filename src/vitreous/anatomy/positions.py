"""Positions inside attention: angles that turn queries and keys, and biases for pairs of places.

A model hands its blocks one table for the whole grid, or each block holds its own. Where tokens have been given up or merged,
each token carries one place (`Tokens.place`), the number of a token in the sequence that entered the first block, and reads its
row of the table there. **A merged token stands where one of its parts stood**: which one is up to the step that merges.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Turn(NamedTuple):
    """Cosines and sines `[…, N, head_dim]`, to be multiplied with `[B, heads, N, head_dim]`."""

    cos: Tensor
    sin: Tensor
    half: bool  # channel i is paired with i + head_dim/2, else 2i with 2i + 1

    def unmoved(self, more: int) -> Turn:
        """The same, for a sequence that ends with so many tokens more, which have no place."""
        widen = lambda t, value: F.pad(t, (0, 0, 0, more), value=value)
        return Turn(widen(self.cos, 1.0), widen(self.sin, 0.0), self.half)


def turned(x: Tensor, turn: Turn | None) -> Tensor:
    """Queries or keys `[B, heads, N, head_dim]`, each token's turned by its angles (Su et al., "RoFormer", 2021, eq. 34)."""
    if turn is None:
        return x
    if turn.half:
        a, b = x.chunk(2, -1)
        across = torch.cat([-b, a], -1)
    else:
        across = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return (x * turn.cos + across * turn.sin).type_as(x)


@dataclass
class Position:
    """How an attention module knows places.

    argument: by which name its block is handed the table, as "rope". kind: "rotary" or "relative".
    prefix: tokens before the patches, which no angle turns. side: the grid that a block's own table is made for.
    """

    kind: str
    argument: str
    prefix: int = 0
    half: bool = False
    side: tuple[int, int] | None = None

    def placed(
        self, attn: nn.Module, given: dict[str, Any], tokens: int, place: Tensor | None = None
    ) -> tuple[Turn | None, Tensor | None]:
        """Angles, and bias `[1 or B, heads, N, N]` to the scores, for a sequence of `tokens`, at their `place`s `[B, N]`."""
        table, kept = given.get(self.argument), cast(Any, attn).__dict__.get("kept")
        if self.kind == "rotary":
            if table is None:
                return None, None
            cos, sin = reversed(table.chunk(2, -1)) if isinstance(table, Tensor) else table
            if kept is not None and cos.ndim > 2 and cos.shape[-3] > 1:
                cos, sin = (t.index_select(-3, torch.tensor(kept, device=t.device)) for t in (cos, sin))
            before = tokens - cos.shape[-2] if place is None else self.prefix
            cos = torch.cat([torch.ones_like(cos[..., :1, :]).expand(*cos.shape[:-2], before, -1), cos], -2)
            sin = torch.cat([torch.zeros_like(sin[..., :1, :]).expand(*sin.shape[:-2], before, -1), sin], -2)
            return Turn(_rows(cos, place), _rows(sin, place), self.half), None
        bias = None if table is None else table
        own = _own_bias(attn)
        if own is not None:
            bias = own if bias is None else own + bias
        if bias is None:
            return None, None
        bias = bias if bias.ndim == 4 else bias[None]
        if kept is not None:
            bias = bias.index_select(1, torch.tensor(kept, device=bias.device))
        if place is not None:
            heads, n, _ = bias.shape[1:]  # a row after another, so that runtimes are given simple gathers
            rows = F.embedding(place, bias[0].permute(1, 2, 0).flatten(1)).unflatten(-1, (n, heads))
            columns = place[:, None, :, None].expand(-1, rows.shape[1], -1, heads)
            bias = rows.gather(2, columns).permute(0, 3, 1, 2)
        return None, bias

    def example(self, attn: nn.Module, patches: int, like: Tensor, draw: torch.Generator) -> dict[str, Any]:
        """Arguments to try a block with."""
        a = cast(Any, attn)
        heads = next((h for n in ("num_heads", "num_attention_heads") if (h := getattr(a, n, None))), 1)
        if self.kind == "relative":
            n = self.prefix + patches
            return {self.argument: None if self.side else torch.randn(heads, n, n, generator=draw).to(like)}
        d = getattr(a, "head_dim", None) or like.shape[-1] // heads
        angles = torch.randn(patches, d // 2, generator=draw)
        angles = angles.repeat(1, 2) if self.half else angles.repeat_interleave(2, -1)
        cos, sin = angles.cos().to(like), angles.sin().to(like)
        return {self.argument: torch.cat([sin, cos], -1) if self.argument == "rope" else (cos, sin)}


def _rows(table: Tensor, place: Tensor | None) -> Tensor:
    """The rows `place` `[B, N]` of a table `[…, N₀, d]`, as `[B, 1 or heads, N, d]`."""
    if place is None:
        return table
    if table.ndim == 2:
        return F.embedding(place, table)[:, None]
    table = (table if table.ndim == 4 else table[None]).expand(place.shape[0], -1, -1, -1)
    return table.gather(2, place[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[-1]))


def _own_bias(attn: nn.Module) -> Tensor | None:
    a = cast(Any, attn)
    if callable(own := getattr(getattr(a, "rel_pos", None), "get_bias", None)):
        return cast(Tensor, own())
    table = getattr(a, "relative_position_bias_table", None)
    if table is None:
        return None
    index = a.relative_position_index
    return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)[None]


def position_of(block: nn.Module, attention: nn.Module) -> Position | None:
    """How the attention of a block knows places, from what the block is called with; None where nothing of it is seen."""
    a = cast(Any, attention)
    known = a.__dict__.get("position")
    if isinstance(known, Position):
        return known
    takes = inspect.signature(block.forward).parameters
    if "rope" in takes:  # timm: EVA-02, DINOv3, PE, RoPE-ViT
        return Position("rotary", "rope", getattr(a, "num_prefix_tokens", 1), getattr(a, "rotate_half", False))
    if "position_embeddings" in takes:  # Hugging Face: DINOv3
        return Position("rotary", "position_embeddings", 1, True)
    if "shared_rel_pos_bias" in takes:  # timm: BEiT
        side = getattr(a, "window_size", None)
        return Position("relative", "shared_rel_pos_bias", 1, side=None if side is None else (side[0], side[1]))
    if "shared_rel_pos" in takes:  # timm: ViTs with relative positions, by a table or by an MLP, of each block or of all
        own = getattr(a, "rel_pos", None)
        side = None if own is None else (own.window_size[0], own.window_size[1])
        return Position("relative", "shared_rel_pos", getattr(own, "prefix_tokens", 0), side=side)
    return None
