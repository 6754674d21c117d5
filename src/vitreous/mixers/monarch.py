"""Monarch matrices: products of two block-diagonal matrices with a permutation between, and the nearest of them to a matrix.

Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training" (ICML 2022).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import VitreousError


def block_diagonal(x: Tensor, blocks: Tensor) -> Tensor:
    """`[…, n · p]` by n blocks `[n, q, p]` to `[…, n, q]`."""
    return torch.einsum("...np,nqp->...nq", x.unflatten(-1, blocks.shape[::2]), blocks)


class MonarchLinear(nn.Module):
    """A linear layer `[…, in_features]` to `[…, out_features]` by a Monarch matrix of `nblocks` and `nblocks` blocks.

    Inputs are filled up with zeros to a multiple of `nblocks`, and outputs cut. `blkdiag1 [n, q, p]` and `blkdiag2 [n, s, r]`
    have the official names and shapes: p = ⌈in / n⌉, s = ⌈out / n⌉ and q = r = min(p, s), so that they hold (p + s) · q · n
    numbers. Raises VitreousError where there are more blocks than features.
    """

    def __init__(self, in_features: int, out_features: int, nblocks: int = 4, bias: bool = True) -> None:
        super().__init__()
        if not 1 <= nblocks <= min(in_features, out_features):
            raise VitreousError(f"a Monarch matrix of {out_features} × {in_features} cannot have {nblocks} blocks")
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        p, s = -(-in_features // nblocks), -(-out_features // nblocks)
        self.blkdiag1 = nn.Parameter(torch.empty(nblocks, min(p, s), p))
        self.blkdiag2 = nn.Parameter(torch.empty(nblocks, s, min(p, s)))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        for blocks in (self.blkdiag1, self.blkdiag2):
            nn.init.uniform_(blocks, -(blocks.shape[2] ** -0.5), blocks.shape[2] ** -0.5)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(out_features**-0.5), out_features**-0.5)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, nblocks={self.nblocks}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        n = self.nblocks
        x = F.pad(x, (0, -self.in_features % n))
        x = block_diagonal(x, self.blkdiag1).flatten(-2).unflatten(-1, (-1, n)).mT.flatten(-2)
        x = block_diagonal(x, self.blkdiag2).mT.flatten(-2)[..., : self.out_features]
        return x if self.bias is None else x + self.bias

    def dense(self) -> Tensor:
        """`[out_features, in_features]`, the matrix that it multiplies by: what reverse sparsification goes on with (section
        3.3)."""
        eye = torch.eye(self.in_features, dtype=self.blkdiag1.dtype, device=self.blkdiag1.device)
        out = self(eye)
        return (out if self.bias is None else out - self.bias).T

    @torch.no_grad()
    def project(self, weight: Tensor) -> None:
        """Become the matrix of this kind that is nearest to `weight` `[out_features, in_features]` in Frobenius norm.

        Section 3.3 and theorem 1. The view of a Monarch matrix as `[s, n, n, p]` falls apart into n² blocks `[s, p]`, each of
        which meets units between the two factors that no other block meets. How many is its rank, q / n where that is whole; so
        each is the truncated singular value decomposition of the same block of `weight`, its values shared between the two
        sides.
        """
        n, (_, q, p), s = self.nblocks, self.blkdiag1.shape, self.blkdiag2.shape[1]
        given = F.pad(weight, (0, n * p - weight.shape[1], 0, n * s - weight.shape[0])).to(
            torch.promote_types(weight.dtype, torch.float)
        )
        u, values, v = torch.linalg.svd(given.reshape(s, n, n, p).permute(1, 2, 0, 3), full_matrices=False)
        left, right = u * values.sqrt().unsqueeze(-2), values.sqrt().unsqueeze(-1) * v  # [n, n, s, r], [n, n, r, p]
        for k in range(n):
            unit = torch.arange(k * q, (k + 1) * q)  # between the factors, in the order in which the first makes them
            for to in range(n):
                met = unit[unit % n == to]
                self.blkdiag1[k, met - k * q] = right[to, k, : len(met)].to(self.blkdiag1.dtype)
                self.blkdiag2[to][:, met // n] = left[to, k, :, : len(met)].to(self.blkdiag2.dtype)

    @classmethod
    def nearest(cls, linear: nn.Linear, nblocks: int) -> MonarchLinear:
        """The projection of a linear layer, its bias as it was."""
        made = cls(linear.in_features, linear.out_features, nblocks, linear.bias is not None).to(linear.weight)
        made.project(linear.weight.detach())
        if made.bias is not None:
            made.bias.data.copy_(linear.bias.detach())
        return made.train(linear.training)
