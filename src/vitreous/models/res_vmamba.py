"""Res-VMamba: VMamba whose stages pass what entered them by. Chen et al., "Res-VMamba: Fine-Grained Food Category Visual
Classification Using Selective State Space Models with Deep Residual Learning" (2024).

Facts from the official repository, ChiShengChen/ResVMamba, made from VMamba's code of January 2024. The release makes the
convolution of each residual anew, at random, in every pass: it is never trained, and no checkpoint has it. The paper's is a layer
like others, and so is ours. A checkpoint without it loads with zeros there, which is VMamba itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ..mixers import MetaBlock
from ..mixers.cross_scan import CrossScan
from .classifier import Pyramid
from .msvmamba import Merge
from .official import official, publish, renamed
from .vmamba import Norm


class SS2D(nn.Module):
    """VMamba's mixer on maps `[B, C, H, W]`: four selective scans, normalised, times SiLU of a second projection.

    expand: channels scanned over channels. states: the numbers that each of them remembers.
    """

    def __init__(self, channels: int, expand: float, states: int) -> None:
        super().__init__()
        inner = int(channels * expand)
        self.in_proj = nn.Conv2d(channels, 2 * inner, 1, bias=False)
        self.conv = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.scan = CrossScan(inner, ceil(channels / 16), states)
        self.norm, self.out_proj = Norm(inner), nn.Conv2d(inner, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.in_proj(x).chunk(2, 1)
        return self.out_proj(self.norm(self.scan(F.silu(self.conv(x)))) * F.silu(gate))


class MixerBlock(nn.Module):
    """x + mixer(norm(x)), without an MLP, on maps `[B, C, H, W]`."""

    def __init__(self, channels: int, mixer: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path = Norm(channels), mixer, DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.attn(self.norm1(x)))


class Stage(nn.Module):
    """What comes out of the blocks `[B, C, H, W]`, and what entered them. Given both of the stage before, it begins with

    downsample(what came out) + fuse(max pooling of what entered): the paper's residual (its figure 2).
    """

    def __init__(self, inputs: int, channels: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = Merge(inputs, channels) if inputs else None
        self.fuse = nn.Conv2d(inputs, channels, 1) if inputs else None
        self.blocks = nn.Sequential(*blocks)

    def forward(self, given: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if isinstance(given, Tensor):
            x = given
        else:
            assert self.downsample is not None and self.fuse is not None
            x = self.downsample(given[0]) + self.fuse(F.max_pool2d(given[1], 2))
        return self.blocks(x), x


class ResVMamba(Pyramid):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`.

    expand, states: as in `SS2D`. mlp_ratio: 0 for blocks without an MLP, as published.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 241,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 27, 2),
        expand: float = 2.0,
        states: int = 16,
        mlp_ratio: float = 0.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        widths = [embed_dim << i for i in range(len(depths))]
        super().__init__(widths, [4 << i for i in range(len(depths))], drop_rate)
        self.stem = nn.Sequential(nn.Conv2d(in_chans, embed_dim, 4, 4), Norm(embed_dim))
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))

        def block(width: int, rate: float) -> nn.Module:
            mixer = SS2D(width, expand, states)
            if not mlp_ratio:
                return MixerBlock(width, mixer, rate)
            mlp = Mlp(width, int(width * mlp_ratio), use_conv=True, drop=drop_rate)
            return MetaBlock(width, mixer, mlp, Norm, drop_path=rate)

        for i, width in enumerate(widths):
            self.stages.append(Stage(widths[i - 1] if i else 0, width, [block(width, rate) for rate in rates[i]]))
        self.norm = Norm(widths[-1])
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and (isinstance(module, nn.Linear) or module.kernel_size == (1, 1)):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.reset_classifier(num_classes)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: linears are convolutions, and a stage begins with what ends the one before it."""
    found = {}
    for name, tensor in state.items():
        part, *rest = name.split(".")
        if part == "layers" and rest[1] == "downsample":
            name = ".".join(["stages", str(int(rest[0]) + 1), *rest[1:]])
        elif part == "fuse":
            name = f"stages.{int(rest[0]) + 1}.fuse.{rest[1]}"
        linear = name.endswith((".in_proj.weight", ".out_proj.weight", ".fc1.weight", ".fc2.weight"))
        found[name] = tensor[..., None, None] if linear else tensor
    if not any(".fuse." in name for name in found):
        for i in (1, 2, 3):
            merge = found.get(f"stages.{i}.downsample.reduction.weight", torch.empty(0, 0))
            found[f"stages.{i}.fuse.weight"] = merge.new_zeros(merge.shape[0], merge.shape[1] // 4, 1, 1)
            found[f"stages.{i}.fuse.bias"] = merge.new_zeros(merge.shape[0])
    scan = r"\.op\.(x_proj_weight|dt_projs_weight|dt_projs_bias|A_logs|Ds)$"
    return renamed(
        found,
        (r"^patch_embed\.0\.", "stem.0."),
        (r"^patch_embed\.2\.", "stem.1."),
        (r"^layers\.", "stages."),
        (r"(blocks\.\d+)\.norm\.", r"\1.norm1."),
        (scan, r".attn.scan.\1"),
        (r"\.op\.conv2d\.", ".attn.conv."),
        (r"\.op\.out_norm\.", ".attn.norm."),
        (r"\.op\.", ".attn."),
        (r"^classifier\.", ""),
    )


VARIANTS: dict[str, dict[str, Any]] = {
    "vssm_tiny": dict(depths=(2, 2, 9, 2), drop_path_rate=0.2),
    "vssm_small": dict(drop_path_rate=0.3),
    "vssm_base": dict(embed_dim=128, drop_path_rate=0.5),
}
for _name, _arguments in VARIANTS.items():
    publish(
        ResVMamba,
        f"res_vmamba_{_name}",
        _arguments,
        variant=f"res-vmamba--{_name}",
        convert=convert,
        first_conv="stem.0",
        num_classes=241,
    )
official("res-vmamba--tiny_2222", partial(ResVMamba, depths=(2, 2, 2, 2)), convert)
official("res-vmamba--small_cfg_2242", partial(ResVMamba, num_classes=1000, depths=(2, 2, 4, 2), mlp_ratio=2.0), convert)
