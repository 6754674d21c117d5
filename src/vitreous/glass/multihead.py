"""`F.multi_head_attention_forward` written out, so that what `nn.MultiheadAttention` does inside can be seen and changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor | None]]


def multi_head(
    attend: Attend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    linear: Callable[..., Tensor] = F.linear,
) -> tuple[Tensor, Tensor | None]:
    """As the function of torch, with the same arguments; the output and the probabilities, None unless they are wanted.

    `attend(q, k, v, mask, dropout)` gets `[B, heads, N, d]` and a mask to add or None, and gives the mixed values and the
    probabilities. `linear` multiplies.
    """
    single = query.ndim == 2
    together = query is key and key is value
    if single:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
    if in_proj_weight is not None and not use_separate_proj_weight and together:
        made = list(linear(query, in_proj_weight, in_proj_bias).chunk(3, -1))
    else:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else in_proj_weight
        weights = weights.chunk(3) if isinstance(weights, Tensor) else weights
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        made = [linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True)]
    b = query.shape[1]
    q, k, v = (t.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for t in made)
    k = k if static_k is None else static_k.unflatten(0, (b, num_heads))
    v = v if static_v is None else static_v.unflatten(0, (b, num_heads))
    mask = _added(attn_mask, q)
    if mask is not None:
        mask = mask.unflatten(0, (-1, num_heads)) if mask.ndim == 3 else mask[None, None]
    hidden = _added(key_padding_mask, q)
    if hidden is not None:
        hidden = (hidden[None] if single else hidden)[:, None, None]
        mask = hidden if mask is None else mask + hidden
    extra = 0
    if bias_k is not None and bias_v is not None:
        k, v = (
            torch.cat([t, bias.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3).expand(b, -1, -1, -1)], 2)
            for t, bias in ((k, bias_k), (v, bias_v))
        )
        extra += 1
    if add_zero_attn:
        k, v = (torch.cat([t, torch.zeros_like(t[:, :, :1])], 2) for t in (k, v))
        extra += 1
    if mask is not None and extra:
        mask = F.pad(mask, (0, extra))
    mixed, probs = attend(q, k, v, mask, dropout_p if training else 0.0)
    out = linear(mixed.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if not need_weights or probs is None:
        probs = None
    elif average_attn_weights:
        probs = probs.mean(1)
    return (out.squeeze(1), None if probs is None else probs.squeeze(0)) if single else (out, probs)


def _added(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
