"""Long convolutions whose filters are functions of the place: a small network says what stands there (Hyena, Monarch Mixer).

Poli et al., "Hyena Hierarchy: Towards Larger Convolutional Language Models" (ICML 2023), section 3.3. The names of the parts are
those of the released code, so that checkpoints load.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fourier import irfft2, rfft2


class Places(nn.Module):
    """z `[1, length, width]`: the place from 0 to 1, then cosines and minus sines of it at (width − 1) / 2 frequencies.

    It is learned, as in the released code, there at a rate of 1e-5. A checkpoint without it leaves it as it was computed.
    """

    t: Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("t", torch.linspace(0, 1, length)[None, :, None], persistent=False)
        bands = (width - 1) // 2
        angles = torch.linspace(1e-4, bands - 1, bands) * (2 * math.pi * torch.arange(length) / length)[:, None]
        self.z = nn.Parameter(torch.cat((self.t, angles.cos()[None], -angles.sin()[None]), -1))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if not state_dict.setdefault(f"{prefix}z", self.z.detach()).is_floating_point():
            state_dict[f"{prefix}z"] = self.z.detach()
        super()._load_from_state_dict(state_dict, prefix, *args)


class Sine(nn.Module):
    """sin(ω x) with learned ω `[1, width]`, which the layers of a filter share."""

    def __init__(self, width: int, omega: float) -> None:
        super().__init__()
        self.freq = nn.Parameter(torch.full((1, width), float(omega)))

    def forward(self, x: Tensor) -> Tensor:
        return (self.freq * x).sin()


def filter_network(inputs: int, width: int, outputs: int, sine: Sine) -> nn.Sequential:
    """`[…, inputs]` to `[…, outputs]` by four linear layers."""
    return nn.Sequential(
        nn.Linear(inputs, width),
        sine,
        nn.Linear(width, width),
        sine,
        nn.Linear(width, width),
        sine,
        nn.Linear(width, outputs, bias=False),
    )


def decay_rates(channels: int) -> Tensor:
    """`[channels]`: a filter falls to a hundredth of its size at 0.3 to 1.5 of the length, by the channel."""
    return torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, channels).abs()


def long_convolution(x: Tensor, kernel: Tensor) -> Tensor:
    """x `[…, H, W]` convolved with a kernel `[…, h, w]` of at least that size, whose ends meet, cut to `[…, H, W]`.

    By the Fourier transform, as products of matrices (`fourier`): a kernel of twice the sides makes it an ordinary convolution.
    """
    height, width = kernel.shape[-2:]
    real, imaginary = rfft2(F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])))
    a, b = rfft2(kernel)
    y = irfft2(real * a - imaginary * b, real * b + imaginary * a, width)
    return (height * width) ** 0.5 * y[..., : x.shape[-2], : x.shape[-1]]
