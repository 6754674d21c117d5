"""Attention by row and by column. Xu and Wan, "ELA: Efficient Local Attention for Deep Convolutional Neural Networks", 2024."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError

# kernel, whether depthwise or in C / 8 groups, groups of the norm
VERSIONS = {"T": (5, True, 32), "B": (7, True, 16), "S": (5, False, 16), "L": (7, False, 16)}


class ELA(nn.Module):
    """x · a_rows · a_columns on maps `[B, C, H, W]`: a = σ(GN(conv(mean over the other axis))), by the same convolution and norm.

    version: "T", "B", "S" or "L" (kernel 5 or 7; depthwise in T and B, C / 8 groups in S and L; 32 groups of the norm in T, else
    16), as independent copies of the paper's listing have them; or `kernel`, `groups` and `norm_groups` themselves. timm takes
    the class as an `attn_layer`. Raises VitreousError where the channels do not divide into the groups.
    """

    def __init__(
        self,
        channels: int,
        version: str = "T",
        kernel: int | None = None,
        groups: int | None = None,
        norm_groups: int | None = None,
    ) -> None:
        super().__init__()
        if version not in VERSIONS:
            raise VitreousError(f"ELA: version must be one of {', '.join(VERSIONS)}, not {version!r}")
        usual, depthwise, parts = VERSIONS[version]
        kernel, parts = kernel or usual, norm_groups or parts
        groups = groups or (channels if depthwise else max(channels // 8, 1))
        if channels % groups or channels % parts:
            raise VitreousError(f"ELA: {channels} channels do not divide into {groups} groups and {parts} of the norm")
        self.conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=groups, bias=False)
        self.gn = nn.GroupNorm(parts, channels)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self.normed(self.conv(x.mean(axis))).sigmoid() for axis in (3, 2))
        return x * rows.unsqueeze(3) * columns.unsqueeze(2)

    def normed(self, x: Tensor) -> Tensor:
        """What `gn` computes, also of a single number a group, which torch refuses for a batch of one."""
        x = x.unflatten(1, (self.gn.num_groups, -1))
        x = F.layer_norm(x, x.shape[2:], eps=self.gn.eps).flatten(1, 2)
        return x * self.gn.weight[:, None] + self.gn.bias[:, None]
