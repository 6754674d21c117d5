"""VAN: attention by a large kernel, decomposed. Guo et al., "Visual Attention Network" (Computational Visual Media 2023).

Facts from the official repository, Visual-Attention-Network/VAN-Classification.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from timm.layers import LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from ..mixers import DepthwiseMlp, MetaBlock, conv_norm
from .classifier import Pyramid, init_weights
from .official import publish, renamed, staged


class LargeKernelAttention(nn.Module):
    """LKA (equations 1 and 2): x · A(x) on maps `[B, C, H, W]`, A a 21 × 21 kernel made of three that are cheap."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.local = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.dilated = nn.Conv2d(channels, channels, 7, padding=9, dilation=3, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.pointwise(self.dilated(self.local(x)))


class LargeKernelMixer(nn.Module):
    """LKA between two 1 × 1 convolutions, and what it read added again; `[B, C, H, W]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj1, self.act = nn.Conv2d(channels, channels, 1), nn.GELU()
        self.lka = LargeKernelAttention(channels)
        self.proj2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj2(self.lka(self.act(self.proj1(x))))


class VAN(Pyramid):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        mlp_ratios: Sequence[int] = (8, 8, 4, 4),
        depths: Sequence[int] = (3, 4, 6, 3),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16, 32), drop_rate)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, width in enumerate(embed_dims):
            embed = conv_norm(in_chans, width, 3 if i else 7, 2 if i else 4, bias=True)
            hidden = width * mlp_ratios[i]
            blocks = (
                MetaBlock(width, LargeKernelMixer(width), DepthwiseMlp(width, hidden, drop=drop_rate), nn.BatchNorm2d, 1e-2, rate)
                for rate in rates[i]
            )
            self.stages.append(nn.Sequential(embed, *blocks, LayerNorm2d(width, eps=1e-6)))
            in_chans = width
        self.apply(init_weights)
        self.reset_classifier(num_classes)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours."""
    return renamed(
        staged(state),
        (r"^(stages\.\d\.0)\.proj\.", r"\1.0."),
        (r"^(stages\.\d\.0)\.norm\.", r"\1.1."),
        (r"layer_scale_(\d)$", r"ls\1.gamma"),
        (r"attn\.proj_(\d)", r"attn.proj\1"),
        (r"spatial_gating_unit\.conv0", "lka.local"),
        (r"spatial_gating_unit\.conv_spatial", "lka.dilated"),
        (r"spatial_gating_unit\.conv1", "lka.pointwise"),
        (r"dwconv\.dwconv", "dwconv"),
    )


NARROW, MIDDLE, WIDE = (32, 64, 160, 256), (64, 128, 320, 512), (96, 192, 480, 768)
VARIANTS = {
    "van_b0": dict(embed_dims=NARROW, depths=(3, 3, 5, 2)),
    "van_b1": dict(embed_dims=MIDDLE, depths=(2, 2, 4, 2)),
    "van_b2": dict(embed_dims=MIDDLE, depths=(3, 3, 12, 3)),
    "van_b3": dict(embed_dims=MIDDLE, depths=(3, 5, 27, 3)),
    "van_b4": dict(embed_dims=MIDDLE, depths=(3, 6, 40, 3)),
    "van_b5": dict(embed_dims=WIDE, depths=(3, 3, 24, 3)),
    "van_b6": dict(embed_dims=(96, 192, 384, 768), depths=(6, 6, 90, 6)),
}
for _name, _arguments in VARIANTS.items():
    publish(VAN, _name, _arguments, variant=f"van--{_name}", convert=convert, first_conv="stages.0.0.0")
