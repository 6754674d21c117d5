"""Resize, cut and normalise inside the graph, for files that take pictures as they are decoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import VitreousError


def triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp_min(0)


def keys(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = −1/2, Pillow's BICUBIC."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


KERNELS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {"bilinear": (triangle, 1), "bicubic": (keys, 2)}


class WithPreprocessing(nn.Module):
    """`model` on pictures `[B, H, W, C]` uint8 of any one size, prepared as `preprocess` (of `card.preprocess`) says.

    Both axes are resized by a product with a matrix of the kernel's weights, widened where the picture shrinks, which is what
    Pillow does; every runtime computes that alike, where their own resize operators differ.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, preprocess: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        how, mode = preprocess["interpolation"], preprocess["crop_mode"]
        height, width = preprocess["input_size"][1:]
        if how not in KERNELS:
            raise VitreousError(
                f"{how} is not resized inside a graph: only {' and '.join(KERNELS)} are; ship without preprocessing"
            )
        if mode not in ("center", "squash") or (mode == "center" and height != width):
            raise VitreousError(f"crop_mode {mode} to {height} x {width} has no form inside a graph: ship without preprocessing")
        self.kernel, self.reach = KERNELS[how]
        self.mode, self.crop = mode, (height, width)
        size = preprocess["size"]
        self.size = (size["shortest_edge"],) * 2 if "shortest_edge" in size else (size["height"], size["width"])
        self.register_buffer("mean", 255 * torch.tensor(preprocess["mean"])[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(preprocess["std"])[:, None, None])

    def forward(self, images: Tensor) -> Any:
        x = images.permute(0, 3, 1, 2).float()
        rows, columns = (torch.arange(n, device=x.device).float() for n in x.shape[2:])
        height, width = rows.amax(0) + 1, columns.amax(0) + 1
        down, across = torch.tensor(float(self.size[0])), torch.tensor(float(self.size[1]))
        if self.mode == "center":  # the shorter side takes the size, the longer one follows
            shorter = torch.minimum(height, width)
            down, across = ((n * self.size[0] / shorter + 1e-3).floor() for n in (height, width))
        x = self._level(x @ self._weights(columns, width, across, self.crop[1]).mT)  # across first, as Pillow does
        x = self._level(self._weights(rows, height, down, self.crop[0]) @ x)
        return self.model((x - self.mean) / self.std)

    def _weights(self, places: Tensor, length: Tensor, resized: Tensor, crop: int) -> Tensor:
        """`[crop, length]`: what each pixel of the middle `crop` of `resized` ones takes from each of `length`."""
        start = ((resized - crop) / 2).round()
        scale = length / resized
        centre = (torch.arange(crop, device=places.device) + start + 0.5) * scale
        weights = self.kernel((places + 0.5 - centre[:, None]) / scale.clamp_min(1))
        return weights / weights.sum(1, keepdim=True)

    @staticmethod
    def _level(x: Tensor) -> Tensor:
        """On the levels of 8 bits, where Pillow keeps what it has resized."""
        return x.clamp(0, 255).round()
