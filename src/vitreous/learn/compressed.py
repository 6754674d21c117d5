"""Layers whose backward pass reads a smaller copy of what the forward pass computed exactly.

Each is an operation of torch's; `Compressed` puts them in its place in a model that it does not touch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

KEPT = 0.1  # share of a frozen layer norm's normalised values that its backward pass sees


def to_bits(x: Tensor, bits: int, step: float, scaled: bool) -> tuple[Tensor, Tensor]:
    """`x` as signed integers of `bits` (two in a byte where they are four) and the step between them, a tensor of one number.

    The step is the paper's, and what lies beyond the range is cut; or with `scaled` the tensor's own, so that nothing is.
    """
    most = 2 ** (bits - 1)
    size = (x.abs().amax() / (most - 1)).clamp_min(torch.finfo(x.dtype).tiny) if scaled else x.new_tensor(step)
    whole = (x / size).round().clamp(-most, most - 1)
    if bits == 8:
        return whole.to(torch.int8), size
    flat = F.pad((whole + most).to(torch.uint8).flatten(), (0, x.numel() % 2))
    return flat[::2] * 16 + flat[1::2], size


def from_bits(kept: Tensor, size: Tensor, shape: torch.Size) -> Tensor:
    """What `to_bits` kept, as numbers of `shape` again."""
    if kept.dtype == torch.int8:
        return kept.to(size.dtype) * size
    both = torch.stack([kept // 16, kept % 16], 1).flatten()[: math.prod(shape)]
    return ((both.to(size.dtype) - 8) * size).view(shape)


class Gelu(Function):
    """GELU; 4 bits of its input are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaled: bool) -> Tensor:
        ctx.save_for_backward(*to_bits(x, 4, 1 / 2, scaled))
        ctx.shape = x.shape
        return F.gelu(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        kept, size = ctx.saved_tensors
        x = from_bits(kept, size, ctx.shape).to(g.dtype)
        cdf, pdf = (1 + torch.erf(x / math.sqrt(2))) / 2, torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return g * (cdf + x * pdf), None


class Linear(Function):
    """A linear layer that learns; 8 bits of its input are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scaled: bool) -> Tensor:
        ctx.save_for_backward(*to_bits(x, 8, 1 / 16, scaled), weight)
        ctx.shape, ctx.biased = x.shape, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        kept, size, weight = ctx.saved_tensors
        x, rows = from_bits(kept, size, ctx.shape).to(g.dtype).flatten(0, -2), g.flatten(0, -2)
        return g @ weight.to(g.dtype), (rows.mT @ x).to(weight.dtype), rows.sum(0).to(weight.dtype) if ctx.biased else None, None


class Product(Function):
    """a · b; 8 bits of both are kept."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, scaled: bool) -> Tensor:
        ctx.save_for_backward(*to_bits(a, 8, 1 / 16, scaled), *to_bits(b, 8, 1 / 16, scaled))
        ctx.shapes = a.shape, b.shape
        return a @ b

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        (a, a_size, b, b_size), (a_shape, b_shape) = ctx.saved_tensors, ctx.shapes
        return g @ from_bits(b, b_size, b_shape).to(g.dtype).mT, from_bits(a, a_size, a_shape).to(g.dtype).mT @ g, None


class Mix(Function):
    """softmax(scores) · v; 8 bits of the probabilities and of v are kept, and no scores. Exactly 1 is kept as 255/256."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, v: Tensor, scaled: bool) -> Tensor:
        probs = scores.softmax(-1)
        ctx.save_for_backward((probs * 256).round().clamp_max(255).to(torch.uint8), *to_bits(v, 8, 1 / 16, scaled))
        ctx.shape = v.shape
        return probs @ v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        kept, v, size = ctx.saved_tensors
        probs, v = kept.to(g.dtype) / 256, from_bits(v, size, ctx.shape).to(g.dtype)
        slope = g @ v.mT * probs
        return slope - probs * slope.sum(-1, keepdim=True), probs.mT @ g, None


class FrozenNorm(Function):
    """A layer norm over the last axis whose weight does not learn; the normalised values that are largest over the whole tensor
    are kept, and the deviations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        away = x - x.mean(-1, keepdim=True)
        std = (away.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        flat = (away / std).flatten()
        place = flat.abs().topk(int(KEPT * len(flat)), sorted=False).indices
        ctx.save_for_backward(flat[place], place.to(torch.int32), std, weight)
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,) = gradients
        kept, place, std, weight = ctx.saved_tensors
        y = torch.zeros(g.numel(), dtype=g.dtype, device=g.device).scatter_(0, place.long(), kept.to(g.dtype)).view_as(g)
        slope = g * weight.to(g.dtype) / std
        x = slope - slope.mean(-1, keepdim=True) - (slope * y).mean(-1, keepdim=True) * y
        return x, None, g.flatten(0, -2).sum(0).to(weight.dtype), None


class Compressed(TorchFunctionMode):
    """Inside, GELU, attention, frozen layer norms and the linear layers with the weights `narrow` (by `id`) are these."""

    def __init__(self, narrow: Collection[int], scaled: bool) -> None:
        super().__init__()
        self.narrow, self.scaled = narrow, scaled

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ours: Callable[..., Any] | None = None
        if torch.is_grad_enabled():
            ours = {
                F.gelu: self._gelu,
                F.linear: self._linear,
                F.layer_norm: self._norm,
                F.scaled_dot_product_attention: self._attend,
            }.get(func)
        made = ours(*args, **kwargs) if ours is not None else None
        return func(*args, **kwargs) if made is None else made

    def _gelu(self, x: Tensor, approximate: str = "none") -> Tensor | None:
        return Gelu.apply(x, self.scaled) if x.requires_grad and approximate == "none" else None

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        return Linear.apply(x, weight, bias, self.scaled) if weight.requires_grad and id(weight) in self.narrow else None

    def _norm(self, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor | None:
        frozen = x.requires_grad and weight is not None and not weight.requires_grad and bias is not None and len(shape) == 1
        return FrozenNorm.apply(x, weight, bias, eps) if frozen else None

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **given: Any,
    ) -> Tensor | None:
        if is_causal or (attn_mask is not None and attn_mask.dtype == torch.bool) or not q.requires_grad:
            return None
        scale = given.get("scale") or q.shape[-1] ** -0.5
        scores = Product.apply(q, k.mT, self.scaled) * scale
        scores = scores if attn_mask is None else scores + attn_mask
        return Mix.apply(scores, F.dropout(v, dropout_p) if dropout_p else v, self.scaled)
