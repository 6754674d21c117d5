"""ViTs of Monarch matrices. Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training" (ICML
2022).

Facts from the official repository, HazyResearch/fly: its `vit-s-butterflyblockdiag-mlp` has them in the MLPs of timm's ViT-S of
that day, 768 wide and 8 blocks deep. The same in ViT-B, and in its attention too, is by the paper's text.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..mixers import MonarchLinear, require_size
from .classifier import Classifier, init_weights
from .official import publish


class MonarchViT(Classifier):
    """A ViT whose MLPs, and with `attention` also queries, keys, values and projections, are Monarch matrices of `nblocks`
    blocks.

    Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`; all else, and all names, as in timm.
    """

    global_pool = "token"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        nblocks: int = 4,
        attention: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.size, norm = (img_size, img_size), cast(type[nn.Module], partial(nn.LayerNorm, eps=1e-6))
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm, drop_path=rate) for rate in rates)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        for block in cast(Any, self.blocks):
            for part in (block.mlp, block.attn) if attention else (block.mlp,):
                for name, layer in list(part.named_children()):
                    if isinstance(layer, nn.Linear):
                        setattr(part, name, MonarchLinear(layer.in_features, layer.out_features, nblocks))
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        require_size(x, self.size, "Monarch's ViT")
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), self.patch_embed(x)), 1)
        return self.norm(self.blocks(x + self.pos_embed))


for _name, _arguments in {
    "vit_s_16": dict(depth=8, num_heads=8, mlp_ratio=3.0),
    "vit_b_16": {},
    "vit_b_16_attention": dict(attention=True),
}.items():
    publish(MonarchViT, f"monarch_{_name}", _arguments, variant=f"monarch--{_name}", first_conv="patch_embed.proj")
