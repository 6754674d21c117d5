"""PATNet: convolution on some of the channels, attention on the others. Huang et al., "Partial Convolution Meets Visual
Attention" (2025).

Facts from the authors' repository, haiduo/PartialNet, which holds it beside a later paper. On FasterNet's skeleton, the channels
that its partial convolution leaves alone are weighted by their mean and deviation (PAT_ch), in the last stage attend to each
other with a bias for their distance (PAT_sf), and a map weighs half of what the MLP gives (PAT_sp). The repository's files switch
PAT_sp on in T1 alone, and T0's constructor has it; which form the published rows have is not said: `…_sp` and `…_nospatial`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from ..mixers import conv_norm
from .classifier import Pyramid, init_weights
from .official import official, publish, renamed


class StatisticAttention(nn.Module):
    """The attention of PAT_ch: every channel of `[B, C, H, W]` times a factor decided by all channels' mean and deviation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cfc1 = nn.Conv2d(channels, channels, (1, 2), bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        places = x.shape[2] * x.shape[3]
        deviation = ((x - mean).square().sum((2, 3), keepdim=True) / max(places - 1, 1)).sqrt()
        return x * F.hardsigmoid(self.bn(self.cfc1(torch.cat((mean, deviation), 3))))


class DistanceAttention(nn.Module):
    """The attention of PAT_sf, on maps `[B, C, H, W]`: softmax attention with a learned bias for the distance of two places.

    Distances are Euclidean, in places, rounded; beyond 20 they share entries by their logarithm (iRPE: Wu et al., "Rethinking and
    Improving Relative Position Encoding for Vision Transformer", ICCV 2021, equation 18).
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(channels, 3 * channels, bias=False), nn.Linear(channels, channels)
        self.drop = nn.Dropout(0.1)
        self.bias = nn.Parameter(torch.zeros(num_heads, 81))

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        row = torch.arange(size[0], device=x.device).repeat_interleave(size[1]).float()
        column = torch.arange(size[1], device=x.device).repeat(size[0]).float()
        far = ((row[:, None] - row).square() + (column[:, None] - column).square()).sqrt()
        shared = 20 + (far.clamp(min=20) / 20).log() / math.log(8) * 20
        entry = 40 + torch.where(far <= 20, far, shared).round().clamp(max=40).long()
        q, k, v = self.qkv(x.flatten(2).mT).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropped = self.drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, self.bias[:, entry], dropped)
        return self.drop(self.proj(x.transpose(1, 2).flatten(2))).mT.unflatten(2, size)


class PartialMixer(nn.Module):
    """A 3 × 3 convolution on the first quarter of the channels of `[B, C, H, W]`, attention on the rest.

    num_heads: PAT_sf with so many heads; 0 for PAT_ch.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.parts = channels // 4, channels - channels // 4
        self.conv = nn.Conv2d(self.parts[0], self.parts[0], 3, padding=1, bias=False)
        rest = self.parts[1]
        norm = LayerNorm2d(rest, eps=1e-6) if num_heads else nn.BatchNorm2d(rest)
        self.attn = DistanceAttention(rest, num_heads) if num_heads else StatisticAttention(rest)
        self.norm, self.first = norm, bool(num_heads)

    def forward(self, x: Tensor) -> Tensor:
        convolved, rest = x.split(self.parts, 1)
        rest = self.attn(self.norm(rest)) if self.first else self.norm(self.attn(rest))
        return torch.cat((self.conv(convolved), rest), 1)


