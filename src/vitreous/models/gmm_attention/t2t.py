"""GMM-T2T: a T2T-ViT with the mask of `gmm_attention`, in its T2T module too (Li and Zhang, 2024).

Facts from the official repository, CatworldLee/Gaussian-Mixture-Mask-Attention. Unlike `t2t_vit`, every soft split gathers 3 × 3
by a stride of 2; attention adds its normalised input to what it gives; tokens are averaged. As there, a class token and a norm
of the T2T module are among the parameters, and nothing reads them.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp, calculate_drop_path_rates
from torch import Tensor, nn

from ...errors import VitreousError
from ...mixers import MetaBlock, require_size, sinusoid
from ..classifier import Classifier, init_weights
from ..official import renamed
from .vit import GaussianMaskAttention, GaussianMixtureMask, computed, gaussian, publish_both


class TokenAttention(nn.Module):
    """Masked attention of one head, tokens `[B, N, dim]` to `[B, N, width]`; its residual are the values."""

    def __init__(self, dim: int, width: int, kernels: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * width, bias=False), nn.Linear(width, width)
        self.mask = GaussianMixtureMask(1, kernels)

    def forward(self, x: Tensor, base: Tensor) -> Tensor:
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        attention = (q * self.scale @ k.mT * self.mask(base)).softmax(-1)
        return (v + self.proj(attention @ v))[:, 0]


class TokenTransformer(nn.Module):
    """Tokens `[B, side², dim]` to `[B, side², width]`: masked attention and an MLP."""

    def __init__(self, side: int, dim: int, width: int, kernels: int) -> None:
        super().__init__()
        self.mask = nn.Parameter(gaussian(side), requires_grad=False)
        self.norm1, self.attn = nn.LayerNorm(dim), TokenAttention(dim, width, kernels)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x), self.mask)
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """Images `[B, C, img_size, img_size]` to tokens `[B, N, embed_dim]`: `splits` soft splits, a transformer between each two.

    cls_token, norm: what official checkpoints have and nothing reads.
    """

    def __init__(self, img_size: int, in_chans: int, embed_dim: int, splits: int, width: int, kernels: int) -> None:
        super().__init__()
        self.sides = [img_size // 2**i for i in range(1, splits)]
        self.transformers = nn.ModuleList(
            TokenTransformer(side, 9 * (width if i else in_chans), width, kernels) for i, side in enumerate(self.sides)
        )
        self.grid_size = (img_size // 2**splits, img_size // 2**splits)
        self.cls_token, self.norm = nn.Parameter(torch.zeros(1, 1, embed_dim)), nn.LayerNorm(9 * width)
        self.project = nn.Linear(9 * width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        for side, transformer in zip(self.sides, self.transformers, strict=True):
            x = transformer(F.unfold(x, 3, stride=2, padding=1).mT).mT.unflatten(2, (side, side))
        return self.project(F.unfold(x, 3, stride=2, padding=1).mT)


class ResidualMaskAttention(GaussianMaskAttention):
    """`GaussianMaskAttention` plus its input."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return x + super().forward(x, attn_mask, is_causal)


class GMMT2T(Classifier):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`; each of the `splits` halves the side.

    token_dim: channels within the T2T module.
    """

    def __init__(
        self,
        img_size: int = 32,
        in_chans: int = 3,
        num_classes: int = 100,
        splits: int = 2,
        token_dim: int = 64,
        embed_dim: int = 256,
        depth: int = 12,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        num_kernals: int = 5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        side, over = divmod(img_size, 2**splits)
        if over:
            raise VitreousError(f"GMM-T2T halves images {splits} times: img_size {img_size} must be a multiple of {2**splits}")
        self.img_size = (img_size, img_size)
        self.patch_embed = TokensToToken(img_size, in_chans, embed_dim, splits, token_dim, num_kernals)
        self.pos_embed = nn.Parameter(sinusoid(side**2, embed_dim), requires_grad=False)
        self.mask = nn.Parameter(gaussian(side), requires_grad=False)
        self.blocks = nn.ModuleList(
            MetaBlock(
                embed_dim,
                ResidualMaskAttention(embed_dim, num_heads, num_kernals),
                Mlp(embed_dim, int(embed_dim * mlp_ratio)),
                nn.LayerNorm,
                drop_path=rate,
            )
            for rate in cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to tokens `[B, N, C]`."""
        require_size(x, self.img_size, "GMM-T2T")
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, self.mask)
        return self.norm(x)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours; the table of positions is computed."""
    state = {**computed(state), "pos_embed": sinusoid(*state["pos_embed"].shape[1:])}
    transformers = ((rf"^tokens_to_token\.attention{i + 1}\.", f"patch_embed.transformers.{i}.") for i in range(2))
    return renamed(state, *transformers, (r"^tokens_to_token\.", "patch_embed."), (r"^cls_token$", "patch_embed.cls_token"))


publish_both(GMMT2T, "t2t", convert, dict(splits=2), dict(splits=3), first_conv=None)
