"""ViG: gated linear attention along both directions of the raster, with 2D locality mixed in by a gate.

Liao et al., "ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention" (AAAI 2025). Facts from the official
repository, hustvl/ViG.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import GluMlp, RmsNorm, RmsNorm2d, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ..mixers import MetaBlock, gated_linear_attention
from .classifier import Classifier, Pyramid, init_weights
from .official import publish, renamed
from .vmamba import Norm, downsample, stem, vmamba_names

NORMALIZER = 16  # the logarithm of a gate is the logarithm of a sigmoid over this: gates start close to 1


class BidirectionalGLA(nn.Module):
    """BiGLA and the 2D gating locality injection on maps `[B, C, H, W]`.

    One q, k and v serve both directions, each of which has gates of its own; what a direction reads includes the token itself.
    share: what their sum is multiplied by. conv_act, out_act: whether SiLU follows the convolution, and precedes the output's
    projection.
    """

    def __init__(
        self, channels: int, num_heads: int, share: float, conv_act: bool = False, out_act: bool = False, eps: float = 1e-6
    ) -> None:
        super().__init__()
        keys, width = channels // 2, channels // num_heads
        self.num_heads, self.sizes = num_heads, (keys, keys, channels)
        self.scale = share * (keys // num_heads) ** -0.5
        conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.in_proj = nn.Sequential(conv, nn.SiLU() if conv_act else nn.Identity())
        self.qkv_proj = nn.Linear(channels, sum(self.sizes), bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(channels, 16, bias=False), nn.Linear(16, 2 * keys))
        self.g_proj = nn.Linear(channels, channels)
        self.g_norm, self.l_norm = RmsNorm(width, eps=eps), RmsNorm(width, eps=eps)
        self.out_act = nn.SiLU() if out_act else nn.Identity()
        self.o_proj = nn.Linear(channels, channels, bias=False)

    def reset_parameters(self) -> None:
        """The paper's start: every projection from Xavier's distribution, 2^−2.5 times as wide."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.xavier_uniform_(module.weight, gain=2**-2.5)

    def heads(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, C]` to `[B, N, heads, C / heads]`."""
        return x.unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Tensor) -> Tensor:
        local = self.in_proj(x).flatten(2).mT
        q, k, v = (self.heads(part).transpose(1, 2) for part in self.qkv_proj(local).split(self.sizes, -1))
        gates = -F.softplus(-self.gk_proj(local)) / NORMALIZER
        onward, backward = (self.heads(part).transpose(1, 2) for part in gates.chunk(2, -1))

        q, k, v = (torch.cat([part, part.flip(2)], 1) for part in (q * self.scale, k, v))
        onward, backward = gated_linear_attention(q, k, v, torch.cat([onward, backward.flip(2)], 1)).chunk(2, 1)
        seen = (onward + backward.flip(2)).transpose(1, 2)

        g = self.heads(self.g_proj(local).sigmoid())
        out = g * self.g_norm(seen) + (1 - g) * self.l_norm(self.heads(local))
        return self.o_proj(self.out_act(out.flatten(2))).mT.reshape(x.shape)


def swiglu(channels: int, multiple: int) -> GluMlp:
    """SwiGLU without biases on maps, 8/3 as wide as its input, rounded up to a multiple."""
    hidden = -(int(channels * 8 / 3) // -multiple) * multiple
    return GluMlp(channels, 2 * hidden, act_layer=nn.SiLU, bias=False, use_conv=True, gate_last=False)


def start(model: nn.Module) -> None:
    model.apply(init_weights)
    for module in model.modules():
        if isinstance(module, BidirectionalGLA):
            module.reset_parameters()


class ViG(Classifier):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`; the positions of img_size are interpolated to others.

    In evaluation the official code halves the sum of both directions twice, in training once; ours always twice. But for its
    eps, the norm behind takes that out.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int = 224,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        conv_act: bool = False,
        out_act: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.grid = (img_size // 16, img_size // 16)
        self.stem = stem(in_chans, embed_dim, 8, nn.SiLU)
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid[0] * self.grid[1], embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.Sequential(
            *(
                MetaBlock(
                    embed_dim,
                    BidirectionalGLA(embed_dim, num_heads, 1 / 4, conv_act, out_act),
                    swiglu(embed_dim, 256),
                    RmsNorm2d,
                    drop_path=rate,
                )
                for rate in cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
            )
        )
        self.norm = RmsNorm2d(embed_dim)
        start(self)
        trunc_normal_(self.pos_embed, std=0.02)
        self.reset_classifier(num_classes)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed"}

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to `[B, C, H / 16, W / 16]`."""
        x = self.stem(x)
        positions = self.pos_embed.mT.unflatten(2, self.grid)
        if x.shape[2:] != self.grid:
            positions = F.interpolate(positions.float(), x.shape[2:], mode="bicubic").to(x.dtype)
        return self.norm(self.blocks(self.pos_drop(x + positions)))


class HierViG(Pyramid):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`, by four stages of ViG's blocks."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 5, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        widths = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(widths, [4 * 2**i for i in range(len(depths))], drop_rate)
        self.stem = stem(in_chans, embed_dim)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, width in enumerate(widths):
            down = downsample(width // 2, width) if i else nn.Identity()
            blocks = (
                MetaBlock(width, BidirectionalGLA(width, num_heads[i], 1 / 2), swiglu(width, 32), Norm, drop_path=rate)
                for rate in rates[i]
            )
            self.stages.append(nn.Sequential(down, *blocks))
        self.norm = Norm(widths[-1])
        start(self)
        self.reset_classifier(num_classes)


def as_convolutions(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The MLPs' linears, `[out, in]`, as 1 × 1 convolutions."""
    return {name: x[..., None, None] if ".mlp.fc" in name else x for name, x in state.items()}


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return as_convolutions(
        renamed(
            state,
            (r"^patch_embed\.proj", "stem"),
            (r"attn_norm", "norm1"),
            (r"mlp_norm", "norm2"),
            (r"gate_proj", "fc1"),
            (r"down_proj", "fc2"),
        )
    )


def convert_hierarchical(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return as_convolutions(renamed(vmamba_names(state), (r"\.op\.", ".attn.")))


PLAIN: dict[str, dict[str, Any]] = {
    "t": dict(embed_dim=192, num_heads=3, conv_act=True, out_act=True),
    "s": dict(embed_dim=384, num_heads=6),
    "b": dict(embed_dim=768, num_heads=12),
}
HIERARCHICAL: dict[str, dict[str, Any]] = {
    "h_t": dict(embed_dim=96, depths=(2, 2, 5, 2), num_heads=(3, 6, 12, 24)),
    "h_s": dict(embed_dim=96, depths=(2, 2, 17, 2), num_heads=(3, 6, 12, 24)),
    "h_b": dict(embed_dim=128, depths=(2, 2, 17, 2), num_heads=(4, 8, 16, 32)),
}
for _name, _arguments in PLAIN.items():
    publish(ViG, f"vig_gla_{_name}", _arguments, variant=f"vig-gla--{_name}", convert=convert, first_conv="stem.0")
for _name, _arguments in HIERARCHICAL.items():
    publish(
        HierViG,
        f"vig_gla_{_name}",
        _arguments,
        variant=f"vig-gla--{_name}",
        convert=convert_hierarchical,
        first_conv="stem.0",
    )
