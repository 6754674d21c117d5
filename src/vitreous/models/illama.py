"""iLLaMA: the decoder of a language model reading patches, each of which looks back only.

Wang et al., "Adapting LLaMA Decoder to Vision Transformer" (2024). Facts from the official repository, techmonsterwang/iLLaMA:
its causal mask multiplies after the softmax, so that the rows of a map sum to less than one, and rotary positions go with learned
ones. What glass sees is the map before the mask.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    PatchEmbed,
    RmsNorm,
    SwiGLU,
    apply_rot_embed,
    calculate_drop_path_rates,
    to_2tuple,
    trunc_normal_,
)
from timm.models import model_entrypoint
from torch import Tensor, nn

from ..mixers import patch_grid, require_size
from .classifier import Classifier, init_weights
from .official import official, publish, renamed


def rotary(positions: int, channels: int, theta: float = 10000.0) -> Tensor:
    """sin and cos, `[2, positions, channels]`, for pairs of neighbouring channels.

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    angles = torch.outer(torch.arange(positions), theta ** -(torch.arange(0, channels, 2) / channels))
    return torch.stack([angles.sin(), angles.cos()]).repeat_interleave(2, -1)


class CausalAttention(nn.Module):
    """Tokens `[B, N, C]`; a token sees those before it and, by the share `soft` (section 3.6), those behind it."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (channels // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor, rope: Tensor, soft: float) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = (apply_rot_embed(t, rope[0], rope[1]) for t in (q, k))
        seen = F.softmax(q @ k.mT * self.scale, dim=-1)
        seen = seen.tril() + soft * seen.triu(1) if soft else seen.tril()
        return self.proj((seen @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + SwiGLU(norm(x)); its hidden width is two thirds of 4 C, up to a multiple of 256."""

    def __init__(self, channels: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn = RmsNorm(channels, eps=1e-6), CausalAttention(channels, num_heads)
        self.norm2, self.mlp = RmsNorm(channels, eps=1e-6), SwiGLU(channels, 2 * 4 * channels // 3, bias=False, align_to=256)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, rope: Tensor, soft: float) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), rope, soft))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ILLaMA(Classifier):
    """Images `[B, C, *img_size]` to logits `[B, num_classes]`; the class token comes last (PS [cls], section 3.4), and sees all.

    soft_mask_rate: what training lowers from one to zero, so that the mask starts bidirectional and ends causal (section 3.6).
    """

    global_pool = "token"
    num_prefix_tokens = 0
    rope: Tensor

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.img_size, self.soft_mask_rate = cast(tuple[int, int], to_2tuple(img_size)), 0.0
        positions = math.prod(patch_grid(self.img_size, patch_size, "iLLaMA")) + 1
        self.patch_embed = PatchEmbed(self.img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim))
        self.register_buffer("rope", rotary(positions, embed_dim // num_heads), persistent=False)
        self.pos_drop = nn.Dropout(drop_rate)
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate) for rate in rates)
        self.norm = RmsNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to `[B, N + 1, C]`, the class token last."""
        require_size(x, self.img_size, "iLLaMA")
        x = self.patch_embed(x)
        x = torch.cat([x, self.cls_token.expand(x.shape[0], -1, -1)], 1)
        x = self.pos_drop(x + self.pos_embed)
        for block in self.blocks:
            x = block(x, self.rope, self.soft_mask_rate)
        return self.norm(x)

    def pool(self, x: Tensor) -> Tensor:
        return x[:, -1]


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours, which are timm's for a SwiGLU."""
    return renamed(state, (r"mlp\.fc1\.", "mlp.fc1_g."), (r"mlp\.fc3\.", "mlp.fc1_x."))


VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": dict(embed_dim=384, num_heads=6),
    "base": dict(embed_dim=768, num_heads=12),
    "large": dict(embed_dim=1024, num_heads=16, depth=24),
}
VARIANTS |= {f"{name}_384": VARIANTS[name] | dict(img_size=384) for name in ("base", "large")}
for _name, _arguments in VARIANTS.items():
    _timm, _size = f"illama_{_name}", _arguments.get("img_size", 224)
    publish(
        ILLaMA,
        _timm,
        _arguments,
        variant=f"illama--{_name}",
        convert=convert,
        size=_size,
        fixed_input_size=True,
        first_conv="patch_embed.proj",
    )
    official(f"illama--{_timm}", model_entrypoint(_timm), convert)
