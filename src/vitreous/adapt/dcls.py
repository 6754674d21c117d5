"""Depthwise convolutions whose weights learn where they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import mixers
from ..errors import VitreousError
from ..steps import Step, step
from .frozen import after_integers


@step("adapt")
@dataclass(frozen=True)
class DCLS(Step):
    """Khalfaoui-Hassani, Pellegrini and Masquelier, "Dilated convolution with learnable spacings" (ICLR 2023): every depthwise
    convolution gets a kernel of `size` × `size` with `count` weights at positions that learn; consecutive layers of as many
    channels share positions.

    version: how a weight is shared out among places, "v0" as in the paper, "max" and "gauss" as in Khalfaoui-Hassani's thesis
    (2024), which has `size=23, count=26, version="gauss"` (`mixers.spaced_kernel`). The paper trains from random positions;
    here a trained kernel gives the start: its `count` strongest places. With as many weights as the kernel has places and "v0"
    or "v1" the model computes what it did. All of it goes on learning, positions best at five times the learning rate.

    For the processor the kernel is a dense one of `size` × `size`. Comes before quantization; deployable.
    """

    size: int = 17
    count: int = 34
    version: Literal["v0", "v1", "max", "gauss"] = "v0"

    def __post_init__(self) -> None:
        if not (3 <= self.size <= 101 and self.size % 2):
            raise VitreousError(f"adapt.DCLS: size must be odd and lie in 3 to 101, not {self.size}")
        if not 1 <= self.count <= self.size**2:
            raise VitreousError(f"adapt.DCLS: count must lie in 1 to {self.size**2}, the places of the kernel, not {self.count}")

    def refuse_after(self, done: Sequence[Step]) -> str:
        return after_integers(done)

    def build(self, model: nn.Module, plan: dict[str, Any]) -> None:
        found = [(name, m) for name, m in model.named_modules() if self._fits(m)]
        if not found:
            raise VitreousError(
                f"{self.name}: {type(model).__name__} has no depthwise convolution of an odd kernel "
                f"up to {self.size} × {self.size}, as ConvNeXt, ConvFormer and VAN have"
            )
        shared: list[tuple[str, Any]] = []
        for i, (name, conv) in enumerate(found):
            shared.append((name, conv))
            following = found[i + 1][1] if i + 1 < len(found) else None
            if following is None or following.weight.shape != conv.weight.shape:
                self._replace(model, shared)
                shared = []

    def _fits(self, m: nn.Module) -> bool:
        if not isinstance(m, nn.Conv2d) or not m.groups == m.in_channels == m.out_channels or m.padding_mode != "zeros":
            return False
        side = m.kernel_size[0]
        square = m.kernel_size == (side, side) and m.stride[0] == m.stride[1] and m.dilation == (1, 1)
        return square and 3 <= side <= self.size and side % 2 == 1 and m.padding in ((side // 2,) * 2, "same")

    def _replace(self, model: nn.Module, convs: list[tuple[str, Any]]) -> None:
        """One set of positions for all of these layers."""
        like: Tensor = convs[0][1].weight
        channels, side = like.shape[0], like.shape[-1]
        energy = torch.stack([conv.weight.detach().float().square().flatten(1) for _, conv in convs]).sum(0)
        kept = min(self.count, side * side)
        places = energy.topk(kept, 1).indices.sort(1).values  # [C, kept], in the kernel as it was
        axes = [places // side - side // 2, places % side - side // 2]
        positions = torch.stack(axes if self.version == "v0" else axes[::-1]).unsqueeze(2)
        first: mixers.DCLS | None = None
        for name, conv in convs:
            bias = conv.bias is not None
            made = mixers.DCLS(
                channels, channels, self.count, (self.size, self.size), channels, conv.stride[0], bias, self.version
            ).to(like)
            with torch.no_grad():
                made.weight.zero_()
                made.weight[:, 0, :kept] = conv.weight.flatten(1).gather(1, places)
                made.P[..., :kept] = positions.to(like)
                if made.bias is not None:
                    made.bias.copy_(conv.bias)
            if first is not None:
                made.P, made.SIG = first.P, first.SIG
            first = first or made
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made.train(conv.training))
