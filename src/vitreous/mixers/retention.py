"""Retention in its three forms: attention whose weights decay with distance instead of passing a softmax.

Hatamizadeh, Ranzinger, Lan, Alvarez, Fidler and Kautz, "ViR: Vision Retention Networks" (2023), equations 2 to 6, after Sun
et al., "Retentive Network" (2023). All take q, k, v `[B, heads, N, d]`, q scaled already, and gamma `[heads]`, the decay from one
token to the next, and give `[B, heads, N, d]`; what they compute is the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .scan import gated_linear_attention


def decays(num_heads: int) -> Tensor:
    """γ of each head: 1 − e^x, with x from log 1/32 to log 1/512 in equal steps."""
    return 1 - torch.linspace(math.log(1 / 32), math.log(1 / 512), num_heads).exp()


def decay_mask(gamma: Tensor, tokens: int) -> Tensor:
    """D `[heads, N, N]`: γ^(i − j) where token j is not behind token i, else 0."""
    i = torch.arange(tokens, device=gamma.device)
    distance = i[:, None] - i
    return torch.where(distance >= 0, gamma[:, None, None] ** distance.clamp(min=0), 0)


def parallel_retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    """(q kᵀ ∘ D) v: all tokens at once, cost N²."""
    return (q @ k.mT * decay_mask(gamma, q.shape[2]).to(q)) @ v


def chunkwise_retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor, chunk: int = 32) -> Tensor:
    """Parallel within chunks, and a state from chunk to chunk: cost linear in N."""
    gate = gamma.log()[None, :, None, None].expand_as(k).to(k)
    return gated_linear_attention(q, k, v, gate, chunk)


def recurrent_retention(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    """S ← γ S + kᵀ v, then q S, token by token: memory does not depend on N."""
    state, out = torch.zeros_like(k[:, :, 0].unsqueeze(-1) * v[:, :, 0].unsqueeze(-2)), []
    keep = gamma[:, None, None].to(q)
    for i in range(q.shape[2]):
        state = keep * state + k[:, :, i].unsqueeze(-1) * v[:, :, i].unsqueeze(-2)
        out.append((q[:, :, i].unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(out, 2)
