"""ElasticViT: a supernet of convolutions and attention from 60 M to over 1 G multiply-accumulates, and the networks in it.

Tang et al., "ElasticViT: Conflict-aware Supernet Training for Deploying Fast Vision Transformer on Diverse Mobile Devices" (ICCV
2023). Facts from the official repository, microsoft/Moonlit. As there, layer norm is over tokens and channels together, and the
queries, keys and values of a head are read across the borders of the three. `learn.ConflictAware` trains the supernet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ..errors import VitreousError
from .classifier import Classifier
from .official import publish, renamed

HEAD, CONVS = 16, 2  # width of a head; stages of convolutions, before those of attention
DOWN = (True, True, True, False, True, True)


class Choice(NamedTuple):
    """A network: side of its images; width, depth and kernel of the stem; and of each stage width and depth, then expansion and
    kernel of its convolutions, or MLP ratio and width of values over that of keys of its attention."""

    side: int
    stem: tuple[int, ...]
    stages: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, given: Sequence[Any]) -> Choice:
        side, stem, stages = given
        return cls(side, tuple(stem), tuple(map(tuple, stages)))


def sides(side: int) -> list[int]:
    """Sides of the maps in the stem and in the six stages."""
    found = [side // 2]
    for i, down in enumerate(DOWN):
        found.append(found[-1] // 2 if down and i < CONVS else -(-found[-1] // 2) if down else found[-1])
    return found


def first(x: Tensor, *sizes: int) -> Tensor:
    """The first of each dimension; `x` itself where that is all, so that a network cut out has nothing to slice."""
    return x if x.shape[: len(sizes)] == sizes else x[tuple(slice(n) for n in sizes)]


class Norm(nn.BatchNorm2d):
    """Batch norm of the first channels, as many as there are; `[B, C, …]`."""

    def forward(self, x: Tensor) -> Tensor:
        n, training = x.shape[1], self.training
        mean, var = first(cast(Tensor, self.running_mean), n), first(cast(Tensor, self.running_var), n)
        if training:
            cast(Tensor, self.num_batches_tracked).add_(1)
        momentum = (
            1 / float(cast(Tensor, self.num_batches_tracked)) if training and self.momentum is None else self.momentum or 0.0
        )
        return F.batch_norm(x, mean, var, first(self.weight, n), first(self.bias, n), training, momentum, self.eps)


class TokenNorm(nn.LayerNorm):
    """Normalises all tokens and channels of an image together; `[B, N, C]`."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[2]
        return F.layer_norm(x, x.shape[1:], eps=self.eps) * first(self.weight, n) + first(self.bias, n)


def prefix_conv(x: Tensor, conv: nn.Conv2d, outputs: int) -> Tensor:
    """A 1 × 1 convolution by the first rows and columns of its weight."""
    return F.conv2d(x, first(conv.weight, outputs, x.shape[1]), None if conv.bias is None else first(conv.bias, outputs))


def prefix_linear(x: Tensor, layer: nn.Linear, outputs: int) -> Tensor:
    return F.linear(x, first(layer.weight, outputs, x.shape[-1]), first(layer.bias, outputs))


