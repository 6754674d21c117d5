"""A2Mamba: local attention whose maps also aggregate the states of a scan. Lou, Fu and Yu, "A2Mamba: Attention-augmented State
Space Models for Visual Recognition" (2025).

Facts from the official repository, LMMMEng/A2Mamba, whose attention runs in kernels of NATTEN and whose scan is one of CUDA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import ConditionalPosition, linear_recurrence, neighbourhoods
from ..mixers.positions import bicubic
from .classifier import Pyramid
from .official import publish, renamed

norm = partial(LayerNorm2d, eps=1e-6)
Aggregate = Callable[[Tensor], Tensor]


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary positions on a map `[B, heads, H, W, d]`: the first half of a head turns with the row, the second with the
    column."""
    rows = torch.arange(x.shape[2], device=x.device, dtype=angle.dtype)[:, None] * angle
    columns = torch.arange(x.shape[3], device=x.device, dtype=angle.dtype)[:, None] * angle
    angles = torch.cat((rows[:, None].expand(-1, x.shape[3], -1), columns[None].expand(x.shape[2], -1, -1)), -1)
    across = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * angles.cos().to(x.dtype) + across * angles.sin().to(x.dtype)


class NeighbourAttention(nn.Module):
    """Softmax attention of every place to the `kernel` × `kernel` around it, `dilation` apart, which hands on its map.

    q, k, v `[B, heads, N, d]` of a grid `size`; bias `[heads, (2 · kernel − 1)²]`. Returns the values `[B, heads, N, d]`, and
    what aggregates any other values of as many heads by the same map.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kernel: int, size: Sequence[int], dilation: int | Sequence[int]
    ) -> tuple[Tensor, Aggregate]:
        places, offsets = neighbourhoods(size[0], size[1], kernel, q.device, dilation)
        scores = (q.unsqueeze(-2) @ k[:, :, places].mT).squeeze(-2) + bias[:, offsets]
        weights = scores.softmax(-1).unsqueeze(-2)

        def aggregate(values: Tensor) -> Tensor:
            return (weights.to(values.dtype) @ values[:, :, places]).squeeze(-2)

        return aggregate(v), aggregate


class A2SSM(nn.Module):
    """A scan in raster order whose states are aggregated by attention before they are read; maps `[B, C, H, W]`.

    y_t = C_t · fuse(attention(h))_t + D x_t, h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t, with one state a channel.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.rank, self.num_heads = math.ceil(channels / 16), num_heads
        self.conv2d = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.x_proj_weight = nn.Parameter(torch.empty(self.rank + 2, channels))
        self.dt_projs_weight = nn.Parameter(torch.empty(channels, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(channels))
        self.A_logs, self.Ds = nn.Parameter(torch.zeros(channels, 1)), nn.Parameter(torch.ones(channels))
        self.state_fusion = nn.Conv2d(num_heads, num_heads, 1)
        nn.init.kaiming_uniform_(self.x_proj_weight, a=math.sqrt(5))
        nn.init.uniform_(self.dt_projs_weight, -(self.rank**-0.5), self.rank**-0.5)
        delta = torch.empty(channels).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.dt_projs_bias.data.copy_(delta + (-torch.expm1(-delta)).log())

    def forward(self, x: Tensor, aggregates: Sequence[Aggregate]) -> Tensor:
        size = x.shape[2:]
        x = F.silu(self.conv2d(x)).flatten(2).mT  # [B, N, C]
        delta, b, c = F.linear(x, self.x_proj_weight).split((self.rank, 1, 1), -1)
        precise = torch.promote_types(x.dtype, torch.float32)  # as published: the states leave mixed precision
        delta = F.softplus(F.linear(delta, self.dt_projs_weight, self.dt_projs_bias).to(precise))
        decay = (delta * -self.A_logs[:, 0].to(precise).exp()).exp()
        h = linear_recurrence(decay.unsqueeze(-2), (delta * b.to(precise) * x.to(precise)).unsqueeze(-2)).squeeze(-2)
        halves = h.unflatten(2, (2, self.num_heads // 2, -1)).permute(2, 0, 3, 1, 4)  # [2, B, heads / 2, N, d]
        state = torch.cat([aggregate(half) for aggregate, half in zip(aggregates, halves, strict=True)], 1)
        mixed = torch.einsum("gh,bhnd->bngd", self.state_fusion.weight.flatten(1), state.to(x.dtype))
        state = (mixed + cast(Tensor, self.state_fusion.bias)[:, None]).flatten(2)
        return (state * c + x * self.Ds).mT.unflatten(2, size)


class WholeAttention(nn.Module):
    """Softmax attention of all places, with a bias for every pair of `places` of a grid; q, k, v `[B, heads, N, d]`.

    Of another number of places the bias is resampled bicubically, as published.
    """

    def __init__(self, num_heads: int, places: int) -> None:
        super().__init__()
        self.rpb = nn.Parameter(torch.zeros(1, num_heads, places, places))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias, n, places = self.rpb, q.shape[2], self.rpb.shape[2]
        if n != places:
            to = bicubic(n, places, places / n).to(bias)
            bias = to @ bias @ to.mT
        return (q @ k.mT + bias).softmax(-1) @ v


class MASS(nn.Module):
    """Multi-scale attention-augmented SSM; maps `[B, C, H, W]`, of which neither side is below `window`.

    Half of the heads attend to neighbourhoods, the others to spread out ones, of what the first gave and their own. Both maps
    aggregate the states of a scan too. whole: in place of the scan attention to the whole map, with a bias for every pair of
    places of a grid of `whole` (resampled for others).
    """

    def __init__(self, channels: int, num_heads: int, window: int, whole: tuple[int, int] | None) -> None:
        super().__init__()
        self.num_heads, self.window, self.scale = num_heads, window, (channels // num_heads) ** -0.5
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.gate = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))
        self.lepe = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm, self.proj = norm(channels), nn.Sequential(norm(channels), nn.Conv2d(channels, channels, 1))
        self.near, self.far = NeighbourAttention(), NeighbourAttention()
        # One table for both halves, as in the released code, where it is two names of one parameter.
        self.rpb = nn.Parameter(torch.zeros(num_heads // 2, 2 * window - 1, 2 * window - 1))
        self.ssm = None if whole else A2SSM(channels, num_heads)
        self.whole = WholeAttention(num_heads, math.prod(whole)) if whole else None

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        size, w = (x.shape[2], x.shape[3]), self.window
        if min(size) < w:
            raise VitreousError(
                f"A2Mamba has windows of {w} × {w}, and a map of {size[0]} × {size[1]}: give it larger images, or other windows="
            )
        gate, qkv = F.silu(self.gate(x)), self.qkv(x)
        lepe = self.lepe(qkv[:, -x.shape[1] :])
        q, k, v = qkv.unflatten(1, (3, self.num_heads, -1)).permute(1, 0, 2, 4, 5, 3)  # [B, heads, H, W, d] each
        q, k, v = (turned(q, angle) * self.scale).flatten(2, 3), turned(k, angle).flatten(2, 3), v.flatten(2, 3)
        (q1, q2), (k1, k2), (v1, v2), bias = q.chunk(2, 1), k.chunk(2, 1), v.chunk(2, 1), self.rpb.flatten(1)
        dilation = (min(size[0] // w, w), min(size[1] // w, w))
        v1, near = self.near(q1, k1, v1, bias, w, size, 1)
        v2, far = self.far(q2, k2, v1 + v2, bias, w, size, dilation)
        found = torch.cat((v1, v2), 1)
        if self.whole is not None:
            y = self.whole(q, k, found).transpose(1, 2).flatten(2).mT.unflatten(2, size)
        else:
            y = cast(A2SSM, self.ssm)(found.transpose(1, 2).flatten(2).mT.unflatten(2, size), (near, far))
        return self.proj((self.norm(y) + lepe) * gate)


class ConvScale(nn.Module):
    """Each channel of a map times a learned number plus another."""

    def __init__(self, channels: int, initial: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((channels, 1, 1, 1), initial)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[:, 0] + self.bias[:, None, None]


class FeedForward(nn.Module):
    """1 × 1 convolutions, h + dw3(h) between them behind the GELU; maps `[B, C, H, W]`."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        self.dwconv = ConditionalPosition(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.dwconv(F.gelu(self.fc1(x))))


class A2Block(nn.Module):
    """Positions, MASS, positions, feed forward; maps `[B, C, H, W]`.

    scale: what learned scales start at, None for none. on_skip: they are on the way past, not on the branch.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window: int,
        whole: tuple[int, int] | None,
        hidden: int,
        scale: float | None,
        on_skip: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.cpe1, self.cpe2 = ConditionalPosition(channels), ConditionalPosition(channels)
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.attn, self.mlp = MASS(channels, num_heads, window, whole), FeedForward(channels, hidden)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        scales = [nn.Identity() if scale is None else ConvScale(channels, scale) for _ in range(2)]
        self.layer_scale1, self.layer_scale2 = scales
        self.on_skip = on_skip

    def joined(self, x: Tensor, y: Tensor, scale: nn.Module) -> Tensor:
        return scale(x) + self.drop_path(y) if self.on_skip else x + self.drop_path(scale(y))

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = self.joined(x, self.attn(self.norm1(x), angle), self.layer_scale1)
        x = self.cpe2(x)
        return self.joined(x, self.mlp(self.norm2(x)), self.layer_scale2)


class Stage(nn.Module):
    """What halves the map, where something does, and blocks that share their angles; `[B, C, H, W]`."""

    angle: Tensor

    def __init__(self, downsample: nn.Module, head_dim: int, blocks: list[A2Block]) -> None:
        super().__init__()
        self.downsample, self.blocks = downsample, nn.ModuleList(blocks)
        self.register_buffer("angle", (10000 ** -torch.linspace(0, 1, head_dim // 4)).repeat_interleave(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            x = block(x, self.angle)
        return x


class A2Mamba(Pyramid):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`.

    img_size: whose last map has a bias for every pair of places; images of other sizes resample it. windows: of each stage, of
    which the maps are at least. scales: what learned scales start at, in each stage; on_skip: as in `A2Block`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int = 224,
        embed_dims: Sequence[int] = (32, 64, 128, 192),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (2, 2, 4, 8),
        windows: Sequence[int] = (11, 9, 7, 7),
        mlp_ratios: Sequence[float] = (4, 4, 3, 3),
        scales: Sequence[float | None] = (None,) * 4,
        on_skip: bool = False,
        feature_dim: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16, 32), drop_rate)
        self.num_features = self.head_hidden_size = feature_dim
        half, first = embed_dims[0] // 2, embed_dims[0]
        layers: list[nn.Module] = []
        convs = ((in_chans, half, 2), (half, half, 1), (half, first, 2), (first, first, 1))
        for i, (inputs, outputs, stride) in enumerate(convs):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]
            layers += [nn.GELU()] if i < 3 else []
        self.stem = nn.Sequential(*layers)
        done, total = 0, sum(depths)
        for i, (width, depth, heads) in enumerate(zip(embed_dims, depths, num_heads, strict=True)):
            blocks = [
                A2Block(
                    width,
                    heads,
                    windows[i],
                    (img_size // 32, img_size // 32) if i == 3 else None,
                    int(mlp_ratios[i] * width),
                    scales[i],
                    on_skip and scales[i] is not None,
                    drop_path_rate * (done + j) / max(total - 1, 1),
                )
                for j in range(depth)
            ]
            narrow = nn.Conv2d(embed_dims[i - 1], width, 3, 2, 1, bias=False) if i else nn.Identity()
            downsample = nn.Sequential(narrow, nn.BatchNorm2d(width)) if i else narrow
            self.stages.append(Stage(downsample, width // heads, blocks))
            done += depth
        self.features = nn.Sequential(nn.Conv2d(embed_dims[-1], feature_dim, 1), nn.BatchNorm2d(feature_dim), nn.SiLU())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.reset_classifier(num_classes)

    def pool(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours. Of the two names of one bias table the second is read."""
    state = {k: v for k, v in state.items() if not k.endswith(".rpb.0")}
    even = (rf"^layers\.{2 * i}\." for i in range(4))
    odd = (rf"^layers\.{2 * i + 1}\." for i in range(3))
    named = renamed(
        state,
        (r"^patch_embed\.", "stem."),
        *((pattern, f"stages.{i}.") for i, pattern in enumerate(even)),
        *((pattern, f"stages.{i + 1}.downsample.") for i, pattern in enumerate(odd)),
        (r"\.rope\.angle$", ".angle"),
        (r"\.token_mixer\.", ".attn."),
        (r"\.rpb\.1$", ".rpb"),
        (r"\.rpb\.2$", ".whole.rpb"),
        (r"\.(cpe\d|dwconv)\.", r".\1.proj."),
        (r"^classifier\.(?=[01]\.)", "features."),
        (r"^classifier\.4\.", "head."),
    )
    if "head.weight" in named:
        named["head.weight"] = named["head.weight"].flatten(1)
    return named


MASSIVE = dict(scales=(1.0, 1.0, 1e-6, 1e-6))
for _name, _arguments, _crop in (
    ("nano", dict(), 0.9),
    ("tiny", dict(embed_dims=(48, 96, 256, 448), depths=(2, 2, 10, 2), num_heads=(2, 4, 8, 16), drop_path_rate=0.1), 0.9),
    (
        "small",
        dict(
            embed_dims=(64, 128, 320, 512),
            depths=(2, 4, 12, 4),
            num_heads=(2, 4, 10, 16),
            scales=(None, None, 1.0, 1.0),
            on_skip=True,
            drop_path_rate=0.2,
        ),
        0.9,
    ),
    (
        "base",
        dict(
            MASSIVE,
            embed_dims=(96, 192, 384, 512),
            depths=(4, 6, 12, 6),
            num_heads=(4, 8, 12, 16),
            mlp_ratios=(4, 4, 3.75, 3.75),
            drop_path_rate=0.4,
        ),
        0.95,
    ),
    (
        "large",
        dict(
            MASSIVE,
            embed_dims=(96, 192, 448, 672),
            depths=(4, 6, 18, 6),
            num_heads=(4, 8, 16, 24),
            mlp_ratios=(4, 4, 4, 4),
            drop_path_rate=0.5,
        ),
        0.975,
    ),
):
    publish(
        A2Mamba, f"a2mamba_{_name}", _arguments, variant=f"a2mamba--{_name}", convert=convert, first_conv="stem.0", crop_pct=_crop
    )
