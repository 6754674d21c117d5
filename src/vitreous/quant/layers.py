"""Fake quantizers, and the layers that hold them: floats in, floats on an integer grid out.

At 8 bits the grids are those that the integer kernels of ONNX Runtime and OpenVINO take: weights int8, symmetric for
each output channel; inputs of layers uint8 with a zero point; operands of a product of two activations int8 without
zero point, since OpenVINO computes that product in floats otherwise. Below 8 bits no runtime executes them, so the
grids are the asymmetric ones of the literature. Gradients pass straight through what is not clipped.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOOR = 1e-10  # the smallest scale: something that is constantly zero would divide by it

# `prove` reads it, and gives no speed to what only simulates integers.
IN_TORCH = "torch computes the integers in floats; the shipped file runs them"

Watcher = Callable[[Tensor], None]


class FakeQuantizer(nn.Module, ABC):
    """Floats in, floats on a grid of 2^`bits` values out. A kind of grid says how in `quantized`.

    While `watcher` is set (calibration), tensors pass unchanged and are shown to it.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.watcher: Watcher | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.watcher is not None:
            self.watcher(x)
            return x
        return self.quantized(x)

    @abstractmethod
    def quantized(self, x: Tensor) -> Tensor: ...

    def extra_repr(self) -> str:
        return f"{self.bits} bits"


class StraightThrough(torch.autograd.Function):
    """`apply(x, on_grid)` is `on_grid(x)`, with the gradient of x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, on_grid: Callable[[Tensor], Tensor]) -> Tensor:
        return on_grid(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        return slopes[0], None


def straight_through(x: Tensor, on_grid: Callable[[Tensor], Tensor]) -> Tensor:
    return cast(Tensor, StraightThrough.apply(x, on_grid)) if x.requires_grad else on_grid(x)


class Quantizer(FakeQuantizer):
    """A uniform fake quantizer: one scale and zero point for a tensor, or for each of `channels` (its first dimension).

    `symmetric` grids have zero point 0 and use the integers −limit … limit, the others 0 … 2^bits − 1.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, symmetric: bool = False, limit: int | None = None, channels: int | None = None) -> None:
        super().__init__(bits)
        self.symmetric, self.channels = symmetric, channels
        self.low, self.high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
        self.limit = limit or self.high
        shape = () if channels is None else (channels,)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))

    def quantized(self, x: Tensor) -> Tensor:
        if self.channels is None:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.low, self.high)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, 0, self.low, self.high)

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point that cover `low` … `high`, widened to hold 0, for unsigned integers need it inside."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            scale = (torch.maximum(-low, high) / self.limit).clamp_min(FLOOR)
            return scale, torch.zeros_like(scale)
        scale = ((high - low) / self.high).clamp_min(FLOOR)
        return scale, (-low / scale).round().clamp(0, self.high)

    def set(self, scale: Tensor, zero_point: Tensor) -> None:
        self.scale.copy_(scale.reshape(self.scale.shape))
        self.zero_point.copy_(zero_point.reshape(self.zero_point.shape))

    def extra_repr(self) -> str:
        per = "tensor" if self.channels is None else "channel"
        return f"{self.bits} bits, {'symmetric' if self.symmetric else 'asymmetric'}, per {per}, limit={self.limit}"


class LogSqrt2(FakeQuantizer):
    """Softmax outputs on powers of √2, in the log2 form that RepQ-ViT executes (section 3.3).

    q = round(−2·log2(x/s)) is clipped to 0 … 2^bits − 1, and comes back as s̃·2^(−⌈q/2⌉), where s̃ = s·√2 for odd and
    s for even q, which is s·√2^(−q). What lies beyond the last level becomes 0, as in the official code.
    """

    scale: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer("scale", torch.ones(()))

    def quantized(self, x: Tensor) -> Tensor:
        return straight_through(x, lambda x: self.on_grid(x, self.scale))

    def on_grid(self, x: Tensor, scale: Tensor) -> Tensor:
        last = 2**self.bits - 1
        q = (-2 * torch.log2(x / scale)).round()
        kept = q <= last
        q = q.clamp(0, last)
        shared = scale * (1 + q % 2 * (2**0.5 - 1))
        return torch.where(kept, shared * torch.exp2(-torch.ceil(q / 2)), 0.0)


class QuantLinear(nn.Linear):
    """A linear layer on quantized input and weight, around the parameters of another.

    `after` names the LayerNorm whose very output this layer reads, where scales may move from one to the other.
    """

    simulated = IN_TORCH

    def __init__(self, linear: nn.Linear, x: FakeQuantizer, w: Quantizer, after: str = "") -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.quant_x, self.quant_w, self.after = x, w, after
        self.train(linear.training)

    @property
    def low_bits(self) -> str:
        return f"W{self.quant_w.bits}A{self.quant_x.bits}"

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.quant_x(input), self.quant_w(self.weight), self.bias)


class QuantConv2d(nn.Conv2d):
    """A convolution on quantized input and weight, around the parameters of another."""

    simulated = IN_TORCH

    def __init__(self, conv: nn.Conv2d, x: Quantizer, w: Quantizer) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            cast(tuple[int, int], conv.kernel_size),
            cast(tuple[int, int], conv.stride),
            cast(tuple[int, int], conv.padding),
            cast(tuple[int, int], conv.dilation),
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.quant_x, self.quant_w = x, w
        self.train(conv.training)

    @property
    def low_bits(self) -> str:
        return f"W{self.quant_w.bits}A{self.quant_x.bits}"

    def forward(self, input: Tensor) -> Tensor:
        # ONNX Runtime computes such products in integers, and a convolution in floats.
        if self.kernel_size == self.stride and self.padding == (0, 0) and self.dilation == (1, 1) and self.groups == 1:
            return self._of_patches(self.quant_x(input))
        return self._conv_forward(self.quant_x(input), self.quant_w(self.weight), self.bias)

    def _of_patches(self, x: Tensor) -> Tensor:
        """The product of each patch, of one place or more, with the weight: `[B, C, H, W]` to `[B, O, h, w]`."""
        weight, (p, q) = self.quant_w(self.weight.flatten(1)), self.kernel_size
        if p == q == 1:
            return F.linear(x.movedim(1, -1), weight, self.bias).movedim(-1, 1)
        rows, columns = x.shape[2] // p, x.shape[3] // q
        x = x[..., : rows * p, : columns * q].unflatten(3, (columns, q)).unflatten(2, (rows, p))
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, weight, self.bias).mT.unflatten(2, (rows, columns))


def quant_layers(model: nn.Module) -> dict[str, QuantLinear | QuantConv2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (QuantLinear, QuantConv2d))}
