"""CRATE: a transformer whose layers are the steps of an optimiser, for codes that are compressed and sparse.

Yu et al., "White-Box Transformers via Sparse Rate Reduction" (NeurIPS 2023). Facts from the official repository,
Ma-Lab-Berkeley/CRATE, whose attention differs from the paper's equation 12: its output is projected by a matrix of its own.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import model_entrypoint
from torch import Tensor, nn

from ..mixers import patch_grid, require_size
from .classifier import Classifier, init_weights
from .official import official, publish, renamed


class SubspaceAttention(nn.Module):
    """MSSA (equations 11 and 12) on `[B, N, C]`: one code in each subspace is query, key, value."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (channels // num_heads) ** -0.5
        self.u, self.proj = nn.Linear(channels, channels, bias=False), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        w = self.u(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return self.proj(F.scaled_dot_product_attention(w, w, w, scale=self.scale).transpose(1, 2).flatten(2))


class ISTA(nn.Module):
    """One step of iterative shrinkage-thresholding (equation 17) on `[…, C]`: a sparser code of z in the dictionary D.

    ReLU(z + η Dᵀ(z − D z) − η λ), with the step η and the sparsity λ of 0.1.
    """

    def __init__(self, channels: int, eta: float = 0.1, lambd: float = 0.1) -> None:
        super().__init__()
        self.dictionary = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(channels, channels)))
        self.eta, self.lambd = eta, lambd

    def forward(self, z: Tensor) -> Tensor:
        gradient = (z - F.linear(z, self.dictionary)) @ self.dictionary
        return F.relu(z + self.eta * gradient - self.eta * self.lambd)


class Block(nn.Module):
    """z + MSSA(norm(z)), then ISTA(norm(z)), which has no residual around it; `[B, N, C]`."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(channels), SubspaceAttention(channels, num_heads)
        self.norm2, self.ista = nn.LayerNorm(channels), ISTA(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.ista(self.norm2(x + self.attn(self.norm1(x))))


class PatchEmbed(nn.Module):
    """Images `[B, C, H, W]` to tokens `[B, N, width]`: a patch's numbers, channels last, projected between two norms."""

    def __init__(self, patch_size: int, in_chans: int, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size, self.grid_size = (patch_size, patch_size), grid
        numbers = in_chans * patch_size**2
        self.norm1, self.proj, self.norm2 = nn.LayerNorm(numbers), nn.Linear(numbers, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.patch_size
        x = x.unflatten(3, (-1, q)).unflatten(2, (-1, p)).permute(0, 2, 4, 3, 5, 1)
        return self.norm2(self.proj(self.norm1(x.flatten(3).flatten(1, 2))))


class CRATE(Classifier):
    """Images `[B, C, *img_size]` to logits `[B, num_classes]`; the sides of `img_size` are multiples of `patch_size`."""

    global_pool = "token"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.img_size = cast(tuple[int, int], to_2tuple(img_size))
        grid = patch_grid(self.img_size, patch_size, "CRATE")
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, grid)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + math.prod(grid), embed_dim))
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to codes `[B, 1 + N, C]`, the class token first."""
        require_size(x, self.img_size, "CRATE")
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        return self.norm(self.blocks(x + self.pos_embed))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours."""
    return renamed(
        state,
        (r"^pos_embedding$", "pos_embed"),
        (r"^to_patch_embedding\.1\.", "patch_embed.norm1."),
        (r"^to_patch_embedding\.2\.", "patch_embed.proj."),
        (r"^to_patch_embedding\.3\.", "patch_embed.norm2."),
        (r"^mlp_head\.0\.", "norm."),
        (r"^mlp_head\.1\.", "head."),
        (r"^transformer\.layers\.(\d+)\.0\.norm\.", r"blocks.\1.norm1."),
        (r"^transformer\.layers\.(\d+)\.0\.fn\.qkv\.", r"blocks.\1.attn.u."),
        (r"^transformer\.layers\.(\d+)\.0\.fn\.to_out\.0\.", r"blocks.\1.attn.proj."),
        (r"^transformer\.layers\.(\d+)\.1\.norm\.", r"blocks.\1.norm2."),
        (r"^transformer\.layers\.(\d+)\.1\.fn\.weight$", r"blocks.\1.ista.dictionary"),
    )


VARIANTS = {
    "tiny": {},
    "small": dict(embed_dim=576, num_heads=12),
    "base": dict(embed_dim=768, num_heads=12),
    "large": dict(embed_dim=1024, num_heads=16, depth=24),
}
for _name, _arguments in VARIANTS.items():
    _timm = f"crate_{_name}"
    publish(CRATE, _timm, _arguments, variant=f"crate--{_name}", convert=convert, fixed_input_size=True, first_conv=None)
    official(f"crate--CRATE_{_name}", model_entrypoint(_timm), convert)
