"""HorNet: interactions of high order without attention. Rao et al., "HorNet: Efficient High-Order Spatial Interactions with
Recursive Gated Convolutions" (NeurIPS 2022).

Facts from the official repository, raoyongming/HorNet. The Fourier transform of the GF models is a product of matrices here,
equal to the fast one up to rounding, so that the models run everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import ConvMlp, LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from ..mixers import MetaBlock, irfft2, rfft2
from .classifier import Pyramid, init_weights
from .official import publish, renamed

norm = partial(LayerNorm2d, eps=1e-6)


class GlobalLocalFilter(nn.Module):
    """GF: half of the channels through a depthwise 3 × 3 convolution, half through a learned filter of their spectrum, in turn.

    Maps `[B, C, H, W]`. The filter is kept for maps of `side` × `side`, and interpolated for others. From Rao et al., "Global
    Filter Networks for Image Classification" (NeurIPS 2021).
    """

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        half = channels // 2
        self.pre_norm, self.post_norm = LayerNorm2d(channels, eps=1e-6), LayerNorm2d(channels, eps=1e-6)
        self.dw = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.complex_weight = nn.Parameter(0.02 * torch.randn(half, side, side // 2 + 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        near, far = self.pre_norm(x).chunk(2, 1)
        real, imaginary = rfft2(far.float())
        filters = self.complex_weight.float().permute(3, 0, 1, 2)
        if filters.shape[2:] != real.shape[2:]:
            filters = F.interpolate(filters, tuple(real.shape[2:]), mode="bilinear", align_corners=True)
        a, b = filters
        far = irfft2(real * a - imaginary * b, real * b + imaginary * a, x.shape[3]).to(x.dtype)
        return self.post_norm(torch.stack((self.dw(near), far), 2).flatten(1, 2))


class GnConv(nn.Module):
    """gⁿConv, the recursive gated convolution on maps `[B, C, H, W]`.

    `order` groups of channels, each twice as wide as the one before, all see their neighbourhood at once; then one after the
    other multiplies what came before. filter_side: None for a depthwise 7 × 7 convolution, else a `GlobalLocalFilter`'s side.
    """

    def __init__(self, channels: int, order: int, filter_side: int | None = None) -> None:
        super().__init__()
        self.dims = [channels >> i for i in reversed(range(order))]
        total = sum(self.dims)
        self.proj_in = nn.Conv2d(channels, 2 * channels, 1)
        self.dwconv = (
            GlobalLocalFilter(total, filter_side) if filter_side else nn.Conv2d(total, total, 7, padding=3, groups=total)
        )
        self.pws = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(self.dims, self.dims[1:], strict=False))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, gates = self.proj_in(x).split((self.dims[0], sum(self.dims)), 1)
        first, *gates = (self.dwconv(gates) / 3).split(self.dims, 1)  # 1/α of the paper, against growth with the order
        x = x * first
        for pw, gate in zip(self.pws, gates, strict=True):
            x = pw(x) * gate
        return self.proj_out(x)


class HorNet(Pyramid):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`.

    global_filter: a global filter in place of the 7 × 7 convolution in the last two stages. img_size: what the filters are
    stored for.
    """

    def __init__(
        self,
        img_size: int = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        base_dim: int = 64,
        depths: Sequence[int] = (2, 3, 18, 2),
        global_filter: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        widths = [base_dim << i for i in range(4)]
        super().__init__(widths, (4, 8, 16, 32), drop_rate)
        self.stem = nn.Sequential(nn.Conv2d(in_chans, base_dim, 4, 4), LayerNorm2d(base_dim, eps=1e-6))
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, width in enumerate(widths):
            down = (LayerNorm2d(width // 2, eps=1e-6), nn.Conv2d(width // 2, width, 2, 2)) if i else ()
            side = img_size >> (i + 2) if global_filter and i > 1 else None
            blocks = (
                MetaBlock(width, GnConv(width, i + 2, side), ConvMlp(width, 4 * width, act_layer=nn.GELU), norm, 1e-6, rate)
                for rate in rates[i]
            )
            self.stages.append(nn.Sequential(*down, *blocks))
        self.head_norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def pool(self, x: Tensor) -> Tensor:
        return self.head_norm(super().pool(x))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: a stage begins with its downsampling; the MLP's linears are 1 × 1 convolutions."""
    names = {}
    for key, tensor in state.items():
        part, *rest = key.split(".")
        if part == "stages" and rest[0] != "0":
            key = ".".join((part, rest[0], str(int(rest[1]) + 2), *rest[2:]))
        if "pwconv" in key and key.endswith("weight"):
            tensor = tensor[:, :, None, None]
        names[key] = tensor
    return renamed(
        names,
        (r"^downsample_layers\.0", "stem"),
        (r"^downsample_layers", "stages"),
        (r"^norm\.", "head_norm."),
        (r"\.gnconv\.", ".attn."),
        (r"\.pwconv", ".mlp.fc"),
        (r"\.gamma(\d)", r".ls\1.gamma"),
    )


for _size, _width in (("tiny", 64), ("small", 96), ("base", 128), ("large", 192)):
    for _kind, _arguments in (
        ("7x7", {}),
        ("gf", {"global_filter": True}),
        ("gf_img384", {"global_filter": True, "img_size": 384}),
    ):
        if _kind == "gf_img384" and _size in ("tiny", "small"):
            continue
        publish(
            HorNet,
            f"hornet_{_size}_{_kind}",
            {"base_dim": _width, **_arguments},
            variant=f"hornet--hornet_{_size}_{_kind}",
            convert=convert,
            first_conv="stem.0",
            size=_arguments.get("img_size", 224),
        )
