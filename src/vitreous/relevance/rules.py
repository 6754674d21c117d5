"""The rules of relevance: from the inputs of an operation, its output y and the relevance r of that, to those of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

Convolution = tuple[Any, ...]  # stride, padding, dilation and groups, as F.conv2d takes them
Product = Callable[[Tensor, Tensor], Tensor]  # linear in each of the two


def linear_rule(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, r: Tensor) -> Tensor:
    """To each contribution c its part of Σ max(c, 0). As that is (Σc + Σ|c|) / 2, no weight is ever split by its sign."""
    size, w_size = x.abs(), w.abs()
    whole = F.linear(size, w_size)
    least = _negligible(whole)
    whole = whole.add_(y) if b is None else whole.add_(y).sub_(b)
    s = r / whole.clamp_(min=least)
    return (x * (s @ w)).addcmul_(size, s @ w_size)


def sum_rule(a: Tensor, b: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Shares a / y and b / y of y = a + b where both have its sign; else all to the one that has."""
    of_a = r * (a / y).clamp_(0, 1).nan_to_num_(0.5)
    return of_a, r - of_a


def product_rule(a: Tensor, b: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """To both factors of each contribution c of y = a @ b its part of Σ max(σc, 0) = (|Σc| + Σ|c|) / 2, σ the sign of y."""
    a_size, b_size = a.abs(), b.abs()
    s = r / (a_size @ b_size).add_(y.abs()).add_(1e-30)
    signed = s * y.sign()
    of_a = (a * (signed @ b.mT)).addcmul_(a_size, s @ b_size.mT)
    return of_a, (b * (a.mT @ signed)).addcmul_(b_size, a_size.mT @ s)


def published_sum_rule(a: Tensor, b: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 8 to 10: shares a / y and b / y, negative ones too; then each summand's sum becomes its size's share of all."""
    s = torch.where(y == 0, 0, r / y)
    parts = [a * s, b * s]
    sums = [part.flatten(1).sum(1) for part in parts]
    whole = r.flatten(1).sum(1) / (sums[0].abs() + sums[1].abs()).clamp_min(1e-30)
    of_a, of_b = ((t.sign() * whole).view(-1, *[1] * (y.ndim - 1)) * part for t, part in zip(sums, parts, strict=True))
    return of_a, of_b


def published_product_rule(a: Tensor, b: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 7: to both factors of each contribution c of y = a @ b its part c / y, negative ones too."""
    s = torch.where(y == 0, 0, r / y)
    return a * (s @ b.mT), b * (a.mT @ s)


def mean_rule(x: Tensor, y: Tensor, r: Tensor, dim: int) -> Tensor:
    """Of a mean or a sum over `dim`: those of the sign of y share by their size."""
    c = (x * y.sign().unsqueeze(dim)).relu_()
    return c * (r / (c.sum(dim) + 1e-30)).unsqueeze(dim)


def image_rule(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, r: Tensor, way: Convolution = ()) -> Tensor:
    """z^B: contributions (x − l)·w for w > 0 and (x − h)·w for w < 0, l and h an image's least and greatest value."""
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    positive, negative, ones = w.clamp(min=0), w.clamp(max=0), torch.ones_like(x[:1])
    whole = y - low * F.conv2d(ones, positive, None, *way) - high * F.conv2d(ones, negative, None, *way)
    whole = whole if b is None else whole - b[:, None, None]
    s = r / whole.clamp_(min=_negligible(whole))
    of_positive, of_negative = (_back(x, part, s, way) for part in (positive, negative))
    return (x - low) * of_positive + (x - high) * of_negative


def image_linear_rule(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, r: Tensor) -> Tensor:
    """`image_rule` for patches `[B, N, pixels]` that were cut before a linear layer reads them."""
    axes = tuple(range(1, x.ndim))
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    positive, negative = w.clamp(min=0), w.clamp(max=0)
    whole = y - low * positive.sum(1) - high * negative.sum(1)
    whole = whole if b is None else whole - b
    s = r / whole.clamp_(min=_negligible(whole))
    return (x - low) * (s @ positive) + (x - high) * (s @ negative)


def convolution_rule(x: Tensor, w: Tensor, b: Tensor | None, y: Tensor, r: Tensor, way: Convolution = ()) -> Tensor:
    """`linear_rule` for the convolutions of a stem behind the one that reads the image."""
    size, w_size = x.abs(), w.abs()
    whole = F.conv2d(size, w_size, None, *way)
    least = _negligible(whole)
    whole = whole.add_(y) if b is None else whole.add_(y).sub_(b[:, None, None])
    s = r / whole.clamp_(min=least)
    return (x * _back(x, w, s, way)).addcmul_(size, _back(x, w_size, s, way))


def contraction_rule(of: Product, x: Tensor, w: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """`linear_rule` for y = of(x, w), weights w that are multiplied in another way than by `F.linear`."""
    size, w_size = x.abs(), w.abs()
    whole = of(size, w_size)
    s = r / (whole + y).clamp_(min=_negligible(whole))
    return x * _first(of, x, w, s) + size * _first(of, x, w_size, s)


def contracted_rule(of: Product, a: Tensor, b: Tensor, y: Tensor, r: Tensor, published: bool = False) -> tuple[Tensor, Tensor]:
    """`product_rule`, or the published one, for y = of(a, b)."""
    other: Product = lambda second, first: of(first, second)
    if published:
        s = torch.where(y == 0, 0, r / y)
        return a * _first(of, a, b, s), b * _first(other, b, a, s)
    a_size, b_size = a.abs(), b.abs()
    s = r / (of(a_size, b_size) + y.abs() + 1e-30)
    signed = s * y.sign()
    of_a = a * _first(of, a, b, signed) + a_size * _first(of, a, b_size, s)
    return of_a, b * _first(other, b, a, signed) + b_size * _first(other, b, a_size, s)


def _first(of: Product, a: Tensor, b: Tensor, r: Tensor) -> Tensor:
    """What reaches the first factor of `of(a, b)` backwards."""
    return torch.func.vjp(lambda t: of(t, b), a)[1](r)[0]


def _back(x: Tensor, w: Tensor, r: Tensor, way: Convolution) -> Tensor:
    """What reaches the input `x` of a convolution backwards; torch takes no padding by name here."""
    if not any(isinstance(part, str) for part in way):
        return conv2d_input(x.shape, w, r, *way)
    return torch.func.vjp(lambda t: F.conv2d(t, w, None, *way), x)[1](r)[0]


def _negligible(sizes: Tensor) -> Tensor:
    """The least sum to share by, for each image: below it is rounding, or nothing but a bias made the output."""
    usual = sizes.flatten(1).mean(1).clamp_min(1e-25)
    return 1e-5 * usual.view(-1, *[1] * (sizes.ndim - 1))
