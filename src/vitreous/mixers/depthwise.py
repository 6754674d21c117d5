"""Depthwise convolutions where a transformer had none: in the MLP, and to say where a token is."""

from __future__ import annotations

from torch import Tensor, nn


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Sequential:
    """A convolution that keeps the side, or divides it by `stride`, and a BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class ConditionalPosition(nn.Module):
    """x + dw(x) on maps `[B, C, H, W]`: Chu et al., "Conditional Positional Encodings for Vision Transformers", 2021."""

    def __init__(self, channels: int, kernel: int = 3) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, channels, kernel, 1, kernel // 2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(x)


class DepthwiseMlp(nn.Module):
    """An MLP of 1 × 1 convolutions on maps `[B, C, H, W]` with a depthwise 3 × 3 before its GELU.

    Wang et al., "PVT v2: Improved Baselines with Pyramid Vision Transformer" (2022), section 3.3. With `skip` the hidden map is
    added to what the depthwise convolution gives.
    """

    def __init__(self, channels: int, hidden: int, skip: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, hidden, 1)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden, channels, 1)
        self.drop = nn.Dropout(drop)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = self.act(x + self.dwconv(x) if self.skip else self.dwconv(x))
        return self.drop(self.fc2(self.drop(x)))
