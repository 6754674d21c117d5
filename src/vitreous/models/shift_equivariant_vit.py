"""PolyTwins and PolyViT: whatever strides is anchored, so that a shift of the image cannot change the answer. Ding et al.,
"Reviving Shift Equivariance in Vision Transformers" (2023).

Facts from the official repository, willding123/Shift-Equivariant-Vision-Transformers, which is built on timm's Twins and ViT.
Exact for shifts in a circle and sides that every stride and window divides; an ordinary shift brings other pixels in at the
border.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.twins import Block as TwinsBlock
from timm.models.twins import LocallyGroupedAttn, Twins
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import CircularConv2d, anchored, patch_grid
from .classifier import Classifier, init_weights
from .official import publish


def stride_of(attn: Any) -> int:
    """By how many places its windows, or what pools its keys and values, go on."""
    return cast(Any, attn).ws if isinstance(attn, LocallyGroupedAttn) else attn.sr_ratio


class AnchoredBlock(TwinsBlock):
    """timm's Twins block, its tokens anchored to its windows, or to the stride by which it pools keys and values; `[B, N, C]`."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        stride = stride_of(self.attn)
        if stride > 1:
            x = anchored(x.mT.unflatten(2, size), stride).flatten(2).mT
        return super().forward(x, size)


class PolyTwins(Twins):
    """timm's Twins-SVT, equivariant to shifts; images `[B, C, H, W]` whose sides are multiples of 32 · windows, as 224.

    Convolutions for positions go round in a circle. Only the first patch embedding needs an anchor: the others find the map
    anchored by the block before them to a multiple of their stride. Weights of Twins-SVT load.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, block_cls=AnchoredBlock)
        for block in cast(Any, self.pos_block):
            conv = block.proj[0]
            block.proj[0] = CircularConv2d(conv.in_channels, conv.out_channels, 3, groups=conv.groups)
            block.proj[0].load_state_dict(conv.state_dict())
        self.patch = cast(Any, self.patch_embeds)[0].proj.kernel_size[0]

    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(self.anchor(x))

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward_intermediates(self.anchor(x), *args, **kwargs)

    def anchor(self, x: Tensor) -> Tensor:
        """The image, anchored to the patches. Raises VitreousError where a window does not divide its map."""
        for i, stage in enumerate(cast(Any, self.blocks)):
            cells = self.patch << i
            strides = [stride_of(b.attn) for b in stage]
            if any(side % (cells * stride) for side in x.shape[2:] for stride in strides):
                raise VitreousError(
                    f"PolyTwins: images of {x.shape[2]} × {x.shape[3]} do not divide by {cells * max(strides)} pixels, windows "
                    f"of stage {i + 1}: give it images of sides that do, as 224, or another wss="
                )
        return anchored(x, self.patch)


class PolyViT(Classifier):
    """A ViT, equivariant to shifts; images `[B, C, H, W]` of any sides that patches divide, to logits `[B, num_classes]`.

    In place of position embeddings a depthwise convolution in a circle over the patches, behind which the class token joins.
    """

    global_pool = "token"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.patch_size = patch_size
        self.patch_embed = PatchEmbed(None, patch_size, in_chans, embed_dim, norm_layer=nn.LayerNorm)
        self.pos_conv = CircularConv2d(embed_dim, embed_dim, 3, groups=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        norm = cast(type[nn.Module], partial(nn.LayerNorm, eps=1e-6))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, qkv_bias=True, norm_layer=norm, drop_path=r) for r in rates))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_weights)
        trunc_normal_(self.cls_token, std=0.02)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        size = patch_grid((x.shape[2], x.shape[3]), self.patch_size, "PolyViT")
        x = self.patch_embed(anchored(x, self.patch_size)).mT.unflatten(2, size)
        x = (x + self.pos_conv(x)).flatten(2).mT
        return self.norm(self.blocks(torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1)))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names of PolyViT to ours."""
    return {k.replace("pos_conv.proj.", "pos_conv."): v for k, v in state.items()}


SVT = dict(mlp_ratios=(4, 4, 4, 4), wss=(7, 7, 7, 7), sr_ratios=(8, 4, 2, 1))
for _name, _arguments in {
    "small": dict(SVT, embed_dims=(64, 128, 256, 512), num_heads=(2, 4, 8, 16), depths=(2, 2, 10, 4), drop_path_rate=0.2),
    "base": dict(SVT, embed_dims=(96, 192, 384, 768), num_heads=(3, 6, 12, 24), depths=(2, 2, 18, 2), drop_path_rate=0.3),
    "large": dict(SVT, embed_dims=(128, 256, 512, 1024), num_heads=(4, 8, 16, 32), depths=(2, 2, 18, 2), drop_path_rate=0.5),
}.items():
    publish(
        PolyTwins,
        f"polytwins_svt_{_name}",
        _arguments,
        variant=f"shift-equivariant-vit--polytwins_svt_{_name}",
        first_conv="patch_embeds.0.proj",
    )
for _name, _arguments in {"small": dict(), "base": dict(embed_dim=768, num_heads=12)}.items():
    publish(
        PolyViT,
        f"polyvit_{_name}",
        _arguments,
        variant=f"shift-equivariant-vit--polyvit_{_name}",
        convert=convert,
        first_conv="patch_embed.proj",
    )
