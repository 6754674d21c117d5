"""Operators on integers that torch lacks or that exporters write in many: what they compute, and their ONNX form.

`quant` builds on them, and `ship` writes them; neither needs the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("vitreous::matmul_integer", mutates_args=())
def matmul_integer(a: Tensor, b: Tensor) -> Tensor:
    """int8 `[..., M, K]` times int8 `[..., K, N]`, as int32: ONNX's MatMulInteger.

    torch multiplies 8-bit integers quickly only in two dimensions and on some processors. Doubles hold every partial sum
    below 2^53, so their product is exact in any order of summation. Both operands are int8, for which ONNX Runtime is exact
    on every processor; its kernels for uint8 add pairs in 16 bits where VNNI is missing, and overflow.
    """
    return (a.double() @ b.double()).to(torch.int32)


@matmul_integer.register_fake
def _shape_of_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a.to(torch.int32), b.to(torch.int32))


@torch.library.custom_op("vitreous::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Floats to int8: round(x/scale), halves to even, clipped to −128 … 127: ONNX's QuantizeLinear."""
    return (x / scale).round().clamp(-128, 127).to(torch.int8)


@quantize.register_fake
def _shape_of_integers(x: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


@torch.library.custom_op("vitreous::shift_right", mutates_args=())
def shift_right(x: Tensor, by: Tensor) -> Tensor:
    """⌊x/2^by⌋ of int64 `x` within ±2^62, which may be negative."""
    return torch.bitwise_right_shift(x, by)


@torch.library.custom_op("vitreous::divide", mutates_args=())
def divide(x: Tensor, y: Tensor) -> Tensor:
    """⌊x/y⌋ of int64 `x` from 0 and `y` from 1, where rounding down and towards 0 are the same: ONNX's Div."""
    return x // y


def _shape_of_both(x: Tensor, y: Tensor) -> Tensor:
    return torch.add(x, y)


shift_right.register_fake(_shape_of_both)
divide.register_fake(_shape_of_both)


def translations(op: Any) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ONNX of these operators, for the exporter's table; `op` is an onnxscript opset."""
    int8, int64, uint64 = 3, 7, 13

    def shifted(x: Any, by: Any) -> Any:
        # ONNX shifts unsigned integers only, so a multiple of every 2^by is lent.
        lent, by = op.Constant(value_int=2**62), op.Cast(by, to=uint64)
        up = op.BitShift(op.Cast(op.Add(x, lent), to=uint64), by, direction="RIGHT")
        return op.Sub(op.Cast(up, to=int64), op.Cast(op.BitShift(op.Cast(lent, to=uint64), by, direction="RIGHT"), to=int64))

    return {
        torch.ops.vitreous.matmul_integer.default: lambda a, b: op.MatMulInteger(a, b),
        torch.ops.vitreous.quantize.default: lambda x, scale: op.QuantizeLinear(
            x, scale, op.Cast(op.Constant(value_int=0), to=int8)
        ),
        torch.ops.vitreous.shift_right.default: shifted,
        torch.ops.vitreous.divide.default: lambda x, y: op.Div(x, y),
    }
