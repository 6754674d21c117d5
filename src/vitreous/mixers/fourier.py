"""The two-dimensional Fourier transform of real maps as products of matrices, which every runtime has."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _waves(n: int, frequencies: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2π · place · frequency / n, over √n: `[n, frequencies]` each."""
    turns = torch.outer(torch.arange(n, device=like.device), torch.arange(frequencies, device=like.device)) % n
    angles = turns.to(like.dtype) * (2 * math.pi / n)
    return angles.cos() / n**0.5, angles.sin() / n**0.5


def rfft2(x: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of `torch.fft.rfft2(x, norm="ortho")`: `[…, H, W]` to `[…, H, W // 2 + 1]` each."""
    height, width = x.shape[-2:]
    cos, sin = _waves(width, width // 2 + 1, x)
    real, imaginary = x @ cos, -(x @ sin)
    cos, sin = _waves(height, height, x)
    return cos @ real + sin @ imaginary, cos @ imaginary - sin @ real


def irfft2(real: Tensor, imaginary: Tensor, width: int) -> Tensor:
    """`torch.fft.irfft2(real + 1j * imaginary, norm="ortho")` for maps `[…, H, width]`."""
    cos, sin = _waves(real.shape[-2], real.shape[-2], real)
    real, imaginary = cos @ real - sin @ imaginary, cos @ imaginary + sin @ real
    cos, sin = _waves(width, width // 2 + 1, real)
    frequency = torch.arange(width // 2 + 1, device=real.device)
    times = torch.where((frequency == 0) | (2 * frequency == width), 1.0, 2.0).to(real.dtype)  # the others stand for a pair
    return real @ (cos * times).mT - imaginary @ (sin * times).mT
