"""Attention of some tokens over others."""

from __future__ import annotations

import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            f(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for f, x in zip((self.q, self.k, self.v), (query, context, context))
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class CrossBlock(nn.Module):
    """`query [B, M, C]` looks at `context [B, N, C]`, both through one norm, and at nothing else; then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = CrossAttention(width, heads), Mlp(width, 4 * width)

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        query = query + self.attn(self.norm1(query), self.norm1(context), mask)
        return query + self.mlp(self.norm2(query))
