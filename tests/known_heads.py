"""A ViT whose heads are of known kinds, by construction."""

from __future__ import annotations

from typing import Any

import torch
from support import small_vit
from torch import Tensor, nn

SIDE = 4


def targets(kind: str) -> Tensor | None:
    """`[16, 16]`: the patches that each patch is to attend to; None for kinds that do not go by place."""
    at = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    step = at[None] - at[:, None]  # [query, key, 2]
    hops = step.abs().amax(-1)
    ways = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "down right": (1, 1)}
    if kind in ways:
        return (step == torch.tensor(ways[kind])).all(-1).float()
    return {"self": hops == 0, "local": hops <= 1, "ring": hops == 2}[kind].float() if kind in ("self", "local", "ring") else None


def known_heads(layers: list[tuple[str, str, str]]) -> nn.Module:
    """Three heads a layer: a place, "self", "local", "ring", "global", "sink" (the class token), "corner" or "content".

    The stream is one-hot in the place of the token (channels 0 to 15 the patches, 16 the class token) with the patch's mean
    brightness in channel 17; blocks add nothing to it, so every layer sees the same.
    """
    model: Any = small_vit(depth=len(layers))
    with torch.no_grad():
        model.cls_token.zero_()
        model.pos_embed.zero_()
        model.pos_embed[0, 0, 16] = 1.0
        model.pos_embed[0, 1:, :16] = torch.eye(16)
        model.patch_embed.proj.weight.zero_()
        model.patch_embed.proj.bias.zero_()
        model.patch_embed.proj.weight[17] = 0.02
        for block, kinds in zip(model.blocks, layers, strict=True):
            for p in (block.attn.proj, block.mlp.fc2):
                p.weight.zero_()
                p.bias.zero_()
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.zero_()
            weight, bias = block.attn.qkv.weight.unflatten(0, (3, 3, 16)), block.attn.qkv.bias.unflatten(0, (3, 3, 16))
            for head, kind in enumerate(kinds):
                if (wanted := targets(kind)) is not None:
                    weight[0, head, :, :16] = 2 * wanted.T
                    weight[1, head, :, :16] = torch.eye(16)
                elif kind != "global":  # every query asks for one channel of the keys
                    bias[0, head, 0] = 10.0
                    weight[1, head, 0, {"sink": 16, "corner": 15, "content": 17}[kind]] = 3.0
    return model
