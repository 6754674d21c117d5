"""Images as a retina hands them on: finely sampled where the gaze rests, ever more coarsely around it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError


class LogPolar(nn.Module):
    """`[B, C, H, W]` sampled on rings around a point: `[B, C, radii, angles]`, the innermost ring first.

    Jérémie, Daucé and Perrinet, "Foveated Retinotopy Improves Classification and Localization in CNNs" (Vision, 2026). Radii grow
    by one factor from ring to ring, from `inner` to 1, which reaches from the image's middle to that of its outermost pixels;
    angles are spread evenly, clockwise from the right. Turning the image about the point by 2π / angles moves the result a place
    along its last axis, round and round; enlarging it by that factor moves it one ring outward. Samples are bilinear; outside of
    the image there is 0, and what lies outside of the circle is not seen.

    radii, angles: None for as many as the image has rows and columns, so that a network made for the image takes the result.
    """

    def __init__(self, inner: float = 2**-5, radii: int | None = None, angles: int | None = None) -> None:
        super().__init__()
        if not 0 < inner < 1:
            raise VitreousError(f"the innermost ring must lie inside of the outermost: inner in (0, 1), not {inner}")
        self.inner, self.radii, self.angles = inner, radii, angles

    def forward(self, x: Tensor, fixation: Tensor | None = None) -> Tensor:
        """fixation: `[B, 2]`, where each image is looked at, x and y from −1 (left, top) to 1; its middle by default."""
        height, width = x.shape[-2:]
        rings, angles = self.radii or height, self.angles or width
        precise = torch.promote_types(x.dtype, torch.float32)  # places in half precision would be pixels off
        steps = torch.arange(rings, device=x.device, dtype=precise) / max(rings - 1, 1)
        radius = (math.log(self.inner) * (1 - steps)).exp()[:, None] * (min(height, width) - 1)
        angle = torch.arange(angles, device=x.device, dtype=precise) * (2 * math.pi / angles)
        grid = torch.stack([radius * angle.cos() / width, radius * angle.sin() / height], -1).expand(x.shape[0], -1, -1, -1)
        if fixation is not None:
            grid = grid + fixation[:, None, None].to(grid)
        return F.grid_sample(x.to(precise), grid, align_corners=False).to(x.dtype)
