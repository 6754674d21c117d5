"""A model without each of its heads in turn, with what they have in common computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..anatomy import Anatomy
from ..anatomy.parts import branch, emit, project
from ..copies.own import run
from ..glass import glass
from ..outputs import answer
from .hot import Hot
from .tail import Placed, Trunk, trunk

FLOATS = 2**20
"""Numbers in one residual stream of the copies that run together: their widest activation then stays near the processor."""


def why_one_by_one(own: nn.Module, anatomy: Anatomy) -> str:
    """Why the heads of `own`, which is laid out, cannot be removed on a shared stream; empty if they can."""
    for block in anatomy.blocks:
        attn = cast(Any, own.get_submodule(block.name)).attn
        if type(attn.proj) is not nn.Linear or getattr(attn, "operands", None) is not None:
            return f"'{block.name}' is quantized, or adapted"
        if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
            return f"'{block.name}' normalises all heads together"
    return ""


class AfterAttention(nn.Module):
    """What a plain block makes of the stream between its attention and its MLP."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, y: Tensor) -> Tensor:
        block = cast(Any, self.block)
        return y + branch(block, 2, block.mlp(block.norm2(y)))


class HotBlock(NamedTuple):
    placed: Placed
    whole: Hot
    rest: Hot


def hot_blocks(own: nn.Module, anatomy: Anatomy, precision: str = "f32") -> list[HotBlock]:
    blocks = [Placed(own.get_submodule(b.name)) for b in anatomy.blocks]
    return [HotBlock(p, Hot(p, precision), Hot(AfterAttention(p.block), precision)) for p in blocks]


def without_each_head(
    model: nn.Module, x: Tensor, anatomy: Anatomy, blocks: Sequence[HotBlock] | None
) -> tuple[Tensor, list[Tensor]]:
    """Outputs `[B, K]` for images `x` `[B, C, H, W]`, and for each block those with one of its heads removed, `[heads, B, K]`.

    With its `hot_blocks`, all heads of a block reuse the stream that enters it and its attention; each head's part of the output
    projection is subtracted, and the copies run together through the blocks after. Where the classifier reads a few tokens
    only, the last block is computed for those. `model` is as `own.still` gives it, laid out for its hot blocks, and `anatomy` its
    own. Without, or where the model does something of its own between blocks, one pass a head under `glass`.
    """
    with torch.no_grad():
        if blocks is not None:
            with trunk(model, x, [b.placed for b in blocks], anatomy.prefix) as found:
                if found is not None:
                    return found.out, [_outputs(found, i, blocks) for i in range(len(blocks))]
        return answer(run(model, x)), list(_one_by_one(model, x, anatomy))


def _one_by_one(model: nn.Module, x: Tensor, anatomy: Anatomy) -> Iterator[Tensor]:
    names = [b.attention.name for b in anatomy.blocks]
    with glass(model, layers=names, reduce=lambda a: a.new_tensor(float(a.shape[1]))) as g:
        run(model, x[:1])
    for name in names:
        outputs = []
        for head in range(int(cast(Tensor, g[name].attention))):
            with glass(model, record=()) as masked:
                masked.mask_heads(name, head)
                outputs.append(answer(run(model, x)))
        yield torch.stack(outputs)


def _outputs(found: Trunk, i: int, hot: Sequence[HotBlock]) -> Tensor:
    blocks = [cast(Any, b.placed.block) for b in hot]
    attn = blocks[i].attn
    entering, last = found.stream[i], i == len(blocks) - 1
    tokens = found.reads if last else entering.shape[1]
    group = max(1, FLOATS // (attn.num_heads * entering[0].numel()))
    made = []
    # The tail is run for all images at once, since it repeats what it keeps of them.
    for x, middle in zip(entering.split(group), found.middle[i].split(group)):
        copies = middle[:, :tokens] - branch(blocks[i], 1, _shares(hot[i].placed, x, tokens))  # [heads, b, tokens, C]
        y = hot[i].rest(copies.flatten(0, 1))
        for block in hot[i + 1 : -1]:
            y = block.whole(y)
        if not last:
            y = _read_out(hot[-1].placed, y, found.reads)
        made.append(y.unflatten(0, (attn.num_heads, -1)).clone())  # a hot block overwrites it
    out = found.tail(torch.cat(made, 1).flatten(0, 1))
    return out.unflatten(0, (attn.num_heads, -1))


def _shares(placed: Placed, x: Tensor, tokens: int) -> Tensor:
    """What each head adds to attention's output at the first `tokens`, `[heads, B, tokens, C]`, for the stream `[B, N, C]`."""
    block = cast(Any, placed.block)
    attn, h, (turn, bias) = block.attn, block.norm1(x), placed.position(x)
    q, k, v = project(attn, h, turn)
    bias = None if bias is None else bias[:, :, :tokens]
    mixed = F.scaled_dot_product_attention(q[:, :, :tokens], k, v, attn_mask=bias, scale=attn.scale)
    if getattr(attn, "gate", None) is not None:
        mixed = mixed * attn.gate(h[:, :tokens]).sigmoid().unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    weight = attn.proj.weight.unflatten(1, (attn.num_heads, -1)).permute(1, 2, 0)  # [heads, d, C]
    return (mixed.transpose(0, 1).flatten(1, 2) @ weight).unflatten(1, (len(x), tokens))


def _read_out(placed: Placed, x: Tensor, tokens: int) -> Tensor:
    """The first `tokens` of what a plain block gives for `[M, N, C]`; keys and values of the rest are never made.

    A score q·(W y) is (Wᵀq)·y, and a mean of values W y is W times the mean of y: with few queries that is far less work.
    """
    block = cast(Any, placed.block)
    attn = block.attn
    fused = getattr(attn, "qkv", None)
    plain_keys = isinstance(getattr(attn, "k_norm", nn.Identity()), nn.Identity) and placed.position(x[:1]) == (None, None)
    if tokens == x.shape[1] or type(fused) is not nn.Linear or getattr(attn, "q_bias", None) is not None or not plain_keys:
        return placed(x)[:, :tokens]
    h = block.norm1(x)
    few, heads = h[:, :tokens], attn.num_heads
    q, _, _ = project(attn, few)
    _, keys, values = fused.weight.unflatten(0, (3, heads, -1))  # [heads, d, C]
    asked = (q * attn.scale) @ keys  # [M, heads, tokens, C]; the keys' bias adds the same to all scores of a query
    probs = (asked.flatten(1, 2) @ h.mT).softmax(-1)
    mixed = (probs @ h).unflatten(1, (heads, tokens)) @ values.mT
    if fused.bias is not None:
        mixed = mixed + fused.bias.unflatten(0, (3, heads, 1, -1))[2]
    y = x[:, :tokens] + branch(block, 1, emit(attn, mixed, few))
    return y + branch(block, 2, block.mlp(block.norm2(y)))
