"""ChannelViT: every channel of an image has its own patches. Bao, Sivanandan, Karaletsos, "Channel Vision Transformers: An Image
Is Worth C × 16 × 16 Words" (ICLR 2024).

Facts from the official repository, insitro/ChannelViT (its licence is non-commercial: no line of it is here).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import calculate_drop_path_rates, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import resample_position
from .classifier import Classifier, init_weights
from .official import official, publish


def sample_channels(channels: int) -> Tensor:
    """Hierarchical channel sampling (section 3.2): first how many, from 1 to all, then which; their indices.

    Every number of channels is as likely as any other, where dropping each alone would seldom leave few. Draws from torch's
    generator.
    """
    kept = int(torch.randint(1, channels + 1, ()))
    return torch.randperm(channels)[:kept]


class ChannelPatchEmbed(nn.Module):
    """Images `[B, C, H, W]` to tokens `[B, C · h · w, D]`, one channel after the other.

    One projection for all channels, and a learned embedding for each.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(1, embed_dim, patch_size, patch_size)
        self.channel_embed = nn.Parameter(trunc_normal_(torch.empty(in_chans, embed_dim), std=0.02))

    def forward(self, x: Tensor, channels: Tensor) -> Tensor:
        tokens = self.proj(x.flatten(0, 1).unsqueeze(1)).flatten(2).mT.unflatten(0, (-1, x.shape[1]))
        return (tokens + self.channel_embed[channels].unsqueeze(1)).flatten(1, 2)


class ChannelViT(Classifier):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`; published without a head, so that it gives the class token.

    H and W: any multiples of `patch_size`; the position embedding, one for all channels, is resampled to them. `img_size` is that
    of its own grid. hcs: in training, use a sample of the channels for each batch.
    """

    global_pool = "token"

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 0,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        hcs: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.in_chans, self.patch_size, self.hcs = in_chans, patch_size, hcs
        self.embed_dim, self.num_prefix_tokens = embed_dim, 1
        self.patch_embed = ChannelPatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, 1 + (img_size // patch_size) ** 2, embed_dim), std=0.02))
        self.pos_drop = nn.Dropout(drop_rate)
        norm = partial(nn.LayerNorm, eps=1e-6)
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    qkv_bias=True,
                    proj_drop=drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=rate,
                    norm_layer=cast(Any, norm),
                )
                for rate in rates
            )
        )
        self.norm = norm(embed_dim)
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "pos_embed", "patch_embed.channel_embed"}

    def position(self, channels: int, h: int, w: int) -> Tensor:
        """`[1, 1 + channels · h · w, D]`. As in the official code, one channel on the table's own grid alone has it as it is."""
        token, table = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if channels > 1 or (h, w) != (side := round(table.shape[1] ** 0.5), side):
            table = resample_position(table, h, w)
        return torch.cat([token, table.repeat(1, channels, 1)], 1)

    def forward_features(self, x: Tensor, channels: Sequence[int] | None = None) -> Tensor:
        """Tokens `[B, 1 + C · h · w, D]`, the class token first; `channels` as in `forward`."""
        taken = torch.arange(self.in_chans) if channels is None else torch.as_tensor(channels)
        if x.shape[1] != taken.numel() or (channels is not None and not all(0 <= c < self.in_chans for c in channels)):
            raise VitreousError(
                f"ChannelViT knows {self.in_chans} channels; images of {x.shape[1]} need channels=, which of 0 to "
                f"{self.in_chans - 1} each of theirs is"
            )
        if x.shape[2] % self.patch_size or x.shape[3] % self.patch_size:
            raise VitreousError(f"sides {list(x.shape[2:])} do not divide into patches of {self.patch_size}")
        if self.hcs and self.training:
            kept = sample_channels(x.shape[1])
            x, taken = x[:, kept.to(x.device)], taken[kept]
        h, w = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        position = self.position(x.shape[1], h, w)
        tokens = self.patch_embed(x, taken.to(x.device))
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens], 1)
        return self.norm(self.blocks(self.pos_drop(tokens + position)))

    def forward(self, x: Tensor, channels: Sequence[int] | None = None) -> Tensor:
        """`channels`: of the channels that the model knows, those that the images have, in the images' order; all by default."""
        return self.forward_head(self.forward_features(x, channels))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names and shapes to ours: a projection over volumes, and channel embeddings as a map, or as a table for HCS."""
    names = {}
    for key, tensor in state.items():
        if key == "patch_embed.proj.weight":
            tensor = tensor.squeeze(2)
        elif key == "patch_embed.channel_embed":
            tensor = tensor.flatten(2)[0].mT
        names[key.replace("channel_embed.weight", "channel_embed")] = tensor
    return names


SIZES = {
    "tiny": dict(embed_dim=192, num_heads=3),
    "small": dict(embed_dim=384, num_heads=6),
    "base": dict(embed_dim=768, num_heads=12),
}


for _size, _widths in SIZES.items():
    for _hcs in (False, True):
        _prefix = "hcs_" if _hcs else ""
        publish(
            ChannelViT,
            f"{_prefix}channelvit_{_size}",
            dict(_widths, hcs=_hcs),
            variant=f"channelvit--{_prefix}channelvit_{_size}",
            convert=convert,
            num_classes=0,
            first_conv="patch_embed.proj",
        )
        for _patch in (8, 16):
            for _channels in (3, 5, 8, 18):  # ImageNet and Camelyon, JUMP-CP without and with brightfield, So2Sat
                _arguments = dict(_widths, hcs=_hcs, patch_size=_patch, in_chans=_channels)
                official(f"channelvit--{_prefix}{_size}_p{_patch}_c{_channels}", partial(ChannelViT, **_arguments), convert)
# the repository's entries for torch.hub
for _name, _patch, _channels, _hcs in (
    ("imagenet_channelvit_small_p16_DINO", 16, 3, False),
    ("imagenet_channelvit_small_p16_with_hcs_supervised", 16, 3, True),
    ("camelyon_channelvit_small_p8_with_hcs_supervised", 8, 3, True),
    ("cpjump_cellpaint_channelvit_small_p8_with_hcs_supervised", 8, 5, True),
    ("cpjump_cellpaint_bf_channelvit_small_p8_with_hcs_supervised", 8, 8, True),
    ("so2sat_channelvit_small_p8_with_hcs_random_split_supervised", 8, 18, True),
    ("so2sat_channelvit_small_p8_with_hcs_hard_split_supervised", 8, 18, True),
):
    _arguments = dict(SIZES["small"], hcs=_hcs, patch_size=_patch, in_chans=_channels)
    official(f"channelvit--{_name}", partial(ChannelViT, **_arguments), convert)
