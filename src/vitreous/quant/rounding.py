"""Learned rounding: whether each weight goes to the grid point below or above it is chosen so that the layer's output stays.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (ICML 2020).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError
from .layers import Quantizer

ZETA, GAMMA = 1.1, -0.1  # the sigmoid is stretched to these and cut at 0 and 1, so that it reaches both
PENALTY = 0.01  # λ
WARM_UP = 0.2  # the share of the iterations without penalty
FASTEST = 0.05  # rate; V must travel 2.4 to be decided


class SoftRounding(nn.Module):
    """A weight between its two nearest grid points: s·clip(⌊W/s⌋ + h(V), n, p), with zero points n = low − z, p = high − z.

    h(V) = clip(σ(V)(ζ − γ) + γ, 0, 1) is the rectified sigmoid (equations 22 and 23). It starts where the soft weight is the
    float weight. `quantizer` is calibrated, for a tensor or for each output channel.
    """

    scale: Tensor
    floor: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, weight: Tensor, quantizer: Quantizer) -> None:
        super().__init__()
        weight = weight.detach().float()
        by_channel = (-1, *[1] * (weight.ndim - 1))
        scale, zero = quantizer.scale.reshape(by_channel), quantizer.zero_point.reshape(by_channel)
        least, most = max(quantizer.low, -quantizer.limit), min(quantizer.high, quantizer.limit)
        floor = (weight / scale).floor()
        self.register_buffer("scale", scale)
        self.register_buffer("floor", floor)
        self.register_buffer("low", (least - zero).float())
        self.register_buffer("high", (most - zero).float())
        share = ((weight / scale - floor - GAMMA) / (ZETA - GAMMA)).clamp(1e-6, 1 - 1e-6)
        self.v = nn.Parameter(torch.logit(share))

    def h(self) -> Tensor:
        return (torch.sigmoid(self.v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def forward(self) -> Tensor:
        """The soft-quantized weight, differentiable in `v`."""
        return torch.minimum(torch.maximum(self.floor + self.h(), self.low), self.high) * self.scale

    @torch.no_grad()
    def gradient(self, slope: Tensor, beta: float | None) -> Tensor:
        """∂/∂V of what has `slope` as its gradient in the soft weight, plus λ·Σ 1 − |2h − 1|^β unless β is None.

        That penalty (equation 24) is 0 when every weight is on the grid; a large β leaves the undecided ones alone. By hand,
        for autograd takes twice as long.
        """
        sigma = torch.sigmoid(self.v)
        h = sigma * (ZETA - GAMMA) + GAMMA
        moves = (h > 0) & (h < 1)
        there = self.floor + h
        towards_h = (slope * self.scale).mul_((there > self.low) & (there < self.high))
        if beta is not None:
            far = h.mul_(2).sub_(1)
            towards_h -= far.abs().pow_(beta - 1).mul_(far.sign()).mul_(2 * beta * PENALTY)
        return towards_h.mul_(sigma).mul_(1 - sigma).mul_(moves).mul_(ZETA - GAMMA)

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The weight on the grid: up where h ≥ 1/2."""
        return torch.minimum(torch.maximum(self.floor + (self.h() >= 0.5), self.low), self.high) * self.scale


def annealed(share: float, start: float = 20.0, end: float = 2.0) -> float | None:
    """β when `share` of the iterations is done: None during the warm-up, then from `start` to `end` along a cosine.

    The paper anneals β and names neither range nor curve; these are the authors' own library's, AIMET.
    """
    if share < WARM_UP:
        return None
    return end + (start - end) * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP))) / 2


def learn_rounding(layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor, quantizer: Quantizer, iterations: int = 1000) -> Tensor:
    """The weight of `layer`, rounded so that on inputs `x` it gives `y`; on the grid, and of the layer's shape.

    Args:
        x: what the layer will read, quantized: `[..., in]`, or images `[N, C, H, W]` for a convolution without groups.
        y: what the float layer gives on the float input: `[..., out]`, or `[N, out, h, w]` (asymmetric reconstruction).
        quantizer: the layer's, with its scale and zero point set; they stay.
        iterations: of Adam. The paper takes 10 000 at Adam's own rate of 1e-3; fewer go proportionally faster, up to 0.05.

    The loss is the squared error of a row, summed over outputs and averaged over rows, plus λ = 0.01 times the penalty
    (equation 21). It is quadratic in the weight: all that it needs of the data are the moments X̂ᵀX̂ and YᵀX̂, and every
    iteration sees all rows, where the paper draws a mini-batch. Without the activation function of equation 25, for layers of
    transformers end in a residual or in attention. An output for which rounding to nearest is better after all, which few
    iterations may leave, is rounded to nearest. Raises `VitreousError` for a convolution with groups, and NaN in `x` or `y`.
    """
    if iterations < 1:
        raise VitreousError(f"learned rounding needs iterations of 1 or more, not {iterations}")
    rows, targets = _rows(layer, x.detach().float(), y.detach().float())
    if layer.bias is not None:
        targets = targets - layer.bias.detach()
    moment, cross = rows.T @ rows / len(rows), targets.T @ rows / len(rows)
    if not (torch.isfinite(moment).all() and torch.isfinite(cross).all()):
        raise VitreousError("learned rounding was given NaN or infinity: check the calibration images and the weights")
    soft = SoftRounding(layer.weight, quantizer)
    decide(soft, moment, cross, iterations)
    nearest = SoftRounding(layer.weight, quantizer).hard().flatten(1)
    learned = soft.hard().flatten(1)
    better = _loss(learned, moment, cross) < _loss(nearest, moment, cross)
    return torch.where(better[:, None], learned, nearest).reshape(layer.weight.shape).to(layer.weight.dtype)


@torch.no_grad()
def decide(soft: SoftRounding, moment: Tensor, cross: Tensor, iterations: int) -> None:
    """Learn V by `iterations` of Adam, from the moments of the data: inputs `[in, in]`, and outputs with inputs `[out, in]`."""
    optimizer = torch.optim.Adam([soft.v], lr=min(10 / iterations, FASTEST))
    for i in range(iterations):
        slope = (soft().reshape(cross.shape) @ moment).sub_(cross).mul_(2)
        soft.v.grad = soft.gradient(slope.reshape(soft.v.shape), annealed(i / iterations))
        optimizer.step()


def _loss(weight: Tensor, moment: Tensor, cross: Tensor) -> Tensor:
    """The squared error of each output `[out]`, up to a constant."""
    return ((weight @ moment - 2 * cross) * weight).sum(1)


def _rows(layer: nn.Linear | nn.Conv2d, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs `[S, in]` and outputs `[S, out]` of the matrix product that the layer is."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2), y.flatten(0, -2)
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise VitreousError("rounding is learned for convolutions without groups, padded with zeros; keep the others rounded")
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.mT.flatten(0, 1), y.flatten(2).mT.flatten(0, 1)
