"""CrossFormer: patches of several sizes, and attention in turn within near and far groups.

Wang et al., "CrossFormer: A Versatile Vision Transformer Based on Cross-scale Attention" (ICLR 2022), and "CrossFormer++: A
Versatile Vision Transformer Hinging on Cross-scale Attention" (TPAMI 2023). Facts from the official repository,
cheerss/CrossFormer. There a model is built for one size of images; here groups are made for the map that comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, Mlp, calculate_drop_path_rates
from torch import Tensor, nn

from ..mixers import MetaBlock
from .classifier import Pyramid, init_weights
from .official import publish, renamed

HIDDEN = -1e4  # added to the score of a key that is padding; finite in half precision too


class CrossScaleEmbedding(nn.Module):
    """CEL (section 3.1): convolutions of several kernels and one stride side by side, the largest with the fewest channels.

    `[B, C, H, W]` to `[B, C', H / stride, W / stride]`.
    """

    def __init__(self, inputs: int, outputs: int, kernels: Sequence[int], stride: int) -> None:
        super().__init__()
        widths = [outputs // 2 ** min(i + 1, len(kernels) - 1) for i in range(len(kernels))]
        self.projs = nn.ModuleList(
            nn.Conv2d(inputs, width, kernel, stride, (kernel - stride) // 2)
            for kernel, width in zip(kernels, widths, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([proj(x) for proj in self.projs], 1)


class DynamicPositionBias(nn.Sequential):
    """DPB (section 3.3): an MLP from an offset in places, `[..., 2]`, to what each head adds to a score, `[..., heads]`."""

    def __init__(self, width: int, heads: int) -> None:
        layers: list[nn.Module] = [nn.Linear(2, width)]
        for outputs in (width, width, heads):
            layers += [nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, outputs)]
        super().__init__(*layers)


class GroupAttention(nn.Module):
    """LSDA (section 3.2) on a map `[B, H, W, C]`: attention within groups of `group` × `group` places.

    interval: 1 for neighbours (SDA); else a group takes every interval-th place (LDA). Where a side of the map is no larger than
    a group, groups are as wide as that side and their interval is 1. Maps are padded to whole groups; padding is not attended to.
    """

    def __init__(
        self, channels: int, heads: int, group: int, interval: int, attn_drop: float = 0.0, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.group, self.interval, self.dropout = heads, group, interval, attn_drop
        self.pos = DynamicPositionBias(channels // 16, heads)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj, self.proj_drop = nn.Linear(channels, channels), nn.Dropout(proj_drop)

    def position_bias(self, group: int, like: Tensor) -> Tensor:
        """`[heads, group², group²]`: what the place of a key relative to its query adds."""
        places = torch.arange(group, device=like.device)
        offsets = torch.arange(1 - group, group, device=like.device, dtype=like.dtype)
        table = self.pos(torch.cartesian_prod(offsets, offsets))
        y, x = (p.flatten() for p in torch.meshgrid(places, places, indexing="ij"))
        row, column = (p[:, None] - p[None, :] + group - 1 for p in (y, x))
        return table[row * (2 * group - 1) + column].permute(2, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        height, width, channels = x.shape[1:]
        group, interval = self.group, self.interval
        if min(height, width) <= group:
            group, interval = min(height, width), 1
        step = group * interval
        down, right = -height % step, -width % step
        rows, columns = (height + down) // step, (width + right) // step

        def grouped(x: Tensor) -> Tensor:
            """`[B, H, W, C]` to `[B · groups, group², C]`."""
            x = x.unflatten(2, (columns, group, interval)).unflatten(1, (rows, group, interval))
            return x.permute(0, 1, 4, 3, 6, 2, 5, 7).flatten(0, 4).flatten(1, 2)

        bias = self.position_bias(group, x)[None]
        if down or right:
            outside = F.pad(x.new_zeros(1, height, width, 1), (0, 0, 0, right, 0, down), value=HIDDEN)
            bias = (bias + grouped(outside).mT[:, None]).repeat(x.shape[0], 1, 1, 1)
            x = F.pad(x, (0, 0, 0, right, 0, down))
        qkv = self.qkv(grouped(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=bias, dropout_p=dropout).transpose(1, 2).flatten(2)
        x = self.proj_drop(self.proj(x))
        x = x.unflatten(1, (group, group)).unflatten(0, (-1, rows, columns, interval, interval))
        x = x.permute(0, 1, 5, 3, 2, 6, 4, 7).reshape(-1, height + down, width + right, channels)
        return x[:, :height, :width]


class ActivationCooling(nn.Module):
    """ACL (CrossFormer++, section 4.2) on `[B, H, W, C]`: a depthwise 3 × 3 and a LayerNorm where no residual passes by."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """An embedding, then blocks, short-distance and long-distance in turn; `[B, C, H, W]` to `[B, C', h, w]`.

    cooling: whether an activation cooling layer follows every third block, if it is not the last.
    """

    def __init__(self, embed: nn.Module, blocks: Sequence[nn.Module], channels: int, cooling: bool) -> None:
        super().__init__()
        self.embed, self.blocks = embed, nn.ModuleList(blocks)
        after = [i for i in range(2, len(blocks) - 1, 3) if cooling]
        self.cooling = nn.ModuleDict({str(i): ActivationCooling(channels) for i in after})

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if str(i) in self.cooling:
                x = self.cooling[str(i)](x)
        return x.permute(0, 3, 1, 2)


class CrossFormer(Pyramid):
    """Images `[B, C, H, W]`, H and W at least 32, to logits `[B, num_classes]`.

    groups, intervals: G and I of each stage. cooling: CrossFormer++'s activation cooling layers; its progressive group size is in
    `groups`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 1, 8, 6),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        groups: Sequence[int] = (7, 7, 7, 7),
        intervals: Sequence[int] = (8, 4, 2, 1),
        cooling: bool = False,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        widths = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(widths, (4, 8, 16, 32), drop_rate)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, (width, heads) in enumerate(zip(widths, num_heads, strict=True)):
            blocks = [
                MetaBlock(
                    width,
                    GroupAttention(width, heads, groups[i], intervals[i] if number % 2 else 1, attn_drop_rate, drop_rate),
                    Mlp(width, int(width * mlp_ratio), drop=drop_rate),
                    nn.LayerNorm,
                    drop_path=rate,
                )
                for number, rate in enumerate(rates[i])
            ]
            if i:
                embed = nn.Sequential(LayerNorm2d(in_chans, eps=1e-5), CrossScaleEmbedding(in_chans, width, (2, 4), 2))
            else:
                embed = nn.Sequential(CrossScaleEmbedding(in_chans, width, (4, 8, 16, 32), 4), LayerNorm2d(width, eps=1e-5))
            self.stages.append(Stage(embed, blocks, width, cooling))
            in_chans = width
        self.norm = LayerNorm2d(widths[-1], eps=1e-5)
        self.apply(init_weights)
        self.reset_classifier(num_classes)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: a stage begins, not ends, with merging."""
    merging = [(rf"^layers\.{i}\.downsample\.norm", f"stages.{i + 1}.embed.0") for i in range(3)]
    merging += [(rf"^layers\.{i}\.downsample\.reductions", f"stages.{i + 1}.embed.1.projs") for i in range(3)]
    return renamed(
        {k: v for k, v in state.items() if not k.endswith((".biases", ".relative_position_index", ".attn_mask"))},
        *merging,
        (r"^layers\.", "stages."),
        (r"^patch_embed\.projs", "stages.0.embed.0.projs"),
        (r"^patch_embed\.norm", "stages.0.embed.1"),
        (r"\.pos\.pos_proj\.", ".pos.0."),
        *((rf"\.pos\.pos{i}\.{j}\.", f".pos.{3 * i - 2 + j}.") for i in (1, 2, 3) for j in (0, 2)),
        (r"blocks\.(\d+)\.ex_conv", r"cooling.\1.conv"),
        (r"blocks\.(\d+)\.ex_ln", r"cooling.\1.norm"),
    )


S: dict[str, Any] = dict(embed_dim=64, num_heads=(2, 4, 8, 16))
B: dict[str, Any] = dict(embed_dim=96, num_heads=(3, 6, 12, 24))
L: dict[str, Any] = dict(embed_dim=128, num_heads=(4, 8, 16, 32))
PLUS: dict[str, Any] = dict(groups=(4, 4, 14, 7), intervals=(4, 2, 1, 1), cooling=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "crossformer_tiny": dict(**S, depths=(1, 1, 8, 6)),
    "crossformer_small": dict(**B, depths=(2, 2, 6, 2)),
    "crossformer_base": dict(**B, depths=(2, 2, 18, 2)),
    "crossformer_large": dict(**L, depths=(2, 2, 18, 2)),
    "crossformer_pp_small": dict(**S, **PLUS, depths=(2, 2, 18, 2)),
    "crossformer_pp_base": dict(**B, **PLUS, depths=(2, 2, 18, 2)),
    "crossformer_pp_large": dict(**L, **PLUS, depths=(2, 2, 18, 2)),
    "crossformer_pp_huge": dict(**L, **PLUS, depths=(6, 6, 18, 2)),
}
for _name, _arguments in VARIANTS.items():
    _first = tuple(f"stages.0.embed.0.projs.{i}" for i in range(4))
    publish(CrossFormer, _name, _arguments, variant=f"crossformer--{_name}", convert=convert, first_conv=_first)
