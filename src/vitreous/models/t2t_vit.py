"""T2T-ViT: neighbouring tokens gathered into one, twice, before a deep narrow ViT.

Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet" (ICCV 2021). Facts from the official
repository, yitu-opensource/T2T-ViT. Attention is scaled by head_dim**-0.5, as its constructors and its evaluation commands do;
its `pretrained=True` would scale by embed_dim**-0.5, but gives no address to load from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp, calculate_drop_path_rates, to_2tuple, trunc_normal_
from timm.models import model_entrypoint
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import require_size, sinusoid
from .classifier import Classifier, init_weights
from .official import official, publish, renamed


class TokenTransformer(nn.Module):
    """Tokens `[B, N, dim]` to `[B, N, width]`: attention of one head and an MLP.

    The width changes, so the values are the first residual. The scale is that of the input's width, dim**-0.5, as in the official
    code.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.norm1, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * width, bias=False), nn.Linear(width, width)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x))[:, None].chunk(3, -1)
        x = (v + self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale)))[:, 0]
        return x + self.mlp(self.norm2(x))


class TokenPerformer(nn.Module):
    """As `TokenTransformer`, in time linear in N: Choromanski et al., "Rethinking Attention with Performers" (ICLR 2021).

    w: the m random directions of the positive features φ; drawn once, orthogonal, and not trained.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        m = width // 2
        self.norm1, self.kqv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * width), nn.Linear(width, width)
        self.norm2, self.mlp, self.drop = nn.LayerNorm(width), Mlp(width, width, drop=(0.0, 0.1)), nn.Dropout(0.1)
        self.w = nn.Parameter(nn.init.orthogonal_(torch.empty(m, width)) * math.sqrt(m), requires_grad=False)

    def phi(self, x: Tensor) -> Tensor:
        """φ(x) = exp(w·x − |x|² / 2) / √m, `[B, N, width]` to `[B, N, m]`; in float32, for its range is wide."""
        x, w = x.float(), self.w.float()
        return torch.exp(x @ w.mT - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(w.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, -1)
        k, q = self.phi(k), self.phi(q)
        y = q @ (k.mT @ v.float()) / (q @ k.sum(1)[..., None] + 1e-8)
        x = v + self.drop(self.proj(y.to(v.dtype)))
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """T2T module (section 3.1): images `[B, C, H, W]` to tokens `[B, H/16 · W/16, embed_dim]`.

    Three soft splits, which unfold overlapping patches of 7, 3 and 3 by strides of 4, 2 and 2; a T2T transformer after the first
    two, which leaves `width` channels.
    """

    def __init__(self, layer: type[nn.Module], in_chans: int, embed_dim: int, img_size: tuple[int, int], width: int = 64) -> None:
        super().__init__()
        self.grid_size = (img_size[0] // 16, img_size[1] // 16)
        self.attention1, self.attention2 = layer(49 * in_chans, width), layer(9 * width, width)
        self.project = nn.Linear(9 * width, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2] // 4, x.shape[3] // 4
        x = self.attention1(F.unfold(x, 7, stride=4, padding=2).mT)
        x = self.attention2(F.unfold(x.mT.unflatten(2, (h, w)), 3, stride=2, padding=1).mT)
        return self.project(F.unfold(x.mT.unflatten(2, (h // 2, w // 2)), 3, stride=2, padding=1).mT)


class SqueezeExcite(nn.Module):
    """Channels of tokens `[B, N, C]` weighed by their means: Hu et al., "Squeeze-and-Excitation Networks", 2018."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(channels, channels // 16, bias=False), nn.Linear(channels // 16, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean(1, keepdim=True)))).sigmoid()


class GhostLinear(nn.Module):
    """`[…, channels]` to `[…, channels]`, the first half by a linear layer and the second by scaling the first.

    Han et al., "GhostNet: More Features from Cheap Operations" (CVPR 2020).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.primary, self.cheap = nn.Linear(channels, channels // 2, bias=False), nn.Parameter(torch.ones(channels // 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(x)
        return torch.cat([x, x * self.cheap], -1)


class GhostAttention(nn.Module):
    """Softmax attention whose queries, keys and values are half ghosts; `[B, N, C]`."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, channels // num_heads
        self.scale = self.head_dim**-0.5
        self.q_proj, self.k_proj, self.v_proj = GhostLinear(channels), GhostLinear(channels), GhostLinear(channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for p in projections)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


