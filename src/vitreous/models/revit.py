"""The shapes that NViT's pruning led to. Yang, Yin, Shen, Molchanov, Li & Kautz, "Global Vision Transformer Pruning with
Hessian-Aware Saliency" (CVPR 2023): its redistribution rule (ReViT), to be trained from scratch as DeiT is.

To prune a trained model to shapes of its own there is `prune.NViT`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from ..errors import VitreousError
from .official import publish

DEPTH, VALUES = 12, 64  # blocks; dimensions of a head's values, by whose root scores are divided whatever its queries have


def revit_shape(width: int) -> dict[str, list[int]]:
    """Of each of the 12 blocks "heads", "qk" (dimensions of a head's queries and keys) and "mlp", for `width` channels."""
    a, b = 2 * round(0.005 * width), 8 * round(0.05 * width / 8)
    if not a or not b:
        raise VitreousError(f"ReViT: width {width} leaves blocks without heads or queries: give at least 104")
    return {
        "heads": [10, a, a, *[2 * a] * 6, a, a, 10],
        "qk": [2 * b, b, b, *[2 * b] * 6, b, b, b],
        "mlp": [3 * width] * 3 + [6 * width] * 6 + [3 * width] * 3,
    }


class UnequalAttention(nn.Module):
    """Attention on tokens `[B, N, C]` whose queries and keys have other dimensions than its values."""

    def __init__(self, width: int, heads: int, qk: int, v: int = VALUES) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, v**-0.5
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, heads * d) for d in (qk, qk, v))
        self.proj = nn.Linear(heads * v, width)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        split = lambda t: t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))


class ReViT(VisionTransformerDistilled):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`, the mean of those of its two tokens; of `width` channels."""

    def __init__(self, width: int = 384, **kwargs: Any) -> None:
        super().__init__(embed_dim=width, depth=DEPTH, num_heads=1, **kwargs)
        shape = revit_shape(width)
        for block, heads, qk, hidden in zip(self.blocks, *shape.values(), strict=True):
            block.attn, block.mlp = UnequalAttention(width, heads, qk), Mlp(width, hidden)
        self.init_weights("")


for _name, _width in (("tiny", 176), ("small", 384)):
    publish(ReViT, f"revit_{_name}", dict(width=_width), variant=f"nvit--revit_{_name}", first_conv="patch_embed.proj")
