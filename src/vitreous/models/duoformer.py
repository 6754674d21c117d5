"""DuoFormer: a ResNet's maps meet region by region, scale by scale. Tang et al., "DuoFormer: Leveraging Hierarchical
Representations by Local and Global Attention Vision Transformer" (2025).

Facts from the authors' repository, xiaoyatang/duoformer_TCGA. As released, the layers of patch attention have neither norm, nor
residual, nor MLP, and the head reads the class token before `fc_norm`, which is never used. The release is for images of 224
pixels; with two scales its table of positions does not fit its tokens, with a ResNet-18 it runs with four scales alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import timm
import torch
from timm.layers import Attention, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import require_size
from .classifier import Classifier, init_weights
from .official import official, publish, renamed

norm = partial(nn.LayerNorm, eps=1e-6)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A convolution from He's normal, with biases near 0."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
    nn.init.kaiming_normal_(layer.weight)
    nn.init.normal_(cast(Tensor, layer.bias), std=1e-6)
    return layer


class ScaleToken(nn.Module):
    """A token for every region from all channels: maps of four scales to `[B, regions, 1, C]`.

    Each map is brought to the side of the smallest by strided convolutions and max pooling; then four convolutions.
    """

    def __init__(self, widths: list[int], channels: int) -> None:
        super().__init__()
        self.shrink = nn.ModuleList(
            [
                nn.Sequential(conv(widths[0], widths[0], 3, 2), conv(widths[0], widths[0], 3, 2), nn.MaxPool2d(2)),
                nn.Sequential(conv(widths[1], widths[1], 3, 2), nn.MaxPool2d(2)),
                nn.MaxPool2d(2),
                nn.Identity(),
            ]
        )
        ins = (sum(widths), channels, channels, channels)
        layers = [(nn.Conv2d(i, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()) for i in ins]
        self.convs = nn.Sequential(*(part for layer in layers for part in layer))

    def forward(self, maps: list[Tensor]) -> Tensor:
        x = self.convs(torch.cat([shrink(x) for shrink, x in zip(self.shrink, maps, strict=True)], 1))
        return x.flatten(2).mT.unsqueeze(2)


def regions(x: Tensor, grid: int) -> Tensor:
    """A map `[B, C, H, W]` in `grid` × `grid` regions: `[B, grid², tokens, C]`.

    Row by row, but for regions of 2 × 2, which the release lists column by column; its positions are learned so.
    """
    k = x.shape[-1] // grid
    x = x.unflatten(3, (grid, k)).unflatten(2, (grid, k))  # [B, C, grid, k, grid, k]
    return x.permute((0, 2, 4, 5, 3, 1) if k == 2 else (0, 2, 4, 3, 5, 1)).flatten(3, 4).flatten(1, 2)


class DuoFormer(Classifier):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`.

    backbone: any timm network with maps of 1/4, 1/8, 1/16 and 1/32. scales: how many of them meet, from the last. scale_token:
    "random", one learned token for all regions, or "channel", one of each region's own (`ScaleToken`). depth: layers of scale
    attention, and then as many of patch attention.
    """

    global_pool = "token"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int = 224,
        backbone: str = "resnet50",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        scales: int = 3,
        scale_token: str = "random",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        if not 2 <= scales <= 4 or scale_token not in ("random", "channel") or img_size % 32:
            raise VitreousError(
                "DuoFormer takes scales from 2 to 4, scale_token 'random' or 'channel', and an img_size that 32 divides, "
                f"not {scales}, {scale_token!r} and {img_size}"
            )
        self.size, self.grid = (img_size, img_size), img_size // 32
        self.backbone: Any = timm.create_model(backbone, in_chans=in_chans, features_only=True, out_indices=(-4, -3, -2, -1))
        for m in self.backbone.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.ones_(m.weight)  # as torchvision has it, which the release starts from; timm silences each branch
        widths = self.backbone.feature_info.channels()
        self.projections = nn.ModuleList(conv(width, embed_dim, 1) for width in widths[-scales:])
        if scale_token == "channel":
            self.channel_token = ScaleToken(widths, embed_dim)
        else:
            self.channel_token = nn.Parameter(0.036 * torch.randn(1, 1, 1, embed_dim))
        self.scale_pos_embed = nn.Parameter(torch.empty(1, 1, 1 + sum(4**i for i in range(scales)), embed_dim))
        self.scale_blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, qkv_bias=True, norm_layer=cast(Any, norm)) for _ in range(depth))
        )
        self.cls_token = nn.Parameter(0.036 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.grid**2 + 1, embed_dim))
        self.blocks = nn.Sequential(*(Attention(embed_dim, num_heads, qkv_bias=True) for _ in range(depth)))
        self.fc_norm = norm(embed_dim)  # official checkpoints have it
        for table in (self.scale_pos_embed, self.pos_embed):
            trunc_normal_(table, std=0.036)
        self.scale_blocks.apply(init_weights)
        self.blocks.apply(init_weights)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to `[B, 1 + regions, C]`, the class token first."""
        require_size(x, self.size, "DuoFormer")
        maps = self.backbone(x)
        token = self.channel_token
        token = token(maps) if isinstance(token, nn.Module) else token.expand(x.shape[0], self.grid**2, -1, -1)
        used = zip(self.projections, maps[-len(self.projections) :], strict=True)
        parts = [regions(project(x), self.grid) for project, x in used]
        x = torch.cat([token, *reversed(parts)], 2) + self.scale_pos_embed  # the coarsest scale first
        x = self.scale_blocks(x.flatten(0, 1)).unflatten(0, (-1, self.grid**2))[:, :, 0]
        return self.blocks(torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours."""
    found = renamed(
        state,
        (r"^resnet_projector\.0\.", "backbone.conv1."),
        (r"^resnet_projector\.1\.", "backbone.bn1."),
        (r"^vision_transformer\.pos_embed_for_scale$", "scale_pos_embed"),
        (r"^vision_transformer\.scaleBlocks\.", "scale_blocks."),
        (r"^vision_transformer\.blocks\.(\d+)\.attn\.", r"blocks.\1."),
        (r"^vision_transformer\.", ""),
        (r"^chann_proj1\.conv([12])\.", lambda m: f"channel_token.shrink.0.{int(m[1]) - 1}."),
        (r"^chann_proj2\.conv1\.", "channel_token.shrink.1.0."),
        (r"^chann_proj_all\.nConvs\.(\d)\.conv\.", lambda m: f"channel_token.convs.{3 * int(m[1])}."),
        (r"^chann_proj_all\.nConvs\.(\d)\.norm\.", lambda m: f"channel_token.convs.{3 * int(m[1]) + 1}."),
        (r"^resnet_projector\.(\d)\.", lambda m: f"backbone.layer{int(m[1]) - 3}."),
    )
    heads = sorted({name.split(".")[1] for name in found if name.startswith("projection.")})
    return renamed(found, *((rf"^projection\.{head}\.", f"projections.{i}.") for i, head in enumerate(heads)))


VARIANTS: dict[str, dict[str, Any]] = {
    "resnet50_2scales": dict(scales=2),
    "resnet50_3scales": dict(),
    "resnet50_3scales_channel": dict(scale_token="channel"),
    "resnet50_4scales": dict(scales=4),
    "resnet18_4scales": dict(backbone="resnet18", scales=4),
}
for _name, _arguments in VARIANTS.items():
    publish(
        DuoFormer,
        f"duoformer_{_name}",
        _arguments,
        variant=f"duoformer--{_name}",
        convert=convert,
        first_conv="backbone.conv1",
    )
# The sizes at which the released code was run for the project's reference outputs.
for _name, _arguments in {
    "r50_3scales": dict(embed_dim=192, depth=2, num_heads=6, num_classes=10),
    "r50_3scales_channel": dict(depth=1, num_classes=4, scale_token="channel"),
    "r18_4scales": dict(backbone="resnet18", scales=4, embed_dim=96, depth=2, num_heads=3, num_classes=4),
}.items():
    official(f"duoformer--{_name}", partial(DuoFormer, **_arguments), convert)
