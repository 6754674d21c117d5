"""DeepMAD: convolutional networks whose widths and depths a mathematical program found.

Shen et al., "DeepMAD: Mathematical Architecture Design for Deep Convolutional Neural Network" (CVPR 2023). Facts from the
official repository, alibaba/lightweight-neural-architecture-search. `vitreous.search.nets.deepmad` finds a structure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn

from ..mixers import conv_norm
from .classifier import Classifier, init_weights
from .official import publish, renamed


@dataclass(frozen=True)
class Stage:
    """`depth` blocks of a kernel between two 1 × 1 convolutions: `out` channels, `btn` between, the first block with `stride`."""

    out: int
    btn: int
    kernel: int
    depth: int
    stride: int = 2


class SqueezeExcite(nn.Module):
    """Maps `[B, C, h, w]` times a sigmoid of their mean; its width is 8 · max(1, ⌊C / 32⌋), C / 4 rounded first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = 8 * max(1, round(channels / 4) // 8)
        self.reduce, self.expand = conv_norm(channels, width, 1), conv_norm(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class Bottleneck(nn.Module):
    """1 × 1, k × k, 1 × 1, each with BatchNorm; `[B, C, h, w]`. The activation comes after the sum too.

    depthwise: the k × k has one channel a group and a squeeze-and-excitation behind it, and where the number of channels
    changes there is no shortcut. Else the shortcut of a first block has a convolution of its own.
    """

    def __init__(self, inputs: int, stage: Stage, first: bool, depthwise: bool) -> None:
        super().__init__()
        stride, btn = stage.stride if first else 1, stage.btn
        self.act = nn.SiLU() if depthwise else nn.ReLU()
        self.conv1 = conv_norm(inputs, btn, 1)
        self.conv2 = conv_norm(btn, btn, stage.kernel, stride, groups=btn if depthwise else 1)
        self.se = SqueezeExcite(btn) if depthwise else nn.Identity()
        self.conv3 = conv_norm(btn, stage.out, 1)
        self.pool = nn.AvgPool2d(2) if stride == 2 else nn.Identity()
        self.shortcut = conv_norm(inputs, stage.out, 1) if first and not depthwise else nn.Identity()
        self.residual = not depthwise or inputs == stage.out

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))
        return self.act(y + self.shortcut(self.pool(x)) if self.residual else y)


class DeepMAD(Classifier):
    """Images `[B, C, H, W]` of any size to logits `[B, num_classes]`.

    stem: channels after the first convolution, 3 × 3 with stride 2. last: channels of a last 1 × 1 convolution, None for none.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        stem: int = 32,
        stages: Sequence[Stage | Sequence[int]] = (),
        depthwise: bool = False,
        last: int | None = None,
        drop_rate: float = 0.0,
    ) -> None:
        given = [s if isinstance(s, Stage) else Stage(*s) for s in stages]
        super().__init__(last or given[-1].out, drop_rate)
        self.stem = nn.Sequential(conv_norm(in_chans, stem, 3, 2), nn.ReLU())
        self.stages, inputs = nn.Sequential(), stem
        for stage in given:
            blocks = nn.Sequential()
            for i in range(stage.depth):
                blocks.append(Bottleneck(inputs, stage, i == 0, depthwise))
                inputs = stage.out
            self.stages.append(blocks)
        self.last = nn.Sequential(conv_norm(inputs, last, 1), nn.ReLU()) if last else nn.Identity()
        self.apply(init_weights)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images to `[B, C, H / 32, W / 32]`."""
        return self.last(self.stages(self.stem(x)))


def narrowed(stages: Sequence[Stage], share: float) -> tuple[Stage, ...]:
    """The same depths with widths times `share`, in multiples of 8: for small pictures and few images."""
    eight = lambda n: max(8, 8 * math.ceil(n * share / 8))
    return tuple(replace(s, out=eight(s.out), btn=eight(s.btn)) for s in stages)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    last = max(int(m[1]) for name in state if (m := re.match(r"block_list\.(\d+)\.", name)))

    def stage(m: re.Match[str]) -> str:
        return f"stages.{int(m[1]) - 1}.{m[2]}."

    state = renamed(
        state,
        (r"^fc_linear\.", "head."),
        (r"^block_list\.0\.(conv1|bn1)\.", r"stem.0.\1."),
        (rf"^block_list\.{last}\.(conv1|bn1)\.", r"last.0.\1."),
        (r"\.residual_proj\.", ".shortcut."),
        (r"\.se2\.conv1\.", ".se.reduce."),
        (r"\.se2\.conv2\.", ".se.expand."),
        (r"\.conv1\.(weight|bias)$", r".0.\1"),
        (r"\.bn1\.(\w+)$", r".1.\1"),
    )
    return {re.sub(r"^block_list\.(\d+)\.block_list\.(\d+)\.", stage, k): v for k, v in state.items()}


R18 = (Stage(96, 40, 5, 1), Stage(384, 40, 5, 6), Stage(384, 64, 5, 9), Stage(1024, 104, 3, 10, 1), Stage(672, 104, 5, 12))
M29 = (
    Stage(40, 240, 5, 2, 1),
    Stage(85, 512, 5, 4),
    Stage(134, 800, 5, 6),
    Stage(201, 1208, 5, 6),
    Stage(312, 1872, 5, 5),
)
publish(DeepMAD, "deepmad_r18", dict(stages=R18), variant="deepmad--r18", convert=convert, first_conv="stem.0.0")
publish(
    DeepMAD,
    "deepmad_29m_224",
    dict(stem=40, stages=M29, depthwise=True, last=1792),
    variant="deepmad--29m_224",
    convert=convert,
    first_conv="stem.0.0",
)
