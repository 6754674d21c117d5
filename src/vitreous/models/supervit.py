"""The supernet that InstaTune's authors released: a vision transformer with a second norm behind attention.

Sridhar et al., "InstaTune: Instantaneous Neural Architecture Search During Fine-Tuning" (ICCV Workshops 2023). Facts from the
official package, IntelLabs/DyNAS-T. That norm is BERT's, on top of the one before attention, so that weights of other ViTs do not
fit it; `learn.InstaTune` trains plain blocks. `prune.subnet.sliced` runs sub-networks of both.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .official import family, official, renamed


class PostNormBlock(Block):
    """h = norm(x + attn(norm1(x))), then h + mlp(norm2(h)); `[B, N, C]`."""

    def __init__(self, dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(dim, *args, **kwargs)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = self.norm(x + self.attn(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = renamed(
        {k: v for k, v in state.items() if k != "encoder.position_ids"},
        (r"^class_token$", "cls_token"),
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.ln\.", "norm."),
        (r"^heads\.(head\.)?", "head."),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_(\d)\.", r".norm\1."),
        (r"\.attention_output\.dense\.", ".attn.proj."),
        (r"\.attention_output\.LayerNorm\.", ".norm."),
        (r"\.mlp\.linear_(\d)\.", r".mlp.fc\1."),
    )
    state["pos_embed"] = state.pop("encoder.pos_embedding.weight")[None]
    for name in [k for k in state if ".self_attention.query." in k]:
        parts = [state.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        state[re.sub(r"self_attention\.query", "attn.qkv", name)] = torch.cat(parts)
    return state


def supervit(**kwargs: Any) -> nn.Module:
    given: dict[str, Any] = dict(img_size=64, patch_size=16, embed_dim=192, depth=12, num_heads=12, num_classes=100)
    return VisionTransformer(**{**given, **kwargs}, block_fn=PostNormBlock, norm_layer=partial(nn.LayerNorm, eps=1e-6))


def told(state: dict[str, Tensor]) -> dict[str, Any]:
    """With which `supervit` has such weights; of how many heads they do not tell: `num_heads`, 12 unless it is given."""
    embed, fc1 = state["patch_embed.proj.weight"], state["blocks.0.mlp.fc1.weight"]
    return dict(
        img_size=embed.shape[-1] * math.isqrt(state["pos_embed"].shape[1] - 1),
        patch_size=embed.shape[-1],
        embed_dim=len(embed),
        depth=1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")),
        mlp_ratio=len(fc1) / len(embed),
    )


official("instatune--supervit", supervit, convert)
family("instatune", supervit, convert, told)
