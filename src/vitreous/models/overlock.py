"""OverLoCK: overview first, look closely next. Lou and Yu, "OverLoCK: An Overview-first-Look-Closely-next ConvNet with
Context-Mixing Dynamic Kernels" (CVPR 2025).

Facts from the official repository, LMMMEng/OverLoCK. Its neighbourhoods are read by CUDA kernels of NATTEN; here they are
gathered, and adaptive pooling is a product of matrices, so that the models run everywhere. In training the official model gives
two logits; here `forward_auxiliary` does, and `forward` always gives the main ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, SqueezeExcite, calculate_drop_path_rates, trunc_normal_
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from ..mixers import ConditionalPosition, DilatedReparam, adaptive_avg_pool, conv_norm, neighbourhoods
from .classifier import Pyramid
from .official import publish, renamed

Carried = tuple[Tensor, Tensor, Tensor]  # of stage 3: its map, the context for stage 4, the Overview-Net's map


class Affine(nn.Module):
    """Every channel of `[B, C, H, W]` times a learned number, plus another; at first it changes nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def squeeze_excite(channels: int) -> nn.Module:
    return SqueezeExcite(channels, rd_channels=max(16, channels // 8), act_layer=nn.GELU)


def conv_mlp(channels: int, hidden: int) -> list[nn.Module]:
    """The layers of an MLP on maps with a depthwise convolution and a global response normalisation inside."""
    grn = GlobalResponseNorm(hidden, channels_last=False)
    return [nn.Conv2d(channels, hidden, 1), nn.GELU(), ConditionalPosition(hidden), grn, nn.Conv2d(hidden, channels, 1)]


class RepConvBlock(nn.Module):
    """The block of Base-Net and Overview-Net, `[B, C, H, W]`. scaled: the identity goes through an `Affine`."""

    def __init__(self, channels: int, kernel: int, mlp_ratio: int, scaled: bool, merged: bool, drop_path: float) -> None:
        super().__init__()
        self.dwconv = ConditionalPosition(channels)
        self.proj = nn.Sequential(
            LayerNorm2d(channels, eps=1e-6),
            DilatedReparam(channels, kernel, merged),
            nn.BatchNorm2d(channels),
            squeeze_excite(channels),
            *conv_mlp(channels, channels * mlp_ratio),
        )
        self.ls = Affine(channels) if scaled else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dwconv(x)
        return self.ls(x) + self.drop_path(self.proj(x))


class ContMix(nn.Module):
    """The context-mixing dynamic convolution.

    x: `[B, C, H, W]`, what is convolved. query, key: `[B, C, H, W]` and `[B, context, H, W]`. Every place compares its query with
    the means of the key in 7 × 7 regions; a linear layer turns the affinities into two softmaxed kernels, of 5 × 5 and of
    `kernel` × `kernel` places, for one half of the channels each. A map smaller than the kernel is enlarged for that.
    """

    small = 5

    def __init__(self, channels: int, context: int, kernel: int, num_heads: int) -> None:
        super().__init__()
        self.kernels, self.num_heads = (self.small, kernel), num_heads
        self.scale = (channels // num_heads) ** -0.5
        self.query = conv_norm(channels, channels // 2, 1)
        self.key = conv_norm(context, channels // 2, 1)
        self.weight = nn.Linear(49, sum(k * k for k in self.kernels))
        self.biases = nn.ParameterList(torch.zeros(num_heads, 2 * k - 1, 2 * k - 1) for k in self.kernels)

    def forward(self, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
        size = tuple(x.shape[2:])
        shorter, least = min(size), self.kernels[1]
        if shorter < least:
            larger = [least if side == shorter else int(least / shorter * side) for side in size]
            x, query, key = (F.interpolate(t, larger, mode="bilinear", align_corners=False) for t in (x, query, key))
        height, width = x.shape[2:]

        def heads(t: Tensor) -> Tensor:
            return t.unflatten(1, (self.num_heads, -1)).flatten(3).mT  # [B, heads, places, d]

        q, k = heads(self.query(query) * self.scale), heads(self.key(adaptive_avg_pool(key, (7, 7))))
        weights = self.weight(q @ k.mT).split([k * k for k in self.kernels], -1)
        mixed = []
        for values, weight, bias, kernel in zip(x.chunk(2, 1), weights, self.biases, self.kernels, strict=True):
            places, offsets = neighbourhoods(height, width, kernel, x.device)
            weight = (weight + bias.flatten(1)[:, offsets]).softmax(-1)
            mixed.append((weight.unsqueeze(-2) @ heads(values)[:, :, places]).squeeze(-2))
        out = torch.cat(mixed, 1).mT.flatten(1, 2).unflatten(2, (height, width))
        return adaptive_avg_pool(out, size) if shorter < least else out


class DynamicBlock(nn.Module):
    """The block of Focus-Net: features x `[B, C, H, W]` and context h `[B, context, H, W]` to new ones.

    first: h is the Overview-Net's context itself; in later blocks that context, `overview`, is added to h again.
    """

    def __init__(
        self,
        channels: int,
        context: int,
        kernel: int,
        num_heads: int,
        mlp_ratio: int,
        first: bool,
        merged: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        both = channels + context
        self.split = (channels, context)
        self.x_scale, self.h_scale = (None, None) if first else (Affine(context), Affine(context))
        self.dwconv1, self.norm1 = ConditionalPosition(both), LayerNorm2d(both, eps=1e-6)
        self.fusion = nn.Sequential(
            *conv_norm(both, both, 3, groups=both, bias=True),
            nn.GELU(),
            nn.Conv2d(both, channels, 1),
            GlobalResponseNorm(channels, channels_last=False),
        )
        self.mixer = ContMix(channels, context, kernel, num_heads)
        self.dyconv_proj = conv_norm(channels, channels, 1)
        self.lepe = nn.Sequential(DilatedReparam(channels, kernel, merged), nn.BatchNorm2d(channels))
        self.se_layer = squeeze_excite(channels)
        self.gate = nn.Sequential(*conv_norm(channels, channels, 1), nn.SiLU())
        self.proj = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, both, 1))
        self.ls1, self.ls2 = Affine(both), Affine(both)
        self.dwconv2, self.norm2 = ConditionalPosition(both), LayerNorm2d(both, eps=1e-6)
        self.mlp = nn.Sequential(*conv_mlp(both, channels * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, h: Tensor, overview: Tensor) -> tuple[Tensor, Tensor]:
        if self.x_scale is not None and self.h_scale is not None:
            h = self.x_scale(h) + self.h_scale(overview)
        both = self.dwconv1(torch.cat((x, h), 1))
        normed = self.norm1(both)
        x = self.fusion(normed)
        mixed = self.dyconv_proj(self.mixer(x, *normed.split(self.split, 1))) + self.lepe(x)
        both = self.ls1(both) + self.drop_path(self.proj(self.gate(x) * self.se_layer(mixed)))
        both = self.dwconv2(both)
        both = self.ls2(both) + self.drop_path(self.mlp(self.norm2(both)))
        x, h = both.split(self.split, 1)
        return x, h


class Stage3(nn.Module):
    """Base-Net's last stage, the Overview-Net on top of it, and Focus-Net's first stage, which sees both; see `Carried`."""

    def __init__(self, base: nn.Module, overview: nn.Module, context: nn.Module, focus: nn.ModuleList) -> None:
        super().__init__()
        self.base, self.overview, self.context, self.focus = base, overview, context, focus

    def forward(self, x: Tensor) -> Carried:
        x = self.base(x)
        seen = self.overview(x)
        context = self.context(seen)
        h = up = F.interpolate(context, tuple(x.shape[2:]), mode="bilinear", align_corners=False)
        for block in self.focus:
            x, h = block(x, h, up)
        return torch.cat((x, h), 1), context, seen


class Stage4(nn.Module):
    """Focus-Net's second stage: `Carried` to `[B, C + context, h, w]`."""

    def __init__(self, channels: int, width: int, context: int, focus: nn.ModuleList) -> None:
        super().__init__()
        self.split = (channels, context)
        self.x_proj, self.h_proj, self.focus = conv_norm(channels, width, 3, 2), conv_norm(context, context, 3, 2), focus

    def forward(self, carried: Carried) -> Tensor:
        both, context, _ = carried
        x, h = both.split(self.split, 1)
        x, h = self.x_proj(x), self.h_proj(h)
        for block in self.focus:
            x, h = block(x, h, context)
        return torch.cat((x, h), 1)


class OverLoCK(Pyramid):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`. The maps of stages 3 and 4 are Focus-Net's, features and context.

    depths, sub_depths: blocks of Base-Net and Overview-Net, and of Focus-Net. merged: with every `DilatedReparam` merged.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (56, 112, 256, 336),
        depths: Sequence[int] = (2, 2, 3, 2),
        sub_depths: Sequence[int] = (6, 2),
        sub_num_heads: Sequence[int] = (4, 6),
        kernels: Sequence[int] = (17, 15, 13, 7),
        mlp_ratio: int = 4,
        sub_mlp_ratio: int = 3,
        projection: int = 1024,
        merged: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        first, second, third, last = embed_dims
        context = last // 4
        super().__init__((first, second, third + context, last + context), (4, 8, 16, 32), drop_rate)
        self.num_features = self.head_hidden_size = projection
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, [*depths, *sub_depths], stagewise=True))
        half = first // 2
        self.stem = nn.Sequential(
            *conv_norm(in_chans, half, 3, 2),
            nn.GELU(),
            *conv_norm(half, half, 3),
            nn.GELU(),
            *conv_norm(half, first, 3, 2),
            nn.GELU(),
            *conv_norm(first, first, 3),
        )

        def plain(i: int) -> nn.Sequential:
            down = (conv_norm(embed_dims[i - 1], embed_dims[i], 3, 2),) if i else ()
            blocks = (RepConvBlock(embed_dims[i], kernels[i], mlp_ratio, i > 1, merged, rate) for rate in rates[i])
            return nn.Sequential(*down, *blocks)

        def focus(i: int) -> nn.ModuleList:
            return nn.ModuleList(
                DynamicBlock(
                    embed_dims[i + 2],
                    context,
                    kernels[i + 2],
                    2 * sub_num_heads[i],
                    sub_mlp_ratio,
                    first=i == j == 0,
                    merged=merged,
                    drop_path=rate,
                )
                for j, rate in enumerate(rates[i + 4])
            )

        self.stages.extend(
            (
                plain(0),
                plain(1),
                Stage3(plain(2), plain(3), nn.Conv2d(last, context, 1), focus(0)),
                Stage4(third, last, context, focus(1)),
            )
        )
        self.projection = nn.Sequential(*conv_norm(last + context, projection, 1), nn.SiLU())
        self.context_width = last
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.reset_classifier(num_classes)

    def pool(self, x: Tensor) -> Tensor:
        return super().pool(self.projection(x))

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        width = self.context_width
        head = nn.Sequential(nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
        self.aux_head = head.to(next(self.parameters())) if num_classes else nn.Identity()

    def forward_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits, and those of the Overview-Net's own head, which a loss in training adds to."""
        carried = self.stages[2](self.stages[1](self.stages[0](self.stem(x))))
        return self.forward_head(self.stages[3](carried)), self.aux_head(carried[2])


PARTS = {  # official: ours, and how many modules of ours come before the first block
    "blocks1": ("stages.0", 0),
    "blocks2": ("stages.1", 1),
    "blocks3": ("stages.2.base", 1),
    "blocks4": ("stages.2.overview", 1),
    "sub_blocks3": ("stages.2.focus", 0),
    "sub_blocks4": ("stages.3.focus", 0),
}


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours."""
    names = {}
    for key, tensor in state.items():
        part, *rest = key.split(".")
        if part in PARTS:
            ours, before = PARTS[part]
            key = ".".join((ours, str(int(rest[0]) + before), *rest[1:]))
        if key.endswith((".gamma", ".beta")) or ".ls" in key or "_scale." in key:
            tensor = tensor.flatten()
        elif ".weight_proj." in key or key in ("head.4.weight", "aux_head.2.weight"):
            tensor = tensor.flatten(1) if tensor.ndim > 1 else tensor
        names[key] = tensor
    return renamed(
        names,
        (r"^patch_embed1", "stem"),
        (r"^patch_embed2", "stages.1.0"),
        (r"^patch_embed3", "stages.2.base.0"),
        (r"^patch_embed4", "stages.2.overview.0"),
        (r"^patch_embedx", "stages.3"),
        (r"^high_level_proj", "stages.2.context"),
        (r"^head\.([01])\.", r"projection.\1."),
        (r"^head\.4\.", "head."),
        (r"^aux_head\.2\.", "aux_head.3."),
        (r"\.gamma$", ".weight"),
        (r"\.beta$", ".bias"),
        (r"(proj\.3|se_layer)\.proj\.1\.", r"\1.fc1."),
        (r"(proj\.3|se_layer)\.proj\.3\.", r"\1.fc2."),
        (r"(\.dwconv\d?|proj\.6|mlp\.2)\.(weight|bias)$", r"\1.proj.\2"),
        (r"\.lk_origin\.", ".branches.large.0."),
        (r"\.origin_bn\.", ".branches.large.1."),
        (r"\.dil_conv_(k\d_\d)\.", r".branches.\1.0."),
        (r"\.dil_bn_(k\d_\d)\.", r".branches.\1.1."),
        (r"\.weight_query\.", ".mixer.query."),
        (r"\.weight_key\.1\.", ".mixer.key.0."),
        (r"\.weight_key\.2\.", ".mixer.key.1."),
        (r"\.weight_proj\.", ".mixer.weight."),
        (r"\.rpb1$", ".mixer.biases.0"),
        (r"\.rpb2$", ".mixer.biases.1"),
    )


VARIANTS = {
    "overlock_xt": dict(),
    "overlock_t": dict(embed_dims=(64, 128, 256, 512), depths=(4, 4, 6, 2), sub_depths=(12, 2), sub_num_heads=(4, 8)),
    "overlock_s": dict(embed_dims=(64, 128, 320, 512), depths=(6, 6, 8, 3), sub_depths=(16, 3), sub_num_heads=(8, 16)),
    "overlock_b": dict(embed_dims=(80, 160, 384, 576), depths=(8, 8, 10, 4), sub_depths=(20, 4), sub_num_heads=(6, 9)),
}
for _name, _arguments in VARIANTS.items():
    for _ending, _merged in (("", {}), ("_reparam", {"merged": True})):
        publish(
            OverLoCK,
            _name + _ending,
            {**_arguments, **_merged},
            variant=f"overlock--{_name}{_ending}",
            convert=convert,
            first_conv="stem.0",
            crop_pct={"overlock_xt": 0.925, "overlock_b": 0.975}.get(_name, 0.95),
        )
