"""The ViT of "Sparse then Prune", whose official checkpoints hold queries, keys and values by head."""

from __future__ import annotations

import functools
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .official import official, renamed


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights `[in, heads, width]` as timm's `[out, in]`, the three in one layer."""
    state = renamed(
        state,
        (r"^embedding\.", "patch_embed.proj."),
        (r"^transformer\.pos_embedding\.pos_embedding$", "pos_embed"),
        (r"^transformer\.encoder_layers\.", "blocks."),
        (r"^transformer\.norm\.", "norm."),
        (r"^classifier\.", "head."),
        (r"\.attn\.out\.", ".attn.proj."),
    )
    made: dict[str, Tensor] = {}
    for name, t in state.items():
        if ".attn.query." in name:
            three = [state[name.replace("query", part)] for part in ("query", "key", "value")]
            flat = [p.flatten(1).T if p.ndim == 3 else p.flatten() for p in three]
            made[name.replace("query", "qkv")] = torch.cat(flat)
        elif name.endswith("attn.proj.weight"):
            made[name] = t.flatten(0, 1).T
        elif not (".attn.key." in name or ".attn.value." in name):
            made[name] = t
    return made


def _build(**kwargs: Any) -> nn.Module:
    return VisionTransformer(norm_layer=functools.partial(nn.LayerNorm, eps=1e-5), **kwargs)


def _known(name: str, **arguments: Any) -> None:
    official(f"sparse-then-prune--{name}", lambda **kwargs: _build(**{**arguments, **kwargs}), from_official)


_known("b16_384", img_size=384)
_known("small_p16_96", img_size=96, embed_dim=384, num_heads=6, num_classes=10)
_known("tiny_p16", embed_dim=192, num_heads=3, num_classes=10)
