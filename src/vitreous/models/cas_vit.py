"""CAS-ViT: attention that adds. Zhang et al., "CAS-ViT: Convolutional Additive Self-attention Vision Transformers" (2024).

Facts from the official repository, Tianfang-Zhang/CAS-ViT. Its table counts a second head for distillation, which its training
script does not build; `distillation=True` does. In training such a model gives the mean of its heads, not the pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from timm.layers import ConvMlp, calculate_drop_path_rates
from torch import Tensor, nn

from ..mixers import DistilledHead, MetaBlock, conv_norm
from .classifier import Pyramid
from .official import publish, renamed


class SpatialGate(nn.Module):
    """Every place of `[B, C, H, W]` weighed by a number from 0 to 1 that its neighbours decide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            *conv_norm(channels, channels, 3, groups=channels, bias=True),
            nn.ReLU(),
            nn.Conv2d(channels, 1, 1, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class ChannelGate(nn.Module):
    """Every channel of `[B, C, H, W]` weighed by a number from 0 to 1 that the means of all channels decide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1, bias=False), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class AdditiveTokenMixer(nn.Module):
    """CATM, the convolutional additive token mixer: Γ(Φ(q) + Φ(k)) · v, on `[B, C, H, W]`.

    The context Φ of queries and of keys is a spatial gate, then a channel gate; Γ and the output projection are depthwise.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.context_q = nn.Sequential(SpatialGate(channels), ChannelGate(channels))
        self.context_k = nn.Sequential(SpatialGate(channels), ChannelGate(channels))
        self.dwc = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.proj = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, 1)
        return self.proj(self.dwc(self.context_q(q) + self.context_k(k)) * v)


class AdditiveBlock(MetaBlock):
    """x + local(x), the local part a bottleneck-free depthwise convolution; then mixer and MLP; `[B, C, H, W]`."""

    def __init__(self, channels: int, mlp_ratio: float, drop: float, drop_path: float) -> None:
        mlp = ConvMlp(channels, int(channels * mlp_ratio), act_layer=nn.GELU, drop=drop)
        super().__init__(channels, AdditiveTokenMixer(channels), mlp, nn.BatchNorm2d, drop_path=drop_path)
        self.local = nn.Sequential(
            *conv_norm(channels, channels, 1, bias=True),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.local(x))


class RCViT(Pyramid):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`. distillation: two heads, whose mean is given."""

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (48, 56, 112, 220),
        depths: Sequence[int] = (2, 2, 4, 2),
        mlp_ratio: float = 4.0,
        distillation: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16, 32), drop_rate)
        self.distillation = distillation
        first = embed_dims[0]
        self.stem = nn.Sequential(
            conv_norm(in_chans, first // 2, 3, 2, bias=True), nn.ReLU(), conv_norm(first // 2, first, 3, 2, bias=True), nn.ReLU()
        )
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, width in enumerate(embed_dims):
            embed = (conv_norm(embed_dims[i - 1], width, 3, 2, bias=True),) if i else ()
            blocks = (AdditiveBlock(width, mlp_ratio, drop_rate, rate) for rate in rates[i])
            self.stages.append(nn.Sequential(*embed, *blocks))
        self.norm = nn.BatchNorm2d(embed_dims[-1])
        self.reset_classifier(num_classes)

    def make_head(self, num_classes: int) -> nn.Module:
        head = super().make_head(num_classes)
        return DistilledHead(head, super().make_head(num_classes)) if self.distillation else head


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: its list has stages at even and embeddings at odd places."""
    if any(k.startswith("dist_head.") for k in state):
        state = renamed(state, (r"^dist_head\.", "head.head_dist."), (r"^head\.(weight|bias)$", r"head.head.\1"))
    names = {}
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[0] == "network":
            at = int(parts[1])
            if at % 2:
                inside = ["0", {"proj": "0", "norm": "1"}[parts[2]]]
            else:
                inside = [str(int(parts[2]) + (at > 0))]
            key = ".".join(["stages", str((at + 1) // 2), *inside, *parts[3:]])
        names[key] = tensor
    return renamed(
        names,
        (r"^patch_embed\.([01])\.", r"stem.0.\1."),
        (r"^patch_embed\.3\.", "stem.2.0."),
        (r"^patch_embed\.4\.", "stem.2.1."),
        (r"local_perception\.network", "local"),
        (r"oper_([qk])\.(\d)\.block", r"context_\1.\2.gate"),
    )


VARIANTS = {
    "rcvit_xs": dict(embed_dims=(48, 56, 112, 220), depths=(2, 2, 4, 2)),
    "rcvit_s": dict(embed_dims=(48, 64, 128, 256), depths=(3, 3, 6, 3)),
    "rcvit_m": dict(embed_dims=(64, 96, 192, 384), depths=(3, 3, 6, 3)),
    "rcvit_t": dict(embed_dims=(96, 128, 256, 512), depths=(3, 3, 6, 3)),
}
for _name, _arguments in VARIANTS.items():
    publish(RCViT, _name, _arguments, variant=f"cas-vit--{_name}", convert=convert, first_conv="stem.0.0")
