"""LITv2: high and low frequencies apart. Pan, Cai and Zhuang, "Fast Vision Transformers with HiLo Attention" (NeurIPS 2022).

Facts from the official repository, ziplab/LITv2. Its deformable convolution is a CUDA kernel; here the places are read by
`grid_sample`, which agrees up to rounding and which ONNX and OpenVINO have.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, calculate_drop_path_rates
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import DepthwiseMlp, MetaBlock
from .classifier import Pyramid, init_weights
from .official import publish, renamed

norm = partial(LayerNorm2d, eps=1e-5)


def require_even(x: Tensor) -> None:
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise VitreousError(
            f"LITv2 takes the places of its maps by twos, and one is {x.shape[2]} × {x.shape[3]}: give it images whose sides are "
            "multiples of 32"
        )


class HiLoAttention(nn.Module):
    """HiLo on maps `[B, C, H, W]`; gives the channels of Hi-Fi, then those of Lo-Fi.

    Hi-Fi: some heads attend within windows of `window` × `window` places. Lo-Fi: a part `alpha` of the heads attends from every
    place to the means of the windows. With `window` 1 all heads are Lo-Fi, which is then plain attention.
    """

    def __init__(self, channels: int, num_heads: int, window: int, alpha: float) -> None:
        super().__init__()
        self.window = window
        self.l_heads = int(num_heads * alpha) if window > 1 else num_heads
        self.h_heads = num_heads - self.l_heads
        low = channels // num_heads * self.l_heads
        if self.l_heads:
            self.l_q, self.l_kv, self.l_proj = nn.Linear(channels, low), nn.Linear(channels, 2 * low), nn.Linear(low, low)
        if self.h_heads:
            high = channels - low
            self.h_qkv, self.h_proj = nn.Linear(channels, 3 * high), nn.Linear(high, high)

    def hifi(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to the Hi-Fi channels `[B, H, W, high]`."""
        s = self.window
        rows, columns = x.shape[1] // s, x.shape[2] // s
        qkv = self.h_qkv(x).unflatten(1, (rows, s)).unflatten(3, (columns, s)).unflatten(5, (3, self.h_heads, -1))
        q, k, v = qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3)  # [B · windows, heads, s · s, d] each
        x = F.scaled_dot_product_attention(q, k, v).unflatten(2, (s, s)).unflatten(0, (-1, rows, columns))
        return self.h_proj(x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4).flatten(1, 2))

    def lofi(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to the Lo-Fi channels `[B, H, W, low]`."""
        size = x.shape[1:3]
        means = F.avg_pool2d(x.permute(0, 3, 1, 2), self.window).flatten(2).mT
        q = self.l_q(x).flatten(1, 2).unflatten(2, (self.l_heads, -1)).transpose(1, 2)
        k, v = self.l_kv(means).unflatten(2, (2, self.l_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.l_proj(x).unflatten(1, size)

    def forward(self, x: Tensor) -> Tensor:
        if self.window > 1:
            require_even(x)
        x = x.permute(0, 2, 3, 1)
        parts = [part(x) for part, heads in ((self.hifi, self.h_heads), (self.lofi, self.l_heads)) if heads]
        return torch.cat(parts, 3).permute(0, 3, 1, 2)


class DeformableMerging(nn.Module):
    """DTM, deformable token merging: four places, moved by learned offsets, become one; `[B, C, H, W]` to `[B, 2C, H/2, W/2]`.

    Pan et al., "Less is More: Pay Less Attention in Vision Transformers" (AAAI 2022), after Dai et al., "Deformable
    Convolutional Networks" (ICCV 2017).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(channels, 8, 2, 2)
        self.conv = nn.Conv2d(4 * channels, 2 * channels, 1)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        require_even(x)
        height, width = x.shape[2:]
        offset = self.offset(x).float().unflatten(1, (2, 2, 2))  # [B, row, column, (y, x), h, w]
        rows = torch.arange(height, device=x.device).view(-1, 2).T[:, None, :, None] + offset[:, :, :, 0]
        columns = torch.arange(width, device=x.device).view(-1, 2).T[None, :, None, :] + offset[:, :, :, 1]
        places = torch.stack(((2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1), -1)  # -1 and 1 are the edges
        seen = F.grid_sample(x.float(), places.flatten(1, 3), align_corners=False).to(x.dtype).unflatten(2, (4, -1))
        return self.act(self.norm(self.conv(seen.flatten(1, 2))))


class ConvFFN(nn.Module):
    """x + mlp(norm2(x)): a block without attention; `[B, C, H, W]`."""

    def __init__(self, channels: int, mlp: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm2, self.mlp = LayerNorm2d(channels, eps=1e-5), mlp
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(x)))


class LITv2(Pyramid):
    """Images `[B, C, H, W]`, sides multiples of 32, to logits `[B, num_classes]`.

    windows: HiLo's in each stage; where it is 0, the stage has no attention. alpha: the part of the heads that is Lo-Fi.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        windows: Sequence[int] = (0, 0, 2, 1),
        alpha: float = 0.9,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        widths = [embed_dim << i for i in range(4)]
        super().__init__(widths, (4, 8, 16, 32), drop_rate)
        self.stem = nn.Sequential(nn.Conv2d(in_chans, embed_dim, 4, 4), LayerNorm2d(embed_dim, eps=1e-5))
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))

        def block(i: int, rate: float) -> nn.Module:
            mlp = DepthwiseMlp(widths[i], int(widths[i] * mlp_ratio), drop=drop_rate)
            if not windows[i]:
                return ConvFFN(widths[i], mlp, rate)
            attention = HiLoAttention(widths[i], num_heads[i], windows[i], alpha)
            return MetaBlock(widths[i], attention, mlp, norm, drop_path=rate)

        for i in range(4):
            merging = (DeformableMerging(widths[i - 1]),) if i else ()
            self.stages.append(nn.Sequential(*merging, *(block(i, rate) for rate in rates[i])))
        self.norm = norm(widths[-1])
        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, DeformableMerging):
                nn.init.zeros_(module.offset.weight)
        self.reset_classifier(num_classes)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: a stage begins with the merging; MLPs and deformable kernels are 1 × 1 convolutions."""
    names = {}
    for key, tensor in state.items():
        part, *rest = key.split(".")
        if part == "layers" and rest[1] == "blocks":
            key = ".".join(("stages", rest[0], str(int(rest[2]) + (rest[0] != "0")), *rest[3:]))
        elif part == "layers":
            key = ".".join(("stages", str(int(rest[0]) + 1), "0", *rest[2:]))
        if key.endswith((".fc1.weight", ".fc2.weight")):
            tensor = tensor[:, :, None, None]
        elif key.endswith(".dconv.weight"):
            tensor = tensor.flatten(1)[:, :, None, None]
        names[key] = tensor
    return renamed(
        names,
        (r"^patch_embed\.proj", "stem.0"),
        (r"^patch_embed\.norm", "stem.1"),
        (r"dconv\.conv_offset", "offset"),
        (r"\.dconv\.", ".conv."),
        (r"norm_layer", "norm"),
        (r"dwconv\.dwconv", "dwconv"),
    )


BASE = dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
VARIANTS = {
    "litv2_s": dict(),
    "litv2_m": dict(depths=(2, 2, 18, 2)),
    "litv2_b": BASE,
    "litv2_b_384": BASE,
}
for _name, _arguments in VARIANTS.items():
    _size = 384 if _name.endswith("384") else 224
    publish(LITv2, _name, _arguments, variant=f"litv2--{_name}", convert=convert, first_conv="stem.0", size=_size)
for _alpha in ("0", "0.2", "0.4", "0.5", "0.7", "0.9", "1"):  # LITv2-S by its share of low frequencies
    publish(
        LITv2,
        f"litv2_s_alpha_{_alpha.replace('.', '')}",
        dict(alpha=float(_alpha)),
        variant=f"litv2--alpha_{_alpha}",
        convert=convert,
        first_conv="stem.0",
    )
