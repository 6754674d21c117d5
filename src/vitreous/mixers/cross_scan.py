"""A map scanned along its rows and its columns, forwards and backwards, each way with weights of its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scan import selective_scan


class CrossScan(nn.Module):
    """SS2D's four selective scans of maps `[B, C, H, W]`, and their sum put back in place.

    Liu et al., "VMamba: Visual State Space Model" (NeurIPS 2024), section 4.2; parameters are named as there. rank: through
    how few numbers Δ is read. states: the numbers that each channel remembers.
    """

    def __init__(self, channels: int, rank: int, states: int = 16) -> None:
        super().__init__()
        self.sizes = (rank, states, states)
        self.x_proj_weight = nn.Parameter(torch.empty(4, sum(self.sizes), channels))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, channels, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(4, channels))
        self.A_logs = nn.Parameter(torch.empty(4 * channels, states))
        self.Ds = nn.Parameter(torch.empty(4 * channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `SelectiveScan` in all four ways."""
        rank, states, _ = self.sizes
        nn.init.uniform_(self.x_proj_weight, -(self.x_proj_weight.shape[2] ** -0.5), self.x_proj_weight.shape[2] ** -0.5)
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.A_logs.copy_(torch.arange(1, states + 1).log().expand_as(self.A_logs))
            delta = torch.empty_like(self.dt_projs_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
            self.dt_projs_bias.copy_(delta + (-torch.expm1(-delta)).log())
        nn.init.ones_(self.Ds)

    def forward(self, x: Tensor) -> Tensor:
        ways = torch.stack([x.flatten(2), x.mT.flatten(2)], 1).mT  # [B, 2, L, C]
        ways = torch.cat([ways, ways.flip(2)], 1)
        delta, B, C = (ways @ self.x_proj_weight.mT).split(self.sizes, -1)
        delta = F.softplus(delta @ self.dt_projs_weight.mT + self.dt_projs_bias[:, None])
        A = -self.A_logs.float().exp().unflatten(0, (4, 1, -1))
        y = selective_scan(ways, delta, A, B, C, self.Ds.unflatten(0, (4, 1, -1)))
        rows, columns = (y[:, :2] + y[:, 2:].flip(2)).mT.unbind(1)
        return rows.reshape(x.shape) + columns.reshape(x.mT.shape).mT
