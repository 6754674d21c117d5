"""ConvNeXt-dcls: ConvNeXt whose kernels have few weights far apart. Khalfaoui-Hassani, Pellegrini and Masquelier, "Dilated
convolution with learnable spacings" (ICLR 2023), and Khalfaoui-Hassani, "Dilated Convolution with Learnable Spacings" (2024).

Facts from the official repositories, K-H-Ismail/ConvNeXt-dcls and …/Dilated-Convolution-with-Learnable-Spacings-PyTorch. All
blocks of a stage share positions. A kernel is built anew in every forward, and is a dense one for the processor: 17 × 17, or 23
× 23.
"""

from __future__ import annotations

from typing import Any, cast

from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from ..mixers import DCLS
from .official import publish, renamed


class DclsConvNeXt(ConvNeXt):
    """timm's ConvNeXt with `count` weights in every depthwise kernel of `size` × `size`; images `[B, C, H, W]` of any size.

    version: how weights are shared out among places (`mixers.spaced_kernel`).
    """

    def __init__(self, size: int = 17, count: int = 34, version: str = "v0", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for stage in cast(Any, self.stages):
            first: DCLS | None = None
            for block in stage.blocks:
                channels = block.conv_dw.in_channels
                made = DCLS(channels, channels, count, (size, size), channels, version=version)
                nn.init.trunc_normal_(made.weight, std=0.02)
                nn.init.zeros_(made.bias) if made.bias is not None else None
                if first is not None:
                    made.P, made.SIG = first.P, first.SIG
                first = first or made
                block.conv_dw = made

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith((".P", ".SIG"))}


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to timm's."""
    return renamed(
        state,
        (r"^norm\.", "head.norm."),
        (r"^head\.(?=[wb])", "head.fc."),
        (r"^stages\.(\d)\.", r"stages.\1.blocks."),
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
        (r"\.dwconv\.", ".conv_dw."),
        (r"\.pwconv(\d)\.", r".mlp.fc\1."),
    )


SMALL, BASE = dict(depths=(3, 3, 27, 3)), dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024))
GAUSS = dict(size=23, count=26, version="gauss")
for _system, _name, _arguments in (
    ("dcls", "convnext_tiny", dict(drop_path_rate=0.1)),
    ("dcls", "convnext_small", dict(SMALL, count=40, drop_path_rate=0.4)),
    ("dcls", "convnext_base", dict(BASE, count=40, drop_path_rate=0.5)),
    ("dcls-thesis", "convnext_tiny_gauss", dict(GAUSS, drop_path_rate=0.1)),
    ("dcls-thesis", "convnext_tiny_max", dict(GAUSS, version="max", drop_path_rate=0.1)),
):
    publish(
        DclsConvNeXt,
        _name.replace("convnext", "convnext_dcls"),
        _arguments,
        variant=f"{_system}--{_name}",
        convert=convert,
        first_conv="stem.0",
        classifier="head.fc",
    )
