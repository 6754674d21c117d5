"""Hyena N-D: a ViT whose tokens are mixed by gated convolutions over the whole map. Zimerman and Wolf, "Multi-Dimensional Hyena
for Spatial Inductive Bias" (AISTATS 2024).

Facts from a public copy of the authors' supplementary code. As there, a convolution sees the places above and to the left alone
("standard"), unless one of the other directions undoes that, and is a 2 · side-th of the true one. The ViTs' sizes are ours:
that code has the layer only.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Mlp, PatchEmbed, trunc_normal_
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import MetaBlock, patch_grid, require_size
from ..mixers.implicit import Places, Sine, decay_rates, filter_network, long_convolution
from .classifier import Classifier, init_weights
from .official import official, publish

DIRECTIONS = ("standard", "seq", "4dir", "4dirp")


class MapFilter(nn.Module):
    """Filters `[C, side, side]`, as a function of row and column.

    joint: one network for both, else the product of one for each. window: whether they fall off with the distance.
    """

    deltas: Tensor

    def __init__(self, channels: int, side: int, places: int, width: int, omega: float, joint: bool, window: bool) -> None:
        super().__init__()
        self.joint, self.window = joint, window
        self.bias = nn.Parameter(torch.randn(channels))
        self.pos_emb = Places(side, places)
        sine = Sine(width, omega)
        if joint:
            self.implicit_filter = filter_network(2 * places, width, channels, sine)
        else:
            self.Yimplicit_filter = filter_network(places, width, channels, sine)
            self.Ximplicit_filter = filter_network(places, width, channels, sine)
        self.register_buffer("deltas", decay_rates(channels), persistent=False)

    def forward(self) -> Tensor:
        z, fall = self.pos_emb.z[0], (-self.pos_emb.t[0] * self.deltas).exp()  # [side, places], [side, C]
        if self.joint:
            side = z.shape[0]
            both = torch.cat((z[:, None].expand(-1, side, -1), z[None].expand(side, -1, -1)), -1)
            found = self.implicit_filter(both)
            return (found * (fall[:, None] * fall[None]) if self.window else found).permute(2, 0, 1)
        rows, columns = self.Ximplicit_filter(z), self.Yimplicit_filter(z)
        if self.window:
            rows, columns = rows * fall, columns * fall
        return rows.T[:, :, None] * columns.T[:, None]


class HyenaOperator(nn.Module):
    """Maps `[B, side, side, C]`, gated and convolved `order` − 1 times in turn, then gated once more.

    direction: what a place sees of the others. "standard": what is above and to the left. "seq": below and to the right in the
    first convolution. "4dir" and "4dirp": one convolution of four flipped copies, mixed by four numbers, or by a linear layer.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        order: int = 2,
        direction: str = "standard",
        joint: bool = False,
        window: bool = True,
        places: int = 3,
        width: int = 64,
        omega: float = 1.0,
    ) -> None:
        super().__init__()
        if direction not in DIRECTIONS or order < 2:
            raise VitreousError(f"Hyena N-D: order must be 2 or more and direction one of {', '.join(DIRECTIONS)}")
        self.channels, self.order, self.direction = channels, order, direction
        if direction == "4dir":
            self.linear_mix = nn.Linear(4, 1)
        elif direction == "4dirp":
            self.linear_mix = nn.Linear(4 * channels, channels)
        inner = channels * (order + 1)
        self.in_proj, self.out_proj = nn.Linear(channels, inner), nn.Linear(channels, channels)
        self.short_filter = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.filter_fn = MapFilter(channels * (order - 1), side, places, width, omega, joint, window)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.short_filter(self.in_proj(x).permute(0, 3, 1, 2)).split(self.channels, 1)
        if self.direction.startswith("4dir"):
            parts = [torch.cat((p, p.flip(2, 3), p.flip(3), p.flip(2))) for p in parts]
        last, *gates, v = parts
        kernels, side = self.filter_fn().split(self.channels), x.shape[1]
        biases = self.filter_fn.bias.split(self.channels)
        for i, (gate, kernel, bias) in enumerate(zip(reversed(gates), kernels, biases, strict=True)):
            v = v * gate
            turned = self.direction == "seq" and i == 0
            v = v.flip(2, 3) if turned else v
            v = long_convolution(v, F.pad(kernel, (0, side, 0, side))) / (2 * side) + bias[:, None, None] * v
            v = v.flip(2, 3) if turned else v
        y = (v * last).permute(0, 2, 3, 1)
        if self.direction.startswith("4dir"):
            first, both, columns, rows = y.unflatten(0, (4, x.shape[0]))
            y = torch.stack((first, both.flip(1, 2), columns.flip(2), rows.flip(1)), -1)
            y = self.linear_mix(y).squeeze(-1) if self.direction == "4dir" else self.linear_mix(y.flatten(3))
        return self.out_proj(y)


