"""SMT: scale-aware modulation in the early stages, attention in the late ones.

Lin et al., "Scale-Aware Modulation Meet Transformer" (ICCV 2023). Facts from the official repository, AFeng-x/SMT.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from ..mixers import DepthwiseMlp, MetaBlock, conv_norm
from .classifier import Pyramid, init_weights
from .official import publish, renamed, staged

norm_layer = partial(LayerNorm2d, eps=1e-6)


class ScaleAwareModulation(nn.Module):
    """SAM (section 3.1) on maps `[B, C, H, W]`: v times what convolutions of several sizes saw.

    Head i of n has a depthwise convolution of 3 + 2i (MHMC). Aggregation (SAA) regroups the channels so that each group holds
    one channel of every head, and mixes within groups, then across.
    """

    def __init__(self, channels: int, heads: int, drop: float = 0.0, expand: int = 2) -> None:
        super().__init__()
        width = channels // heads
        self.v, self.s = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.local = nn.ModuleList(nn.Conv2d(width, width, 3 + 2 * i, padding=1 + i, groups=width) for i in range(heads))
        self.mix = nn.Conv2d(channels, channels * expand, 1, groups=width)
        self.norm, self.act = nn.BatchNorm2d(channels * expand), nn.GELU()
        self.mix_all = nn.Conv2d(channels * expand, channels, 1)
        self.proj, self.drop = nn.Conv2d(channels, channels, 1), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.s(x).chunk(len(self.local), 1)
        seen = torch.stack([conv(head) for conv, head in zip(self.local, heads, strict=True)], 2).flatten(1, 2)
        modulator = self.mix_all(self.act(self.norm(self.mix(seen))))
        return self.drop(self.proj(modulator * self.v(x)))


class Attention(nn.Module):
    """Softmax attention over all places of a map `[B, C, H, W]`, and a depthwise 3 × 3 convolution of the values added to it."""

    def __init__(self, channels: int, heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.dropout = heads, attn_drop
        self.qkv = nn.Linear(channels, 3 * channels)
        self.local = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.proj, self.proj_drop = nn.Linear(channels, channels), nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        grid = x.shape[2:]
        qkv = self.qkv(x.flatten(2).mT).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        local = self.local(v.mT.flatten(1, 2).unflatten(2, grid)).flatten(2).mT
        tokens = self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2) + local))
        return tokens.mT.unflatten(2, grid)


class SMT(Pyramid):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`.

    sam_heads, heads: of the modulation and of the attention in each stage. A stage with both alternates them, modulation first
    (evolutionary hybrid network, section 3.2). head_conv: kernel of the first convolution. layer_scale: as in `MetaBlock`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        sam_heads: Sequence[int] = (4, 4, 4, 0),
        heads: Sequence[int] = (0, 0, 8, 16),
        mlp_ratios: Sequence[int] = (4, 4, 4, 2),
        depths: Sequence[int] = (2, 2, 8, 1),
        head_conv: int = 3,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16, 32), drop_rate)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, width in enumerate(embed_dims):

            def mixer(number: int, i: int = i, width: int = width) -> nn.Module:
                if sam_heads[i] and not (heads[i] and number % 2):
                    return ScaleAwareModulation(width, sam_heads[i], drop_rate)
                return Attention(width, heads[i], attn_drop_rate, drop_rate)

            if i:
                embed = nn.Sequential(nn.Conv2d(in_chans, width, 3, 2, 1), LayerNorm2d(width, eps=1e-5))
            else:
                stem = [conv_norm(in_chans, width, head_conv, 2), nn.ReLU(), nn.Conv2d(width, width, 2, 2)]
                embed = nn.Sequential(*stem, LayerNorm2d(width, eps=1e-5))
            blocks = (
                MetaBlock(
                    width,
                    mixer(number),
                    DepthwiseMlp(width, width * mlp_ratios[i], skip=True, drop=drop_rate),
                    norm_layer,
                    layer_scale,
                    rate,
                )
                for number, rate in enumerate(rates[i])
            )
            self.stages.append(nn.Sequential(embed, *blocks, norm_layer(width)))
            in_chans = width
        self.apply(init_weights)
        self.reset_classifier(num_classes)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: q and kv are one layer, and linears on maps are 1 × 1 convolutions."""
    names = renamed(
        staged(state),
        (r"^(stages\.0\.0)\.conv\.([01])\.", r"\1.0.\2."),
        (r"^(stages\.0\.0)\.conv\.3\.", r"\1.2."),
        (r"^(stages\.0\.0)\.norm\.", r"\1.3."),
        (r"^(stages\.\d\.0)\.proj\.", r"\1.0."),
        (r"^(stages\.\d\.0)\.norm\.", r"\1.1."),
        (r"gamma_(\d)$", r"ls\1.gamma"),
        (r"dwconv\.dwconv", "dwconv"),
        (r"attn\.local_conv\.", "attn.local."),
        *((rf"attn\.local_conv_{i + 1}\.", f"attn.local.{i}.") for i in range(4)),
        (r"attn\.proj0\.", "attn.mix."),
        (r"attn\.bn\.", "attn.norm."),
        (r"attn\.proj1\.", "attn.mix_all."),
    )
    for key in [k for k in names if ".attn.q." in k]:
        names[key.replace(".q.", ".qkv.")] = torch.cat([names.pop(key), names.pop(key.replace(".q.", ".kv."))])
    for key in [k for k in names if re.search(r"attn\.[vs]\.weight|mlp\.fc\d\.weight", k)]:
        names[key] = names[key][:, :, None, None]
        if key.endswith("attn.v.weight"):
            proj = key.replace(".v.", ".proj.")
            names[proj] = names[proj][:, :, None, None]
    return names


SMALL = dict(depths=(3, 4, 18, 2))
BASE = dict(mlp_ratios=(8, 6, 4, 2), depths=(4, 6, 28, 2), head_conv=7)
LARGE = dict(embed_dims=(96, 192, 384, 768), mlp_ratios=(8, 6, 4, 2), depths=(4, 6, 28, 4), head_conv=7)
# The checkpoints of the large model have a layer scale, which the official function `smt_l` has not.
SCALED = dict(**LARGE, layer_scale=1e-4)
VARIANTS: dict[str, tuple[dict[str, Any], int, int]] = {  # arguments, size of images, classes
    "smt_t": ({}, 224, 1000),
    "smt_s": (SMALL, 224, 1000),
    "smt_b": (BASE, 224, 1000),
    "smt_l": (LARGE, 224, 1000),
    "smt_large_224": (SCALED, 224, 1000),
    "smt_large_224_22k": (dict(**SCALED, num_classes=21841), 224, 21841),
    "smt_large_224_22kto1k_finetune": (SCALED, 224, 1000),
    "smt_large_384_22kto1k_finetune": (SCALED, 384, 1000),
}
for _name, (_arguments, _size, _classes) in VARIANTS.items():
    publish(
        SMT,
        _name,
        _arguments,
        variant=f"smt--{_name}",
        convert=convert,
        size=_size,
        num_classes=_classes,
        first_conv="stages.0.0.0.0",
    )
