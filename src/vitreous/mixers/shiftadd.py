"""Linear layers by shifts, attention by additions, and a choice between shifts and multiplications for each token.

You et al., "ShiftAddViT: Mixture of Multiplication Primitives Towards Efficient Vision Transformer" (NeurIPS 2023). No runtime
here has such kernels: all of it is computed in floats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def round_power_of_2(x: Tensor) -> Tensor:
    """sign(x) · 2^round(log₂ |x|), so that a product with it is a shift; 0 stays 0."""
    return x.sign() * torch.exp2(x.abs().log2().round())


def round_to_fixed(x: Tensor) -> Tensor:
    """⌊x · 2¹⁶⌋ / 2¹⁶ within −2¹⁵ … 2¹⁵ − 1: the fixed point of 32 bits that shifts move."""
    return ((x * 2**16).floor() / 2**16).clamp(-(2**15), 2**15 - 1)


def straight_through(rounded: Tensor, x: Tensor) -> Tensor:
    """`rounded`, with the gradient of `x`."""
    return x + (rounded - x).detach()


class ShiftLinear(nn.Linear):
    """A linear layer whose weights are used as powers of two, and its inputs in fixed point; `[…, in]` to `[…, out]`.

    Elhoushi et al., "DeepShift: Towards Multiplication-Less Neural Networks" (2021), DeepShift-Q: the weight itself learns.
    """

    def forward(self, input: Tensor) -> Tensor:
        weight = straight_through(round_power_of_2(self.weight), self.weight)
        return F.linear(straight_through(round_to_fixed(input), input), weight, self.bias)


def binary_codes(x: Tensor, mean: Tensor | None = None) -> Tensor:
    """m · [x > 0] with m the mean of |x| over everything in `x`, or `mean`; its gradient is that of x within 0 … 1."""
    size = x.abs().mean() if mean is None else mean
    return straight_through((x > 0) * size, x.clamp(0, 1))


class BinaryAttention(nn.Module):
    """Linear-angular attention of binary queries and keys, which select what is added up; tokens `[B, N, C]`.

    ½ v + (1/π) q_b (k_bᵀ v), each token's answer brought to length 1, plus a convolution of v along the tokens (section 4.1);
    sparse: plus the softmax attention above 0.02.

    As released the size of the codes is the mean over the whole batch, so that an image's answer depends on those beside it,
    until `fix` has set it.
    """

    def __init__(self, channels: int, num_heads: int = 8, qkv_bias: bool = False, kernel: int = 9, sparse: bool = False) -> None:
        super().__init__()
        self.num_heads, self.sparse, self.scale = num_heads, sparse, (channels // num_heads) ** -0.5
        self.q, self.kv = nn.Linear(channels, channels, bias=qkv_bias), nn.Linear(channels, 2 * channels, bias=qkv_bias)
        self.proj = nn.Linear(channels, channels)
        self.dconv = nn.Conv2d(num_heads, num_heads, (kernel, 1), padding=(kernel // 2, 0), groups=num_heads, bias=False)
        self.sizes: Tensor | None
        self.register_buffer("sizes", None)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    @torch.no_grad()
    def fix(self, x: Tensor) -> None:
        """Take the size of the codes from these tokens for good."""
        q, k, _ = self.heads(x)
        self.sizes = torch.stack([(t / t.norm(dim=-1, keepdim=True)).abs().mean() for t in (q, k)])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        if (held := state_dict.get(f"{prefix}sizes")) is not None:
            self.sizes = torch.empty_like(held, device=self.proj.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        probs = (q * self.scale @ k.mT).softmax(-1) if self.sparse else None
        sizes = (None, None) if self.sizes is None else self.sizes.unbind()
        q, k = (binary_codes(t / t.norm(dim=-1, keepdim=True), size) for t, size in zip((q, k), sizes, strict=True))
        y = 0.5 * v + q @ (k.mT @ v) / math.pi
        if probs is not None:
            y = y + (probs * (probs > 0.02)) @ v
        y = y / y.norm(dim=-1, keepdim=True) + self.dconv(v)
        return self.proj(y.transpose(1, 2).flatten(2))


class ShiftExperts(nn.Module):
    """For each token the better suited of two: `multiplied`, or the same with `ShiftLinear` in it; `[B, N, C]` (section 4.2).

    A linear router chooses one, with a weight of 1 in evaluation as released; in training the weight is its probability, by
    which it learns. `choices` returns those `[B, N, 2]`, for `latency_loss`.
    """

    def __init__(self, channels: int, multiplied: nn.Module, shifted: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(channels, 2), nn.ModuleList([multiplied, shifted])

    def choices(self, x: Tensor) -> Tensor:
        return self.router(x).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        probs = self.choices(x)
        chosen = F.one_hot(probs.argmax(-1), 2).to(x.dtype)
        weight = chosen * probs if self.training else chosen
        multiplied, shifted = self.experts
        return weight[..., :1] * multiplied(x) + weight[..., 1:] * shifted(x)


def latency_loss(probs: Tensor, latencies: Tensor) -> Tensor:
    """CV²(α · importance) + CV²(α · load), CV² = variance / mean² over experts, α their share of `latencies` `[E]` (section 4.2).

    probs `[…, E]` of the router. Least where each expert's tokens times its latency is the same, so that the faster gets more.
    Load is counted by choice, and has no gradient.
    """
    alpha = latencies / latencies.sum()
    probs = probs.flatten(0, -2)
    load = F.one_hot(probs.argmax(-1), probs.shape[-1]).to(probs.dtype).sum(0)
    squared = lambda t: t.var(unbiased=False) / (t.mean() ** 2 + 1e-10)
    return squared(alpha * probs.sum(0)) + squared(alpha * load)
