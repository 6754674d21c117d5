"""Lightweight UniFormer: its global blocks work on half of the places and on one token that stands for the rest.

Li et al., "UniFormer: Unifying Convolution and Self-attention for Visual Recognition" (TPAMI 2023), with the slow-fast updating
of Xu et al., "Evo-ViT: Slow-Fast Token Evolution for Dynamic Vision Transformer" (AAAI 2022). Facts from the official repository,
Sense-X/UniFormer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, trunc_normal_
from torch import Tensor, nn

from ...mixers import ConditionalPosition
from ..classifier import Pyramid, init_weights
from ..official import publish, renamed
from .network import conv_stem, local_block, patch_embed
from .network import convert as convert_uniformer

norm_layer = partial(nn.LayerNorm, eps=1e-6)
Carried = tuple[Tensor, Tensor, Tensor | None]  # a map, the class token, the scores of the places


class ScoringAttention(nn.Module):
    """Softmax attention on tokens `[B, N, C]`, and what the first token attends to, `[B, N]`, the mean over heads."""

    def __init__(self, channels: int, heads: int, attn_drop: float = 0.0, proj_drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (channels // heads) ** -0.5
        self.qkv, self.attn_drop = nn.Linear(channels, 3 * channels), nn.Dropout(attn_drop)
        self.proj, self.proj_drop = nn.Linear(channels, channels), nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.mT * self.scale).softmax(-1)
        x = (self.attn_drop(attention) @ v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x)), attention[:, :, 0].mean(1)


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """The tokens `[B, N, C]` in the `order` `[B, N]`."""
    return x.gather(1, order[:, :, None].expand(-1, -1, x.shape[2]))


class EvolvingBlock(nn.Module):
    """A block on a map `[B, C, H, W]`, a class token `[B, 1, C]` and the scores of the places `[B, H · W]`; gives all three.

    Without scores, in the first block, every place is updated, and what the class token attends to becomes the scores. With them,
    the half with the highest is updated (slow); the rest is summed, weighted by score, to one more token, and gets what that
    token got (fast). The scores of the first half are mixed half and half with what the class token attends to now.
    """

    def __init__(self, channels: int, heads: int, hidden: int, drop: float, attn_drop: float, drop_path: float) -> None:
        super().__init__()
        self.position = ConditionalPosition(channels)
        self.norm1, self.attn = norm_layer(channels), ScoringAttention(channels, heads, attn_drop, drop)
        self.norm2, self.mlp = norm_layer(channels), Mlp(channels, hidden, drop=drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def update(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens after attention and MLP, what the last one got from both, and what the class token attends to."""
        mixed, attended = self.attn(self.norm1(tokens))
        tokens = tokens + self.drop_path(mixed)
        changed = self.mlp(self.norm2(tokens))
        return tokens + self.drop_path(changed), mixed[:, -1:] + changed[:, -1:], attended[:, 1:]

    def forward(self, x: Tensor, token: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x = self.position(x)
        grid, places = x.shape[2:], x.flatten(2).mT
        if scores is None:
            tokens, _, scores = self.update(torch.cat([token, places], 1))
            places = tokens[:, 1:]
        else:
            half = places.shape[1] // 2
            order = scores.argsort(1, descending=True)
            places, scores = reordered(places, order), scores.gather(1, order)
            rest, weights = places[:, half:], scores[:, half:]
            summed = (rest * (weights / weights.sum(1, keepdim=True))[:, :, None]).sum(1, keepdim=True)
            tokens, fast, attended = self.update(torch.cat([token, places[:, :half], summed], 1))
            places = torch.cat([tokens[:, 1:-1], rest + fast], 1)
            scores = torch.cat([0.5 * scores[:, :half] + 0.5 * attended[:, :-1], scores[:, half:]], 1)
            back = order.argsort(1)
            places, scores = reordered(places, back), scores.gather(1, back)
        return places.mT.unflatten(2, grid), tokens[:, :1], scores


class EvolvingStage(nn.Module):
    """Patches of 2, then `EvolvingBlock`s. The `first` reads a map and brings the class token. Behind a stage of the same kind
    its scores are averaged over the new patches, keeping their sum, and the class token goes through a linear layer."""

    def __init__(self, inputs: int, channels: int, blocks: Sequence[nn.Module], first: bool) -> None:
        super().__init__()
        self.embed, self.blocks = patch_embed(inputs, channels, 2), nn.ModuleList(blocks)
        self.cls_upsample = nn.Identity() if first else nn.Linear(inputs, channels)
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, channels), std=0.02)) if first else None

    def forward(self, carried: Tensor | Carried) -> Carried:
        if isinstance(carried, Tensor):
            assert self.cls_token is not None
            carried = carried, self.cls_token.repeat(carried.shape[0], 1, 1), None
        x, token, scores = carried
        token = self.cls_upsample(token)
        if scores is not None:
            pooled = F.avg_pool2d(scores.unflatten(1, x.shape[2:])[:, None], 2).flatten(1)
            scores = pooled * (scores.sum(1, keepdim=True) / pooled.sum(1, keepdim=True))
        x = self.embed(x)
        for block in self.blocks:
            x, token, scores = block(x, token, scores)
        return x, token, scores


