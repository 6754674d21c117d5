"""GMM attention: scores multiplied by a mixture of Gaussians of the distance. Li and Zhang, "Toward a Deeper Understanding:
RetNet Viewed through Convolution" (Pattern Recognition 2024).

Facts from the official repository, CatworldLee/Gaussian-Mixture-Mask-Attention, for images of 32 (CIFAR, SVHN) and 64 pixels
(Tiny-ImageNet). Here are the mask, the plain ViTs, and what they share with `swin`, `cait`, `pit` and `t2t`.

Not built: the paper's first attempt, a free number for each pair of tokens (`is_SLM`), which the repository does not hand on to
Swin and to the ViTs of other depths; and patches of 32 pixels in images of 256, for which it has no data set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ...errors import VitreousError
from ..classifier import init_weights
from ..official import Convert, official, publish, renamed


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

    `attn_mask` is the `gaussian` of the grid; it comes from the model, where all layers share it. prefix: how many tokens stand
    before those of the grid; scores from them and to them are left as they are.
    """

    def __init__(self, dim: int, num_heads: int, kernels: int, prefix: int = 0, **kwargs: Any) -> None:
        super().__init__(dim, num_heads, **kwargs)
        self.mask, self.prefix = GaussianMixtureMask(num_heads, kernels), prefix

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is None:
            raise VitreousError("GaussianMaskAttention needs the Gaussian of its grid as attn_mask: `gaussian(side)`")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mask = self.mask(attn_mask)
        if self.prefix:
            mask = F.pad(mask, (self.prefix, 0, self.prefix, 0), value=1.0)
        scores = q * self.scale @ k.mT * mask
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


def computed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official tensors without the Gaussians that every layer names again; those left are computed."""
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("mask.mask")}
    return {n: gaussian(math.isqrt(t.shape[-1])) if n.rpartition(".")[2] == "mask" else t for n, t in kept.items()}


def patches(weight: Tensor) -> Tensor:
    """`[width, side · side · 3]`, of a linear layer that reads patches as rows, columns, channels, as a convolution's weight."""
    side = math.isqrt(weight.shape[1] // 3)
    return weight.unflatten(1, (side, side, -1)).permute(0, 3, 1, 2)


# What the repository's ViT, CaiT and PiT call the same.
NAMES = (
    (r"^pos_embedding$", "pos_embed"),
    (r"^to_patch_embedding\.[01]\.", "patch_embed.proj."),
    (r"^mlp_head\.1\.", "head."),
    (r"\blayers\.(\d+)\.0\.norm\.", r"blocks.\1.norm1."),
    (r"\blayers\.(\d+)\.0\.fn\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"\blayers\.(\d+)\.0\.fn\.(to_)?", r"blocks.\1.attn."),
    (r"\blayers\.(\d+)\.1\.norm\.", r"blocks.\1.norm2."),
    (r"\blayers\.(\d+)\.1\.fn\.net\.0\.", r"blocks.\1.mlp.fc1."),
    (r"\blayers\.(\d+)\.1\.fn\.net\.3\.", r"blocks.\1.mlp.fc2."),
)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours."""
    names = renamed(computed(state), (r"^transformer\.", ""), (r"^mlp_head\.0\.", "fc_norm."), *NAMES)
    return {**names, "patch_embed.proj.weight": patches(names["patch_embed.proj.weight"])}


def publish_both(
    cls: type[nn.Module], name: str, convert: Convert, cifar: Mapping[str, Any], tinyimagenet: Mapping[str, Any], **cfg: Any
) -> None:
    """Publish the official `name` twice: for images of 32 pixels with the arguments `cifar`, and of 64 with `tinyimagenet`."""
    short = name.replace("**", "_w192").replace("*", "_w108").replace("-", "_")
    for data, size, classes, arguments in (("cifar", 32, 100, cifar), ("tinyimagenet", 64, 200, tinyimagenet)):
        publish(
            cls,
            f"gmm_{short}_{data}",
            dict(img_size=size, num_classes=classes, **arguments),
            variant=f"gmm-attention--{name}_{data}",
            convert=convert,
            size=size,
            num_classes=classes,
            fixed_input_size=True,
            crop_pct=1.0,
            **cfg,
        )


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
    _cifar, _tinyimagenet = (dict(embed_dim=_width, depth=_depth, num_heads=_heads, patch_size=_patch) for _patch in _patches)
    publish_both(GMMViT, _name, convert, _cifar, _tinyimagenet, maps=_depth, first_conv="patch_embed.proj")
official("gmm-attention--vit_cifar_sigma50", GMMViT, convert)  # another golden of the same model
