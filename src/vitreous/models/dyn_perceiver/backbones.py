"""The feature branches of Dynamic Perceiver: MobileNetV3, RegNet-Y, and narrowed ResNets; see `dyn_perceiver`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import timm.models.resnet
import torchvision
from torch import nn


@dataclass(frozen=True)
class Backbone:
    """A feature branch cut where the latents exchange with it."""

    stem: nn.Module
    stages: tuple[nn.Module, nn.Module, nn.Module, nn.Module]
    hidden: int | None = None  # width of a second layer in the classifiers that see the feature map
    drop_rate: float = 0.0  # before the cnn exit

    @property
    def widths(self) -> list[int]:
        """Channels before each stage, and behind the last."""
        convs = [[m for m in stage.modules() if isinstance(m, nn.Conv2d)] for stage in self.stages]
        return [c[0].in_channels for c in convs] + [convs[-1][-1].out_channels]


def mobilenet(width: float) -> Backbone:
    net = torchvision.models.mobilenet_v3_large(weights=None, width_mult=width)
    f = net.features
    hidden = next(m for m in net.classifier if isinstance(m, nn.Linear)).out_features
    stem, one, two, three, four = (nn.Sequential(*f[a:b]) for a, b in pairwise((0, 3, 5, 8, 14, len(f))))
    return Backbone(stem, (one, two, three, four), hidden=hidden)


def regnet(build: Callable[..., Any]) -> Backbone:
    net = build(weights=None)
    return Backbone(net.stem, tuple(net.trunk_output))


def resnet(width: float, depths: tuple[int, ...], bottleneck: bool) -> Backbone:
    """timm's ResNet narrowed throughout, stem included."""
    channels = [int(c * width) for c in (64, 64, 128, 256, 512)]
    stem = nn.Sequential(
        nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(channels[0]),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    )
    block: Any = timm.models.resnet.Bottleneck if bottleneck else timm.models.resnet.BasicBlock
    stages, _ = timm.models.resnet.make_blocks((block,) * 4, tuple(channels[1:]), depths, channels[0], drop_path_rate=0.2)
    for m in [*stem.modules(), *(m for _, stage in stages for m in stage.modules())]:
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(m, block):
            cast(Any, m).zero_init_last()
    one, two, three, four = (stage for _, stage in stages)
    return Backbone(stem, (one, two, three, four), drop_rate=0.2)
