"""MSVMamba: selective scans in four directions, three of them over a map of half the resolution.

Shi, Dong and Xu, "Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model" (NeurIPS 2024). Facts from the official
repository, YuHengsss/MSVMamba: its `master` branch has the models of the first version of the paper, `v2` those of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import SqueezeExcite, calculate_drop_path_rates
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ..mixers import DepthwiseMlp, MetaBlock, SelectiveScan
from .classifier import Pyramid, init_weights
from .official import publish, renamed
from .vmamba import Norm, downsample, stem, vmamba_names


class MultiScaleScan(nn.Module):
    """MS2D, multi-scale 2D scanning, in the place of attention, on maps `[B, C, H, W]`.

    The whole map is scanned along its rows; half of it, by a strided convolution, along its rows backwards, its columns, and
    its columns backwards. These three are one sequence with one state, so that the later read what the earlier saw.

    expand: channels scanned over channels. gated: whether SiLU of a second projection multiplies the result. v3: as in the
    second version, one norm of the sum of both scales, the smaller repeated; in the first, each has been normalised before,
    and the smaller is interpolated.
    """

    def __init__(self, channels: int, expand: int, gated: bool, v3: bool) -> None:
        super().__init__()
        inner, rank = channels * expand, ceil(channels / 16)
        self.gated, self.v3 = gated, v3
        self.in_proj = nn.Conv2d(channels, inner * (1 + gated), 1, bias=False)
        self.act = nn.SiLU()
        self.conv_full = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.conv_half = nn.Conv2d(inner, inner, 7, 2, padding=3, groups=inner)
        self.scan_full, self.scan_half = SelectiveScan(inner, rank), SelectiveScan(inner, rank)
        self.norm = Norm(inner)
        self.se = SqueezeExcite(inner, rd_channels=inner // 8, bias=False)
        self.out_proj = nn.Conv2d(inner, channels, 1, bias=False)

    def along_rows(self, x: Tensor) -> Tensor:
        """The map `[B, C, H, W]` scanned once."""
        return self.scan_full(x.flatten(2).mT).mT.reshape(x.shape)

    def three_ways(self, x: Tensor) -> list[Tensor]:
        """The map `[B, C, h, w]` scanned in three directions, one after the other."""
        rows, columns = x.flatten(2).mT, x.mT.flatten(2).mT
        scanned = self.scan_half(torch.cat([rows.flip(1), columns, columns.flip(1)], 1))
        rows, columns, upward = scanned.mT.chunk(3, 2)
        return [rows.flip(2).reshape(x.shape), columns.reshape(x.mT.shape).mT, upward.flip(2).reshape(x.mT.shape).mT]

    def forward(self, x: Tensor) -> Tensor:
        x = self.in_proj(x)
        x, gate = x.chunk(2, 1) if self.gated else (x, None)
        full = self.along_rows(self.act(self.conv_full(x)))
        half = self.three_ways(self.act(self.conv_half(x)))
        size = x.shape[2:]
        if self.v3:
            y = self.norm(full + F.interpolate(half[0] + half[1] + half[2], size))
        else:
            half = [self.norm(part) for part in half]
            y = self.norm(full) + F.interpolate(half[0] + half[1] + half[2], size, mode="bilinear")
        y = self.se(y)
        return self.out_proj(y if gate is None else y * self.act(gate))


class Merge(PatchMerging):
    """Swin's merging of 2 × 2 patches, on maps `[B, C, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MSVMamba(Pyramid):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`.

    expand, gated: of the scans. mlp_ratio: hidden over input channels of the MLPs. v3: as in the second version of the paper,
    overlapping stem and downsampling, the norm behind the MLP, and what v3 changes in the scans.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 2, 9, 2),
        expand: int = 2,
        mlp_ratio: int = 2,
        gated: bool = True,
        v3: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        widths = [embed_dim * 2**i for i in range(len(depths))]
        super().__init__(widths, [4 * 2**i for i in range(len(depths))], drop_rate)
        plain = nn.Sequential(nn.Conv2d(in_chans, embed_dim, 4, 4), Norm(embed_dim))
        self.stem = stem(in_chans, embed_dim) if v3 else plain
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, width in enumerate(widths):
            stage: list[nn.Module] = [nn.Identity()]
            if i:
                stage = [downsample(width // 2, width) if v3 else Merge(width // 2)]
            for rate in rates[i]:
                mlp = DepthwiseMlp(width, width * mlp_ratio, skip=True)
                block = MetaBlock(width, MultiScaleScan(width, expand, gated, v3), mlp, Norm, drop_path=rate)
                if v3:
                    block.mlp, block.norm2 = nn.Sequential(mlp, block.norm2), nn.Identity()
                stage.append(block)
            self.stages.append(nn.Sequential(*stage))
        self.norm = Norm(widths[-1])
        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, SelectiveScan):
                module.reset_parameters()
        self.reset_classifier(num_classes)


SCAN = {
    "x_proj_weight": "x_proj.weight",
    "dt_projs_weight": "dt_proj.weight",
    "dt_projs_bias": "dt_proj.bias",
    "A_logs": "A_log",
    "Ds": "D",
}


def convert(state: dict[str, Tensor], v3: bool) -> dict[str, Tensor]:
    """Official names to ours: a tensor of the scans holds both scales, in v3 the full one first, and linears are convolutions."""
    scales = ("scan_full", "scan_half") if v3 else ("scan_half", "scan_full")
    names = {}
    for key, tensor in vmamba_names(state).items():
        block, _, name = key.rpartition(".op.")
        if name in SCAN:
            for scale, part in zip(scales, tensor.chunk(2), strict=True):
                names[f"{block}.attn.{scale}.{SCAN[name]}"] = part[0] if "proj" in name else part
        else:
            names[key] = tensor[..., None, None] if block and tensor.ndim == 2 else tensor
    if v3:
        names = renamed(names, (r"\.norm2\.", ".mlp.1."), (r"\.convFFN\.", ".mlp.0."))
    return renamed(
        names,
        (r"\.convFFN\.", ".mlp."),
        (r"(mlp.*)\.linear(\d)\.", r"\1.fc\2."),
        (r"(mlp.*)\.dwc\.", r"\1.dwconv."),
        (r"\.op\.", ".attn."),
        (r"\.conv2d\.", ".conv_full."),
        (r"\.conv2d_b1\.", ".conv_half."),
        (r"\.out_norm\.", ".norm."),
        (r"\.se\.fc\.0\.", ".se.fc1."),
        (r"\.se\.fc\.2\.", ".se.fc2."),
    )


FIRST: dict[str, dict[str, Any]] = {
    "nano": dict(embed_dim=48, depths=(1, 2, 5, 2)),
    "micro": dict(embed_dim=64, depths=(1, 2, 5, 2)),
    "tiny": dict(embed_dim=96, depths=(1, 2, 9, 2)),
}
SECOND: dict[str, dict[str, Any]] = {
    "msvmambav3_tiny_224": dict(embed_dim=96, depths=(2, 2, 9, 2), gated=False),
    "msvmambav3_small_224": dict(embed_dim=96, depths=(2, 3, 20, 2), gated=False),
    "msvmambav3_base_224": dict(embed_dim=128, depths=(2, 4, 18, 2)),
}
for _name, _arguments in FIRST.items():
    publish(
        MSVMamba,
        f"msvmamba_{_name}",
        _arguments,
        variant=f"msvmamba--{_name}",
        convert=partial(convert, v3=False),
        first_conv="stem.0",
    )
for _name, _arguments in SECOND.items():
    publish(
        MSVMamba,
        _name,
        dict(expand=1, mlp_ratio=4, v3=True, **_arguments),
        variant=f"msvmamba--{_name}",
        convert=partial(convert, v3=True),
        first_conv="stem.0",
    )
