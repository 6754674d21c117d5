"""DiNAT: every other neighbourhood is spread out. Hassani and Shi, "Dilated Neighborhood Attention Transformer" (2022).

Facts from the official repository, SHI-Labs/Neighborhood-Attention-Transformer, whose attention runs in kernels of NATTEN; here
the neighbours are gathered. Dilations are arguments, made for the published size of images: larger images want larger ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

from timm.layers import LayerNorm2d, Mlp, calculate_drop_path_rates
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ..mixers import MetaBlock, NeighbourhoodAttention
from .classifier import Classifier, Pyramid, init_weights
from .official import official, publish, renamed

norm1d, norm2d = partial(nn.LayerNorm, eps=1e-5), partial(LayerNorm2d, eps=1e-5)


class Merging(PatchMerging):
    """Swin's patch merging on maps: `[B, C, H, W]` to `[B, 2C, ⌈H/2⌉, ⌈W/2⌉]`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Stage(nn.Module):
    """What brings the map to this stage's size, then blocks whose neighbourhoods have these dilations; `[B, C, H, W]`."""

    def __init__(
        self,
        downsample: nn.Module,
        channels: int,
        num_heads: int,
        kernel: int,
        dilations: Sequence[int],
        mlp_ratio: float,
        layer_scale: float | None,
        drop_rate: float,
        rates: Sequence[float],
    ) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.ModuleList(
            MetaBlock(
                channels,
                NeighbourhoodAttention(channels, num_heads, kernel, dilation),
                Mlp(channels, int(channels * mlp_ratio), drop=drop_rate),
                norm1d,
                layer_scale,
                rate,
            )
            for dilation, rate in zip(dilations, rates, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        size = x.shape[2:]
        x = x.flatten(2).mT
        for block in self.blocks:
            x = block(x, size)
        return x.mT.unflatten(2, size)


class DiNAT(Pyramid):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`.

    dilations: of every block of each stage, 1 for a neighbourhood without gaps. merging: Swin's patches and patch merging in
    place of overlapping convolutions, as in DiNAT_s.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 64,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        dilations: Sequence[Sequence[int]] = ((1, 8, 1), (1, 4, 1, 4), (1, 2) * 3, (1,) * 5),
        kernel: int = 7,
        mlp_ratio: float = 3.0,
        layer_scale: float | None = None,
        merging: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        widths = [embed_dim << i for i in range(len(dilations))]
        super().__init__(widths, [4 << i for i in range(len(dilations))], drop_rate)
        if merging:
            stem = nn.Sequential(nn.Conv2d(in_chans, embed_dim, 4, 4), norm2d(embed_dim))
        else:
            halves = nn.Conv2d(in_chans, embed_dim // 2, 3, 2, 1), nn.Conv2d(embed_dim // 2, embed_dim, 3, 2, 1)
            stem = nn.Sequential(*halves, norm2d(embed_dim))
        depths = [len(d) for d in dilations]
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, depths, stagewise=True))
        for i, width in enumerate(widths):
            narrower: nn.Module = stem
            if i:
                conv = nn.Conv2d(width // 2, width, 3, 2, 1, bias=False)
                narrower = Merging(width // 2, width) if merging else nn.Sequential(conv, norm2d(width))
            stage = narrower, width, num_heads[i], kernel, dilations[i], mlp_ratio, layer_scale, drop_rate, rates[i]
            self.stages.append(Stage(*stage))
        self.norm = norm2d(widths[-1])
        self.apply(init_weights)
        self.reset_classifier(num_classes)


class IsotropicDiNAT(Classifier):
    """A ViT without class token and positions whose blocks attend to neighbourhoods; `[B, C, H, W]` to `[B, num_classes]`.

    dilation: of every second block.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel: int = 7,
        dilation: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        stem = nn.Sequential(nn.Conv2d(in_chans, embed_dim, patch_size, patch_size), norm2d(embed_dim))
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        dilations = [dilation if i % 2 else 1 for i in range(depth)]
        self.body = Stage(stem, embed_dim, num_heads, kernel, dilations, 4.0, None, drop_rate, rates)
        self.norm = norm2d(embed_dim)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.body(x))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours: a stage begins with what ends the one before it in the official models."""
    deeper = {k: f"stages.{int(k.split('.')[1]) + 1}.{k.split('.', 2)[2]}" for k in state if ".downsample." in k}
    first = "body" if "layers.0.norm1.weight" in state else "stages.0"
    stem = 2 if "patch_embed.proj.1.weight" in state else 1
    conv = (r"downsample\.reduction", "downsample.0"), (r"downsample\.norm", "downsample.1")
    return renamed(
        {deeper.get(k, k): v for k, v in state.items()},
        (r"^(levels|layers)\.(\d)\.(?=blocks)", r"stages.\2."),
        (r"^layers\.(\d+)\.", r"body.blocks.\1."),
        *(conv if stem == 2 else ()),
        (r"^patch_embed\.proj\.(?=[wb])", f"{first}.downsample.0."),
        (r"^patch_embed\.proj\.", f"{first}.downsample."),
        (r"^patch_embed\.norm\.", f"{first}.downsample.{stem}."),
        (r"gamma(\d)$", r"ls\1.gamma"),
    )


def spread(depths: Sequence[int], far: Sequence[int] = (8, 4, 2, 1)) -> tuple[tuple[int, ...], ...]:
    """Dilations 1 and `far` in turn."""
    return tuple(tuple(d if i % 2 else 1 for i in range(depth)) for depth, d in zip(depths, far))


FAR = (13, 6, 3, 1)  # for images of 384 pixels
MINI, DEEP, SWIN = (3, 4, 6, 5), (3, 4, 18, 5), (2, 2, 18, 2)
LARGE = dict(embed_dim=192, num_heads=(6, 12, 24, 48))
VARIANTS = {
    "mini": dict(dilations=spread(MINI), drop_path_rate=0.2),
    "tiny": dict(dilations=spread(DEEP), drop_path_rate=0.2),
    "small": dict(embed_dim=96, num_heads=(3, 6, 12, 24), dilations=spread(DEEP), mlp_ratio=2.0, drop_path_rate=0.3),
    "base": dict(
        embed_dim=128, num_heads=(4, 8, 16, 32), dilations=spread(DEEP), mlp_ratio=2.0, layer_scale=1e-5, drop_path_rate=0.5
    ),
    "large": dict(LARGE, dilations=spread(DEEP), mlp_ratio=2.0, drop_path_rate=0.35),
    "large_384": dict(LARGE, dilations=spread(DEEP, FAR), mlp_ratio=2.0, drop_path_rate=0.35),
    "large_384_11x11": dict(LARGE, dilations=spread(DEEP), kernel=11, mlp_ratio=2.0, drop_path_rate=0.35),
    "large_21k": dict(LARGE, dilations=spread(DEEP), mlp_ratio=2.0, drop_path_rate=0.2),
    "large_21k_11x11": dict(LARGE, dilations=spread(DEEP), kernel=11, mlp_ratio=2.0, drop_path_rate=0.2),
    "s_tiny": dict(embed_dim=96, num_heads=(3, 6, 12, 24), dilations=spread((2, 2, 6, 2)), drop_path_rate=0.2),
    "s_small": dict(embed_dim=96, num_heads=(3, 6, 12, 24), dilations=spread(SWIN), drop_path_rate=0.3),
    "s_base": dict(embed_dim=128, num_heads=(4, 8, 16, 32), dilations=spread(SWIN), drop_path_rate=0.5),
    "s_large": dict(LARGE, dilations=spread(SWIN), drop_path_rate=0.35),
    "s_large_384": dict(LARGE, dilations=spread(SWIN, FAR), drop_path_rate=0.35),
    "s_large_21k": dict(LARGE, dilations=spread(SWIN), drop_path_rate=0.2),
}
for _name, _arguments in VARIANTS.items():
    _swin = dict(mlp_ratio=4.0, merging=True) if _name.startswith("s_") else {}
    _size, _classes = 384 if "384" in _name else 224, 21841 if "21k" in _name else 1000
    publish(
        DiNAT,
        f"dinat_{_name}",
        {**_arguments, **_swin, "num_classes": _classes},
        variant=f"dinat--{_name}",
        convert=convert,
        size=_size,
        first_conv="stages.0.downsample.0",
        num_classes=_classes,
    )
for _name, _arguments in {
    "isotropic_small": dict(drop_path_rate=0.1),
    "isotropic_base": dict(embed_dim=768, num_heads=24, drop_path_rate=0.4),
}.items():
    publish(
        IsotropicDiNAT,
        f"dinat_{_name}",
        _arguments,
        variant=f"dinat--{_name}",
        convert=convert,
        first_conv="body.downsample.0",
    )
official("dinat--base_ls", partial(DiNAT, **{"mlp_ratio": 3.0, **VARIANTS["base"]}), convert)  # base, the one with layer scale
