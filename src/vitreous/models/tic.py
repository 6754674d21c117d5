"""TiC: convolutions that attend. Zhang et al., "TiC: Exploring Vision Transformer in Convolution" (2023).

Facts of the layer from the official repository, zs670980918/MSA-Conv, which holds nothing else. The network is ours, after the
paper's description: stages of MSA-Conv whose keys and values are shifted in four directions, and between stages MSA-Conv over the
pooled map; its depths and widths could not be had.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..mixers import conv_norm
from .classifier import Pyramid, init_weights
from .official import publish

DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))  # rows and columns, in turn over quarters of the channels


class LocalAttention(nn.Module):
    """Softmax attention of every place of `[B, C, H, W]` to the `kernel` × `kernel` places around it, `dilation` apart.

    Places outside of the map take part with score and value 0, as those of a convolution do. shift: by how many places keys and
    values are moved round the map, each quarter of the channels in a direction of its own, so that places far apart become
    neighbours (multi-directional cyclic shift).
    """

    def __init__(self, channels: int, num_heads: int, kernel: int, dilation: int, shift: int, drop: float) -> None:
        super().__init__()
        self.num_heads, self.kernel, self.dilation, self.shift = num_heads, kernel, dilation, shift
        self.qkv_conv = nn.Conv2d(channels, 3 * channels, 1)
        self.drop = nn.Dropout(drop)

    def around(self, x: Tensor) -> list[Tensor]:
        """For each of the places around: its value at every place of the map `[…, H, W]`."""
        (height, width), d = x.shape[-2:], self.dilation
        x = F.pad(x, (d * (self.kernel // 2),) * 4)
        steps = [d * i for i in range(self.kernel)]
        return [x[..., i : i + height, j : j + width] for i in steps for j in steps]

    def forward(self, x: Tensor) -> Tensor:
        size, scale = x.shape[-2:], (x.shape[1] // self.num_heads) ** -0.5
        q, k, v = self.qkv_conv(x).chunk(3, 1)
        q, k, v = (t.unflatten(1, (self.num_heads, -1)) for t in (scale * q, moved(k, self.shift), moved(v, self.shift)))
        scores = torch.stack([(q * near).sum(2) for near in self.around(k)], -1)  # [B, heads, H, W, kernel²]
        weights = self.drop(scores.flatten(2, 3).softmax(-1)).unflatten(2, size).unsqueeze(2).unbind(-1)
        parts: list[Tensor] = [weight * near for weight, near in zip(weights, self.around(v), strict=True)]
        return sum(parts[1:], parts[0]).flatten(1, 2)


class MSAConv(nn.Module):
    """x + attention in the window of a convolution, and then that convolution; `[B, C, H, W]` to `[B, outputs, H', W']`.

    With one head and no shift it is the released layer, behind which stands a ReLU. num_heads: groups of channels that attend by
    themselves. dilation, shift: of the attention.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        dilation: int = 1,
        num_heads: int = 1,
        shift: int = 0,
        drop: float = 0.1,
    ) -> None:
        super().__init__()
        self.attn = LocalAttention(inputs, num_heads, kernel, dilation, shift, drop)
        self.mlp = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attn(x))


def moved(x: Tensor, shift: int) -> Tensor:
    """The map `[B, C, H, W]` rolled by `shift`, each quarter of its channels in its own direction."""
    if not shift:
        return x
    quarters = zip(x.tensor_split(4, 1), DIRECTIONS, strict=True)
    return torch.cat([part.roll((shift * rows, shift * columns), (2, 3)) for part, (rows, columns) in quarters], 1)


class TiC(Pyramid):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`: there are no positions but those of convolutions.

    shift: of every second block.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 4, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel: int = 3,
        shift: int = 2,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__(embed_dims, [4 << i for i in range(len(depths))])
        half, first = embed_dims[0] // 2, embed_dims[0]
        self.stem = nn.Sequential(conv_norm(in_chans, half, 3, 2), nn.ReLU(), conv_norm(half, first, 3, 2), nn.ReLU())

        def layer(inputs: int, outputs: int, heads: int, shift: int) -> nn.Module:
            conv = MSAConv(inputs, outputs, kernel, num_heads=heads, shift=shift, drop=drop_rate)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

        for i, width in enumerate(embed_dims):
            pooled = [nn.AvgPool2d(2), layer(embed_dims[i - 1], width, num_heads[i], 0)] if i else []
            blocks = [layer(width, width, num_heads[i], shift if j % 2 else 0) for j in range(depths[i])]
            self.stages.append(nn.Sequential(*pooled, *blocks))
        self.apply(init_weights)
        self.reset_classifier(num_classes)


publish(
    TiC,
    "tic_tiny",
    {},
    variant="tic--tiny",
    doc="TiC of our sizes: the published network could not be had.",
    first_conv="stem.0.0",
)