class GhostMlp(nn.Module):
    """An MLP of ratio 3 whose hidden features are a third by a linear layer and two thirds by scaling it; `[B, N, C]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(channels, channels), nn.Linear(3 * channels, channels), nn.GELU()
        self.cheap = nn.Parameter(torch.ones(2, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))
        return self.fc2(torch.cat([x, *(self.act(x * cheap) for cheap in self.cheap)], -1))


class DenseBlock(Block):
    """`[B, N, C]` to `[B, N, C + growth]`: `growth` new channels of a block's output after the old ones."""

    def __init__(self, growth: int, dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(dim, *args, **kwargs)
        self.dense_linear = nn.Linear(dim, growth)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return torch.cat([x, self.dense_linear(super().forward(x, attn_mask, is_causal))], -1)


class Transition(nn.Sequential):
    """`[B, N, C]` to `[B, N, C / 2]`: a linear layer and a GELU between stages of dense blocks."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.Linear(channels, channels // 2), nn.GELU())


class T2TViT(Classifier):
    """Images `[B, C, *img_size]` to logits `[B, num_classes]`; the sides of `img_size` are multiples of 16.

    tokens_type: "performer" or "transformer", the T2T transformer. kind: "plain"; "se", with a squeeze-excite behind attention;
    "ghost", with cheap channels in attention and MLP; "dense", where `depth` counts the blocks of each stage, each of which adds
    `growth_rate` channels (Table 4 and section 4.2 of the paper).
    """

    global_pool = "token"

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        tokens_type: str = "performer",
        kind: str = "plain",
        embed_dim: int = 384,
        depth: int | tuple[int, ...] = 14,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        growth_rate: int = 64,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        depths = (depth,) if isinstance(depth, int) else tuple(depth)
        width, blocks = embed_dim, []
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, stage in enumerate(rates):
            for rate in stage:
                shared: dict[str, Any] = dict(norm_layer=nn.LayerNorm, proj_drop=drop_rate, drop_path=rate)
                if kind == "dense":
                    blocks.append(DenseBlock(growth_rate, width, num_heads, mlp_ratio, **shared))
                    width += growth_rate
                    continue
                block: Any = Block(width, num_heads, mlp_ratio, **shared)
                if kind == "se":
                    block.ls1 = SqueezeExcite(width)
                elif kind == "ghost":
                    block.attn, block.mlp = GhostAttention(width, num_heads), GhostMlp(width)
                blocks.append(block)
            if i < len(depths) - 1:
                blocks.append(Transition(width))
                width //= 2

        super().__init__(width, drop_rate)
        self.img_size = cast(tuple[int, int], to_2tuple(img_size))
        if any(side % 16 for side in self.img_size):
            raise VitreousError(f"T2T-ViT has tokens of 16 × 16 pixels: img_size {self.img_size} must be multiples of 16")
        layer = {"performer": TokenPerformer, "transformer": TokenTransformer}[tokens_type]
        self.patch_embed = TokensToToken(layer, in_chans, embed_dim, self.img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions = 1 + math.prod(self.patch_embed.grid_size)
        self.pos_embed = nn.Parameter(sinusoid(positions, embed_dim), requires_grad=False)
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to `[B, 1 + N, width]`, the class token first."""
        require_size(x, self.img_size, "T2T-ViT")
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        return self.norm(self.blocks(self.pos_drop(x + self.pos_embed)))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours; the table of positions is computed anew."""
    state = {**state, "pos_embed": sinusoid(*state["pos_embed"].shape[1:])}
    state = renamed(
        state,
        (r"^tokens_to_token\.", "patch_embed."),
        (r"^(patch_embed\.attention\d)\.attn\.", r"\1."),
        (r"^(patch_embed\.attention\d\.mlp)\.0\.", r"\1.fc1."),
        (r"^(patch_embed\.attention\d\.mlp)\.2\.", r"\1.fc2."),
        (r"attn\.se_layer\.fc\.0\.", "ls1.fc1."),
        (r"attn\.se_layer\.fc\.2\.", "ls1.fc2."),
        (r"attn\.([qkv])\.", r"attn.\1_proj.primary."),
        (r"attn\.cheap_operation_([qkv])\.weight$", r"attn.\1_proj.cheap"),
        (r"^(blocks\.\d+)\.linear\.", r"\1.0."),
    )
    return {k: v.flatten() if k.endswith("_proj.cheap") else v for k, v in _cheap_rows(state)}


def _cheap_rows(state: dict[str, Tensor]) -> Iterable[tuple[str, Tensor]]:
    """Both cheap operations of a ghost MLP, `[C, 1, 1]` each, as the rows of one tensor."""
    for name, tensor in state.items():
        if name.endswith("mlp.cheap_operation2.weight"):
            other = state[name.replace("operation2", "operation3")]
            yield name.replace("_operation2.weight", ""), torch.stack([tensor, other]).flatten(1)
        elif not name.endswith("mlp.cheap_operation3.weight"):
            yield name, tensor


LITE: dict[str, Any] = dict(embed_dim=256, num_heads=4, mlp_ratio=2.0)
VARIANTS: dict[str, dict[str, Any]] = {
    "t2t_vit_7": dict(depth=7, **LITE),
    "t2t_vit_10": dict(depth=10, **LITE),
    "t2t_vit_12": dict(depth=12, **LITE),
    "t2t_vit_14": {},
    "t2t_vit_19": dict(embed_dim=448, depth=19, num_heads=7),
    "t2t_vit_24": dict(embed_dim=512, depth=24, num_heads=8),
    "t2t_vit_14_resnext": dict(num_heads=32),
    "t2t_vit_14_wide": dict(embed_dim=768, depth=4, num_heads=12),
    "t2t_vit_14_se": dict(kind="se"),
    "t2t_vit_16_ghost": dict(kind="ghost", depth=16),
    "t2t_vit_dense": dict(kind="dense", embed_dim=128, depth=(3, 6, 6, 4), num_heads=8, mlp_ratio=2.0),
}
VARIANTS |= {f"t2t_vit_t_{size}": {**VARIANTS[f"t2t_vit_{size}"], "tokens_type": "transformer"} for size in (14, 19, 24)}
for _name, _arguments in VARIANTS.items():
    publish(T2TViT, _name, _arguments, variant=f"t2t-vit--{_name}", convert=convert, fixed_input_size=True, first_conv=None)
publish(
    T2TViT, "t2t_vit_14_384", dict(img_size=384), variant="t2t-vit--t2t_vit_14_384", convert=convert, size=384, first_conv=None
)
official("t2t-vit--t2t_vit_7_kqv", model_entrypoint("t2t_vit_7"), convert)  # the reference outputs have it with other weights
