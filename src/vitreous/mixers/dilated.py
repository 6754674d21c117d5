"""A large depthwise convolution, trained as the sum of several."""

from __future__ import annotations

from torch import Tensor, nn

DILATED = {  # large kernel: (kernel, dilation) of the branches beside it
    17: ((5, 1), (7, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    15: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    13: ((5, 1), (7, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    7: ((5, 1), (3, 1), (3, 2), (3, 3)),
}


class DilatedReparam(nn.Module):
    """A large depthwise convolution and dilated ones beside it, each normalised; or, `merged`, the one that is their sum.

    Maps `[B, C, H, W]`. Ding et al., "UniRepLKNet" (CVPR 2024).
    """

    def __init__(self, channels: int, kernel: int, merged: bool) -> None:
        super().__init__()

        def conv(size: int, dilation: int) -> nn.Conv2d:
            reach = dilation * (size - 1) // 2
            return nn.Conv2d(channels, channels, size, 1, reach, dilation, channels, bias=merged)

        if merged:
            self.branches = nn.ModuleDict({"large": nn.Sequential(conv(kernel, 1))})
        else:
            kinds = {"large": (kernel, 1), **{f"k{k}_{r}": (k, r) for k, r in DILATED[kernel]}}
            self.branches = nn.ModuleDict({n: nn.Sequential(conv(*kind), nn.BatchNorm2d(channels)) for n, kind in kinds.items()})

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Tensor] = [branch(x) for branch in self.branches.values()]
        return sum(parts[1:], parts[0])
