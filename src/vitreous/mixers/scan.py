"""Linear recurrences in parallel: what gated linear attention and state space models have instead of softmax.

Everything here is `linear_recurrence` with something around it. Only factors between 0 and 1 are ever multiplied, and nothing
is divided by one, so no decay is too strong for float32. Operations and memory grow with the length, not with its square.
"""

from __future__ import annotations

import math
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLA, MAMBA = find_spec("fla") is not None, find_spec("mamba_ssm") is not None


def linear_recurrence(a: Tensor, u: Tensor) -> Tensor:
    """h_t = a_t · h_{t−1} + u_t from h_0 = 0, all of `[…, L, *, *]`; a and u broadcast but for the time.

    Blelloch, "Prefix Sums and Their Applications" (1990): steps are joined in pairs, the half as long recurrence gives every
    second state, and one more step from each gives the others. Some 4 L multiplications, log2(L) deep.
    """
    length = u.shape[-3]
    if length == 1:
        return u
    if length % 2:
        a, u = F.pad(a, (0, 0, 0, 0, 0, 1)), F.pad(u, (0, 0, 0, 0, 0, 1))
    (a0, a1), (u0, u1) = pairs(a), pairs(u)
    odd = linear_recurrence(a0 * a1, a1 * u0 + u1)
    even = u0 + a0 * behind(odd)
    h = torch.stack([even, odd], -3).flatten(-4, -3)
    return h[..., :length, :, :] if length % 2 else h


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every second of `[…, L, *, *]`, from the first and from the second."""
    return x[..., ::2, :, :], x[..., 1::2, :, :]


def behind(x: Tensor) -> Tensor:
    """At each of `[…, L, *, *]` the one before it, at the first 0."""
    return F.pad(x, (0, 0, 0, 0, 1, -1))


def gated_linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunk: int = 32) -> Tensor:
    """o_t = S_tᵀ q_t with S_t = diag(exp g_t) S_{t−1} + k_t v_tᵀ; q, k, g `[B, heads, L, K]`, v and o `[B, heads, L, V]`.

    Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training" (ICML 2024), section 4, g the
    logarithm of the gate, at most 0. It goes by chunks, as there: from chunk to chunk the states follow `linear_recurrence`.
    Within one, where the paper divides by the decay since the chunk's start and so needs a second level of chunks to stay
    finite, ours halves: the later half of each block reads the earlier by the decay from the border between them, for blocks
    of 2, 4, … tokens.

    On CUDA the kernel of `fla` is used where it is installed.
    """
    if FLA and q.is_cuda:
        kernel: Any = import_module("fla.ops.gla").chunk_gla
        return kernel(*(x.transpose(1, 2) for x in (q, k, v, g)), scale=1.0)[0].transpose(1, 2)
    kind, length = v.dtype, v.shape[-2]
    precise = torch.promote_types(kind, torch.float32)
    chunk = min(chunk, 2 ** math.ceil(math.log2(length)))
    q, k, v, g = (F.pad(x.to(precise), (0, 0, 0, -length % chunk)).unflatten(-2, (-1, 1)) for x in (q, k, v, g))

    # Each block is a half of the next: q as it reads the state before the block, k as it is in the state behind the block.
    decay = g.exp()
    out, q, keep = (q * k).sum(-1, keepdim=True) * v, q * decay, decay
    for _ in range(int(math.log2(chunk))):
        (q0, q1), (k0, k1), (v0, v1), (o0, o1), (d0, d1) = map(pairs, (q, k, v, out, keep))
        out = torch.cat([o0, o1 + (q1 @ k0.mT) @ v0], -2)
        q, k, v, keep = torch.cat([q0, q1 * d0], -2), torch.cat([k0 * d1, k1], -2), torch.cat([v0, v1], -2), d0 * d1

    states = linear_recurrence(keep.mT, k.mT @ v)
    return (out + q @ behind(states)).flatten(-3, -2)[..., :length, :].to(kind)


def selective_scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """y_t = C_tᵀ h_t + D x_t with h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t; x, delta and y `[B, L, D]`, B and C `[B, L, N]`.

    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), algorithm 2, discretised as its code
    does: A by exponentiation, B by Δ. A `[D, N]` is negative, delta positive, D `[D]`. Several scans at once have a dimension
    ahead of L, and A and D theirs: `[K, 1, D, N]` and `[K, 1, D]`.

    On CUDA the kernel of `mamba_ssm` is used for one scan where it is installed.
    """
    if MAMBA and x.is_cuda and x.ndim == 3:
        kernel: Any = import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        return kernel(x.mT, delta.mT, A.float(), B.mT, C.mT, D.float()).mT
    kind = x.dtype
    x, delta, A, B, C, D = (t.to(torch.promote_types(kind, torch.float32)) for t in (x, delta, A, B, C, D))
    # States lie `[…, L, N, D]`: processors work along the last dimension, and N may be 1.
    h = linear_recurrence((delta[..., None, :] * A.mT).exp(), (delta * x)[..., None, :] * B[..., None])
    return ((h * C[..., None]).sum(-2) + D * x).to(kind)


def state_space_dual(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, chunk: int = 64, passed: Tensor | None = None
) -> Tensor:
    """y_t = h_tᵀ C_t + D x_t with h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_tᵀ, where a head has one decay for all that it remembers.

    x and y `[B, L, heads, P]`, delta `[B, L, heads]`, A and D `[heads]`, and B and C, which all heads share, `[B, L, N]`; A is
    negative, delta positive. Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
    State Space Duality" (ICML 2024), section 6. It goes by chunks, as there: from chunk to chunk the states follow
    `linear_recurrence`. Within one a token reads those before it, as in attention, times the decay between the two. Its
    logarithm is summed for each pair: as the difference of two sums since the chunk's start it would be less exact.

    passed: the sum of Δ, `[B, L, heads]`, over what stood between a token and the one before it and is no longer there; the state
    decays as if it were.

    On CUDA the kernel of `mamba_ssm` is used where it is installed, and nothing is `passed`.
    """
    if MAMBA and x.is_cuda and passed is None:
        kernel: Any = import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        return kernel(x, delta, A.float(), B[:, :, None], C[:, :, None], 256, D=D.float())
    kind, length = x.dtype, x.shape[1]
    x, delta, A, B, C, D = (t.to(torch.promote_types(kind, torch.float32)) for t in (x, delta, A, B, C, D))
    chunk = min(chunk, length)

    def chunks(t: Tensor) -> Tensor:
        """`[B, L, …]` to `[B, L / chunk, chunk, …]`, 0 behind the end."""
        return F.pad(t, (0, 0) * (t.ndim - 2) + (0, -length % chunk)).unflatten(1, (-1, chunk))

    B, C, decay = chunks(B), chunks(C), delta if passed is None else delta + passed.to(delta)
    u, g = chunks(delta[..., None] * x).transpose(2, 3), chunks(decay * A).mT
    between = g[..., None].expand(*g.shape, chunk).tril(-1).cumsum(-2).exp().tril()  # [B, chunks, heads, reading, read]
    since = g.cumsum(-1).exp()[..., None]

    states = (B.mT[:, :, None] * between[..., -1:, :]) @ u
    before = behind(linear_recurrence(since[..., -1:, :].transpose(1, 2), states.transpose(1, 2))).transpose(1, 2)
    y = ((C @ B.mT)[:, :, None] * between) @ u + since * (C[:, :, None] @ before)
    return (y.transpose(2, 3).flatten(1, 2)[:, :length] + D[:, None] * x).to(kind)


class SelectiveScan(nn.Module):
    """Mamba's S6 layer: `[B, L, D]` to the same, Δ, B and C read from what it scans (Gu and Dao 2023, section 3.2).

    rank: through how few numbers Δ is read. states: N, the numbers that each channel remembers.
    """

    def __init__(self, channels: int, rank: int, states: int = 1) -> None:
        super().__init__()
        self.sizes = (rank, states, states)
        self.x_proj = nn.Linear(channels, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(rank, channels)
        self.A_log = nn.Parameter(torch.empty(channels, states))
        self.D = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Section 3.6: A = −1, …, −N, and Δ spread evenly, in logarithm, between 0.001 and 0.1."""
        rank, states, _ = self.sizes
        self.x_proj.reset_parameters()
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, states + 1).log().expand_as(self.A_log))
            delta = torch.empty_like(self.dt_proj.bias).uniform_(math.log(0.001), math.log(0.1)).exp()
            self.dt_proj.bias.copy_(delta + (-torch.expm1(-delta)).log())
        nn.init.ones_(self.D)

    def forward(self, x: Tensor) -> Tensor:
        delta, B, C = self.x_proj(x).split(self.sizes, -1)
        return selective_scan(x, F.softplus(self.dt_proj(delta)), -self.A_log.float().exp(), B, C, self.D)
