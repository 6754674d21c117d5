"""Adaptive polyphase anchoring: a map is turned so that strides take the same places of it wherever it was shifted to.

Ding et al., "Reviving Shift Equivariance in Vision Transformers" (2023), algorithm 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError


def phase_norms(x: Tensor, stride: int) -> Tensor:
    """The norm, over channels and places, of each polyphase component x[:, :, i::stride, j::stride]: `[B, stride²]`, row by row.

    Sums go row by row and then column by column, so that in exact arithmetic a shift of `x` `[B, C, H, W]` only permutes them.
    Raises VitreousError where the stride does not divide the sides.
    """
    if x.shape[2] % stride or x.shape[3] % stride:
        raise VitreousError(f"a map of {x.shape[2]} × {x.shape[3]} does not divide into polyphase components {stride} apart")
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # half precision would make ties of what is not
    squares = x.square().sum(1)
    squares = squares.unflatten(2, (-1, stride)).sum(2).unflatten(1, (-1, stride)).sum(1)
    return squares.flatten(1).sqrt()


class CircularConv2d(nn.Conv2d):
    """A convolution of an odd kernel that keeps the sides of maps `[B, C, H, W]` and goes round at the border, by
    copies, since runtimes have no such padding."""

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = self.kernel_size[0] // 2, self.kernel_size[1] // 2
        x = torch.cat((input[..., -columns:], input, input[..., :columns]), 3)
        x = torch.cat((x[:, :, -rows:], x, x[:, :, :rows]), 2)
        return F.conv2d(x, self.weight, self.bias, groups=self.groups)


def anchored(x: Tensor, stride: int) -> Tensor:
    """`[B, C, H, W]` rolled so that its strongest polyphase component begins at the first place; of equal ones the first.

    Shifting `x` in a circle then shifts what comes out by multiples of `stride` only, and a patch embedding, a window or a
    pooling of that stride is equivariant. Gradients go through the roll.
    """
    best = phase_norms(x.detach(), stride).argmax(1)
    rows = (torch.arange(x.shape[2], device=x.device) + (best // stride)[:, None]) % x.shape[2]
    columns = (torch.arange(x.shape[3], device=x.device) + (best % stride)[:, None]) % x.shape[3]
    x = x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return x.gather(3, columns[:, None, None, :].expand(-1, x.shape[1], x.shape[2], -1))