class MBConv(nn.Module):
    """Inverted bottleneck `[B, C, H, W]` to `[B, C', H / stride, W / stride]`, `ratio` times as wide within; of a supernet the
    first channels and the middle of the kernel. shortcut: build the one by convolution, which only other widths need."""

    def __init__(
        self, inputs: int, outputs: int, ratio: int, kernel: int, stride: int, se: bool, wide: bool, shortcut: bool
    ) -> None:
        super().__init__()
        inner, self.stride, self.se = inputs * ratio, stride, se
        if wide:
            self.pw_conv, self.pw_bn = nn.Conv2d(inputs, inner, 1, bias=False), Norm(inner)
        self.wide = wide
        self.dw_conv, self.dw_bn = nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False), Norm(inner)
        if se:
            self.se_conv1, self.se_conv2 = nn.Conv2d(inner, inner // 4, 1), nn.Conv2d(inner // 4, inner, 1)
        self.pwl_conv, self.pwl_bn = nn.Conv2d(inner, outputs, 1, bias=False), Norm(outputs)
        if stride == 1:
            nn.init.zeros_(self.pwl_bn.weight)
        if shortcut:
            self.shortcut_conv = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor, outputs: int, ratio: int, kernel: int) -> Tensor:
        passed, inputs = x, x.shape[1]
        inner, cut = inputs * ratio, (self.dw_conv.kernel_size[0] - kernel) // 2
        if self.wide:
            x = F.hardswish(self.pw_bn(prefix_conv(x, self.pw_conv, inner)))
        weight = first(self.dw_conv.weight, inner)
        weight = weight[:, :, cut : cut + kernel, cut : cut + kernel] if cut else weight
        x = F.hardswish(self.dw_bn(F.conv2d(x, weight, None, self.stride, kernel // 2, 1, inner)))
        if self.se:
            s = F.relu(prefix_conv(x.mean((2, 3), keepdim=True), self.se_conv1, inner // 4))
            x = x * F.hardsigmoid(prefix_conv(s, self.se_conv2, inner))
        x = self.pwl_bn(prefix_conv(x, self.pwl_conv, outputs))
        if self.stride > 1:
            passed = F.avg_pool2d(passed, self.stride, padding=passed.shape[-1] % 2)
        return x + (passed if inputs == outputs else prefix_conv(passed, self.shortcut_conv, outputs))


class Attention(nn.Module):
    """Heads of 16 channels, as many as the width has; values `scale` times as wide, through a 3 × 3 convolution; a learnt bias
    for each distance on a map of at most `side` × `side`; `[B, N, C]`."""

    def __init__(self, width: int, scale: int, side: int) -> None:
        super().__init__()
        self.width, self.side = width, side
        self.qkv = nn.Linear(width, (2 + scale) * width, bias=False)
        self.proj = nn.Linear(scale * width, width)
        self.dw_v_conv = nn.Conv2d(scale * width, scale * width, 3, 1, 1, groups=scale * width, bias=False)
        self.attention_bias = nn.Parameter(torch.zeros((2 * side - 1) ** 2, width // HEAD))
        trunc_normal_(self.attention_bias, std=0.02)

    def bias(self, side: int) -> Tensor:
        """`[heads, N, N]` of a map of `side` × `side`."""
        at = torch.arange(side, device=self.attention_bias.device)
        apart = at[:, None] - at + self.side - 1
        index = apart[:, None, :, None] * (2 * self.side - 1) + apart[None, :, None, :]
        return self.attention_bias[index.reshape(-1)].reshape(side * side, side * side, -1).permute(2, 0, 1)

    def forward(self, x: Tensor, scale: int) -> Tensor:
        n, c = x.shape[1:]
        side, most, heads = round(n**0.5), self.width, c // HEAD
        w = first(self.qkv.weight, len(self.qkv.weight), c)
        w = (
            w
            if c == most and scale * c == len(w) - 2 * most
            else torch.cat([w[:c], w[most : most + c], w[2 * most :][: scale * c]])
        )
        q, k, v = F.linear(x, w).unflatten(2, (heads, -1)).split([HEAD, HEAD, HEAD * scale], 3)
        v = v.flatten(2).mT.unflatten(2, (side, side))
        v = F.conv2d(v, first(self.dw_v_conv.weight, scale * c), None, 1, 1, 1, scale * c)
        v = v.flatten(2).mT.unflatten(2, (heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v, attn_mask=first(self.bias(side), heads)[None])
        return prefix_linear(F.hardswish(y.transpose(1, 2).flatten(2)), self.proj, c)


class Block(nn.Module):
    """Pre-norm attention and MLP; `[B, N, C]`."""

    def __init__(self, width: int, ratio: int, scale: int, side: int) -> None:
        super().__init__()
        self.norm1, self.attn = TokenNorm(width), Attention(width, scale, side)
        self.norm2, self.fc1, self.fc2 = TokenNorm(width), nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor, ratio: int, scale: int) -> Tensor:
        c = x.shape[2]
        x = x + self.attn(self.norm1(x), scale)
        return x + prefix_linear(F.hardswish(prefix_linear(self.norm2(x), self.fc1, ratio * c)), self.fc2, c)


class ElasticViT(Classifier):
    """Images `[B, C, H, W]` to logits `[B, num_classes]`; they are resized, bicubically, to the side of the network that runs.

    img_size, stem, stages: the largest network, as a `Choice` says it. least: the smallest; with it this is a supernet, whose
    `choice` runs (the largest by default). Without it there is this one network, and nothing that it does not use.
    features: width of what the classifier reads. head_ratio: of the layer on the last tokens.
    """

    def __init__(
        self,
        img_size: int = 256,
        in_chans: int = 3,
        num_classes: int = 1000,
        stem: Sequence[int] = (24, 2, 5),
        stages: Sequence[Sequence[int]] = (
            (32, 5, 6, 5),
            (48, 6, 6, 5),
            (96, 5, 5, 4),
            (160, 6, 5, 4),
            (288, 6, 5, 4),
            (320, 6, 5, 4),
        ),
        least: Sequence[Any] = (),
        choice: Sequence[Any] = (),
        features: int = 1984,
        head_ratio: int = 6,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__(features, drop_rate)
        self.largest = Choice.of((img_size, stem, stages))
        self.least = Choice.of(least) if least else None
        if len(self.largest.stages) != len(DOWN) or any(s[0] % HEAD for s in self.largest.stages[CONVS:]):
            raise VitreousError(f"ElasticViT: give {len(DOWN)} stages, those of attention as wide as a multiple of {HEAD}")
        elastic, at, (width, depth, kernel) = self.least is not None, sides(img_size), self.largest.stem
        self.first_conv, self.first_conv_bn = nn.Conv2d(in_chans, width, 3, 2, 1, bias=False), Norm(width)
        self.stem = nn.ModuleList(MBConv(width, width, 1, kernel, 1, False, False, elastic) for _ in range(depth))
        self.stages, self.reductions = nn.ModuleList(), nn.ModuleList()
        for i, (outputs, depth, one, two) in enumerate(self.largest.stages):
            inputs, stride = outputs if elastic else width, 2 if DOWN[i] else 1
            if i < CONVS:
                made = [
                    MBConv(
                        outputs if j else inputs,
                        outputs,
                        one,
                        two,
                        1 if j else stride,
                        i > 0,
                        True,
                        elastic or (not j and width != outputs),
                    )
                    for j in range(depth)
                ]
            else:
                self.reductions.append(MBConv(inputs, outputs, 6, 3, stride, True, True, elastic or width != outputs))
                made = [Block(outputs, one, two, at[i + 1]) for _ in range(depth)]
            self.stages.append(nn.ModuleList(made))
            width = outputs
        self.head_ratio = head_ratio
        self.pre_head_0, self.pre_head_norm_0 = nn.Linear(width, width * head_ratio), Norm(width * head_ratio)
        self.pre_head_1 = nn.Linear(width * head_ratio, features)
        self.run(Choice.of(choice) if choice else self.largest)
        self.reset_classifier(num_classes)

    def run(self, choice: Choice) -> None:
        """Which network the images go through from now on. Raises `VitreousError` as `check` does."""
        self.check(choice)
        self.choice = choice

    def check(self, choice: Choice) -> None:
        """Raise `VitreousError` where a network is not in this supernet."""
        flat = lambda c: (c.side, *c.stem, *(n for s in c.stages for n in s))
        low, high = flat(self.least or self.largest), flat(self.largest)
        widths = [choice.stem[0], *(s[0] for s in choice.stages)]
        within = len(flat(choice)) == len(high) and all(a <= b <= c for a, b, c in zip(low, flat(choice), high, strict=True))
        if not within or widths != sorted(widths) or any(s[0] % HEAD for s in choice.stages[CONVS:]):
            raise VitreousError(
                f"there is no network {tuple(choice)} between {tuple(self.least or self.largest)} and {tuple(self.largest)}"
            )

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to tokens `[B, N, C]` of the last stage."""
        c = self.choice
        if x.shape[-2:] != (c.side, c.side):
            x = F.interpolate(x, (c.side, c.side), mode="bicubic")
        width, depth, kernel = c.stem
        x = F.hardswish(self.first_conv_bn(F.conv2d(x, first(self.first_conv.weight, width), None, 2, 1)))
        for block in self.stem[:depth]:
            x = block(x, width, 1, kernel)
        for i, (width, depth, one, two) in enumerate(c.stages):
            blocks = cast(nn.ModuleList, self.stages[i])[:depth]
            if i < CONVS:
                for block in blocks:
                    x = block(x, width, one, two)
                continue
            x = self.reductions[i - CONVS](x, width, 6, 3)
            side, x = x.shape[-1], x.flatten(2).mT
            for block in blocks:
                x = block(x, one, two)
            if i + 1 < len(c.stages):
                x = x.mT.unflatten(2, (side, side))
        return x

    def pool(self, x: Tensor) -> Tensor:
        x = prefix_linear(x, self.pre_head_0, self.head_ratio * x.shape[2])
        x = F.hardswish(self.pre_head_norm_0(x.mT)).mean(2)
        return F.hardswish(prefix_linear(x, self.pre_head_1, self.num_features))


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    def place(stage: str, layer: str) -> str:
        number = int(layer)
        return f"stages.{stage}.{number // 2}." + ("" if number % 2 else "attn.")

    state = renamed(
        {k: v for k, v in state.items() if not k.endswith("relative_position_index")},
        (r"^classifer\.", "head."),
        (r"^conv_stem\.layers\.(\d+)\.0\.", r"stem.\1."),
        (r"^feature_exactor\.([01])\.layers\.(\d+)\.0\.", r"stages.\1.\2."),
        (r"^feature_exactor\.(\d+)\.layers\.0\.reduction\.", lambda m: f"reductions.{int(m[1]) - CONVS}."),
        (r"^feature_exactor\.(\d+)\.layers\.(\d*[13579])\.norm1\.", lambda m: f"stages.{m[1]}.{int(m[2]) // 2}.norm2."),
        (r"^feature_exactor\.(\d+)\.layers\.(\d+)\.norm1\.", lambda m: f"stages.{m[1]}.{int(m[2]) // 2}.norm1."),
        (r"^feature_exactor\.(\d+)\.layers\.(\d+)\.", lambda m: place(m[1], m[2])),
    )
    return state


LEAST = (128, (16, 1, 3), ((16, 2, 3, 3), (16, 2, 3, 3), (48, 1, 2, 2), (80, 1, 2, 2), (144, 1, 2, 2), (160, 1, 2, 2)))
PUBLISHED = {
    "elastic_T1": (128, (16, 1, 3), ((24, 2, 3, 3), (32, 3, 3, 3), (64, 1, 2, 2), (96, 1, 2, 2), (176, 1, 3, 2), (272, 1, 4, 2))),
    "elastic_T2": (160, (16, 1, 3), ((24, 2, 3, 3), (40, 3, 3, 3), (48, 1, 3, 2), (96, 1, 4, 2), (176, 2, 3, 2), (256, 2, 2, 2))),
    "elastic_S1": (192, (16, 1, 3), ((24, 3, 3, 3), (40, 3, 3, 3), (64, 2, 2, 2), (96, 2, 2, 2), (192, 2, 3, 2), (272, 2, 4, 2))),
    "elastic_S2": (224, (16, 1, 3), ((24, 3, 3, 3), (48, 3, 3, 3), (64, 2, 2, 2), (96, 2, 2, 2), (192, 2, 2, 2), (256, 2, 4, 2))),
    "elastic_M": (224, (16, 1, 5), ((32, 3, 3, 3), (48, 5, 3, 3), (64, 2, 2, 2), (96, 2, 4, 2), (192, 2, 4, 2), (288, 2, 5, 2))),
    "elastic_L1": (256, (16, 1, 5), ((24, 3, 3, 5), (40, 3, 6, 5), (64, 2, 4, 2), (96, 2, 3, 2), (192, 2, 4, 2), (320, 2, 4, 2))),
    "elastic_L1.5": (
        256,
        (16, 2, 3),
        ((24, 4, 3, 3), (48, 4, 4, 5), (64, 2, 4, 2), (96, 2, 5, 2), (256, 2, 3, 2), (320, 2, 5, 2)),
    ),
    "elastic_L2": (
        256,
        (16, 1, 3),
        ((24, 3, 6, 3), (40, 4, 6, 3), (80, 2, 3, 2), (128, 2, 2, 2), (256, 2, 3, 2), (304, 2, 5, 3)),
    ),
    "elastic_L3": (
        256,
        (16, 1, 5),
        ((32, 3, 5, 3), (48, 4, 5, 5), (80, 2, 4, 2), (128, 2, 4, 2), (256, 2, 3, 2), (320, 2, 5, 2)),
    ),
}
for name, choice in PUBLISHED.items():  # each is the whole supernet, in which this network runs
    publish(
        ElasticViT, name.replace(".", "_"), dict(least=LEAST, choice=choice), variant=f"elasticvit--{name}", convert=convert,
        size=choice[0], first_conv="first_conv",
    )  # fmt: skip