class TokenHyena(nn.Module):
    """`HyenaOperator` on the tokens `[B, side · side, C]` of a square grid."""

    def __init__(self, channels: int, side: int, order: int, direction: str) -> None:
        super().__init__()
        self.side, self.op = side, HyenaOperator(channels, side, order, direction)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x.unflatten(1, (self.side, self.side))).flatten(1, 2)


class ReleasedLayer(nn.Module):
    """The released layer alone, on maps `[B, C, side, side]`; `[B, side, side, C]` out."""

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__()
        self.op = HyenaOperator(channels, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x.permute(0, 2, 3, 1))


class HyenaViT(Classifier):
    """Images `[B, C, img_size, img_size]` to logits `[B, num_classes]`: a ViT without class token.

    hyena_depth: how many of the first layers mix by Hyena; the others, if any, attend (the paper's hybrid). direction, order:
    as in `HyenaOperator`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        hyena_depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        direction: str = "4dir",
        order: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dim, drop_rate)
        self.size = (img_size, img_size)
        side, _ = patch_grid(self.size, patch_size, "Hyena N-D")
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, side * side, embed_dim))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(
                MetaBlock(
                    embed_dim,
                    TokenHyena(embed_dim, side, order, direction)
                    if i < hyena_depth
                    else Attention(embed_dim, num_heads, qkv_bias=True),
                    Mlp(embed_dim, int(embed_dim * mlp_ratio), drop=drop_rate),
                    norm,
                    drop_path=drop_path_rate * i / max(depth - 1, 1),
                )
                for i in range(depth)
            )
        )
        self.norm = norm(embed_dim)
        self.apply(init_weights)
        trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():  # a filter of small weights would be no function of the place
            if isinstance(module, MapFilter):
                for layer in module.modules():
                    cast(nn.Linear, layer).reset_parameters() if isinstance(layer, nn.Linear) else None
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        require_size(x, self.size, "Hyena N-D")
        return self.norm(self.blocks(self.patch_embed(x) + self.pos_embed))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names are ours; what the constructor computes is left out."""
    return {k: v for k, v in state.items() if not k.endswith((".pos_emb.t", "deltas"))}


TINY = dict(embed_dim=192, num_heads=3)
for _name, _arguments, _size in (
    ("vit_tiny", TINY, 224),
    ("vit_tiny_hybrid", dict(TINY, hyena_depth=6), 224),
    ("vit_tiny_cifar", dict(TINY, img_size=32, patch_size=4, num_classes=10), 32),
):
    publish(
        HyenaViT,
        f"hyena_nd_{_name}",
        _arguments,
        variant=f"hyena-nd--{_name}",
        first_conv="patch_embed.proj",
        size=_size,
        num_classes=_arguments.get("num_classes", 1000),
    )
_layer = partial(ReleasedLayer, 24, side=8)
official("hyena-nd--product_standard", partial(_layer, width=16), convert)
official("hyena-nd--filter2d_4dir", partial(_layer, width=16, joint=True, direction="4dir"), convert)
official("hyena-nd--product_4dirp_nowindow", partial(_layer, width=16, direction="4dirp", window=False), convert)
official("hyena-nd--filter2d_order3", partial(_layer, width=16, joint=True, order=3), convert)
