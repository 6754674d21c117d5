"""Mamba-2, and how Adventurer reads images by it.

Dao and Gu, "Transformers are SSMs" (ICML 2024); Wang et al., "Adventurer: Optimizing Vision Mamba Architecture Designs for
Efficiency" (CVPR 2025). Facts from state-spaces/mamba and wangf3014/Adventurer.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import RmsNorm
from torch import Tensor, nn

from .scan import state_space_dual

Norm = partial(RmsNorm, eps=1e-5)


class Mamba2(nn.Module):
    """Tokens `[B, N, C]` to the same; each reads itself and those before it, by `state_space_dual`.

    Dao and Gu, "Transformers are SSMs" (ICML 2024), section 7; names and defaults of `mamba_ssm`'s Mamba2. One projection gives
    the gate, what is scanned, B, C and Δ; the gate multiplies before the norm.

    expand: channels scanned over channels. d_state: numbers remembered of each. headdim: channels that share a decay. d_conv:
    how many tokens the convolution reads, the last of them its own.
    """

    def __init__(self, channels: int, expand: int = 2, d_state: int = 64, headdim: int = 64, d_conv: int = 4) -> None:
        super().__init__()
        inner, self.headdim = channels * expand, headdim
        self.scanned = (inner, d_state, d_state)
        self.projected = (inner, sum(self.scanned), inner // headdim)
        self.in_proj = nn.Linear(channels, sum(self.projected), bias=False)
        self.conv1d = nn.Conv1d(sum(self.scanned), sum(self.scanned), d_conv, padding=d_conv - 1, groups=sum(self.scanned))
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.empty(inner // headdim)) for _ in range(3))
        self.norm = Norm(inner)
        self.out_proj = nn.Linear(inner, channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A spread evenly between −1 and −16, and Δ, in logarithm, between 0.001 and 0.1; the rest as torch does."""
        with torch.no_grad():
            self.A_log.uniform_(1, 16).log_()
            delta = torch.empty_like(self.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
            self.dt_bias.copy_(delta + (-torch.expm1(-delta)).log())
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(x)[0]

    def read(self, x: Tensor, passed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The tokens, and what their gates let through `[B, N, inner]`. passed: as in `state_space_dual`."""
        gate, scanned, delta = self.in_proj(x).split(self.projected, -1)
        scanned = F.silu(self.conv1d(scanned.mT)[..., : x.shape[1]]).mT
        x, B, C = scanned.split(self.scanned, -1)
        x, A = x.unflatten(-1, (-1, self.headdim)), -self.A_log.float().exp()
        y = state_space_dual(x, F.softplus(delta + self.dt_bias), A, B, C, self.D, passed=passed).flatten(2) * F.silu(gate)
        return self.out_proj(self.norm(y)), y

    def delta(self, x: Tensor) -> Tensor:
        """Δ of tokens alone, `[B, N, heads]`."""
        return F.softplus(F.linear(x, self.in_proj.weight[-self.projected[2] :]) + self.dt_bias)


def turned(x: Tensor) -> Tensor:
    """Tokens `[B, N, C]` in reverse, but for the class token, which stays the last."""
    return torch.cat([x[:, :-1].flip(1), x[:, -1:]], 1)


class CausalMixer(Mamba2):
    """Mamba-2 as images need it: the first token, too, knows something of the whole, and not all blocks read one way.

    The mean of all tokens goes ahead of them, and its own result is dropped (Adventurer, heading average); with `flip` the
    patches are read from the last to the first (inter-layer flipping).
    """

    def __init__(self, channels: int, flip: bool) -> None:
        super().__init__(channels)
        self.flip = flip

    def read(self, x: Tensor, passed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `Mamba2.read`, all of it in the order of `x`, whichever way the patches are read."""
        x = turned(x) if self.flip else x
        if passed is not None:
            passed = F.pad(turned(passed) if self.flip else passed, (0, 0, 1, 0))
        x, y = (t[:, 1:] for t in super().read(torch.cat([x.mean(1, keepdim=True), x], 1), passed))
        return (turned(x), turned(y)) if self.flip else (x, y)
