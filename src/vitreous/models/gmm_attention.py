"""GMM attention: scores multiplied by a mixture of Gaussians of the distance. Li and Zhang, "Toward a Deeper Understanding:
RetNet Viewed through Convolution" (Pattern Recognition 2024).

Facts from the official repository, CatworldLee/Gaussian-Mixture-Mask-Attention, for images of 32 (CIFAR, SVHN) and 64 pixels
(Tiny-ImageNet).
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..errors import VitreousError
from .classifier import init_weights
from .official import official, publish, renamed


def gaussian(side: int) -> Tensor:
    """`[1, 1, N, N]` for a grid of N = side² tokens: exp(-d² / 2), d the distance of two of them.

    As in the official code it is the root of exp(-d²) in float32, so that it is 0 from d² = 104 on.
    """
    at = torch.arange(side, dtype=torch.float32)
    square = (at[:, None] - at) ** 2
    return (-square[:, None, :, None] - square[None, :, None, :]).exp().sqrt().reshape(1, 1, side**2, side**2)


class GaussianMixtureMask(nn.Module):
    """Each head's mask, `[heads, N, N]`: the sum over k of α_k · exp(-d² / 2)^(1 / σ_k²), from the Gaussian of σ = 1.

    Each of the `kernels` has a σ and an α for every head, which start as in the official code.
    """

    def __init__(self, heads: int, kernels: int) -> None:
        super().__init__()
        self.sigma = nn.Parameter(torch.randn(kernels, heads, 1, 1) * 10 + 10)
        self.alpha = nn.Parameter(torch.randn(kernels, heads, 1, 1) * 2)

    def forward(self, base: Tensor) -> Tensor:
        return (self.alpha * base ** (1 / (self.sigma**2 + 1e-5))).sum(0)


class GaussianMaskAttention(Attention):
    """Self-attention on tokens `[B, N, C]` whose scaled scores are multiplied by the mask before the softmax.

    `attn_mask` is the `gaussian` of the grid; it comes from the model, where all layers share it.
    """

    def __init__(self, dim: int, num_heads: int, kernels: int, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.mask = GaussianMixtureMask(num_heads, kernels)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is None:
            raise VitreousError("GaussianMaskAttention needs the Gaussian of its grid as attn_mask: `gaussian(side)`")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scores = q * self.scale @ k.mT * self.mask(attn_mask)
        x = self.attn_drop(scores.softmax(-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2)))


class GMMViT(VisionTransformer):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`: no class token, tokens averaged, then normalised."""

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 4,
        num_classes: int = 100,
        embed_dim: int = 192,
        depth: int = 9,
        num_heads: int = 12,
        mlp_ratio: float = 2.0,
        num_kernals: int = 5,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=False,
            class_token=False,
            global_pool="avg",
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
            **kwargs,
        )
        drop = dict(attn_drop=kwargs.get("attn_drop_rate", 0.0), proj_drop=kwargs.get("proj_drop_rate", 0.0))
        for block in self.blocks:
            cast(Any, block).attn = GaussianMaskAttention(embed_dim, num_heads, num_kernals, **drop).apply(init_weights)
        self.mask = nn.Parameter(gaussian(img_size // patch_size), requires_grad=False)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens `[B, N, C]`; the mask is the model's own."""
        return super().forward_features(x, attn_mask=self.mask)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward_intermediates(*args, **{**kwargs, "attn_mask": self.mask})


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours; the linear that reads patches as rows, columns, channels becomes a convolution.

    The Gaussian, which every layer names again, is computed.
    """
    names = renamed(
        {k: v for k, v in state.items() if not k.endswith("mask.mask")},
        (r"^pos_embedding$", "pos_embed"),
        (r"^to_patch_embedding\.1\.", "patch_embed.proj."),
        (r"^mlp_head\.0\.", "fc_norm."),
        (r"^mlp_head\.1\.", "head."),
        (r"^transformer\.layers\.(\d+)\.0\.norm\.", r"blocks.\1.norm1."),
        (r"^transformer\.layers\.(\d+)\.0\.fn\.to_qkv\.", r"blocks.\1.attn.qkv."),
        (r"^transformer\.layers\.(\d+)\.0\.fn\.to_out\.0\.", r"blocks.\1.attn.proj."),
        (r"^transformer\.layers\.(\d+)\.0\.fn\.mask\.", r"blocks.\1.attn.mask."),
        (r"^transformer\.layers\.(\d+)\.1\.norm\.", r"blocks.\1.norm2."),
        (r"^transformer\.layers\.(\d+)\.1\.fn\.net\.0\.", r"blocks.\1.mlp.fc1."),
        (r"^transformer\.layers\.(\d+)\.1\.fn\.net\.3\.", r"blocks.\1.mlp.fc2."),
    )
    weight = names["patch_embed.proj.weight"]
    side = round((weight.shape[1] / 3) ** 0.5)
    return {
        **names,
        "mask": gaussian(round(names["mask"].shape[-1] ** 0.5)),
        "patch_embed.proj.weight": weight.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2),
    }


# official name: width, depth, heads, patches at 32 and at 64 pixels
VARIANTS = {
    "vit": (192, 9, 12, 4, 8),
    "vit-base": (256, 8, 4, 2, 8),
    "vit-heat": (192, 8, 6, 2, 4),
    "vit_d6": (252, 6, 12, 4, 8),
    "vit_d15": (144, 15, 12, 4, 8),
    "vit_d30": (72, 30, 12, 4, 8),
    "vit_d30*": (108, 30, 12, 4, 8),
    "vit_d30**": (192, 30, 12, 4, 8),
    "vit_d60": (72, 60, 12, 4, 8),
}
for _name, (_width, _depth, _heads, *_patches) in VARIANTS.items():
    for _data, _size, _patch, _classes in (("cifar", 32, _patches[0], 100), ("tinyimagenet", 64, _patches[1], 200)):
        _arguments = dict(
            img_size=_size, patch_size=_patch, num_classes=_classes, embed_dim=_width, depth=_depth, num_heads=_heads
        )
        publish(
            GMMViT,
            f"gmm_{_name.replace('**', '_w192').replace('*', '_w108').replace('-', '_')}_{_data}",
            _arguments,
            variant=f"gmm-attention--{_name}_{_data}",
            convert=convert,
            size=_size,
            maps=_depth,
            num_classes=_classes,
            fixed_input_size=True,
            crop_pct=1.0,
            first_conv="patch_embed.proj",
        )
official("gmm-attention--vit_cifar_sigma50", GMMViT, convert)  # another golden of the same model
