"""Each architecture small enough that every common test of tests/models/test_every_model.py runs in a second."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from torch import nn


@dataclass(frozen=True)
class Small:
    """How to make an architecture small, and what its paper's design allows.

    name, arguments: for `timm.create_model`. side, channels: of its images. other_side: another size of images that it takes as
    it is built, None where the design has one size; then `resized` are the arguments that build it for 1.5 × `side`, None
    where nothing does. attention: whether it has softmax attention that `glass` sees. unused: parameters that no gradient
    reaches, by design of the paper; say why in a comment.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    side: int = 64
    channels: int = 3
    other_side: int | None = 96
    resized: dict[str, Any] | None = None
    attention: bool = True
    unused: tuple[str, ...] = ()

    def make(self, **kwargs: Any) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(self.name, **{"num_classes": 7, **self.arguments, **kwargs}).eval()

    def images(self, n: int = 2, side: int | None = None) -> torch.Tensor:
        side = side or self.side
        return torch.randn(n, self.channels, side, side, generator=torch.Generator().manual_seed(1))


SMALL: dict[str, Small] = {
    "van": Small("van_b0", dict(embed_dims=(16, 16, 24, 32), depths=(1, 1, 1, 1)), attention=False),
}