class UniFormerLight(Pyramid):
    """Images `[B, C, H, W]`, H and W at least 64, to logits `[B, num_classes]`, from the mean of the last map.

    `norm_cls` and `head_cls`, which read the class token, are in official checkpoints: their answer is for the official training
    alone, and `forward` does not use them.
    """

    head_cls: nn.Module

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (56, 112, 224, 448),
        depths: Sequence[int] = (2, 5, 8, 2),
        head_dim: int = 28,
        mlp_ratio: float = 3.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (4, 8, 16, 32), drop_rate)
        rates = cast(list[list[float]], calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True))
        for i, width in enumerate(embed_dims):
            hidden = int(width * mlp_ratio)
            if i < 2:
                embed = patch_embed(in_chans, width, 2) if i else conv_stem(in_chans, width)
                stage = nn.Sequential(embed, *(local_block(width, hidden, None, drop_rate, rate) for rate in rates[i]))
            else:
                drops = (drop_rate, attn_drop_rate)
                blocks = [EvolvingBlock(width, width // head_dim, hidden, *drops, rate) for rate in rates[i]]
                stage = EvolvingStage(in_chans, width, blocks, first=i == 2)
            self.stages.append(stage)
            in_chans = width
        self.norm, self.norm_cls = nn.BatchNorm2d(embed_dims[-1]), nn.LayerNorm(embed_dims[-1])
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        head = self.make_head(num_classes).apply(init_weights) if num_classes else nn.Identity()
        self.head_cls = head.to(self.norm_cls.weight)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours."""
    names = convert_uniformer({k: v for k, v in state.items() if not k.startswith("patch_embed")})
    embeds = renamed(
        {k: v for k, v in state.items() if k.startswith("patch_embed")},
        *(
            (rf"^patch_embed1\.proj\.{i}\.", f"stages.0.0.{place}.")
            for i, place in ((0, "0.0"), (1, "0.1"), (3, "2.0"), (4, "2.1"))
        ),
        (r"^patch_embed2\.proj", "stages.1.0.0"),
        (r"^patch_embed2\.norm", "stages.1.0.1"),
        *((rf"^patch_embed{i + 1}\.proj", f"stages.{i}.embed.0") for i in (2, 3)),
        *((rf"^patch_embed{i + 1}\.norm", f"stages.{i}.embed.1") for i in (2, 3)),
    )
    blocks = [(rf"^stages\.([23])\.{i + 1}\.", rf"stages.\1.blocks.{i}.") for i in range(32)]
    return {
        **embeds,
        **renamed(names, *blocks, (r"^cls_upsample", "stages.3.cls_upsample"), (r"^cls_token", "stages.2.cls_token")),
    }


XS = dict(embed_dims=(64, 128, 256, 512), depths=(3, 5, 9, 3), head_dim=32)
VARIANTS = {
    "uniformer_xxs": ({}, 224),
    "uniformer_xxs_128": ({}, 128),
    "uniformer_xxs_160": ({}, 160),
    "uniformer_xxs_192": ({}, 192),
    "uniformer_xs": (XS, 224),
    "uniformer_xs_192": (XS, 192),
}
for _name, (_arguments, _size) in VARIANTS.items():
    publish(
        UniFormerLight,
        _name,
        _arguments,
        variant=f"uniformer--{_name}",
        convert=convert,
        size=_size,
        first_conv="stages.0.0.0.0",
        classifier=("head", "head_cls"),
    )
