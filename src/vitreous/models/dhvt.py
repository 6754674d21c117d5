"""DHVT: a ViT for small datasets, with convolutions around its tokens and tokens that stand for its heads.

Lu et al., "Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets" (NeurIPS 2022).
Facts from the official repository, ArieSeirack/DHVT.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import conv_norm
from .classifier import Classifier, init_weights
from .official import publish


class Affine(nn.Module):
    """α x + β for each channel of maps `[B, C, H, W]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(1, channels, 1, 1)), nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * x + self.beta


class SOPE(nn.Module):
    """Sequential overlapping patch embedding (section 3.2): images `[B, C, H, W]` to maps `[B, width, H / patch, W / patch]`.

    As many 3 × 3 convolutions of stride 2 as it takes, the width doubled by each.
    """

    def __init__(self, patch_size: int, in_chans: int, width: int) -> None:
        super().__init__()
        if patch_size not in (2, 4, 16):
            raise VitreousError(f"DHVT has patches of 2, 4 or 16 pixels, not {patch_size}")
        layers: list[nn.Module] = []
        inputs, halvings = in_chans, patch_size.bit_length() - 1
        for i in range(halvings):
            outputs = width >> (halvings - 1 - i)
            layers += [conv_norm(inputs, outputs, 3, 2), nn.GELU()]
            inputs = outputs
        # The official stem ends without an activation, but for patches of 2, where it has only one convolution.
        self.proj = nn.Sequential(*(layers if halvings == 1 else layers[:-1]))
        self.pre_affine, self.post_affine = Affine(in_chans), Affine(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.post_affine(self.proj(self.pre_affine(x)))


class HeadInteractedAttention(nn.Module):
    """HI-MHSA (section 3.4) on tokens `[B, 1 + N, C]`: softmax attention among them and one token for each head.

    A head's token is made from the mean of its channels over all tokens; what the head tokens give is added, as their mean, to
    the class token, and they are dropped.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, channels // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.ht_proj, self.ht_norm = nn.Linear(self.head_dim, channels), nn.LayerNorm(self.head_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, num_heads, channels))

    def head_tokens(self, x: Tensor) -> Tensor:
        """`[B, heads, C]`."""
        heads = (self.num_heads, self.head_dim)
        y = self.ht_proj(x.mean(1).unflatten(-1, heads)).unflatten(-1, heads)
        return F.gelu(self.ht_norm(y)).flatten(2) + self.pos_embed

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        x = torch.cat([x, self.head_tokens(x)], 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        x = self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))
        return torch.cat([x[:, :1] + x[:, n:].mean(1, keepdim=True), x[:, 1:n]], 1)


class DAFF(nn.Module):
    """Dynamic aggregation feed forward (section 3.3) on tokens `[B, 1 + h · w, C]`.

    The patches pass convolutions; the class token is multiplied by a squeeze of what they give, which no sigmoid bounds.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, hidden, 1), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = nn.Conv2d(hidden, channels, 1), nn.BatchNorm2d(channels)
        self.compress, self.excitation = nn.Linear(channels, channels // 4), nn.Linear(channels // 4, channels)
        self.act = nn.GELU()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        token, x = x[:, :1], x[:, 1:].mT.unflatten(2, grid)
        x = self.act(self.bn1(self.conv1(x)))
        x = x + self.act(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x)).flatten(2).mT
        gate = self.excitation(self.act(self.compress(x.mean(1, keepdim=True))))
        return torch.cat([token * gate, x], 1)


class Block(nn.Module):
    """x + HI-MHSA(norm(x)), then x + DAFF(norm(x)); tokens `[B, 1 + h · w, C]`."""

    def __init__(self, channels: int, num_heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(channels, eps=1e-6), HeadInteractedAttention(channels, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(channels, eps=1e-6), DAFF(channels, int(channels * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class DHVT(Classifier):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`; only convolutions tell it where a patch is."""

    global_pool = "token"

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.patch_embed = SOPE(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)
        for table in (self.cls_token, *(cast(Any, block).attn.pos_embed for block in self.blocks)):
            trunc_normal_(table, std=0.02)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to `[B, 1 + h · w, C]`, the class token first."""
        x = self.patch_embed(x)
        grid = (x.shape[2], x.shape[3])
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).mT], 1)
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x)


TINY, SMALL = dict(embed_dim=192, num_heads=4), dict(embed_dim=384, num_heads=8)
DOMAIN, IMAGENET = dict(num_classes=345), dict(num_classes=1000)  # the classes of DomainNet, and of ImageNet
VARIANTS: dict[str, dict[str, Any]] = {
    "tiny_cifar_patch4": dict(patch_size=4, num_classes=100, **TINY),
    "small_cifar_patch4": dict(patch_size=4, num_classes=100, **SMALL),
    "tiny_cifar_patch2": dict(patch_size=2, num_classes=100, **TINY),
    "small_cifar_patch2": dict(patch_size=2, num_classes=100, **SMALL),
    "tiny_domain_patch16": TINY | DOMAIN,
    "small_domain_patch16": SMALL | DOMAIN | dict(num_heads=6),
    "tiny_imagenet_patch16": TINY | IMAGENET | dict(num_heads=3),
    "small_imagenet_patch16": SMALL | IMAGENET | dict(num_heads=6),
}
for _name, _arguments in VARIANTS.items():
    _cfg: dict[str, Any] = dict(
        size=32 if "cifar" in _name else 224, num_classes=_arguments["num_classes"], first_conv="patch_embed.proj.0.0"
    )
    publish(DHVT, f"dhvt_{_name}", _arguments, variant=f"dhvt--{_name}", **_cfg)
