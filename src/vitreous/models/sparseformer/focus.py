"""The focusing transformer of SparseFormer: tokens with a box (a RoI) each, that look into it and move it; see `sparseformer`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention, DropPath, Mlp
from torch import Tensor, nn

Op = Literal["attend", "adjust", "sample", "place", "mlp"]


@dataclass(frozen=True)
class Style:
    """What the two papers do differently."""

    first: tuple[Op, ...]  # operators of the repeated focusing layer
    second: tuple[Op, ...]  # of the one behind it, at full width
    heads: int | None  # of every attention; None for one head a 64 channels
    eps: float  # of LayerNorm
    generator: int | None  # hidden width of the mixing weights' generator; None for a quarter of the token's
    mixing_bias: bool  # a bias in both mixings, and a GELU between them
    deep_adjust: bool  # two layers, not one, predict how a box moves
    stage_embedding: bool  # tells the repetitions of the first layer apart
    transition_norm: bool  # LayerNorm where the width grows
    padding: str  # what is sampled outside the image, in the words of `grid_sample`
    class_token: bool  # joins before the cortex and is the output; else one start for each token, and their mean
    quick_gelu: bool = False  # CLIP's, in the cortex


V1 = Style(
    first=("attend", "adjust", "sample", "mlp"),
    second=("attend", "adjust", "sample", "mlp"),
    heads=64,
    eps=1e-6,
    generator=None,
    mixing_bias=True,
    deep_adjust=False,
    stage_embedding=False,
    transition_norm=True,
    padding="zeros",
    class_token=False,
)
BTSP = Style(
    first=("sample", "place", "attend", "mlp", "adjust"),
    second=("sample", "place"),
    heads=None,
    eps=1e-5,
    generator=128,
    mixing_bias=False,
    deep_adjust=True,
    stage_embedding=True,
    transition_norm=False,
    padding="border",
    class_token=True,
)


def heads_of(style: Style, dim: int) -> int:
    return style.heads or max(1, dim // 64)


def small_norm(norm: nn.Module) -> None:
    """LayerNorm to vectors of length one, as the layers that steer boxes and mixing start."""
    weight = cast(nn.LayerNorm, norm).weight
    nn.init.constant_(weight, len(weight) ** -0.5)


def full(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def move(roi: Tensor, by: Tensor) -> Tensor:
    """Boxes [B, N, 4] as (x1, y1, x2, y2), moved by `by` [B, N, 4]: their centre by a share of their size, and their size by
    a factor exp(·) (equations 1 and 2 of the first paper)."""
    centre, size = (roi[..., 2:] + roi[..., :2]) / 2, (roi[..., 2:] - roi[..., :2]).abs()
    centre, half = centre + by[..., :2] * size, size * by[..., 2:].exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def look(features: Tensor, roi: Tensor, offsets: Tensor, padding: str) -> Tensor:
    """Features [B, C, h, w] bilinearly sampled in each token's box `roi` [B, N, 4], at `offsets` [B, N, P, 2]: [B, N, P, C].

    Offsets are standardised over a token's P points, so that three standard deviations make the box. Coordinates stay in
    float32: bfloat16 tells only 256 places in an image apart.
    """
    offsets, roi = full(offsets), full(roi)
    offsets = (offsets - offsets.mean(-2, keepdim=True)) / (3 * (offsets.std(-2, keepdim=True) + 1e-5))
    centre, size = (roi[..., 2:] + roi[..., :2]) / 2, roi[..., 2:] - roi[..., :2]
    points = centre[:, :, None] + offsets * size[:, :, None]
    sampled = F.grid_sample(full(features), points * 2 - 1, padding_mode=padding, align_corners=False)
    return sampled.permute(0, 2, 3, 1).to(features.dtype)


def place(roi: Tensor, dim: int) -> Tensor:
    """Sines and cosines of the boxes [B, N, 4] at dim / 4 frequencies between 1 and 128: [B, N, dim], without gradient."""
    angle = full(roi.detach())[..., None] * math.pi
    frequencies = torch.linspace(0, math.log(128), dim // 4, dtype=angle.dtype, device=roi.device).exp()
    angles = angle * frequencies
    return torch.cat([angles[..., 0::2].sin(), angles[..., 1::2].cos()], dim=-1).flatten(2)


class AdaptiveMixing(nn.Module):
    """Mix sampled features over channels, then over points, with matrices that the token generates."""

    def __init__(self, dim: int, conv_dim: int, points: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.conv_dim, self.points, self.out_points = conv_dim, points, max(points, 32)
        self.parameter_generator = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Linear(hidden, conv_dim**2 + points * self.out_points)
        )
        self.m_beta = nn.Parameter(torch.zeros(conv_dim)) if bias else None
        self.s_beta = nn.Parameter(torch.zeros(self.out_points)) if bias else None
        self.out_proj = nn.Linear(conv_dim * self.out_points, dim)

    def forward(self, sampled: Tensor, tokens: Tensor) -> Tensor:
        """Sampled features [B, N, P, C] and tokens [B, N, D] to [B, N, D]."""
        batch, count = tokens.shape[:2]
        channel, spatial = self.parameter_generator(tokens).split([self.conv_dim**2, self.points * self.out_points], dim=-1)
        out = sampled @ channel.reshape(batch, count, self.conv_dim, self.conv_dim)
        if self.m_beta is not None:
            out = F.gelu(out + self.m_beta)
        out = spatial.reshape(batch, count, self.out_points, self.points) @ out
        if self.s_beta is not None:
            out = out + self.s_beta[:, None]
        return self.out_proj(F.gelu(out).flatten(2))

    def init_weights(self) -> None:
        small_norm(self.parameter_generator[0])
        last = cast(nn.Linear, self.parameter_generator[2])
        nn.init.zeros_(last.weight)
        nn.init.xavier_uniform_(last.bias[: self.conv_dim**2].view(self.conv_dim, self.conv_dim))
        nn.init.xavier_uniform_(last.bias[self.conv_dim**2 :].view(self.points, self.out_points))


class Focus(nn.Module):
    """A layer of the focusing transformer: the operators `ops` in order, `len(drop_path)` times with the same weights."""

    def __init__(self, style: Style, ops: tuple[Op, ...], dim: int, conv_dim: int, points: int, drop_path: list[float]) -> None:
        super().__init__()
        self.ops, self.dim, self.points, self.padding = ops, dim, points, style.padding
        norm = partial(nn.LayerNorm, eps=style.eps)
        self.stage_embedding = nn.Embedding(len(drop_path), dim) if style.stage_embedding and len(drop_path) > 1 else None
        if "sample" in ops:
            hidden = style.generator or dim // 4
            self.adaptive_mixing = AdaptiveMixing(dim, conv_dim, points, hidden, style.mixing_bias)
            self.roi_offset_module = nn.Sequential(norm(dim), nn.Linear(dim, points * 2, bias=False))
            self.roi_offset_bias = nn.Parameter(torch.empty(points * 2))
        if "attend" in ops:
            self.norm1, self.attn = norm(dim), Attention(dim, heads_of(style, dim), qkv_bias=True)
        if "mlp" in ops:
            self.norm2, self.mlp = norm(dim), Mlp(dim, dim * 4)
        if "adjust" in ops:
            hidden = [nn.Linear(dim, dim), nn.GELU()] if style.deep_adjust else []
            self.roi_adjust_module = nn.Sequential(norm(dim), *hidden, nn.Linear(dim, 4, bias=False))
        if "place" in ops:
            self.pe_transition = nn.Sequential(norm(dim), nn.Linear(dim, dim))
        self.drop_adjust = not style.deep_adjust
        self.drop_paths = nn.ModuleList(DropPath(p) for p in drop_path)

    def forward(self, features: Tensor, tokens: Tensor, roi: Tensor, seen: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Features [B, C, h, w], tokens [B, N, D], boxes [B, N, 4] to new tokens and boxes; boxes looked at go to `seen`."""
        for i, drop in enumerate(self.drop_paths):
            if self.stage_embedding is not None:
                tokens = tokens + self.stage_embedding.weight[i]
            for op in self.ops:
                if op == "sample":
                    seen.append(roi)
                    offsets = (self.roi_offset_module(tokens) + self.roi_offset_bias).unflatten(-1, (self.points, 2))
                    tokens = tokens + drop(self.adaptive_mixing(look(features, roi, offsets, self.padding), tokens))
                elif op == "attend":
                    tokens = tokens + drop(self.attn(self.norm1(tokens)))
                elif op == "mlp":
                    tokens = tokens + drop(self.mlp(self.norm2(tokens)))
                elif op == "place":
                    tokens = tokens + self.pe_transition(place(roi, self.dim).to(tokens.dtype))
                else:
                    by = self.roi_adjust_module(tokens)
                    roi = move(roi, full(drop(by) if self.drop_adjust else by))
        return tokens, roi

    def init_weights(self) -> None:
        for name in ("roi_adjust_module", "roi_offset_module"):
            if layers := getattr(self, name, None):
                small_norm(layers[0])
                nn.init.zeros_(layers[-1].weight)  # every box starts where it is put, every offset where the bias says
        if "sample" in self.ops:
            side = math.isqrt(self.points)
            offsets = self.roi_offset_bias.data.view(-1, 2)
            nn.init.uniform_(offsets, -0.5, 0.5)
            if side**2 == self.points:
                along = (torch.arange(side) + 0.5) / side - 0.5
                offsets[:] = torch.cartesian_prod(along, along).flip(1)  # x runs first
