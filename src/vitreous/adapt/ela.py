"""Attention by row and by column in the blocks of a convolutional network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from .. import mixers
from ..errors import VitreousError
from ..mixers.ela import VERSIONS
from ..steps import Step, step
from .frozen import after_integers

# After which layer of a block it comes: the last of the residual branch, or the depthwise one (section 4.1).
LAYERS: dict[type[nn.Module], str] = {BasicBlock: "bn2", Bottleneck: "bn3", ConvNeXtBlock: "conv_dw"}
BY_NAME = {"InvertedResidual": "bn2", "DepthwiseSeparableConv": "bn1"}


@step("adapt")
@dataclass(frozen=True)
class ELA(Step):
    """Xu and Wan, "ELA: Efficient Local Attention for Deep Convolutional Neural Networks" (2024): one layer a block that weights
    the map by row and by column (`mixers.ELA`).

    In timm's ResNets it comes behind the last norm of the residual branch, in MobileNets and EfficientNets behind the depthwise
    convolution, as published; in ConvNeXts behind the depthwise convolution too. It changes what the model computes, so train
    it, with all the rest: `vt.train`. Blocks whose channels do not divide into the groups of the norm are left alone.

    Comes before quantization; deployable.
    """

    version: Literal["T", "B", "S", "L"] = "T"

    def refuse_after(self, done: Sequence[Step]) -> str:
        if any(isinstance(s, ELA) for s in done):
            return "the blocks have it already"
        return after_integers(done)

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        found = 0
        for block in list(model.modules()):
            kinds = [last for kind, last in LAYERS.items() if isinstance(block, kind)]
            last = kinds[0] if kinds else BY_NAME.get(type(block).__name__)
            layer: Any = getattr(block, last, None) if last else None
            if last is None or layer is None:
                continue
            channels = layer.weight.shape[0]
            if channels % VERSIONS[self.version][2] or channels % 8:
                continue
            made = mixers.ELA(channels, self.version).to(layer.weight).train(block.training)
            setattr(block, last, Followed(layer, made))
            found += 1
        if not found:
            raise VitreousError(
                f"{self.name}: {type(model).__name__} has no block of a ResNet, MobileNet, EfficientNet or ConvNeXt with a "
                f"multiple of {VERSIONS[self.version][2]} channels"
            )

    def covers(self, model: nn.Module, calibration: Any) -> str:
        return f"{sum(isinstance(m, Followed) for m in model.modules())} blocks"


class Followed(nn.Module):
    """A layer and what was put behind it."""

    def __init__(self, layer: nn.Module, then: nn.Module) -> None:
        super().__init__()
        self.layer, self.then = layer, then

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.then(self.layer(x, *args, **kwargs))