class PartialSpatial(nn.Module):
    """PAT_sp: the first half of the channels of `[B, C, H, W]` times a map that they decide, the second through a 1 × 1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parts = channels - channels // 2, channels // 2
        self.conv_attn = nn.Conv2d(self.parts[0], 1, 1, bias=False)
        self.norm, self.norm2 = nn.BatchNorm2d(self.parts[0]), nn.BatchNorm2d(self.parts[1])
        self.conv = nn.Conv2d(self.parts[1], self.parts[1], 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split(self.parts, 1)
        return torch.cat((self.norm(first * F.hardsigmoid(self.conv_attn(first))), self.conv(self.norm2(second))), 1)


class Block(nn.Module):
    """x + mlp(PAT_ch(x)), or with PAT_sf x + PAT_sf(x), then x + mlp(x); `[B, C, H, W]`."""

    def __init__(
        self, channels: int, num_heads: int, mlp_ratio: float, spatial: bool, act: type[nn.Module], drop_path: float
    ) -> None:
        super().__init__()
        self.own = bool(num_heads)  # whether the mixer has a residual of its own
        self.mixer = PartialMixer(channels, num_heads)
        hidden = int(channels * mlp_ratio)
        last = (PartialSpatial(channels),) if spatial else ()
        self.mlp = nn.Sequential(*conv_norm(channels, hidden, 1), act(), nn.Conv2d(hidden, channels, 1, bias=False), *last)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mixer(x)
        if self.own:
            x = mixed = x + mixed
        return x + self.drop_path(self.mlp(mixed))


class PATNet(Pyramid):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`. spatial: with PAT_sp."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 32,
        depths: Sequence[int] = (1, 2, 8, 2),
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        spatial: bool = False,
        act_layer: str = "relu",
        feature_dim: int = 1280,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        widths = [embed_dim << i for i in range(len(depths))]
        super().__init__(widths, [4 << i for i in range(len(depths))], drop_rate)
        act = {"relu": nn.ReLU, "gelu": nn.GELU}[act_layer]
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, width in enumerate(widths):
            side = 2 if i else 4
            conv = nn.Conv2d(widths[i - 1] if i else in_chans, width, side, side, bias=False)
            heads = num_heads if i == len(widths) - 1 else 0
            blocks = (Block(width, heads, mlp_ratio, spatial, act, rate) for rate in rates[i])
            self.stages.append(nn.Sequential(conv, nn.BatchNorm2d(width), *blocks))
        self.feature, self.act = nn.Conv2d(widths[-1], feature_dim, 1, bias=False), act()
        self.num_features = self.head_hidden_size = feature_dim
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def pool(self, x: Tensor) -> Tensor:
        return self.act(self.feature(x.mean((2, 3), keepdim=True))).flatten(1)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: of its stages every second is a merging of patches."""

    def stage(name: str) -> str:
        head, number, *rest = name.split(".")
        if head != "stages":
            return name
        i = int(number)
        if i % 2:
            return ".".join(("stages", str(i // 2 + 1), "0" if rest[0] == "reduction" else "1", *rest[1:]))
        return ".".join(("stages", str(i // 2), str(int(rest[1]) + 2), *rest[2:]))

    return renamed(
        {stage(k): v for k, v in state.items()},
        (r"^patch_embed\.proj\.", "stages.0.0."),
        (r"^patch_embed\.norm\.", "stages.0.1."),
        (r"spatial_mixing\.partial_conv3\.", "mixer.conv."),
        (r"spatial_mixing\.", "mixer."),
        (r"rpe_k\.lookup_table_bias", "bias"),
        (r"^avgpool_pre_head\.1\.", "feature."),
    )


SIZES = {
    "t0": dict(embed_dim=32, act_layer="gelu"),
    "t1": dict(embed_dim=48, act_layer="gelu", drop_path_rate=0.02),
    "t2": dict(embed_dim=64, depths=(2, 2, 6, 4), drop_path_rate=0.05),
    "s": dict(embed_dim=96, depths=(2, 2, 9, 4), drop_path_rate=0.1),
    "m": dict(embed_dim=128, depths=(2, 3, 16, 4), drop_path_rate=0.2),
    "l": dict(embed_dim=160, depths=(2, 3, 20, 4), drop_path_rate=0.3),
}
FILES = {"t0": dict(spatial=True), "t1": dict(spatial=True)}  # the others are without PAT_sp in the repository's files
for _name, _arguments in SIZES.items():
    for _suffix, _form in {
        "": FILES.get(_name, {}),
        "_sp": dict(spatial=True, num_heads=6),
        "_nospatial": dict(num_heads=6),
    }.items():
        publish(
            PATNet,
            f"patnet_{_name}{_suffix}",
            {**_arguments, **_form},
            variant=f"patnet--{_name}{_suffix}",
            convert=convert,
            first_conv="stages.0.0",
        )
    official(f"patnet--{_name}_cfg", partial(PATNet, **{**_arguments, **FILES.get(_name, {})}), convert)
