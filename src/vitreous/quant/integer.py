"""The integer arithmetic of I-ViT: integer tensors in, integer tensors out, and nothing in between that is not an integer.

Li & Gu, "I-ViT: Integer-only Quantization for Efficient Vision Transformer Inference" (ICCV 2023), section 3. A real number
is an integer times a scale; scales are known before and never appear here, but as the integers made from them.
Intermediate results are int64, where nothing overflows; shifts and divisions round down.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import VitreousError
from ..operators import divide, matmul_integer, shift_right
from .layers import FLOOR

INT8, INT16 = (-128, 127), (-(2**15), 2**15 - 1)
MULTIPLIER_BITS = 24
FRACTION = 8  # bits after the point of the mean in a LayerNorm
NORM_BITS = 30  # a normalized token is given as 2^30·y/√(Σy²)
SOFTMAX_BITS, SOFTMAX_N = 14, 15
SIGMOID_BITS, SIGMOID_N = 15, 23


def _shift(x: Tensor, by: int) -> Tensor:
    return shift_right(x, torch.tensor(by, device=x.device))


def _number(value: int | Tensor, like: Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value, device=like.device)


def _over(number: int, x: Tensor) -> Tensor:
    return divide(torch.tensor(number, device=x.device), x)


# ---- grids


@dataclass(frozen=True)
class Grid:
    """Integers `low` … `high`; the number they stand for is scale·(I − zero)."""

    scale: float
    low: int = -128
    high: int = 127
    zero: int = 0

    @staticmethod
    def signed(span: list[float], bits: int = 8) -> Grid:
        high = 2 ** (bits - 1) - 1
        return Grid(max(abs(span[0]), abs(span[1]), FLOOR * high) / high, -high - 1, high)

    @staticmethod
    def skewed(span: list[float]) -> Grid:
        """8 bits over a range that need not be symmetric, though it holds 0."""
        low, high = min(span[0], 0.0), max(span[1], 0.0)
        scale = max((high - low) / 255, FLOOR)
        return Grid(scale, -128, 127, round(-low / scale) - 128)

    @staticmethod
    def inverse(span: list[float], factor: float = 1.0) -> tuple[Grid, int]:
        """16 bits whose step is 1/(factor·one) for an integer `one`, which ShiftExp needs; and that integer."""
        one = max(int(INT16[1] / (factor * max(abs(span[0]), abs(span[1]), 1e-3))), 1)
        return Grid(1 / (factor * one), *INT16), one


# ---- dyadic arithmetic (section 3.2)


class Requantize(nn.Module):
    """Integers on one grid to integers on another: clip((I·b + a) >> c), which is I·`ratio` + `offset`, halves rounded up.

    ratio: old scale over new, of the tensor or of each of its last channels. offset: what is added, in new integers. The
    shift c is common to all, and chosen so that the greatest multiplier b has 24 bits.
    """

    multiplier: Tensor
    addend: Tensor
    shift: Tensor

    def __init__(self, ratio: Tensor, low: int, high: int, offset: Tensor | None = None) -> None:
        super().__init__()
        self.low, self.high = low, high
        self.dtype = torch.int8 if high < 128 else torch.int32
        ratio = ratio.double()
        offset = torch.zeros((), dtype=torch.float64) if offset is None else offset.double().clamp(-(2.0**31), 2.0**31)
        shift = MULTIPLIER_BITS - _bits(ratio)
        shift = torch.minimum(shift, 60 - _bits(offset)).clamp(1, 46)  # no product and no addend reaches 2^61
        self.register_buffer("multiplier", (ratio * 2.0**shift).round().clamp(-(2.0**29), 2.0**29).to(torch.int64))
        self.register_buffer("addend", (offset * 2.0**shift).round().to(torch.int64) + (1 << (shift - 1)))
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        moved = shift_right(x.to(torch.int64) * self.multiplier + self.addend, self.shift)
        return moved.clamp(self.low, self.high).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.low} … {self.high}"


def _bits(x: Tensor) -> Tensor:
    return torch.frexp(x.abs().amax())[1].to(torch.int64)


# ---- what is not linear (sections 3.3 to 3.5); `one` is the integer that stands for 1, so its inverse is the scale


def shift_exp(x: Tensor, one: int | Tensor, n: int) -> Tensor:
    """About one·2^n·e^(−x/one), at least `one`, for integers `x` from 0. ShiftExp, section 3.3.

    e^x is 2^(x·log2(e)), where log2(e) is nearly 1.0111 in binary, and between two powers 2^(−r) is nearly 1 − r/2.
    """
    x = x + _shift(x + 1, 1) - _shift(x + 15, 4)
    one = _number(one, x)
    x = torch.minimum(x, n * one)
    q = divide(x, one)
    return shift_right((2 * one - (x - q * one)) * 2**n, q + 1)


def shiftmax(x: Tensor, one: int | Tensor) -> Tensor:
    """Softmax over the last dimension, in 2^14ths, which two int8 hold. Shiftmax, algorithm 1."""
    x = x.to(torch.int64)
    e = shift_exp(x.amax(-1, keepdim=True) - x, one, SOFTMAX_N)
    p = e * _over(2**62 - 1, e.sum(-1, keepdim=True)) + 2 ** (61 - SOFTMAX_BITS)
    return _shift(p, 62 - SOFTMAX_BITS).clamp(max=2**SOFTMAX_BITS - 1)


def shift_gelu(x: Tensor, one: int | Tensor) -> Tensor:
    """x·σ(1.702·x), in 2^15ths of the step of `x`, where `one` stands for 1/1.702. ShiftGELU, algorithm 2.

    σ is e^(x − m)/(e^(x − m) + e^(−m)) for any m. Here m is max(x, 0), so that one of the two is 1 and none vanishes.
    """
    x = x.to(torch.int64)
    one = _number(one, x)
    e, top = shift_exp(x.abs(), one, SIGMOID_N), one * 2**SIGMOID_N
    above = torch.where(x < 0, e, top)
    return x * _shift(above * _over(2**62 - 1, e + top), 62 - SIGMOID_BITS)


def isqrt(x: Tensor) -> Tensor:
    """√x of integers `[..., 1]`, rounded down, or 1 more where x + 1 is a square; 1 for 0, since lengths divide.

    Newton's iteration (section 3.5) k ← (k + x/k)/2 from 2^⌊bits(x)/2⌋, which is off by at most √2, so that after four its
    relative error is below 1e−11.
    """
    x = x.clamp(min=1)
    starts = torch.tensor([2**j for j in range(32)], device=x.device)
    least = torch.tensor([0] + [2 ** (2 * j - 1) for j in range(1, 32)], device=x.device)
    k = torch.where(x >= least, starts, 1).amax(-1, keepdim=True)
    for _ in range(4):
        k = _shift(k + divide(x, k), 1)
    return k


def layer_norm(x: Tensor) -> Tensor:
    """Tokens `[..., C]` of at most 16 bits, less their mean and over their length: 2^30·y/√(Σy²). I-LayerNorm, section 3.5."""
    x = x.to(torch.int64) * 2**FRACTION
    c = x.shape[-1]
    lift = 2 ** (16 + FRACTION)  # so that only what is positive is divided
    y = x + lift - divide((x + lift).sum(-1, keepdim=True) + c // 2, torch.tensor(c, device=x.device))
    length = isqrt((y * y).sum(-1, keepdim=True))
    return _shift(y * _over(2 ** (NORM_BITS + 1 + FRACTION), length), 1 + FRACTION)


# ---- layers


class Scale(nn.Module):
    """The last thing done: integers to floats. I-ViT adds biases before, as integers of the accumulator's own scale."""

    bias: Tensor

    def __init__(self, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(scale.float(), requires_grad=False)
        self.register_buffer("bias", None if bias is None else (bias / scale).round().to(torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return (x if self.bias is None else x + self.bias).float() * self.scale


class IntegerLinear(nn.Module):
    """int8 `[..., K]` to what `out`, a `Requantize` or `Scale`, makes of the int32 accumulators `[..., O]`."""

    low_bits = "W8A8"

    def __init__(self, weight: Tensor, out: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        return self.out(matmul_integer(x, self.weight.mT))


class IntegerNorm(nn.Module):
    """I-LayerNorm, its affine folded into the requantization, so that no bias is divided by a weight near 0."""

    def __init__(self, norm: nn.LayerNorm, out: Grid) -> None:
        super().__init__()
        c = norm.normalized_shape[0]
        weight = torch.ones(c) if norm.weight is None else norm.weight.detach()
        bias = torch.zeros(c) if norm.bias is None else norm.bias.detach()
        ratio = weight.double() * c**0.5 / 2**NORM_BITS / out.scale
        self.out = Requantize(ratio, out.low, out.high, bias.double() / out.scale + out.zero)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            raise VitreousError("quant.IViT: something between the integer layers computes floats: the model is no plain ViT")
        return self.out(layer_norm(x))


def integer_linear(
    weight: Tensor,
    bias: Tensor | None,
    x: Grid,
    y: Grid,
    gamma: Tensor | None = None,
    out: Tensor | None = None,
) -> IntegerLinear:
    """A linear layer from grid `x` to grid `y`, or to the scales `out` `[O]`; what it gives is multiplied by `gamma` `[O]`."""
    w, scale = weight_grid(weight)
    bias = torch.zeros(len(w), dtype=torch.float64) if bias is None else bias.detach().double()
    bias = bias - x.zero * w.double().sum(1) * scale * x.scale
    gamma = torch.ones(()) if gamma is None else gamma.detach().double()
    out = torch.tensor(y.scale) if out is None else out
    return IntegerLinear(w, Requantize(scale * x.scale * gamma / out, y.low, y.high, bias * gamma / out))


def weight_grid(weight: Tensor, least: float | Tensor = FLOOR) -> tuple[Tensor, Tensor]:
    """int8 `[O, K]` and scales `[O]` of a weight, symmetric for each output."""
    w = weight.detach().double()
    scale = (w.abs().amax(1) / 127).clamp(min=least)
    return (w / scale[:, None]).round().to(torch.int8), scale


def dequantizing_linear(layer: nn.Linear, x: Grid) -> IntegerLinear:
    """A last layer, from grid `x` to floats. Scales are wide enough for its biases to fit 32 bits."""
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach()
    w, scale = weight_grid(layer.weight, (bias.double().abs() / (x.scale * 2**30)).clamp(min=FLOOR))
    return IntegerLinear(w, Scale(scale * x.scale, bias.double() - x.zero * w.double().sum(1) * scale * x.scale))


def to_grid(x: Tensor, scale: Tensor) -> Tensor:
    """Floats to 16-bit integers: where a token step has computed."""
    return (x / scale).round().clamp(*INT16).to(torch.int32)
