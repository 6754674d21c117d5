"""LSNet: see large, focus small. Wang et al., "LSNet: See Large, Focus Small" (CVPR 2025).

Facts from the official repository, jameslahm/lsnet. Its dynamic convolution is a Triton kernel; here it is a sum of shifted maps,
which any runtime computes. In training, a distilled model gives the mean of its two heads as it does in evaluation, not the pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import SqueezeExcite, to_2tuple
from torch import Tensor, nn

from ..errors import VitreousError
from ..mixers import DistilledHead, conv_norm
from .classifier import Pyramid
from .official import publish, renamed


def small_kernel_aggregation(x: Tensor, kernels: Tensor) -> Tensor:
    """SKA, small-kernel aggregation: a convolution, zeros beyond the border, whose 3 × 3 kernel is another at every place.

    x: `[B, C, H, W]`. kernels: `[B, G, 9, H, W]`; channel c uses kernel c mod G.
    """
    height, width = x.shape[2:]
    around = F.pad(x, (1, 1, 1, 1)).unflatten(1, (-1, kernels.shape[1]))
    seen = (around[..., row : row + height, column : column + width] for row in range(3) for column in range(3))
    terms = [kernels[:, None, :, i] * x for i, x in enumerate(seen)]
    return sum(terms[1:], terms[0]).flatten(1, 2)


class LSConv(nn.Module):
    """LS convolution on maps `[B, C, H, W]`: a 7 × 7 look around every place decides the 3 × 3 kernels used there."""

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        half, self.kernels = channels // 2, channels // groups
        self.perceive = nn.Sequential(
            conv_norm(channels, half, 1),
            nn.ReLU(),
            conv_norm(half, half, 7, groups=half),
            conv_norm(half, half, 1),
            nn.ReLU(),
            nn.Conv2d(half, 9 * self.kernels, 1),
            nn.GroupNorm(self.kernels, 9 * self.kernels),
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(small_kernel_aggregation(x, self.perceive(x).unflatten(1, (self.kernels, 9))))


class RepDepthwise(nn.Module):
    """The sum of a depthwise 3 × 3 and a depthwise 1 × 1 convolution, each normalised; `[B, C, H, W]`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv3 = conv_norm(channels, channels, 3, groups=channels)
        self.conv1 = conv_norm(channels, channels, 1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(x) + self.conv1(x)


class Attention(nn.Module):
    """LeViT's attention on maps `[B, C, *size]`, its queries smoothed by a depthwise 3 × 3 convolution.

    A learned bias belongs to every head and absolute offset between two places: Graham et al., "LeViT" (ICCV 2021), section 4.2.
    """

    offsets: Tensor

    def __init__(self, channels: int, num_heads: int, key_dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads, self.key_width, self.size = num_heads, num_heads * key_dim, size
        self.qkv = conv_norm(channels, 2 * self.key_width + channels, 1)
        self.dw = conv_norm(self.key_width, self.key_width, 3, groups=self.key_width)
        self.proj = nn.Sequential(nn.ReLU(), conv_norm(channels, channels, 1))
        rows, columns = size
        self.attention_biases = nn.Parameter(torch.zeros(num_heads, rows * columns))
        with torch.device("cpu"):
            places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
            offsets = (places[:, None] - places[None]).abs()
        self.register_buffer("offsets", offsets[..., 0] * columns + offsets[..., 1], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[2:]) != self.size:
            raise VitreousError(
                f"LSNet's attention has position biases for {self.size[0]} × {self.size[1]} places, not for {x.shape[2]} × "
                f"{x.shape[3]}: build the model with img_size= the side of your images"
            )
        q, k, v = self.qkv(x).split((self.key_width, self.key_width, x.shape[1]), 1)
        q, k, v = (t.flatten(2).unflatten(1, (self.num_heads, -1)).mT for t in (self.dw(q), k, v))
        attended = F.scaled_dot_product_attention(q, k, v, self.attention_biases[:, self.offsets][None])
        return self.proj(attended.mT.flatten(1, 2).unflatten(2, self.size))


class Block(nn.Module):
    """x + mixer(x), squeezed and excited behind a `RepDepthwise`, then x + mlp(x); `[B, C, H, W]`."""

    def __init__(self, channels: int, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self.se = SqueezeExcite(channels, 0.25) if isinstance(mixer, RepDepthwise) else nn.Identity()
        self.mlp = nn.Sequential(conv_norm(channels, 2 * channels, 1), nn.ReLU(), conv_norm(2 * channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(x + self.mixer(x))
        return x + self.mlp(x)


class LSNet(Pyramid):
    """Images `[B, C, *img_size]` to logits `[B, num_classes]`; the first maps have one place for 8 × 8 pixels.

    num_heads, key_dim: of the attention, which every second block of the last stage has in place of an LS convolution.
    distillation: two heads, whose mean is given.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dims: Sequence[int] = (64, 128, 256, 384),
        depths: Sequence[int] = (0, 2, 8, 10),
        num_heads: int = 4,
        key_dim: int = 16,
        distillation: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, (8, 16, 32, 64), drop_rate)
        self.distillation = distillation
        first = embed_dims[0]
        self.stem = nn.Sequential(
            conv_norm(in_chans, first // 4, 3, 2),
            nn.ReLU(),
            conv_norm(first // 4, first // 2, 3, 2),
            nn.ReLU(),
            conv_norm(first // 2, first, 3, 2),
        )
        rows, columns = (-(-side // 64) for side in cast(tuple[int, int], to_2tuple(img_size)))  # six strides of 2 that round up
        large_small = [LSConv] * 3 + [partial(Attention, num_heads=num_heads, key_dim=key_dim, size=(rows, columns))]
        for i, width in enumerate(embed_dims):
            before = embed_dims[max(i - 1, 0)]
            down = (conv_norm(before, before, 3, 2, groups=before), conv_norm(before, width, 1)) if i else ()
            mixers = (large_small[i](width) if d % 2 else RepDepthwise(width) for d in range(depths[i]))
            self.stages.append(nn.Sequential(*down, *(Block(width, mixer) for mixer in mixers)))
        self.reset_classifier(num_classes)

    def make_head(self, num_classes: int) -> nn.Module:
        def head() -> nn.Module:
            return nn.Sequential(nn.BatchNorm1d(self.num_features), nn.Linear(self.num_features, num_classes))

        return DistilledHead(head(), head()) if self.distillation else head()


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to ours."""
    state = {k: v for k, v in state.items() if not k.endswith("attention_bias_idxs")}
    if any(k.startswith("head_dist.") for k in state):
        state = renamed(state, (r"^head", "head.head"))
    return renamed(
        state,
        (r"^patch_embed", "stem"),
        *((f"^blocks{i + 1}", f"stages.{i}") for i in range(4)),
        (r"mixer\.m\.", "mixer."),
        (r"mixer\.conv\.", "mixer.conv3."),
        (r"mixer\.bn\.", "mixer.norm."),
        (r"ffn\.m\.pw1", "mlp.0"),
        (r"ffn\.m\.pw2", "mlp.2"),
        *((f"lkp.cv{i}", f"perceive.{at}") for i, at in enumerate((0, 2, 3, 5), 1)),
        (r"lkp\.norm", "perceive.6"),
        (r"\.c\.", ".0."),
        (r"(head|head_dist)\.bn\.", r"\1.0."),
        (r"\.(bn|l)\.", ".1."),
    )


SIZES = {
    "t": dict(embed_dims=(64, 128, 256, 384), depths=(0, 2, 8, 10)),
    "s": dict(embed_dims=(96, 192, 320, 448), depths=(1, 2, 8, 10)),
    "b": dict(embed_dims=(128, 256, 384, 512), depths=(4, 6, 8, 10)),
}
for _size, _arguments in SIZES.items():
    for _ending, _distilled in (("", {}), ("_distill", {"distillation": True})):
        _name = f"lsnet_{_size}{_ending}"
        publish(
            LSNet,
            _name,
            {**_arguments, **_distilled},
            variant=f"lsnet--{_name}",
            convert=convert,
            first_conv="stem.0.0",
            fixed_input_size=True,
        )
